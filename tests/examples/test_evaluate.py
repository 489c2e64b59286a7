"""examples/evaluate.py and examples/classify_dataset.py as their users start them, on miniature data."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import classify_dataset
import evaluate
import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import MOTIONS, write_moving_shapes
from PIL import Image
from tiny_models import make_model

from vivit_hf import ViViTConfig, ViViTVideoProcessor


EXAMPLES = Path(evaluate.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--master_port=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 videos of which one is broken, and a model with random weights that tells them apart."""
    folder = tmp_path_factory.mktemp("data")
    write_moving_shapes(folder / "videos", clips_per_class=3, test_clips_per_class=1, seed=0)
    (folder / "videos" / "train" / "up_left" / "001.mp4").write_bytes(b"broken")
    model = make_model(
        ViViTConfig.from_preset("vivit-tiny", num_frames=8, image_size=32, id2label=dict(enumerate(sorted(MOTIONS))))
    )
    model.save_pretrained(folder / "model")
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder / "model")
    return folder


def start(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, env=environment)


def options(data, output, *more):
    return [
        *("--model", data / "model", "--data", data / "videos" / "train", "--use_cpu", "--num_workers", 0),
        *("--output_dir", output, *more),
    ]


def predictions(folder):
    return pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    process = start([sys.executable, EXAMPLES / "evaluate.py", *options(data, output)])
    assert process.returncode == 0, process.stderr[-3000:]
    return output, process.stdout


def test_scores_with_the_views_that_they_come_from(data, evaluated):
    output, printed = evaluated
    results = json.loads((output / "results.json").read_text())
    assert results["eval_protocol"] == (
        "4 clips x 3 crops of 8 frames, stride 1, resized to short side 36, cropped to 32 x 32, probabilities averaged"
    )
    assert (results["eval_samples"], results["eval_damaged_files"]) == (11, 1) and "eval_top5" not in results
    assert results["eval_majority_class_accuracy"] == pytest.approx(3 / 11) and "Near chance: top-1" in printed
    assert f"top1: {results['eval_top1']:.4f}" in printed and results["eval_protocol"] in printed
    assert "left out: " in printed and "up_left/001.mp4" in printed

    found = predictions(output)
    assert [Path(video).parent.name for video in found["video"]] == [name for (name,) in found["labels"]]
    wrong = [index for index, error in enumerate(found["error"]) if error is not None]
    assert len(wrong) == 1 and found["probabilities"][wrong[0]] is None
    right = [
        label[0] == predicted[0]
        for label, predicted in zip(found["labels"], found["predicted"], strict=True)
        if predicted is not None
    ]
    assert results["eval_top1"] == pytest.approx(np.mean(right))
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in found["probabilities"] if row is not None)


def test_probabilities_are_those_of_the_model_on_all_views(data, evaluated):
    from vivit_hf import ViViTForVideoClassification

    model = ViViTForVideoClassification.from_pretrained(data / "model")
    processor = ViViTVideoProcessor.from_pretrained(data / "model")
    found = predictions(evaluated[0])
    inputs = processor(found["video"][4], num_clips=4, num_crops=3)
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1).mean(0)
    assert found["probabilities"][4] == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_table_per_class_and_the_picture(evaluated):
    output, printed = evaluated
    with (output / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == sorted(MOTIONS)
    assert [int(row["videos"]) for row in rows] == [3, 3, 2, 3]
    results = json.loads((output / "results.json").read_text())
    correct = sum(float(row["accuracy"]) * int(row["videos"]) for row in rows)
    assert correct / 11 == pytest.approx(results["eval_top1"])
    assert "per class, the worst first" in printed
    with Image.open(output / "confusion_matrix.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_two_processes_give_the_same_scores(data, evaluated, tmp_path):
    process = start([*TORCHRUN, EXAMPLES / "evaluate.py", *options(data, tmp_path)])
    assert process.returncode == 0, process.stderr[-3000:]
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (evaluated[0], tmp_path))
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    assert one == two
    alone, together = predictions(evaluated[0]), predictions(tmp_path)
    assert alone["video"] == together["video"]
    for first, second in zip(alone["probabilities"], together["probabilities"], strict=True):
        assert (first is None) == (second is None)
        assert first is None or second == pytest.approx(first, abs=1e-6)


def test_evaluation_that_cannot_work(data, tmp_path):
    for name, processor in (("uniform", {"frame_sampling": "uniform"}), ("short", {"num_frames": 4})):
        shutil.copytree(data / "model", tmp_path / name)
        settings = {**ViViTVideoProcessor.from_pretrained(data / "model").to_dict(), **processor}
        ViViTVideoProcessor.from_dict(settings).save_pretrained(tmp_path / name)
    ViViTConfig.from_preset("vivit-tiny", num_labels=1).save_pretrained(tmp_path / "regression")
    ViViTConfig.from_preset("vivit-tiny", num_labels=0).save_pretrained(tmp_path / "features")
    for changed, message in (
        (["--data", data / "nowhere"], "nowhere: there is no such file or folder"),
        (["--data", data / "videos"], "is not among the 4 of the model"),
        (["--model", data / "no_model"], "no_model"),
        (["--model", tmp_path / "regression"], "regression is a regression: its outputs are no labels"),
        (["--model", tmp_path / "features"], r"has no classifier \(num_labels is 0\)"),
        (["--model", tmp_path / "uniform"], "spreads one clip over the whole video, got num_clips=4"),
        (["--model", tmp_path / "short"], r"The model expects clips of \(8, 32, 32\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(list(map(str, [*options(data, tmp_path / "out"), *changed])))
    assert not (tmp_path / "out").exists()


def test_nouns_verbs_and_actions(data, tmp_path):
    groups = {"noun": 3, "verb": 2}
    names = dict(enumerate(("noun: a", "noun: b", "noun: c", "verb: x", "verb: y")))
    model = make_model(
        ViViTConfig.from_preset("vivit-tiny", num_frames=8, image_size=32, id2label=names, label_groups=groups)
    )
    model.save_pretrained(tmp_path / "model")
    ViViTVideoProcessor.from_pretrained(data / "model").save_pretrained(tmp_path / "model")
    files = sorted((data / "videos" / "test").rglob("*.mp4"))
    lines = [f"{file},{'abc'[index % 3]},{'xy'[index % 2]}" for index, file in enumerate(files)]
    (tmp_path / "table.csv").write_text("\n".join(["path,noun,verb", *lines]))
    arguments = ["--data", tmp_path / "table.csv", "--label_column_name", "noun,verb", "--model", tmp_path / "model"]
    evaluate.main(list(map(str, [*options(data, tmp_path / "out"), *arguments, "--averaging", "logits"])))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = predictions(tmp_path / "out")
    both = [
        labels == [name[-1] for name in predicted]
        for labels, predicted in zip(found["labels"], found["predicted"], strict=True)
    ]
    assert results["eval_top1"] == results["eval_action_top1"] == np.mean(both)
    assert results["eval_action_top5"] <= 1.0 and results["eval_protocol"].endswith("logits averaged")


# classify_dataset.py


def classify(data, output, *more):
    return [
        *("--model", data / "model", "--videos", data / "videos", "--use_cpu", "--num_workers", 0),
        *("--output_dir", output, "--shard_size", 3, *more),
    ]


def rows_of(folder):
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def classified(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("classified")
    classify_dataset.main(list(map(str, classify(data, output))))
    return rows_of(output)


def test_every_video_is_classified_once(data, classified):
    assert [row["index"] for row in classified] == list(range(16))
    assert [row["video"] for row in classified] == sorted(str(path) for path in (data / "videos").rglob("*.mp4"))
    for row in classified:
        if row["error"] is not None:
            assert row["video"].endswith("up_left/001.mp4") and row["labels"] is None
            continue
        assert sorted(row["labels"]) == sorted(MOTIONS) and sum(row["scores"]) == pytest.approx(1, abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert sum(row["error"] is not None for row in classified) == 1


def test_killed_and_started_again_nothing_is_lost_or_done_twice(data, classified, tmp_path):
    command = [sys.executable, EXAMPLES / "classify_dataset.py", *classify(data, tmp_path, "--num_clips", 1)]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("part-*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.parquet")}
    assert 0 < len(finished) < 6, "killed in the middle"

    again = start(command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"16 videos in 6 parts, {len(finished)} of them finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    rows = rows_of(tmp_path)
    assert [(row["index"], row["video"], row["error"]) for row in rows] == [
        (row["index"], row["video"], row["error"]) for row in classified
    ]
    assert not list(tmp_path.glob(".*unfinished*")) or len(rows) == 16


def test_processes_share_the_parts(data, classified, tmp_path):
    process = start([*TORCHRUN, EXAMPLES / "classify_dataset.py", *classify(data, tmp_path)])
    assert process.returncode == 0, process.stderr[-3000:]
    rows = rows_of(tmp_path)
    assert [row["video"] for row in rows] == [row["video"] for row in classified]
    for row, expected in zip(rows, classified, strict=True):
        assert row["error"] == expected["error"]
        assert row["labels"] == expected["labels"]
        assert row["scores"] is None or row["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_a_list_of_files_and_a_data_set(data, tmp_path):
    files = sorted((data / "videos" / "test").rglob("*.mp4"))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, files)) + "\n\n")
    common = ["--model", data / "model", "--use_cpu", "--num_workers", 0, "--top_k", 2]
    classify_dataset.main(list(map(str, [*common, "--videos", listed, "--output_dir", tmp_path / "list"])))
    given = ["--dataset_name", data / "videos", "--split", "test", "--output_dir", tmp_path / "set"]
    classify_dataset.main(list(map(str, [*common, *given])))
    one, two = rows_of(tmp_path / "list"), rows_of(tmp_path / "set")
    assert [row["scores"] for row in one] == [row["scores"] for row in two] and len(one) == 4
    assert all(len(row["labels"]) == 2 for row in one)
    assert two[0]["video"] == f"{data / 'videos'}/test[0]"


def test_a_processor_that_does_not_fit_the_model_is_said(data, tmp_path):
    shutil.copytree(data / "model", tmp_path / "short")
    settings = {**ViViTVideoProcessor.from_pretrained(data / "model").to_dict(), "num_frames": 4}
    ViViTVideoProcessor.from_dict(settings).save_pretrained(tmp_path / "short")
    arguments = ["--model", tmp_path / "short", "--videos", data / "videos", "--output_dir", tmp_path / "labels"]
    with pytest.raises(SystemExit, match=r"classify_dataset.py: The model expects clips of \(8, 32, 32\)"):
        classify_dataset.main(list(map(str, [*arguments, "--use_cpu", "--num_workers", "0"])))
    assert not list((tmp_path / "labels").glob("*.parquet"))


def test_another_run_is_not_mixed_in(data, tmp_path):
    arguments = list(map(str, classify(data, tmp_path)))
    classify_dataset.main(arguments)
    for more in (["--num_clips", "2"], ["--videos", str(data / "videos" / "test")]):
        with pytest.raises(SystemExit, match=r"holds another run \((num_clips 1 -> 2|num_videos 16 -> 4)"):
            classify_dataset.main([*arguments, *more])
    for source in ("nowhere", "model"):
        with pytest.raises(SystemExit, match=r"there (is no such|are no videos)"):
            classify_dataset.main([*arguments, "--videos", str(data / source)])
