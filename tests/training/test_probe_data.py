"""Labels and features are matched by file, start and end, and what is missing on either side is named."""

import numpy as np
import pytest

from vivit_hf.data.annotations import AnnotationError
from vivit_hf.inference.feature_files import Features
from vivit_hf.training.probe_data import match_labels, read_labels


NAN = float("nan")


def features_of(files, starts=None, ends=None, failed=(), steps=None, hidden=4):
    shape = (len(files), *([steps] if steps else []), hidden)
    return Features(
        files=tuple(map(str, files)),
        vectors=np.random.default_rng(0).normal(size=shape).astype(np.float32),
        times=np.zeros(shape[:2]) if steps else None,
        starts=np.array(starts or [NAN] * len(files)),
        ends=np.array(ends or [NAN] * len(files)),
        settings={
            "kind": "step" if steps else "video",
            "hidden_size": hidden,
            "num_steps": steps,
            "failed": list(failed),
        },
    )


def table(folder, text, name="labels.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def matched(folder, text, features, **settings):
    return match_labels(features, read_labels(table(folder, text), **settings))


FOUR = "path,label\n1.mp4,run\n2.mp4,jump\n3.mp4,run\n4.mp4,jump\n"


def four(folder):
    return [folder / f"{number}.mp4" for number in range(1, 5)]


def test_vectors_go_with_the_labels_of_their_files(tmp_path):
    features = features_of(four(tmp_path)[::-1])
    data = matched(tmp_path, FOUR, features)
    assert data.names == ("jump", "run") and data.labels.tolist() == [1, 0, 1, 0]
    assert (data.vectors == features.vectors[::-1][:, None]).all() and data.held_out is None
    assert sorted(data.groups.tolist()) == [0, 1, 2, 3]
    assert data.without_features == data.without_label == ()


def test_steps_keep_their_axis(tmp_path):
    assert matched(tmp_path, FOUR, features_of(four(tmp_path), steps=3)).vectors.shape == (4, 3, 4)


def test_paths_from_different_folders_are_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    features = features_of([f"clips/../clips/{number}.mp4" for number in range(1, 5)])
    data = match_labels(features, read_labels(table(tmp_path, FOUR), video_root=tmp_path / "clips"))
    assert len(data.labels) == 4


def test_class_folders_are_labels(tmp_path):
    files = [tmp_path / f"{name}/{number}.mp4" for name in ("läuft", "跳") for number in range(2)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    data = match_labels(features_of(files), read_labels(tmp_path))
    assert data.names == ("läuft", "跳") and data.labels.tolist() == [0, 0, 1, 1]


def test_parts_of_a_file_are_told_apart_and_stay_together(tmp_path):
    text = "path,start,end,label\n1.mp4,0,2.5,run\n1.mp4,2.5,,jump\n2.mp4,,1,run\n2.mp4,00:00:01,2,jump\n"
    one, two = tmp_path / "1.mp4", tmp_path / "2.mp4"
    features = features_of([two, two, one, one], starts=[1.0, NAN, 2.5, 0.0], ends=[2.0, 1.0, NAN, 2.5])
    data = matched(tmp_path, text, features)
    assert (data.vectors[:, 0] == features.vectors[[3, 2, 1, 0]]).all()
    assert data.groups.tolist() == [0, 0, 1, 1]


def test_groups_of_a_column_stay_together(tmp_path):
    text = "path,label,patient\n1.mp4,run,x\n2.mp4,jump,y\n3.mp4,run,x\n4.mp4,jump,y\n"
    data = matched(tmp_path, text, features_of(four(tmp_path)), group_column="patient")
    assert data.groups.tolist() == [0, 1, 0, 1]


def test_what_is_missing_on_either_side_is_named(tmp_path):
    files = [*four(tmp_path)[:3], tmp_path / "5.mp4", tmp_path / "6.mp4"]
    failed = [{"file": str(tmp_path / "4.mp4"), "start": None, "end": None, "error": "it is damaged"}]
    data = matched(tmp_path, FOUR + "7.mp4,run\n", features_of(files, failed=failed))
    assert len(data.labels) == 3
    assert data.without_features == (f"{tmp_path}/4.mp4 (it is damaged)", f"{tmp_path}/7.mp4")
    assert data.without_label == (f"{tmp_path}/5.mp4", f"{tmp_path}/6.mp4")


def test_no_match_at_all_names_both_sides(tmp_path):
    with pytest.raises(ValueError, match=r"labels begin with .*/1\.mp4, the features with /elsewhere/1\.mp4"):
        matched(tmp_path, FOUR, features_of(["/elsewhere/1.mp4"]))


def test_a_repeated_row_counts_once(tmp_path):
    assert len(matched(tmp_path, FOUR + "1.mp4,run\n", features_of(four(tmp_path))).labels) == 4


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (FOUR + "1.mp4,jump\n", {}, r"labels\.csv:6: .*1\.mp4 has the label 'jump' here and 'run' in .*labels\.csv:2"),
        ("path,label\n1.mp4,run\n2.mp4,run\n", {}, "at least 2 labels are needed.* got run"),
        ("path,label,tape\n1.mp4,run,t\n2.mp4,jump,t\n", {"group_column": "tape"}, "All 2 videos belong to one group"),
        ("path,label\n1.mp4,run\n2.mp4,jump\n", {"group_column": "tape"}, "no column of groups named 'tape'"),
        ("path,noun,verb\n1.mp4,a,b\n", {"label_columns": ["noun", "verb"]}, "label groups noun, verb"),
        ("path,label,split\n1.mp4,run,val\n2.mp4,jump,test\n", {}, "none to train on"),
        ("path,label,split\n1.mp4,run,train\n2.mp4,jump,test\n3.mp4,run,test\n", {}, "'jump' has no training video"),
        ("path,start,end,label,split\n1.mp4,0,1,a,train\n1.mp4,1,2,b,test\n", {}, "1 of the 1 test videos share"),
    ],
)
def test_labels_that_do_not_work_are_refused(tmp_path, text, settings, message):
    files, starts, ends = four(tmp_path), None, None
    if "start" in text:
        files, starts, ends = [tmp_path / "1.mp4"] * 2, [0.0, 1.0], [1.0, 2.0]
    with pytest.raises(ValueError, match=message):
        matched(tmp_path, text, features_of(files, starts, ends), **settings)


def test_several_labels_per_video_are_refused(tmp_path):
    path = table(tmp_path, '[{"path": "1.mp4", "label": ["run", "jump"]}]', "labels.json")
    with pytest.raises(AnnotationError, match=r"labels\.json:1: this video has 2 labels \(run, jump\)"):
        read_labels(path)


def test_a_video_that_the_features_hold_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"features hold .*/1\.mp4 twice"):
        matched(tmp_path, FOUR, features_of([tmp_path / "1.mp4"] * 2))


@pytest.mark.parametrize(("value", "message"), [(NAN, "NaN or infinity"), (1.0, "are equal")])
def test_features_without_information_are_refused(tmp_path, value, message):
    features = features_of(four(tmp_path))
    features.vectors[:] = value
    with pytest.raises(ValueError, match=message):
        matched(tmp_path, FOUR, features)


# Splits


SPLITS = "path,label,split\n1.mp4,run,train\n2.mp4,jump,train\n3.mp4,run,test\n4.mp4,jump,test\n"


def test_a_column_of_splits_says_what_is_held_out(tmp_path):
    data = matched(tmp_path, SPLITS, features_of(four(tmp_path)))
    assert data.held_out.tolist() == [False, False, True, True] and data.held_out_split == "test"


def test_validation_videos_are_held_out_before_test_videos(tmp_path):
    text = SPLITS.replace("3.mp4,run,test", "3.mp4,run,val")
    data = matched(tmp_path, text, features_of(four(tmp_path)))
    assert data.held_out.tolist() == [False, False, True] and data.held_out_split == "validation"
    assert data.without_label == (f"{tmp_path}/4.mp4",)


def test_a_single_split_is_cross_validated(tmp_path):
    assert matched(tmp_path, SPLITS.replace("train", "test"), features_of(four(tmp_path))).held_out is None


def test_splits_can_be_ignored(tmp_path):
    data = matched(tmp_path, SPLITS, features_of(four(tmp_path)), split_column="none")
    assert data.held_out is None and len(data.labels) == 4


def test_a_held_out_split_without_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No test video has features"):
        matched(tmp_path, SPLITS, features_of(four(tmp_path)[:2]))
