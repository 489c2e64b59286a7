"""Features files: their columns, what comes back, and what is not taken for features."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vivit_hf.inference.feature_files import Features, join_features, read_features, read_settings, write_features


WHOLE = np.nan


def make_settings(num_steps=None, **changes):
    return {
        "kind": "video" if num_steps is None else "step",
        "model": "a",
        "fingerprint": {"weights": "0", "config": "1", "processor": "2"},
        "hidden_size": 6,
        "num_steps": num_steps,
        "failed": [],
        **changes,
    }


def make_features(names=("a.mp4", "b.mp4", "b.mp4"), num_steps=None, seed=0, **changes):
    rng = np.random.default_rng(seed)
    shape = (len(names), 6) if num_steps is None else (len(names), num_steps, 6)
    times = None if num_steps is None else np.sort(rng.random(shape[:2]), axis=1)
    starts = np.array([WHOLE, 0.5, 2.0][: len(names)])
    ends = np.array([WHOLE, 1.5, WHOLE][: len(names)])
    vectors = rng.standard_normal(shape).astype(np.float32)
    return Features(tuple(names), vectors, times, starts, ends, make_settings(num_steps, **changes))


def check_equal(found, expected):
    assert found.files == expected.files and found.settings == expected.settings
    assert np.array_equal(found.vectors, expected.vectors) and found.vectors.dtype == np.float32
    assert (found.times is None) == (expected.times is None)
    for name in ("starts", "ends", "times"):
        if (values := getattr(expected, name)) is not None:
            assert np.array_equal(getattr(found, name), values, equal_nan=True)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_features_come_back_as_they_were_written(tmp_path, num_steps):
    features = make_features(num_steps=num_steps)
    write_features(tmp_path / "f.parquet", features)
    check_equal(read_features(tmp_path / "f.parquet"), features)


def test_a_vector_per_video_is_a_row_that_other_programs_read(tmp_path):
    features = make_features()
    write_features(tmp_path / "f.parquet", features)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "start", "end", "vector"]
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 6)
    rows = table.to_pylist()
    assert [(row["file"], row["start"], row["end"]) for row in rows] == [
        ("a.mp4", None, None),
        ("b.mp4", 0.5, 1.5),
        ("b.mp4", 2.0, None),
    ]
    assert rows[1]["vector"] == features.vectors[1].tolist()
    assert json.loads(table.schema.metadata[b"vivit_hf"]) == features.settings


def test_a_vector_per_step_has_its_step_and_its_time(tmp_path):
    features = make_features(num_steps=4)
    write_features(tmp_path / "f.parquet", features)
    rows = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert [(row["file"], row["step"]) for row in rows[:5]] == [*(("a.mp4", step) for step in range(4)), ("b.mp4", 0)]
    assert [row["time"] for row in rows] == features.times.reshape(-1).tolist()


@pytest.mark.parametrize("num_steps", [None, 4])
def test_several_files_are_read_and_joined_in_their_order(tmp_path, num_steps):
    failed = [{"file": "broken.mp4", "start": None, "end": None, "error": "no video"}]
    first = make_features(num_steps=num_steps, num_videos=3)
    second = make_features(("c.mp4",), num_steps, seed=1, failed=failed)
    empty = make_features((), num_steps)
    paths = [tmp_path / name for name in ("1.parquet", "2.parquet", "3.parquet")]
    for path, features in zip(paths, (first, empty, second), strict=True):
        write_features(path, features)
    assert join_features(paths, tmp_path / "all.parquet")["failed"] == failed
    assert "num_videos" not in read_features(paths).settings, "which would be that of the first file"
    for found in (read_features(paths), read_features(tmp_path / "all.parquet")):
        assert found.files == ("a.mp4", "b.mp4", "b.mp4", "c.mp4") and found.settings["failed"] == failed
        assert np.array_equal(found.vectors, np.concatenate([first.vectors, second.vectors]))


@pytest.mark.parametrize("change", [{"fingerprint": {"weights": "9"}}, {"views": {"num_clips": 2}}, {"dtype": "x"}])
def test_features_of_different_models_or_settings_are_not_mixed(tmp_path, change):
    same = {"views": {"num_clips": 1}, "dtype": "float32"}
    write_features(tmp_path / "1.parquet", make_features(**same))
    write_features(tmp_path / "2.parquet", make_features(**{**same, **change}))
    with pytest.raises(ValueError, match=rf"2\.parquet and .*1\.parquet differ in {next(iter(change))}"):
        read_features([tmp_path / "1.parquet", tmp_path / "2.parquet"])


def test_other_files_are_not_taken_for_features(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"file": ["a.mp4"]}), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet is not a Parquet file"):
        read_features(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet holds no features of `vivit-hf embed`"):
        read_features(tmp_path / "table.parquet")
    with pytest.raises(OSError, match="gone"):
        read_settings(tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read_features(tmp_path)
    with pytest.raises(ValueError, match="no file of features"):
        read_features([])


def test_steps_that_are_lost_or_out_of_order_are_refused(tmp_path):
    write_features(tmp_path / "f.parquet", make_features(num_steps=4))
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    for name, part in (("short", table.slice(1)), ("sorted", table.sort_by("step"))):
        pyarrow.parquet.write_table(part, tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"{name}\.parquet has lost rows or their order"):
            read_features(tmp_path / f"{name}.parquet")


def test_features_check_their_shapes():
    good = make_features(num_steps=4)
    fields = {**vars(good)}
    for change in (
        {"vectors": good.vectors[:, 0]},
        {"vectors": good.vectors.astype(np.float64)},
        {"times": None},
        {"times": good.times[:2]},
        {"starts": good.starts[:2]},
    ):
        with pytest.raises(ValueError, match=r"[Ee]xpected"):
            Features(**{**fields, **change})
