"""Heat lies where the map is high, and says no more than the map."""

import numpy as np
import pytest
import torch

from vivit_hf.explain.heat import draw_overlay


def make_frames(frames: int = 8, height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_heat_lies_where_the_map_is_high():
    frames = make_frames()
    even, high = np.ones((4, 3, 5), np.float32), np.ones((4, 3, 5), np.float32)
    high[2, 1, 3] = 20
    without, with_heat = draw_overlay(frames, even), draw_overlay(frames, high)
    assert with_heat.dtype == np.uint8 and with_heat.shape == frames.shape
    changed = (without != with_heat).any(axis=-1)
    # A step covers its two frames; heat runs out half a token beside the token.
    assert changed[4:6, 8:16, 24:32].all()
    assert not changed[[0, 1, 2, 3, 6, 7]].any()
    assert not changed[4:6, :4].any() and not changed[4:6, :, :20].any() and not changed[4:6, :, 36:].any()
    hottest = with_heat[4, 11:13, 27:29].reshape(-1, 3).mean(axis=0)
    assert hottest[0] > 190 and hottest[0] > hottest[2] + 60  # light yellow over whatever was there


def test_heat_depends_on_shares_and_not_on_their_scale():
    frames, values = make_frames(), np.random.default_rng(1).random((4, 3, 5), np.float32)
    np.testing.assert_array_equal(draw_overlay(frames, values), draw_overlay(frames, torch.from_numpy(values * 1e-3)))


def test_a_nearly_even_map_is_not_made_to_look_sharp():
    frames = np.full((8, 24, 40, 3), 128, np.uint8)
    values = 1 + 0.01 * np.random.default_rng(1).random((4, 3, 5), np.float32)
    assert np.abs(draw_overlay(frames, values).astype(int) - 128).max() < 6


def test_more_heat_is_lighter():
    frames, values = np.full((1, 24, 400, 3), 60, np.uint8), np.linspace(0, 2, 50, dtype=np.float32).reshape(1, 1, 50)
    lightness = draw_overlay(frames, values)[0, 12] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > -1).all() and lightness[-1] > lightness[0] + 100


def test_a_map_of_zeros_has_no_heat():
    frames = make_frames()
    zeros, even = np.zeros((4, 3, 5)), np.ones((4, 3, 5))
    np.testing.assert_array_equal(draw_overlay(frames, zeros), draw_overlay(frames, even))


@pytest.mark.parametrize(
    ("frames", "space_map", "message"),
    [
        (make_frames().astype(float), np.ones((4, 3, 5)), r"`frames` must be uint8 .*got float64 \(8, 24, 40, 3\)"),
        (make_frames()[0], np.ones((4, 3, 5)), r"`frames` must be uint8 .*got uint8 \(24, 40, 3\)"),
        ([], np.ones((4, 3, 5)), "`frames` must be uint8 .*got list"),
        (make_frames(), np.ones((3, 3, 5)), r"a time that divides the 8 frames, got \(3, 3, 5\)"),
        (make_frames(), np.ones((1, 4, 3, 5)), r"must be \(time, height, width\).*got \(1, 4, 3, 5\)"),
        (make_frames(), -np.ones((4, 3, 5)), r"finite and not negative, got -1\.0"),
        (make_frames(), np.full((4, 3, 5), np.nan), "finite and not negative, got nan"),
    ],
)
def test_what_cannot_be_drawn_is_named(frames, space_map, message):
    with pytest.raises(ValueError, match=message):
        draw_overlay(frames, space_map)
