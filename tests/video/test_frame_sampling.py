"""Frame indices and crops: equal to the official code, and valid for all sizes."""

import ast
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from paths import FIXTURES

from vivit_hf import frame_sampling
from vivit_hf.frame_sampling import (
    apply_short_video_policy,
    centre_crop,
    fixed_crops,
    random_crop,
    resized_size,
    sample_clips,
    sample_clips_at_rate,
    sample_frames_uniformly,
    sample_uniform_clip,
)


GOLDEN = json.loads(str(np.load(FIXTURES / "scenic" / "sample_frames_uniformly.npz")["config"]))
lengths = st.integers(1, 400)
counts = st.integers(1, 64)


def test_uniform_sampling_matches_the_official_code():
    assert len(GOLDEN["indices"]) > 1000
    for pair, expected in GOLDEN["indices"].items():
        total, num_frames = map(int, pair.split(","))
        indices = sample_frames_uniformly(total, num_frames)
        assert indices.dtype == np.int64
        assert indices.tolist() == expected, pair


def test_uniform_sampling_returns_an_extra_frame_where_the_official_code_does():
    differing = [
        [total, num_frames, len(sample_frames_uniformly(total, num_frames))]
        for total, num_frames in (map(int, pair.split(",")) for pair in GOLDEN["indices"])
        if num_frames < total and len(sample_frames_uniformly(total, num_frames)) != num_frames
    ]
    assert sorted(differing) == sorted(GOLDEN["count_differs_from_n"])


@given(total=lengths, num_frames=counts, policy=st.sampled_from(["repeat_last", "loop"]))
def test_a_uniform_clip_has_exactly_num_frames_indices(total, num_frames, policy):
    indices = sample_uniform_clip(total, num_frames, short_video_policy=policy)
    assert indices.shape == (num_frames,)
    assert 0 <= indices.min() and indices.max() < total
    official = sample_frames_uniformly(total, num_frames)
    shared = min(len(official), num_frames)
    assert np.array_equal(indices[:shared], official[:shared])


def test_short_video_policies():
    indices = np.array([0, 3, 6, 9, 12])
    assert apply_short_video_policy(indices, 8, "repeat_last").tolist() == [0, 3, 6, 7, 7]
    assert apply_short_video_policy(indices, 8, "loop").tolist() == [0, 3, 6, 1, 4]
    with pytest.raises(ValueError, match=r"needs 13 frames and the video has 8.*repeat_last"):
        apply_short_video_policy(indices, 8, "error")
    assert apply_short_video_policy(indices, 13, "error").tolist() == indices.tolist()
    with pytest.raises(ValueError, match="'repeat'"):
        apply_short_video_policy(indices, 13, "repeat")


@given(
    total=lengths,
    num_frames=counts,
    stride=st.integers(1, 12),
    num_clips=st.integers(1, 6),
    start=st.sampled_from(["centre", "random"]),
    policy=st.sampled_from(["repeat_last", "loop"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300)
def test_clips_lie_in_the_video_at_their_stride(total, num_frames, stride, num_clips, start, policy, seed):
    indices = sample_clips(
        total,
        num_frames,
        stride,
        num_clips=num_clips,
        start=start,
        short_video_policy=policy,
        generator=np.random.default_rng(seed),
    )
    assert indices.shape == (num_clips, num_frames) and indices.dtype == np.int64
    assert 0 <= indices.min() and indices.max() < total
    if total > (num_frames - 1) * stride:
        assert np.all(np.diff(indices, axis=1) == stride)


@given(num_frames=counts, stride=st.integers(1, 12), spare=st.integers(0, 200), num_clips=st.integers(2, 8))
def test_several_clips_are_spread_from_the_first_frame_to_the_last_window(num_frames, stride, spare, num_clips):
    total = num_frames * stride + spare
    starts = sample_clips(total, num_frames, stride, num_clips=num_clips)[:, 0]
    assert starts[0] == 0 and starts[-1] == spare
    gaps = np.diff(starts)
    assert gaps.max() - gaps.min() <= 1


def test_one_clip_is_in_the_middle():
    assert sample_clips(280, 32, 2)[0].tolist() == list(range(108, 172, 2))
    assert sample_clips(20, 4, 3)[0].tolist() == [4, 7, 10, 13]
    assert sample_clips(3, 5, 1)[0].tolist() == [0, 1, 2, 2, 2]


def test_random_starts_reach_both_ends_and_follow_the_generator():
    draws = sample_clips(10, 4, 2, num_clips=200, start="random", generator=np.random.default_rng(0))
    assert set(draws[:, 0]) == {0, 1, 2, 3}
    again = sample_clips(10, 4, 2, num_clips=200, start="random", generator=np.random.default_rng(0))
    assert np.array_equal(draws, again)
    with pytest.raises(ValueError, match="Generator"):
        sample_clips(10, 4, 2, start="random")


@given(total=st.integers(2, 300), num_frames=counts, every=st.integers(1, 6), num_clips=st.integers(1, 4))
def test_a_rate_in_a_video_of_constant_rate_is_a_stride(total, num_frames, every, num_clips):
    times = np.arange(total) / 30
    at_rate = sample_clips_at_rate(times, num_frames, 30 / every, num_clips=num_clips)
    by_stride = sample_clips(total, num_frames, every, num_clips=num_clips)
    # Starts fall between frames here and on frames there.
    assert np.abs(at_rate - by_stride).max() <= 1
    if total >= num_frames * every and num_clips == 1 and (total - num_frames * every) % 2 == 0:
        assert np.array_equal(at_rate, by_stride)


def test_a_rate_takes_the_frames_on_screen():
    times = np.array([0.0, 0.1, 0.2, 0.9, 1.0, 1.1])
    indices = sample_clips_at_rate(times, 6, 5, num_clips=1)[0]  # 0.06 s, then every 0.2 s
    assert indices.tolist() == [0, 2, 2, 2, 2, 4]
    assert sample_clips_at_rate(times, 8, 5)[0].tolist() == [0, 2, 2, 2, 2, 4, 5, 5]
    assert sample_clips_at_rate(times, 8, 5, short_video_policy="loop")[0].tolist() == [0, 2, 2, 2, 2, 4, 5, 0]
    with pytest.raises(ValueError, match=r"needs 1\.400 seconds"):
        sample_clips_at_rate(times, 8, 5, short_video_policy="error")
    with pytest.raises(ValueError, match="in order"):
        sample_clips_at_rate(times[::-1], 8, 5)
    assert sample_clips_at_rate(np.array([7.0]), 3, 5)[0].tolist() == [0, 0, 0]


@given(
    times=st.lists(st.floats(0, 100), min_size=1, max_size=60).map(sorted),
    num_frames=counts,
    rate=st.floats(0.1, 200),
    start=st.sampled_from(["centre", "random"]),
    policy=st.sampled_from(["repeat_last", "loop"]),
)
def test_a_rate_always_gives_valid_indices(times, num_frames, rate, start, policy):
    indices = sample_clips_at_rate(
        np.array(times),
        num_frames,
        rate,
        num_clips=2,
        start=start,
        short_video_policy=policy,
        generator=np.random.default_rng(0),
    )
    assert indices.shape == (2, num_frames)
    assert 0 <= indices.min() and indices.max() < len(times)
    if policy == "repeat_last":
        assert np.all(np.diff(indices, axis=1) >= 0)


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), edge=st.integers(1, 600))
def test_resizing_keeps_the_aspect_ratio_and_an_exact_short_edge(height, width, edge):
    new_height, new_width = resized_size(height, width, {"shortest_edge": edge})
    assert min(new_height, new_width) == edge
    assert (new_height - new_width) * (height - width) >= 0
    # resize_smallest of DMVR
    assert (new_height, new_width) == (max(edge, height * edge // width), max(edge, width * edge // height))
    assert resized_size(height, width, {"height": 3, "width": 5}) == (3, 5)


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    crop_height=st.integers(1, 300),
    crop_width=st.integers(1, 300),
    margin=st.integers(0, 50),
)
def test_a_resized_frame_holds_the_crop_in_any_orientation(height, width, crop_height, crop_width, margin):
    crop = {"height": crop_height, "width": crop_width}
    edge = min(crop_height, crop_width) + margin
    new_height, new_width = resized_size(height, width, {"shortest_edge": edge}, crop)
    assert new_height >= crop_height and new_width >= crop_width
    plain = resized_size(height, width, {"shortest_edge": edge})
    if plain[0] >= crop_height and plain[1] >= crop_width:
        assert (new_height, new_width) == plain
    else:
        # Minimal: a short edge of one pixel less would not hold the crop.
        smaller = resized_size(height, width, {"shortest_edge": min(new_height, new_width) - 1})
        assert smaller[0] < crop_height or smaller[1] < crop_width


@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    crop_height=st.integers(1, 500),
    crop_width=st.integers(1, 500),
)
@settings(max_examples=300)
def test_crops_lie_in_the_frame_or_are_refused(height, width, crop_height, crop_width):
    sizes = (height, width, crop_height, crop_width)
    if crop_height > height or crop_width > width:
        for crop in (centre_crop, partial(fixed_crops, num_crops=3)):
            with pytest.raises(ValueError, match=f"{crop_height} x {crop_width}.*{height} x {width}.*`crop_size`"):
                crop(*sizes)
        return
    drawn = random_crop(*sizes, np.random.default_rng(0))
    three = fixed_crops(*sizes, num_crops=3)
    for top, left, crop_h, crop_w in [centre_crop(*sizes), drawn, *three]:
        assert (crop_h, crop_w) == (crop_height, crop_width)
        assert 0 <= top <= height - crop_h and 0 <= left <= width - crop_w
    assert three[1] == centre_crop(*sizes)
    if width >= height:
        assert (three[0][1], three[2][1]) == (0, width - crop_width)
        assert {crop[0] for crop in three} == {three[1][0]}
    else:
        assert (three[0][0], three[2][0]) == (0, height - crop_height)
        assert {crop[1] for crop in three} == {three[1][1]}


@pytest.mark.parametrize(("total", "num_frames"), [(100, 8), (17, 16), (300, 16), (9, 8)])
def test_a_random_uniform_clip_has_each_frame_around_its_place(total, num_frames):
    exact = sample_uniform_clip(total, num_frames)
    drawn = np.stack(
        [
            sample_uniform_clip(total, num_frames, start="random", generator=np.random.default_rng(seed))
            for seed in range(200)
        ]
    )
    assert (np.diff(drawn, axis=1) >= 0).all() and drawn.min() >= 0 and drawn.max() < total
    assert np.abs(drawn - exact).max() <= total / (num_frames + 1) / 2 + 1
    assert drawn.mean(axis=0) == pytest.approx(exact, abs=max(1, 0.1 * total / num_frames))


@pytest.mark.parametrize("total", [3, 8])
def test_a_random_uniform_clip_of_a_short_video_has_all_of_its_frames(total):
    exact = sample_uniform_clip(total, 8)
    drawn = sample_uniform_clip(total, 8, start="random", generator=np.random.default_rng(0))
    assert (drawn == exact).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_frames_uniformly(0, 4), "`num_frames_in_video=0` must be a whole number of at least 1"),
        (lambda: sample_clips(10, 0), "`num_frames=0` must be a whole number of at least 1"),
        (lambda: sample_clips(10, 4, 1.5), r"`stride=1.5` must be a whole number of at least 1"),
        (lambda: sample_clips(10, 4, num_clips=True), "`num_clips=True`"),
        (
            lambda: sample_clips(10, 4, start="middle"),
            "`start='middle'` is not known. Expected one of 'centre', 'random'",
        ),
        (lambda: sample_clips_at_rate(np.arange(3), 4, 0), "`frames_per_second=0` must be a number above 0"),
    ],
)
def test_errors_name_the_value_and_the_expectation(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sampling_needs_nothing_but_numpy():
    """Of the package it takes only modules that import no torch, so its code can be read and used by itself."""
    tree = ast.parse(Path(frame_sampling.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"numpy", "limits_vivit", "presets_vivit"}


@pytest.mark.parametrize(("total", "stride"), [(5, 1), (7, 1), (8, 1), (20, 4), (29, 4), (30, 4), (1, 2)])
def test_random_starts_of_loops_match_dmvr(total, stride):
    """`sample_sequence` draws below length - (steps - 1) * stride, or below the length if that is not positive."""
    generator = np.random.default_rng(0)
    clips = sample_clips(
        total, 8, stride, num_clips=2000, start="random", short_video_policy="loop", generator=generator
    )
    fits = total - 7 * stride
    assert set(clips[:, 0]) == set(range(fits if fits > 0 else total))
    assert (np.diff(clips, axis=1) % total == stride % total).all(), "the sequence is repeated"
    kept = sample_clips(
        total, 8, stride, num_clips=200, start="random", short_video_policy="repeat_last", generator=generator
    )
    assert set(kept[:, 0]) <= set(range(max(1, fits)))


def test_random_starts_of_loops_at_a_rate_are_any_frame():
    arguments = {"num_clips": 500, "start": "random", "generator": np.random.default_rng(0)}
    clips = sample_clips_at_rate(np.arange(5) / 10, 8, 10, short_video_policy="loop", **arguments)
    assert set(clips[:, 0]) == set(range(5)) and (np.diff(clips, axis=1) % 5 == 1).all()
    clips = sample_clips_at_rate(np.arange(5) / 10, 8, 10, short_video_policy="repeat_last", **arguments)
    assert set(clips[:, 0]) == {0}
