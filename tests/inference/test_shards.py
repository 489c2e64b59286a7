"""Shards of a run: what is written, and that runs with other settings never mix."""

import numpy as np
import pyarrow.parquet
import pytest

from vivit_hf.data.labels import LabelMap
from vivit_hf.inference.prediction import VideoPrediction
from vivit_hf.inference.shards import OtherRunError, changes, check_run, shard_starts, start_run, write_shard


LABELS = LabelMap({"": ("run", "jump", "sit")})
SETTINGS = {"model": "a", "weights": "0" * 64, "top_k": 2}


def test_every_video_is_in_one_shard(tmp_path):
    starts = shard_starts(tmp_path, 7, 3)
    assert list(starts.values()) == [0, 3, 6]
    assert [path.name for path in starts] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_a_shard_holds_the_best_labels_and_the_errors(tmp_path):
    scores = np.array([0.1, 0.7, 0.2], dtype=np.float32)
    predictions = [VideoPrediction(0, scores, scores), VideoPrediction(1, error="broken")]
    names = ["a.mp4", "b.mp4", "http://example.org/c.mp4?key=hunter2", "d.mp4"]
    assert write_shard(tmp_path / "part.parquet", predictions, names, 2, LABELS, top_k=2) == 1
    first, second = pyarrow.parquet.read_table(tmp_path / "part.parquet").to_pylist()
    assert (first["index"], first["labels"], first["error"]) == (2, ["jump", "sit"], None)
    assert first["video"] == "http://example.org/c.mp4?***" and first["scores"] == pytest.approx([0.7, 0.2])
    assert (second["index"], second["video"], second["labels"], second["error"]) == (3, "d.mp4", None, "broken")


def test_a_new_folder_is_to_be_started_and_then_goes_on(tmp_path):
    folder = tmp_path / "new"
    assert check_run(folder, SETTINGS, overwrite=False)
    start_run(folder, SETTINGS)
    assert not check_run(folder, SETTINGS, overwrite=False)


def test_the_name_of_a_model_does_not_matter(tmp_path):
    start_run(tmp_path, SETTINGS)
    assert not check_run(tmp_path, {**SETTINGS, "model": "b"}, overwrite=False)


@pytest.mark.parametrize(("name", "value"), [("weights", "1" * 64), ("top_k", 5)])
def test_another_run_is_refused_by_its_settings(tmp_path, name, value):
    start_run(tmp_path, SETTINGS)
    with pytest.raises(OtherRunError, match=f"holds another run \\({name} .* -> .*--overwrite"):
        check_run(tmp_path, {**SETTINGS, name: value}, overwrite=False)


def test_digests_are_shortened_and_other_long_settings_are_not():
    machines = [f"CPU with AVX512, bfloat16 units, VNNI, {threads}" for threads in ("1 thread", "2 threads")]
    old, new = ({"device": machine, "weights": letter * 64} for machine, letter in zip(machines, "ab", strict=True))
    assert changes(old, new) == (f"device {machines[0]!r} -> {machines[1]!r}, weights {'a' * 12}... -> {'b' * 12}...")


def test_answers_of_another_run_are_deleted_if_that_is_wished(tmp_path):
    start_run(tmp_path, SETTINGS)
    (tmp_path / "part-00000.parquet").touch()
    other = {**SETTINGS, "top_k": 5}
    assert check_run(tmp_path, other, overwrite=True)
    start_run(tmp_path, other)
    assert [path.name for path in tmp_path.iterdir()] == ["_run.json"]
