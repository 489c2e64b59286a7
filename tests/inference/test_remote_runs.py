"""`classify-dataset` and `embed` at an address: interrupted, continued, shared, and refused by name."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet
import pytest
import torch
from command_line import invoke
from fsspec.implementations.memory import MemoryFileSystem
from tiny_models import make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.cli.classify_dataset import main
from vivit_hf.data.remote_files import file_names, location_of
from vivit_hf.inference import read_features
from vivit_hf.inference.shards import OtherRunError, join_run, missing_shards, own_share, shard_starts


ADDRESS = "memory://bucket/run"
SIZES = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 40}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and a list of 9 videos: one is broken, one has a second name, and one stands twice in the list."""
    folder = tmp_path_factory.mktemp("data")
    make_model(tiny_config("factorised_encoder")).save_pretrained(folder / "model")
    ViViTVideoProcessor(num_frames=8, frame_stride=1, **SIZES).save_pretrained(folder / "model")
    names = [write_video(folder / f"{index}.mp4", moving_frames(20 + index)) for index in range(6)]
    names.insert(4, folder / "broken.mp4")
    names[4].write_bytes(b"no video")
    os.link(names[0], folder / "second_name.mp4")
    (folder / "list.txt").write_text("\n".join(map(str, [*names, folder / "second_name.mp4", names[1]])))
    return folder


@pytest.fixture
def model(data, tmp_path):
    """A copy of the model to change."""
    return shutil.copytree(data / "model", tmp_path / "model")


@pytest.fixture(autouse=True)
def empty_store():
    MemoryFileSystem.store.clear()


def classify(data, *more, model=None, output=ADDRESS, videos="list.txt"):
    listed = ["--model", model or data / "model", "--videos", data / videos, "--output_dir", output]
    main(list(map(str, [*listed, "--use_cpu", "--num_workers", 0, "--shard_size", 2, *more])))


def tables(address=ADDRESS):
    folder = location_of(address)
    return [
        pyarrow.parquet.read_table((folder / name).open("rb"))
        for name in sorted(file_names(folder))
        if name.endswith("parquet")
    ]


def rows(address=ADDRESS):
    return [row for table in tables(address) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):
    """The rows of a run on a local disk."""
    output = tmp_path_factory.mktemp("local")
    classify(data, output=output)
    return [row for path in sorted(output.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_a_local_run_has_a_row_for_every_line(data, local):
    assert [row["index"] for row in local] == list(range(9))
    assert [row["video"] for row in local] == (data / "list.txt").read_text().split("\n")
    assert [row["error"] is not None for row in local] == [index == 4 for index in range(9)]
    assert local[8]["scores"] == pytest.approx(local[1]["scores"], abs=1e-6)
    assert local[7]["scores"] == pytest.approx(local[0]["scores"], abs=1e-6)


@pytest.mark.parametrize("output", [ADDRESS, "file"])
def test_rows_at_an_address_are_those_on_a_disk(data, local, output, tmp_path):
    classify(data, output=ADDRESS if output == ADDRESS else f"file://{tmp_path}/run")
    assert rows(ADDRESS if output == ADDRESS else str(tmp_path / "run")) == local


def test_types_do_not_depend_on_the_answers(data, local):
    classify(data, "--shard_size", 1)
    found = tables()
    assert len(found) == 9 and found[4]["labels"].null_count == 1, "this shard has no label at all"
    assert {str(table.schema) for table in found} == {str(found[0].schema)}
    assert [row["labels"] for table in found for row in table.to_pylist()] == [row["labels"] for row in local]


def break_after(count, monkeypatch):
    """Let the store take so many files, and break every later transfer."""
    put, left = MemoryFileSystem.put_file, [count]

    def put_some(self, source, target, **kwargs):
        if not left[0]:
            raise ConnectionError("the line is dead")
        left[0] -= 1
        put(self, source, target, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_some)


def test_an_interrupted_run_goes_on_with_the_missing_shards_only(data, local, monkeypatch):
    break_after(3, monkeypatch)  # _run.json and two shards
    with pytest.raises(SystemExit, match=r"classify-dataset: Cannot write memory://.*/part-00002\.parquet: Connection"):
        classify(data)
    before = {name: MemoryFileSystem.store[f"/bucket/run/{name}"] for name in file_names(location_of(ADDRESS))}
    assert sorted(before) == ["_run.json", "part-00000.parquet", "part-00001.parquet"]

    monkeypatch.undo()
    classify(data)
    assert all(MemoryFileSystem.store[f"/bucket/run/{name}"] is file for name, file in before.items())
    assert rows() == local


def test_a_finished_run_loads_no_model_and_writes_nothing(data, capsys, monkeypatch):
    classify(data)
    before = dict(MemoryFileSystem.store)
    monkeypatch.setattr(ViViTForVideoClassification, "from_pretrained", None)
    capsys.readouterr()
    classify(data)
    assert capsys.readouterr().out == "9 videos in 5 parts, 5 of them finished\n"
    assert {name: id(file) for name, file in MemoryFileSystem.store.items()} == {
        name: id(file) for name, file in before.items()
    }


def test_a_list_that_has_grown_is_another_run(data, tmp_path):
    classify(data)
    before = rows()
    grown = tmp_path / "grown.txt"
    grown.write_text((data / "list.txt").read_text() + f"\n{data / '2.mp4'}")
    with pytest.raises(
        SystemExit, match=r"memory://.*bucket/run holds another run \(num_videos 9 -> 10, videos_digest"
    ):
        classify(data, videos=grown)
    assert rows() == before
    classify(data, "--overwrite", videos=grown)
    assert [row["index"] for row in rows()] == list(range(10))


def test_another_model_is_refused_by_name(data, model):
    classify(data)
    before = rows()
    changed = ViViTForVideoClassification.from_pretrained(model)
    changed.classifier.bias.data += 1
    changed.save_pretrained(model)
    with pytest.raises(SystemExit, match=r"holds another run \(weights \w{12}\.\.\. -> \w{12}\.\.\.\): .*--overwrite"):
        classify(data, model=model)
    assert rows() == before


def calibrate(model, **fields):
    """Write a calibration into a configuration, as `evaluate --calibrate` does."""
    found = {"temperatures": [3.0], "num_files": 50, "num_units": 50, "num_clips": 1, "num_crops": 1, **fields}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "calibration": found}))


def test_a_calibrated_model_gives_the_answers_of_classify(data, model):
    unknown = {"score": "energy", "threshold": -1.0, "window_threshold": -1.0, "false_alarms": 0.05}
    calibrate(model, averaging="logits", unknown=unknown)
    views = ("--num_clips", 2, "--num_crops", 3)
    classify(data, *views, model=model)
    found = rows()
    arguments = [row["video"] for row in found[:4]]
    told = invoke(
        "classify", "--json", *arguments, "--model", model, "--num-clips", 2, "--num-crops", 3, "--workers", 0
    )
    expected = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(expected) == 4, told.stderr
    for row, answer in zip(found, expected, strict=False):
        assert row["labels"] == [one["label"] for one in answer["predictions"]]
        assert row["scores"] == pytest.approx([one["score"] for one in answer["predictions"]], abs=1e-4)
        assert row["unknown"] is answer["unknown"]
    assert found[4]["unknown"] is None and found[4]["error"] is not None


def test_calibrating_a_model_makes_another_run(data, model):
    classify(data, model=model)
    assert {row["unknown"] for row in rows()} == {None}
    calibrate(model, averaging="probabilities")
    with pytest.raises(SystemExit, match=r"holds another run \(calibration None -> '?\w{12}"):
        classify(data, model=model)


def test_a_video_whose_scores_are_not_finite_is_a_row_and_the_shard_goes_on(data, local, monkeypatch):
    decode = ViViTVideoProcessor.__call__

    def spoil(self, video, **settings):
        found = decode(self, video, **settings)
        if str(video).endswith("/3.mp4"):
            found["pixel_values"][0, 0, 0] = torch.nan
        return found

    monkeypatch.setattr(ViViTVideoProcessor, "__call__", spoil)
    classify(data)
    found = rows()
    assert "contains NaN or infinite numbers" in found[3]["error"] and found[3]["labels"] is None
    for row, expected in zip(found, local, strict=True):
        if row["index"] != 3:
            assert row["scores"] == (expected["scores"] and pytest.approx(expected["scores"], abs=1e-6))


def test_damaged_weights_stop_the_run_before_its_first_shard(data, model):
    broken = ViViTForVideoClassification.from_pretrained(model)
    broken.classifier.weight.data[0, 0] = torch.nan
    broken.save_pretrained(model)
    with pytest.raises(SystemExit, match=r"NaN or infinite numbers\. So do its weights \(classifier\.weight\)"):
        classify(data, model=model)
    assert tables() == []


@dataclass
class Process:
    """The state of a process of several; `waits` are called one after the other when it waits for the others."""

    process_index: int = 0
    num_processes: int = 1
    waits: list = field(default_factory=list)

    @property
    def is_main_process(self):
        return self.process_index == 0

    def wait_for_everyone(self):
        if self.waits:
            self.waits.pop(0)()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_processes_of_any_number_share_what_is_missing(num_processes):
    folder = location_of(ADDRESS)
    shards = shard_starts(folder, 11, 2)
    MemoryFileSystem().pipe_file("/bucket/run/part-00003.parquet", b"")
    missing = missing_shards(folder, shards)
    shares = [own_share(missing, Process(index, num_processes)) for index in range(num_processes)]
    assert sorted(path.name for share in shares for path in share) == [
        f"part-0000{index}.parquet" for index in (0, 1, 2, 4, 5)
    ]


def test_a_process_with_other_videos_than_the_main_process_is_refused():
    folder, settings = location_of(ADDRESS), {"model": "a", "videos_digest": "1" * 64}
    main_process = Process()
    join_run(folder, settings, False, main_process)
    join_run(folder, settings, False, Process(1, 2))
    other = {**settings, "videos_digest": "2" * 64}
    with pytest.raises(OtherRunError, match=r"videos_digest 1{12}\.\.\. -> 2{12}"):
        join_run(folder, other, False, Process(1, 2))
    MemoryFileSystem.store.clear()
    started = Process(1, 2, [lambda: None, lambda: join_run(folder, settings, False, main_process)])
    with pytest.raises(OtherRunError, match="videos_digest"):
        join_run(folder, other, False, started)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://bucket/run", r"Cannot use s3://bucket/run: it needs s3fs: pip install s3fs\."),
        ("gs://bucket/run", r"Cannot use gs://bucket/run: it needs gcsfs: pip install gcsfs\."),
        ("nowhere://bucket", "Cannot use nowhere://bucket: Protocol not known: nowhere"),
        ("https://example.org/run", "Cannot .* https://example.org/run"),
    ],
)
def test_an_address_that_cannot_be_written_is_refused_before_the_work(data, output, message, monkeypatch):
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(ViViTForVideoClassification, "from_pretrained", None)
    with pytest.raises(SystemExit, match=f"classify-dataset: {message}"):
        classify(data, output=output)


def embed(data, output, *more):
    arguments = ("--model", data / "model", "--num-clips", 2, "--num-crops", 1, "--workers", 0, "--device", "cpu")
    return invoke("embed", data / "list.txt", *arguments, "--output", output, *more)


def test_embed_at_an_address_writes_the_file_of_a_disk(data, tmp_path):
    result = embed(data, "memory://bucket/features.parquet", "--per-step")
    assert result.exit_code == 1, "one video is broken"
    assert "memory:///bucket/features.parquet: 7 videos with 8 vectors" in result.stdout, result.stderr
    assert embed(data, tmp_path / "features.parquet", "--per-step").exit_code == 1
    stored = MemoryFileSystem.store["/bucket/features.parquet"].getvalue()
    assert stored == (tmp_path / "features.parquet").read_bytes()
    assert list(MemoryFileSystem.store) == ["/bucket/features.parquet"], "the shards are gone"
    one, two = read_features("memory://bucket/features.parquet"), read_features(tmp_path / "features.parquet")
    np.testing.assert_array_equal(one.vectors, two.vectors)


def test_embed_goes_on_after_an_interruption(data, monkeypatch):
    address = "memory://bucket/features.parquet"
    break_after(4, monkeypatch)
    stopped = embed(data, address)
    assert (
        stopped.exit_code == 2 and "Cannot write memory:///bucket/features.parquet.parts/part-00003" in stopped.stderr
    )
    monkeypatch.undo()
    again = embed(data, address)
    assert again.exit_code == 1 and "3 of 8 shards are there already" in again.stderr, again.stderr
    assert len(read_features(address).files) == 7
    assert embed(data, address).exit_code == 1, "a finished file is there already"
    other = embed(data, address, "--per-step")
    assert other.exit_code == 2 and "features.parquet holds another run (kind 'video' -> 'step'" in other.stderr
