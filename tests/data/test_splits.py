"""Test the automatic split: units stay together, and both sides have every class if possible."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from vivit_hf.data.annotations import AnnotationError, LabelledVideo, read_videos
from vivit_hf.data.labels import shared_units, split_videos


def grouped(*units):
    """Return one video per label of each unit; each unit is one patient."""
    videos = [
        (label if isinstance(label, tuple) else (label,), patient)
        for patient, unit in enumerate(units)
        for label in unit
    ]
    return [
        LabelledVideo(f"{index}.mp4", labels, f"t.csv:{index + 2}", keep_together=(f"patient={patient}",))
        for index, (labels, patient) in enumerate(videos)
    ]


def is_possible(units):
    """Try every division; return whether one gives both sides all classes."""
    classes = set().union(*units)
    for sides in itertools.product((False, True), repeat=len(units)):
        halves = [
            set().union(*(unit for unit, there in zip(units, sides, strict=True) if there == side)) for side in (0, 1)
        ]
        if halves[0] == halves[1] == classes:
            return True
    return False


@settings(max_examples=150)
@given(
    units=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), min_size=2, max_size=8),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 3),
)
def test_both_sides_have_every_class_if_possible(units, fraction, seed):
    videos = grouped(*units)
    if not is_possible([set(unit) for unit in units]):
        with pytest.raises(AnnotationError, match=r"No split of the|has a single video|must stay together"):
            split_videos(videos, fraction, seed)
        return
    train, validation = split_videos(videos, fraction, seed)
    assert {one.labels for one in train} == {one.labels for one in validation} == {one.labels for one in videos}
    assert not {one.keep_together for one in train} & {one.keep_together for one in validation}
    assert sorted(one.where for one in train + validation) == sorted(one.where for one in videos)
    assert split_videos(videos, fraction, seed) == (train, validation)


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=40, max_size=60),
    num_classes=st.integers(2, 4),
    fraction=st.floats(0.15, 0.5),
    seed=st.integers(0, 3),
)
def test_the_share_of_every_class_is_near_the_requested_one(sizes, num_classes, fraction, seed):
    """Each patient has up to four videos of one class, so a class is off by half a patient at most."""
    units = [[f"class {patient % num_classes}"] * size for patient, size in enumerate(sizes)]
    videos = grouped(*units)
    _, validation = split_videos(videos, fraction, seed)
    held, total = (Counter(one.labels for one in part) for part in (validation, videos))
    for labels, count in total.items():
        assert abs(held[labels] - fraction * count) <= 0.5 + max(sizes) / 2


@settings(max_examples=50)
@given(units=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), min_size=2, max_size=8))
def test_missing_labels_put_rare_classes_into_training(units):
    videos = grouped(*units)
    classes = set().union(*units)
    if all(set().union(*units[:left], *units[left + 1 :]) < classes for left in range(len(units))):
        with pytest.raises(AnnotationError, match="No split of the"):  # training needs every unit
            split_videos(videos, 0.3, allow_missing_labels=True)
        return
    train, validation = split_videos(videos, 0.3, allow_missing_labels=True)
    assert validation and {one.labels for one in train} == {one.labels for one in videos}
    if is_possible([set(unit) for unit in units]):
        assert {one.labels for one in validation} == {one.labels for one in videos}


def test_label_groups_and_multiple_labels_are_on_both_sides():
    pairs = [[("pan", "open")], [("lid", "wash")], [("pan", "wash")], [("lid", "open")], [("pan", "open")]]
    for part in split_videos(grouped(*pairs), 0.2, groups=("noun", "verb")):
        assert {one.labels[0] for one in part} == {"pan", "lid"} and {one.labels[1] for one in part} == {"open", "wash"}
    # The same word in two groups is two classes.
    same = [[("1", "2")], [("2", "1")], [("1", "1")], [("2", "2")]]
    for part in split_videos(grouped(*same), 0.5, groups=("noun", "verb")):
        assert {one.labels[0] for one in part} == {one.labels[1] for one in part} == {"1", "2"}
    several = [[("run",)], [("run", "jump")], [("jump", "swim")], [("swim",)]]
    for part in split_videos(grouped(*several), 0.3):
        assert {label for one in part for label in one.labels} == {"run", "jump", "swim"}


def test_parts_of_one_file_stay_together_for_any_spelling_of_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for name in "abcd":
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"")
    os.symlink(tmp_path / "videos" / "a.mp4", tmp_path / "link.mp4")
    os.symlink(tmp_path / "videos", tmp_path / "folder")
    spellings = ["videos/a.mp4", "./videos/a.mp4", f"{tmp_path}/videos/a.mp4", "link.mp4", "folder/../videos/a.mp4"]
    rows = [f"{path},{label},{start},{start + 1}" for start, path in enumerate(spellings) for label in ("run", "jump")]
    rows += [f"folder/{name}.mp4,{label},0,1" for name in "bcd" for label in ("run", "jump")]
    Path("t.csv").write_text("\n".join(["path,label,start,end", *rows]))
    videos = read_videos("t.csv").videos
    for seed in range(20):
        train, validation = split_videos(videos, 0.4, seed)
        of_a = [one.where for one in validation if int(one.where.split(":")[1]) <= 11]
        assert len(of_a) in (0, 10)
        assert not shared_units(train, validation)
        assert {one.labels for one in train} == {one.labels for one in validation} == {("run",), ("jump",)}


def test_clips_of_one_youtube_video_stay_together(tmp_path):
    rows = [
        f"{label},{name},{start},{start + 10}" for name in "uvwxyz" for label in ("run", "jump") for start in (0, 20)
    ]
    for row in rows:
        _, name, start, end = row.split(",")
        (tmp_path / f"{name}_{int(start):06d}_{int(end):06d}.mp4").write_bytes(b"")
    (tmp_path / "k400.csv").write_text("\n".join(["label,youtube_id,time_start,time_end", *rows]))
    train, validation = split_videos(read_videos(tmp_path / "k400.csv").videos, 0.3)
    names = [{Path(one.video).name[0] for one in part} for part in (train, validation)]
    assert names[0] and names[1] and not names[0] & names[1]


def test_error_names_a_class_that_cannot_be_divided():
    parts = [LabelledVideo({"path": "a.mp4", "start": n, "end": n + 1}, ("run",), f"t.csv:{n + 2}") for n in range(3)]
    with pytest.raises(AnnotationError, match=r"t\.csv:2: the class 'run' has 3 videos, which must stay together and"):
        split_videos([*parts, *grouped("j", "j")], 0.2)
    with pytest.raises(AnnotationError, match=r"the class 'a' has 2 videos, which must stay together \(patient=0\)"):
        split_videos(grouped("aab", "b"), 0.2)
    with pytest.raises(AnnotationError, match=r"t\.csv:3: the verb 'wash' has a single video"):
        split_videos(grouped([("a", "open")], [("a", "wash")], [("a", "open")]), 0.2, groups=("noun", "verb"))
    with pytest.raises(
        AnnotationError, match=r"No split of the 6 videos was found with all 3 classes .*: the 3 files or groups"
    ):
        split_videos(grouped("ab", "bc", "ca"), 0.3)
    with pytest.raises(AnnotationError, match="no videos to split"):
        split_videos([], 0.3)


def test_units_on_both_sides_of_a_given_split_are_found():
    videos = grouped("a", "b", "ab")
    assert shared_units(videos[:2], videos[2:]) == []
    assert shared_units(videos[:3], videos[2:]) == [(videos[2], videos[2]), (videos[2], videos[3])]
