"""Test label maps, splits and weights."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from tiny_models import tiny_config

from vivit_hf import ViViTConfig
from vivit_hf.data.annotations import AnnotationError, LabelledVideo
from vivit_hf.data.labels import LabelMap, balanced_weights, check_splits, class_weights, split_videos


def videos(*labels):
    return [
        LabelledVideo(f"{index}.mp4", label if isinstance(label, tuple) else (label,), f"t.csv:{index + 2}")
        for index, label in enumerate(labels)
    ]


GROUPED = LabelMap({"noun": ("pan", "lid", "tap"), "verb": ("open", "wash")})


def test_labels_are_numbered_alphabetically():
    label_map = LabelMap.of(videos("run", "jump", "run"))
    assert label_map.names == ["jump", "run"]
    assert [label_map.encode(one).item() for one in videos("run", "jump")] == [1, 0]
    assert label_map.config_fields()["id2label"] == {0: "jump", 1: "run"}


def test_label_groups_and_multiple_labels_are_encoded():
    label_map = LabelMap.of(videos(("pan", "open"), ("lid", "wash")), groups=("noun", "verb"))
    assert label_map.names == ["noun: lid", "noun: pan", "verb: open", "verb: wash"]
    assert label_map.encode(videos(("pan", "wash"))[0]).tolist() == [1, 1]
    several = LabelMap.of(videos(("run", "jump"), ("swim",)), has_several=True)
    assert several.encode(videos(("jump", "swim"))[0]).tolist() == [1.0, 0.0, 1.0]
    assert several.config_fields()["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("label_map", [GROUPED, LabelMap({"": ("a", "b", "c")}), LabelMap({"": ("a", "b")}, True)])
def test_labels_survive_a_round_trip_through_the_config(tmp_path, label_map):
    config = tiny_config("factorised_encoder", **label_map.config_fields())
    config.save_pretrained(tmp_path)
    again = LabelMap.from_config(ViViTConfig.from_pretrained(tmp_path))
    assert again.groups == label_map.groups and again.has_several == label_map.has_several


def test_labels_may_be_indices_into_their_group():
    assert GROUPED.encode(videos(("2", "0"))[0]).tolist() == [2, 0]
    with pytest.raises(AnnotationError, match=r"t\.csv:2: the label '3' is not among the 3"):
        GROUPED.encode(videos(("3", "0"))[0])


def test_indices_are_refused_if_names_are_numbers():
    label_map = LabelMap({"": ("1", "3", "5")})
    assert label_map.encode(videos("3")[0]).item() == 1
    for label in ("0", "2", "01", "²"):
        with pytest.raises(AnnotationError, match=rf"t\.csv:2: the label '{label}' is not among the 3 of the model"):
            label_map.encode(videos(label)[0])
    with pytest.raises(AnnotationError, match="the label '0' is not among the 2"):
        LabelMap({"": ("-1.5", "up")}).encode(videos("0")[0])
    with pytest.raises(AnnotationError, match="the label '0' is not among"):
        LabelMap({"": ("1", "3")}, has_several=True).encode(videos(("1", "0"))[0])
    # Each group by itself: the nouns are numbers, the verbs are not.
    mixed = LabelMap({"noun": ("1", "2"), "verb": ("open", "wash")})
    assert mixed.encode(videos(("2", "0"))[0]).tolist() == [1, 0]
    with pytest.raises(AnnotationError, match="the label '0' is not among the 2 nouns of the model"):
        mixed.encode(videos(("0", "open"))[0])


def test_indices_are_refused_for_names_collected_from_videos():
    for has_several in (False, True):
        label_map = LabelMap.of(videos("run", "jump"), has_several=has_several)
        with pytest.raises(AnnotationError, match=r"t\.csv:2: the label '0' is not among the 2"):
            label_map.encode(videos("0")[0])


@pytest.mark.parametrize("label", ["0", "2", "1"])
def test_numbers_are_never_mistaken_for_another_class(label):
    numbered = ViViTConfig.from_preset("vivit-tiny", id2label={0: "1", 1: "3", 2: "5"})
    named = ViViTConfig.from_preset("vivit-tiny", id2label={0: "a", 1: "b", 2: "c"})
    assert LabelMap.from_config(named).encode(videos(label)[0]).item() == int(label)
    if label == "1":
        assert LabelMap.from_config(numbered).encode(videos(label)[0]).item() == 0
        return
    with pytest.raises(AnnotationError, match=f"the label '{label}' is not among the 3 of the model: 1, 3, 5"):
        LabelMap.from_config(numbered).encode(videos(label)[0])


def test_duplicate_label_names_are_refused():
    label_map = LabelMap({"": ("up", "down", "up")})
    assert label_map.encode(videos("down")[0]).item() == 1
    with pytest.raises(AnnotationError, match="the model has several labels 'up'"):
        label_map.encode(videos("up")[0])


def test_missing_classes_are_checked_per_group():
    label_map = LabelMap({"noun": ("1", "2"), "verb": ("1", "2")})
    train, validation = videos(("1", "1"), ("2", "2")), videos(("1", "2"), ("2", "2"))
    with pytest.raises(AnnotationError, match=r"1 of the 4 classes .*: 'verb: 1' \(t\.csv:2\)"):
        check_splits(train, validation, label_map)
    # A name and its index are the same class.
    named = LabelMap({"": ("a", "b")})
    assert check_splits(videos("a", "b"), videos("0", "1"), named) == []


def test_label_files_are_read_or_refused(tmp_path):
    files = {
        "a.txt": "run\njump\n",
        "b.json": '["run", "jump"]',
        "c.json": '{"run": "0", "jump": "1"}',
        "d.json": '{"1": "jump", "0": "run"}',
        "e.csv": "id,key,category\n0,run,x\n1,jump,y\n",
        "e2.csv": "id,name\n10,jump\n9,run\n",
        "e3.csv": "id,name\nn02,run\nn01,jump\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert LabelMap.from_file(tmp_path / name).names == ["run", "jump"], name
    (tmp_path / "g.json").write_text(json.dumps({"noun": ["pan", "lid"], "verb": ["open", "wash"]}))
    assert LabelMap.from_file(tmp_path / "g.json").groups == {"noun": ("pan", "lid"), "verb": ("open", "wash")}
    wrong = {
        "a.txt": ("run\nrun\n", "each only once; repeated: run"),
        "b.json": ('{"run": 3, "jump": 5}', "indices starting at 0"),
        "c.json": ("[", r"c\.json:1: this is not JSON"),
        "d.csv": ("id\n1\n", "no column 'key' or 'name'"),
        "d2.csv": ("id,key\n0,run\n2,jump\n", "the column 'id' must number the labels without gaps"),
        "e.txt": ("run\n", "got run"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AnnotationError, match=message):
            LabelMap.from_file(tmp_path / name)
    with pytest.raises(AnnotationError, match="no such label file"):
        LabelMap.from_file(tmp_path / "nowhere.txt")


def test_too_few_classes_or_too_many_labels_are_refused():
    with pytest.raises(AnnotationError, match="training data: at least 2 labels are needed, each only once; got run"):
        LabelMap.of(videos("run", "run"))
    with pytest.raises(AnnotationError, match="at least 2 labels of 'verb' are needed, each only once; got open"):
        LabelMap.of(videos(("pan", "open"), ("lid", "open")), groups=("noun", "verb"))
    with pytest.raises(AnnotationError, match=r"t\.csv:3: got 2 labels \(a, b\), expected 1"):
        LabelMap.of(videos("a", ("a", "b")))


@given(
    counts=st.lists(st.integers(2, 12), min_size=2, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_split_is_stratified_complete_and_repeatable(counts, fraction, seed):
    data = videos(*(f"class {number}" for number, count in enumerate(counts) for _ in range(count)))
    train, validation = split_videos(data, fraction, seed)
    assert sorted(one.video for one in train + validation) == sorted(one.video for one in data)
    for part in (train, validation):
        assert {one.labels for one in part} == {one.labels for one in data}
    held = Counter(one.labels[0] for one in validation)
    for number, count in enumerate(counts):
        assert held[f"class {number}"] == min(max(1, round(fraction * count)), count - 1)
    assert split_videos(data, fraction, seed) == (train, validation)


def test_incomplete_splits_are_refused():
    with pytest.raises(AnnotationError, match=r"t\.csv:4: the class 'jump' has a single video"):
        split_videos(videos("run", "run", "jump"), 0.2)
    with pytest.raises(AnnotationError, match="between 0 and 1, got 1"):
        split_videos(videos("run", "run"), 1)
    label_map = LabelMap.of(videos("run", "jump"))
    with pytest.raises(AnnotationError, match="validation split is empty"):
        check_splits(videos("run", "jump"), [], label_map)
    with pytest.raises(AnnotationError, match=r"t\.csv:2: the label 'swim' is not among"):
        check_splits(videos("run", "jump"), videos("swim"), label_map)
    with pytest.raises(AnnotationError, match=r"1 of the 2 classes .* have no video in .*: 'jump' \(t\.csv:3\)"):
        check_splits(videos("run", "jump"), videos("run"), label_map)
    assert check_splits(videos("run", "jump"), videos("run"), label_map, allow_missing_labels=True) == ["jump"]


def test_weights_balance_the_classes():
    data = videos(*["run"] * 6, *["jump"] * 2)
    label_map = LabelMap.of(data)
    targets = [label_map.encode(one) for one in data]
    weights = class_weights(targets, label_map)
    assert weights.tolist() == pytest.approx([2.0, 2 / 3])  # jump, run
    assert weights[torch.stack(targets)].mean() == pytest.approx(1.0)
    drawn = balanced_weights(targets, label_map)
    assert drawn[:6].sum() == pytest.approx(drawn[6:].sum())


def test_weights_support_groups_and_missing_classes():
    targets = [
        GROUPED.encode(one) for one in videos(("pan", "open"), ("pan", "wash"), ("lid", "open"), ("pan", "open"))
    ]
    weights = class_weights(targets, GROUPED)
    assert weights.tolist() == pytest.approx([4 / 6, 2.0, 1.0, 4 / 6, 2.0])
    assert balanced_weights(targets, GROUPED).tolist() == pytest.approx([4 / 6, 2.0, 2.0, 4 / 6])
    with pytest.raises(ValueError, match="one label per video"):
        class_weights(targets, LabelMap({"": ("a", "b")}, True))
