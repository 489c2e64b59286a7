"""File names that are not UTF-8, or that mean something to the terminal, in everything that reads or writes names."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import classify_dataset
import pyarrow.parquet
import pytest
from command_line import invoke

from vivit_hf import demo_model_path
from vivit_hf.data.annotations import AnnotationError, read_videos
from vivit_hf.data.whole_files import as_utf8
from vivit_hf.training.finetuning_arguments import DataArguments
from vivit_hf.training.finetuning_data import load_splits


LATIN = os.fsdecode(b"caf\xe9")
SHOWN = r"caf\udce9"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")


@pytest.fixture
def videos(tmp_path):
    """A class folder per label of the demo model, and one more with odd file names."""
    folder = tmp_path / "videos"
    for name in ("down_left", "down_right", "up_left", "up_right"):
        (folder / name).mkdir(parents=True)
        shutil.copy(demo_model_path() / "samples" / f"{name}.mp4", folder / name / f"{LATIN}.mp4")
    (folder / "up_left" / f"{LATIN}[red]\x1b[31m.mp4").write_bytes(b"broken")
    return folder


def test_text_that_utf8_cannot_hold_is_escaped():
    assert as_utf8(Path(f"a/{LATIN}.mp4")) == f"a/{SHOWN}.mp4"
    assert as_utf8("caf\u00e9 \ud800") == "caf\u00e9 \\ud800"


def options(*more):
    return list(map(str, ["--model", demo_model_path(), "--use_cpu", "--num_workers", 0, *more]))


def test_classify_dataset_writes_every_name(videos, tmp_path):
    listed = tmp_path / "list.txt"
    names = sorted(str(path) for path in videos.rglob("*.mp4"))
    listed.write_bytes(os.fsencode("\n".join(names)))
    for source, output in ((videos, tmp_path / "folder"), (listed, tmp_path / "list")):
        classify_dataset.main(options("--videos", source, "--output_dir", output))
        (part,) = output.glob("*.parquet")
        found = pyarrow.parquet.read_table(part).to_pylist()
        assert [row["video"] for row in found] == [as_utf8(name) for name in names]
        assert [row["labels"] is None for row in found] == ["[red]" in name for name in names]
        assert all(SHOWN in row["error"] for row in found if row["labels"] is None)


def test_evaluate_writes_every_name_and_prints_no_escapes(videos, tmp_path):
    views = ("--num_clips", 1, "--num_crops", 1)
    printed = invoke("evaluate", *options("--data", videos, "--output_dir", tmp_path / "scores", *views)).stdout
    found = pyarrow.parquet.read_table(tmp_path / "scores" / "predictions.parquet").to_pylist()
    assert len(found) == 5 and all(SHOWN in row["video"] for row in found)
    assert f"{SHOWN}[red]" in printed and "\x1b[31m" not in printed
    printed.encode("utf-8")


def test_class_folders_have_labels_that_can_be_written(tmp_path):
    for name in (LATIN, "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{LATIN}.mp4").write_bytes(b"")
    first, second = read_videos(tmp_path).videos
    assert sorted((first.labels, second.labels)) == [(SHOWN,), ("run",)]
    for one in (first, second):
        one.where.encode("utf-8")
        assert os.path.isfile(one.video)


def test_annotation_files_with_odd_names(tmp_path):
    (tmp_path / f"{LATIN}.mp4").write_bytes(b"")
    table = tmp_path / f"{LATIN}.jsonl"
    table.write_text(json.dumps({"path": f"{LATIN}.mp4", "label": LATIN}))
    (one,) = read_videos(table).videos
    assert one.labels == (SHOWN,) and os.path.isfile(one.video) and one.where.endswith(f"{SHOWN}.jsonl:1")
    (tmp_path / "list.txt").write_bytes(b"run/caf\xe9.mp4\n")
    with pytest.raises(AnnotationError, match=r"list\.txt:1: this is not UTF-8 text"):
        read_videos(tmp_path / "list.txt")


def test_data_sets_that_cannot_be_loaded_are_named(videos, tmp_path):
    common = options("--output_dir", tmp_path / "labels")
    for arguments, message in (
        (["--dataset_name", str(videos)], r"videos: this data set cannot be loaded: .* A file name is not UTF-8"),
        (["--dataset_name", str(tmp_path / "nowhere")], "nowhere: this data set cannot be loaded"),
        (["--dataset_name", str(demo_model_path() / "samples"), "--split", "dev"], "samples: this data set cannot"),
        (
            ["--dataset_name", str(demo_model_path() / "samples"), "--video_column_name", "clip"],
            "no column of videos named 'clip'",
        ),
    ):
        with pytest.raises(SystemExit, match=f"classify-dataset: .*{message}"):
            classify_dataset.main([*common, *arguments])
    with pytest.raises(AnnotationError, match="A file name is not UTF-8"):
        load_splits(DataArguments(dataset_name=str(videos)), 0, print)


def test_scan_names_files_so_that_they_can_be_opened(videos, tmp_path):
    for arguments in (["--json", "-"], ["--json", str(tmp_path / "scan.jsonl")]):
        command = [sys.executable, "-m", "vivit_hf", "scan", str(videos), "--workers", "1", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=200)
        assert done.returncode == 1, done.stderr[-2000:]
        text = done.stdout.decode() if arguments[1] == "-" else (tmp_path / "scan.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == 5 and all((videos / row["path"]).is_file() for row in rows)
        assert b"\x1b[31m" not in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "this JSON cannot be read"),
        ('[{"path": "a.mp4", "label": ' + "1" * 5000 + "}]", "this JSON cannot be read"),
    ],
)
def test_json_that_no_parser_takes_is_named(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(AnnotationError, match=rf"t\.json:1: {message}"):
        read_videos(tmp_path / "t.json")
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(AnnotationError, match=r"t\.jsonl:1: this JSON cannot be read"):
        read_videos(tmp_path / "t.jsonl")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "label"), ("a.mp4", "run", "jump")])
    with pytest.raises(AnnotationError, match=r"t\.csv:1: several columns are named 'label'"):
        read_videos(tmp_path / "t.csv")
