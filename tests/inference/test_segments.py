"""Merging windows into segments: what it promises holds for any scores."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vivit_hf import ViViTConfig
from vivit_hf.inference.segments import merge_windows
from vivit_hf.inference.streaming import WindowPrediction


CONFIG = ViViTConfig.from_preset("vivit-tiny", num_labels=3, id2label={0: "a", 1: "b", 2: "c"})


def windows_of(labels, hop=1.0, length=3.0, sharpness=6.0, cuts=()):
    """Windows that are sure of one label each, and see the first cut that is in them."""
    logits = sharpness * torch.nn.functional.one_hot(torch.tensor(labels), 3).float()
    return [
        WindowPrediction(
            start, start + length, place, row, cut=next((cut for cut in cuts if start < cut <= start + length), None)
        )
        for place, (start, row) in enumerate(zip(hop * np.arange(len(labels)), logits, strict=True))
    ]


@settings(max_examples=200)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    hop=st.sampled_from([0.5, 1.0, 2.5, 4.0]),
    min_duration=st.sampled_from([None, 0.0, 2.0, 100.0]),
    cuts=st.lists(st.integers(0, 400).map(lambda tenths: tenths / 10), max_size=20).map(sorted),
)
def test_segments_cover_what_the_windows_saw_without_gap_or_overlap(labels, hop, min_duration, cuts):
    windows = windows_of(labels, hop, cuts=cuts)
    segments = list(merge_windows(windows, CONFIG, min_duration=min_duration))
    assert segments[0].start == 0 and segments[-1].end == windows[-1].end
    for segment, following in itertools.pairwise(segments):
        assert segment.end == following.start and segment.label != following.label
    assert all(segment.end > segment.start and 0 < segment.score <= 1 for segment in segments)
    assert {segment.label for segment in segments} <= {"abc"[label] for label in labels}
    if min_duration and len(segments) > 1:
        # What is short is divided among its neighbours; they only grow.
        assert all(segment.end - segment.start >= min_duration - 1e-9 for segment in segments)


def test_two_labels_meet_in_the_middle_of_what_lies_between():
    """Windows of 3 s see a third label for 2 s where two meet."""
    labels = [0] * 6 + [1] * 2 + [2] * 6
    (first, second) = merge_windows(windows_of(labels), CONFIG)
    assert (first.label, second.label) == ("a", "c") and first.end == second.start
    whole = list(merge_windows(windows_of(labels), CONFIG, min_duration=0))
    assert [segment.label for segment in whole] == ["a", "b", "c"]
    assert first.end == pytest.approx((whole[1].start + whole[1].end) / 2)
    assert [one.label for one in merge_windows(windows_of([0] * 6 + [1] + [0] * 6), CONFIG)] == ["a"]


def test_a_cut_is_the_boundary_if_it_is_near():
    """Windows of 3 s, one per second: those from 6 s on are sure of the second label, so that half begins at 7 s."""
    labels = [0] * 6 + [1] * 8

    def boundary(*cuts, **options):
        first, second = merge_windows(windows_of(labels, cuts=cuts), CONFIG, **options)
        assert first.end == second.start
        return first.end

    usual = boundary()
    assert 6 <= usual <= 8
    assert boundary(usual + 0.9) == usual + 0.9 and boundary(usual - 0.9) == usual - 0.9
    assert boundary(usual - 2.0, usual + 0.7, usual + 3.0) == usual + 0.7
    assert boundary(usual - 2.4) == usual and boundary(usual + 2.4) == usual
    assert boundary(usual - 0.9, min_duration=usual - 0.5) == usual  # it would leave the first one too short


def test_what_windows_see_across_a_cut_is_no_segment():
    """Windows of 3 s, one per half second, of which six agree on a third label."""
    labels = [0] * 12 + [2] * 6 + [1] * 16
    _, third, _ = merge_windows(windows_of(labels, hop=0.5), CONFIG)
    assert third.label == "c" and third.end - third.start == pytest.approx(2.5)
    first, second = merge_windows(windows_of(labels, hop=0.5, cuts=[third.start + 1.1]), CONFIG)
    assert (first.label, first.end, second.label) == ("a", third.start + 1.1, "b")


def test_segments_below_the_least_score_are_left_out():
    windows = windows_of([0] * 6, sharpness=6.0) + [
        WindowPrediction(place, place + 3.0, place, torch.tensor([0.0, 0.2, 0.0])) for place in range(6, 14)
    ]
    assert [segment.label for segment in merge_windows(windows, CONFIG)] == ["a", "b"]
    assert [segment.label for segment in merge_windows(windows, CONFIG, min_score=0.6)] == ["a"]


def test_a_timeline_comes_while_the_video_is_still_read():
    """Each segment as soon as the next one lasts: a live source is not waited for to its end."""
    taken = []

    def windows():
        for window in windows_of([0] * 10 + [1] * 10 + [2] * 10):
            taken.append(window)
            yield window

    first = next(merge_windows(windows(), CONFIG))
    assert first.label == "a" and len(taken) < 25
