"""`vivit-hf evaluate` and examples/evaluate.py: scores with their views, for any number of processes."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from command_line import check_refusal, invoke
from labelled_videos import TORCHRUN, start, write_labelled_videos
from moving_shapes import MOTIONS
from paths import EXAMPLES, ROOT
from PIL import Image
from python_without import python_without
from tiny_models import make_model

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_videos(tmp_path_factory.mktemp("data"))


def options(data, output, *more):
    return [
        *("--model", data / "model", "--data", data / "videos" / "train", "--use_cpu", "--num_workers", 0),
        *("--output_dir", output, *more),
    ]


def test_without_matplotlib_there_are_scores_and_no_pictures(data, tmp_path):
    """Those of an earlier evaluation would show other scores."""
    output = tmp_path / "out"
    assert invoke("evaluate", *options(data, output)).exit_code == 0 and (output / "confusion_matrix.png").exists()
    program = f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\nfrom vivit_hf.cli.app import main\nmain()\n"
    (tmp_path / "evaluate.py").write_text(program)
    command = [*python_without(tmp_path / "site", "matplotlib"), tmp_path / "evaluate.py", "evaluate"]
    process = start([*command, *options(data, output)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "matplotlib is not installed, so there is no picture: pip install 'vivit-hf[training]'" in process.stderr
    found = {path.name for path in output.iterdir()}
    assert found == {"results.json", "predictions.parquet", "per_class.csv"}


def predictions(folder):
    return pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    process = start([sys.executable, EXAMPLES / "evaluate.py", *options(data, output)])
    assert process.returncode == 0, process.stderr[-3000:]
    return output, process.stdout


def test_scores_come_with_the_views_that_they_come_from(evaluated):
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


ONE_VIEW = ("--num-clips", 1, "--num-crops", 1)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_options_with_dashes_and_underscores_are_the_same(data, tmp_path):
    dashes = ["--model", data / "model", "--data", data / "videos" / "test", "--use-cpu", "--num-workers", 0]
    underscores = [str(one).replace("--use-cpu", "--use_cpu").replace("--num-w", "--num_w") for one in dashes]
    for arguments, name in ((dashes, "a"), (underscores, "b")):
        result = invoke("evaluate", *arguments, *ONE_VIEW, "--output-dir", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert results_of(tmp_path / "a") == results_of(tmp_path / "b")


@pytest.fixture(scope="module")
def table(data, tmp_path_factory):
    """A file with a column of splits: 4 videos to test on, 11 to train on."""
    path = tmp_path_factory.mktemp("table") / "videos.csv"
    files = sorted((data / "videos").rglob("*.mp4"))
    lines = [f"{file},{file.parent.name},{file.parent.parent.name}" for file in files if "001.mp4" not in file.name]
    path.write_text("\n".join(["path,label,split", *lines]))
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_a_file_is_scored_alone(data, table, split, tmp_path):
    arguments = ("--data", table, "--split", split, "--output_dir", tmp_path, *ONE_VIEW)
    result = invoke("evaluate", *options(data, tmp_path), *arguments)
    assert result.exit_code == 0, result.output
    videos = predictions(tmp_path)["video"]
    expected = [line.split(",")[0] for line in table.read_text().splitlines() if line.endswith(split)]
    assert videos == expected and results_of(tmp_path)["split"] == split
    assert results_of(tmp_path)["eval_samples"] == len(expected)


def test_all_splits_of_a_file_can_be_scored_together(data, table, tmp_path):
    arguments = ("--data", table, "--split_column", "none", *ONE_VIEW)
    assert invoke("evaluate", *options(data, tmp_path), *arguments).exit_code == 0
    assert results_of(tmp_path)["eval_samples"] == len(table.read_text().splitlines()) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose --split, or --split_column none for all"),
        (["--split", "validation"], "there are no validation rows"),
        (["--split", "dev"], "'dev' is not one of"),
    ],
)
def test_a_split_that_is_not_there_is_named(data, table, arguments, message, tmp_path):
    check_refusal(["evaluate", *options(data, tmp_path / "out"), "--data", table, *arguments], 2, message)


def test_a_folder_has_no_splits(data, tmp_path):
    check_refusal(["evaluate", *options(data, tmp_path / "out"), "--split", "test"], 2, "has no column of splits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["--data", "{data}/videos"], "is not among the 4 of the model"),
        (["--model", "no_model"], "there is no folder 'no_model'"),
        (["--num_crops", 2], "expected 1 or 3, got 2"),
        (["--averaging", "votes"], "'votes' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_what_cannot_be_evaluated_is_named(data, arguments, message, tmp_path):
    arguments = [str(one).replace("{data}", str(data)) for one in arguments]
    check_refusal(["evaluate", *options(data, tmp_path / "out"), *arguments], 2, message)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def uniform(data, tmp_path):
    """The model with a processor that spreads the frames of one clip over the whole video."""
    return with_processor(data, tmp_path, frame_sampling="uniform")


def with_processor(data, tmp_path, **settings):
    shutil.copytree(data / "model", tmp_path / "model")
    given = {**ViViTVideoProcessor.from_pretrained(data / "model").to_dict(), **settings}
    ViViTVideoProcessor.from_dict(given).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_uniform_frames_make_one_clip_of_each_video(data, uniform, tmp_path):
    result = invoke("evaluate", *options(data, tmp_path / "out"), "--model", uniform)
    assert result.exit_code == 0 and "1 clip x " in result.stdout, result.stderr


def test_more_clips_of_uniform_frames_are_refused(data, uniform, tmp_path):
    arguments = [*options(data, tmp_path / "out"), "--model", uniform, "--num-clips", 4]
    check_refusal(["evaluate", *arguments], 2, "spreads one clip over the whole video, got num_clips=4")
    check_refusal(["classify", data / "videos" / "up_left", "--model", uniform, "--num-clips", 4], 2, "got num_clips=4")


def test_a_processor_that_does_not_fit_is_named(data, tmp_path):
    model = with_processor(data, tmp_path, num_frames=4)
    check_refusal(
        ["evaluate", *options(data, tmp_path / "out"), "--model", model], 2, "but the model expects (8, 32, 32)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_labels", "message"),
    [(1, "The model is a regression: its outputs cannot be compared with labels"), (0, "has no classifier")],
)
def test_a_model_without_classes_is_named(data, num_labels, message, tmp_path):
    shutil.copytree(data / "model", tmp_path / "model")
    config = ViViTConfig.from_preset("vivit-tiny", num_frames=8, image_size=32, num_labels=num_labels)
    make_model(config).save_pretrained(tmp_path / "model")
    check_refusal(["evaluate", *options(data, tmp_path / "out"), "--model", tmp_path / "model"], 2, message)


def test_videos_that_are_all_damaged_are_an_error(data, tmp_path):
    (tmp_path / "videos" / "up_left").mkdir(parents=True)
    (tmp_path / "videos" / "up_left" / "000.mp4").write_bytes(b"broken")
    arguments = [*options(data, tmp_path / "out"), "--data", tmp_path / "videos", *ONE_VIEW]
    check_refusal(["evaluate", *arguments], 2, "None of the videos can be read")


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
    result = invoke("evaluate", *options(data, tmp_path / "out"), *arguments, "--averaging", "logits")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = predictions(tmp_path / "out")
    both = [
        labels == [name[-1] for name in predicted]
        for labels, predicted in zip(found["labels"], found["predicted"], strict=True)
    ]
    assert results["eval_top1"] == results["eval_action_top1"] == np.mean(both)
    assert results["eval_action_top5"] <= 1.0 and results["eval_protocol"].endswith("logits averaged")
