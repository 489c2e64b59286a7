"""Cuts between scenes are found; motion, noise, flicker and fades are not cuts."""

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config

from vivit_hf import StreamingClassifier, ViViTVideoProcessor
from vivit_hf.inference.cuts import find_cut, frame_change


def make_picture(seed, channels=3, height=24, width=40):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))


def test_equal_frames_do_not_change():
    picture = make_picture(0)
    assert frame_change(picture, picture.clone()) == 0.0


def test_the_change_between_flat_frames_is_finite():
    assert np.isfinite(frame_change(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)))


def test_unrelated_pictures_differ_by_about_their_contrast():
    changes = [frame_change(make_picture(seed), make_picture(seed + 1)) for seed in range(20)]
    assert 1.0 < np.mean(changes) < 1.3


def test_the_change_does_not_depend_on_the_scale_of_the_pixels():
    before, after = make_picture(0), make_picture(1)
    assert frame_change(255 * before, 255 * after) == pytest.approx(frame_change(before, after), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], None),
        ([0.0], None),
        ([1.1], None),  # a single change is its own median
        ([0.1, 1.1, 0.1], 1),
        ([0.1, 0.9, 0.1, 1.1, 0.1], 3),
        ([0.1, 0.45, 0.1], None),  # below half of the contrast
        ([0.6, 1.1, 0.7], None),  # everything moves
        ([0.0, 0.51, 0.0], 1),
    ],
)
def test_a_cut_is_strong_and_sudden(changes, expected):
    assert find_cut(changes) == expected


SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 40}}


@pytest.mark.parametrize("variant", ["factorised_encoder", "spatio_temporal"])
def test_a_cut_is_seen_in_every_window_that_holds_it(variant):
    """Not a flicker, a slow change, nor the noise of a still picture."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 6, 10, 3)).repeat(8, axis=1).repeat(8, axis=2)
    frames = np.stack([first] * 20 + [second] * 20).astype(np.float64)
    brightness = 1 + 0.1 * np.sin(np.arange(40))[:, None, None, None]
    frames = (frames * brightness * 0.9 + rng.normal(0, 2, frames.shape)).clip(0, 255).astype(np.uint8)
    model = make_model(tiny_config(variant))
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=1, **SIZE)
    stream = StreamingClassifier(model, processor, hop=1)
    windows = stream.push(frames)
    assert len(windows) == 33
    for window in windows:
        assert window.cut == (20 if window.start < 20 <= window.end else None)
    stream.reset()
    fade = np.stack([first + (second - first) * share for share in np.linspace(0, 1, 40)]).astype(np.uint8)
    assert all(window.cut is None for window in stream.push(fade))
