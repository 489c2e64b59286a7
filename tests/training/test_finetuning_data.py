"""The data of a fine-tuning run: which videos are trained on and which are held out."""

import csv
from collections import Counter

import datasets
import pytest

from vivit_hf.data.annotations import AnnotationError
from vivit_hf.data.hub_datasets import StreamedVideos
from vivit_hf.training.finetuning_arguments import DataArguments
from vivit_hf.training.finetuning_data import load_splits


def load(seed=0, **arguments):
    said = []
    splits = load_splits(DataArguments(**arguments), seed, said.append)
    return splits, "\n".join(said)


@pytest.fixture
def table(tmp_path):
    """Writes a CSV of files that are there."""

    def write(rows, *columns, name="t.csv"):
        for row in rows:
            path = tmp_path / row[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", *columns), *rows])
        return str(tmp_path / name)

    return write


def paths(videos):
    return {str(one.source()).rsplit("/", 1)[-1] for one in videos}


ROWS = [(f"{n}.mp4", "run" if n % 2 else "jump", "train" if n < 6 else "val" if n < 8 else "test") for n in range(10)]


def test_a_column_of_splits_decides(table):
    splits, said = load(train_file=table(ROWS, "split"))
    assert paths(splits.train) == {f"{n}.mp4" for n in range(6)} and paths(splits.validation) == {"6.mp4", "7.mp4"}
    assert "column 'split': 6 train, 2 validation, 2 test; the test rows are left out." in said

    without_validation = [row for row in ROWS if row[2] != "val"]
    splits, said = load(train_file=table(without_validation, "split"))
    assert paths(splits.validation) == {"8.mp4", "9.mp4"}
    assert "the test rows serve as validation, since there are no others" in said

    splits, said = load(train_file=table(ROWS, "split"), split_column="none", train_val_split=0.5)
    assert len(splits.train) + len(splits.validation) == 10 and "column" not in said

    only = [row for row in ROWS if row[2] == "train"]
    splits, _ = load(train_file=table(only, "split"), train_val_split=0.34)
    assert len(splits.train) + len(splits.validation) == 6, "training rows only: split as without the column"


def test_a_file_for_validation_has_its_own_column(table):
    train, validation = table(ROWS, "split"), table(ROWS, "split", name="v.csv")
    splits, said = load(train_file=train, validation_file=validation)
    assert len(splits.train) == 6 and paths(splits.validation) == {"6.mp4", "7.mp4"}
    assert "6 train, 2 validation, 2 test; the validation and test rows are left out" in said
    training_only = table(ROWS[:6], "split", name="v.csv")
    with pytest.raises(
        AnnotationError, match=r"v\.csv, column 'split': there are only training rows, and this file is"
    ):
        load(train_file=train, validation_file=training_only)
    with pytest.raises(AnnotationError, match=r"column 'split': there are no training rows \(2 validation, 2 test\)"):
        load(train_file=table(ROWS[6:], "split"))


def test_an_unknown_label_of_a_held_out_row_is_named(table):
    rows = [*ROWS[:6], ("6.mp4", "swim", "val"), *ROWS[7:]]
    with pytest.raises(AnnotationError, match=r"t\.csv:8: the label 'swim' is not among the 2"):
        load(train_file=table(rows, "split"))
    numbers = [
        (f"{n}.mp4", label, split)
        for n, (label, split) in enumerate(
            [("1", "train"), ("3", "train"), ("5", "train"), ("1", "val"), ("3", "val"), ("5", "val"), ("0", "val")]
        )
    ]
    with pytest.raises(AnnotationError, match=r"t\.csv:8: the label '0' is not among the 3 of the model: 1, 3, 5"):
        load(train_file=table(numbers, "split"))


def test_groups_stay_together(table):
    rows = [(f"{n}.mp4", "run" if n % 2 else "jump", n // 4) for n in range(40)]
    for seed in range(5):
        splits, _ = load(seed, train_file=table(rows, "patient"), group_column="patient", train_val_split=0.2)
        sides = [{one.keep_together for one in part} for part in (splits.train, splits.validation)]
        assert not sides[0] & sides[1] and len(splits.validation) == 8
    train, validation = table(rows, "patient"), table(rows[:4], "patient", name="v.csv")
    with pytest.raises(
        AnnotationError, match=r"4 of the 4 validation videos .*: patient=0\): leave --group_column out"
    ):
        load(train_file=train, validation_file=validation, group_column="patient")
    _, said = load(train_file=train, validation_file=validation)
    assert "Warning: 4 of the 4 validation videos share a file or a group with training videos" in said


def test_fewer_samples_are_of_all_classes(table):
    rows = [(f"{n}.mp4", "rare" if n >= 97 else "usual" if n % 2 else "other") for n in range(100)]
    for seed in range(5):
        splits, _ = load(seed, train_file=table(rows), max_train_samples=10, max_eval_samples=3, train_val_split=0.3)
        held = Counter(one.labels[0] for one in splits.train)
        assert set(held) == {"rare", "usual", "other"} and abs(held["usual"] - held["other"]) <= 1
        assert len({one.labels for one in splits.validation}) == 3
        assert not paths(splits.train) & paths(splits.validation)
    splits, said = load(train_file=table(rows), max_train_samples=2)
    assert len(splits.train) == 2 and "2 of 85 videos leave out 1 of the 3 classes" in said


def test_a_list_of_the_authors(table, tmp_path):
    names = [f"{label}/{n}.mp4" for label in ("run", "jump") for n in range(4)]
    table([(name, "") for name in names])
    (tmp_path / "lists").mkdir()
    for name, places in (("trainlist01", (0, 1, 2)), ("testlist01", (3,))):
        lines = [
            f"{label}/{n}.mp4" + f" {number}" * (name == "trainlist01")
            for number, label in enumerate(("run", "jump"), 1)
            for n in places
        ]
        (tmp_path / "lists" / f"{name}.txt").write_text("\n".join(lines))
    splits, _ = load(
        train_file=str(tmp_path / "lists" / "trainlist01.txt"),
        validation_file=str(tmp_path / "lists" / "testlist01.txt"),
        video_root=str(tmp_path),
    )
    assert (len(splits.train), len(splits.validation), splits.label_map.names) == (6, 2, ["jump", "run"])


def test_a_folder_of_splits_is_no_folder_of_classes(table, tmp_path):
    table([(f"{split}/{label}/1.mp4", "") for split in ("train", "Val") for label in ("run", "jump")])
    with pytest.raises(
        AnnotationError, match=r"its folders are splits \(Val, train\), not classes: give one as --train"
    ):
        load(train_dir=str(tmp_path))


# The Hub


def write_dataset(folder, rows, split="train", **features):
    """A parquet file as the Hub has it."""
    dataset = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    folder.mkdir(exist_ok=True)
    dataset.to_parquet(folder / f"{split}-00000.parquet")
    return str(folder)


ACTION = datasets.ClassLabel(names=["walk", "run", "jump"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["labels", "activity"])
def test_class_labels_are_known_whatever_their_column_is_called(tmp_path, name, streaming):
    rows = [{"path": f"{n}.mp4", name: n % 3} for n in range(9)]
    source = write_dataset(tmp_path / "data", rows, **{name: ACTION})
    splits, _ = load(dataset_name=source, streaming=streaming)
    assert splits.label_map.names == ["walk", "run", "jump"]
    assert isinstance(splits.train, StreamedVideos) == streaming
    assert {one.labels[0] for one in splits.train} == {"walk", "run", "jump"}


def test_groups_of_class_labels_are_known_to_a_stream(tmp_path):
    rows = [{"path": f"{n}.mp4", "noun": n % 3, "verb": n % 3} for n in range(9)]
    source = write_dataset(tmp_path / "data", rows, noun=ACTION, verb=ACTION)
    splits, _ = load(dataset_name=source, streaming=True, label_column_name="noun,verb")
    assert splits.label_map.groups == {"noun": ("walk", "run", "jump"), "verb": ("walk", "run", "jump")}


def test_files_and_groups_of_a_hub_data_set_stay_together(tmp_path):
    rows = [
        {"video": {"bytes": bytes([n // 6]) * 40, "path": "clip.mp4"}, "label": ("run", "jump")[n % 2], "tape": n // 12}
        for n in range(72)
    ]
    source = write_dataset(tmp_path / "data", rows, video=datasets.Video(decode=False))
    for settings, size in (({}, 6), ({"group_column": "tape"}, 12)):
        splits, _ = load(dataset_name=source, train_val_split=0.3, **settings)
        sides = [
            Counter(one.source()["bytes"][0] * 6 // size for one in part) for part in (splits.train, splits.validation)
        ]
        assert (
            sides[1]
            and set(sides[0].values()) == set(sides[1].values()) == {size}
            and not sides[0].keys() & sides[1].keys()
        )


def test_a_column_of_splits_in_a_hub_data_set_decides(tmp_path):
    rows = [{"path": path, "label": label, "split": split} for path, label, split in ROWS]
    source = write_dataset(tmp_path / "data", rows)
    splits, said = load(dataset_name=source)
    assert [len(splits.train), len(splits.validation)] == [6, 2] and "the test rows are left out" in said
    with pytest.raises(
        AnnotationError, match=r"a stream cannot be divided by its column 'split'.*set split_column to none"
    ):
        load(dataset_name=source, streaming=True)
    rows[3]["split"] = "holdout"
    source = write_dataset(tmp_path / "wrong", rows)
    with pytest.raises(AnnotationError, match=r"wrong/train\[3\]: 'holdout' in the column 'split' is not a split"):
        load(dataset_name=source)
