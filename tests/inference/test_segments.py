"""Merging windows into segments: what it promises holds for any scores."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vivit_hf import ViViTConfig
from vivit_hf.inference.segments import merge_windows
from vivit_hf.inference.streaming import WindowPrediction
from vivit_hf.inference.unknown import UNKNOWN


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


def strange(windows, first, last):
    """The windows, unknown where they show a strange event from `first` to `last` seconds."""
    return [replace(one, unknown=one.start <= last and one.end >= first) for one in windows]


@pytest.mark.parametrize("hop", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("cuts", [(), (21.75,)])
def test_a_strange_moment_leaves_the_labels_where_they_are(hop, cuts):
    """Every window of 3 s that contains it is unknown, so the run of them is 3 s longer than the event."""
    windows = windows_of([0] * round(21 / hop) + [1] * round(12 / hop), hop, cuts=cuts)
    usual = list(merge_windows(windows, CONFIG))
    assert [segment.label for segment in usual] == ["a", "b"]
    for moment in (5.1, 21.7):
        assert list(merge_windows(strange(windows, moment, moment + 0.1), CONFIG)) == usual
    found = list(merge_windows(strange(windows, 6.0, 12.0), CONFIG))
    assert [segment.label for segment in found] == ["a", UNKNOWN, "a", "b"]
    assert found[1].start == pytest.approx(4.5, abs=hop) and found[1].end == pytest.approx(13.5, abs=hop)
    assert found[1].score > 0.75 and found[2].start == found[1].end and found[3] == usual[1]
    # Asked for short segments, they come.
    assert UNKNOWN in {one.label for one in merge_windows(strange(windows, 5.1, 5.2), CONFIG, min_duration=0)}


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("cuts", [(), range(1, 40)])
def test_a_video_without_a_known_window_is_unknown_however_short(count, cuts):
    windows = [replace(one, unknown=True) for one in windows_of([0] * count, cuts=cuts)]
    (segment,) = merge_windows(windows, CONFIG)
    assert (segment.start, segment.end) == (0, windows[-1].end) and (segment.label, segment.score) == (UNKNOWN, 1.0)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_strange_scene_between_cuts_has_the_cuts_as_boundaries(is_last):
    """Windows of 3 s across a cut are all unknown, as are those of the scene from 10 to 15 s."""
    windows = windows_of([0] * 20 + [1] * (11 if is_last else 40), hop=0.5, cuts=(10.0,) if is_last else (10.0, 15.0))
    windows = [
        replace(one, unknown=one.cut is not None or 10 <= one.start < (20 if is_last else 15)) for one in windows
    ]
    found = [(one.label, one.start) for one in merge_windows(windows, CONFIG)]
    assert found == [("a", 0.0), (UNKNOWN, 10.0), ("b", 15.0)][: 2 if is_last else 3]
