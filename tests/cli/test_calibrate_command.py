"""`vivit-hf evaluate --calibrate`: the demo model on moving shapes, from files to probabilities."""

import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from command_line import check_refusal, invoke, rows
from labelled_videos import TORCHRUN, start
from moving_shapes import MOTIONS, write_moving_shapes, write_video
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import pipeline

from vivit_hf import (
    ViViTConfig,
    ViViTForVideoClassification,
    ViViTVideoProcessor,
    demo_model_path,
)
from vivit_hf.inference.timeline import video_timeline


pytestmark = pytest.mark.slow

VIEWS = ("--num-clips", 2, "--num-crops", 1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """24 files in a table with their scene, which six of the classes share, and noisy labels."""
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, clips_per_class=1, test_clips_per_class=6, seed=3)
    files = sorted((folder / "test").rglob("*.mp4"))
    lines = [f"{file},{file.parent.name},{file.stem}" for file in files]
    lines[0] = lines[0].replace(f",{files[0].parent.name},", ",up_right,")  # one wrong label
    (folder / "table.csv").write_text("\n".join(["path,label,scene", *lines]))
    return folder


def copy_of_demo(folder):
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copyfile(demo_model_path() / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("calibration", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def options(videos, model, output):
    given = ("--model", model, "--data", videos / "table.csv", "--group-column", "scene", "--output-dir", output)
    return [*given, *VIEWS, "--use-cpu", "--num-workers", 0]


@pytest.fixture(scope="module")
def calibrated(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    model = copy_of_demo(folder / "model")
    before = json.loads((model / "config.json").read_text())
    result = invoke("evaluate", *options(videos, model, folder / "scores"), "--calibrate")
    assert result.exit_code == 0, result.output
    return folder, before, result.stdout


def stored(folder):
    return json.loads((folder / "model" / "config.json").read_text())


def predicted(folder):
    return pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()


def test_the_temperature_is_stored_and_nothing_else_changes(calibrated):
    folder, before, printed = calibrated
    after = stored(folder)
    found = after.pop("calibration")
    assert after == before
    assert (found["num_files"], found["num_clips"], found["num_crops"]) == (24, 2, 1)
    assert f"temperature {found['temperatures'][0]:.3f}" in printed and "files that it was not fitted on" in printed
    results = json.loads((folder / "scores" / "results.json").read_text())["calibration"]
    assert results["temperature"] == found["temperatures"][0] and (results["files"], results["units"]) == (24, 6)
    least, most = results["temperature_range"]
    assert least <= results["temperature"] <= most


def test_the_temperature_is_the_best_one_for_the_files(calibrated, videos):
    """The loss of the files' plain probabilities, with labels that count as in Platt scaling, is least there."""
    folder, _, _ = calibrated
    found = predicted(folder / "scores")
    logits = torch.tensor(found["probabilities"]).double().log()
    names = sorted(MOTIONS)
    targets = torch.tensor([names.index(label) for (label,) in found["labels"]])
    sure = 25 / 26
    wanted = torch.full((24, 4), (1 - sure) / 3, dtype=torch.double)
    wanted[torch.arange(24), targets] = sure

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(logits / temperature, wanted))

    temperatures = np.geomspace(0.05, 20, 400)
    best = temperatures[np.argmin([loss(one) for one in temperatures])]
    assert stored(folder)["calibration"]["temperatures"][0] == pytest.approx(best, rel=0.02)


def test_the_picture_shows_before_and_after(calibrated):
    with Image.open(calibrated[0] / "scores" / "reliability.png") as picture:
        assert picture.width > 700 and picture.height > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_again_gives_the_same(calibrated, videos, tmp_path):
    folder, _, _ = calibrated
    first = stored(folder)
    result = invoke("evaluate", *options(videos, folder / "model", tmp_path), "--calibrate")
    assert result.exit_code == 0 and stored(folder) == first


def test_two_processes_give_the_same(calibrated, videos, tmp_path):
    model = copy_of_demo(tmp_path / "model")
    command = [*TORCHRUN, "-m", "vivit_hf", "evaluate", *options(videos, model, tmp_path / "scores"), "--calibrate"]
    process = start(command)
    assert process.returncode == 0, process.stderr[-3000:]
    found, expected = stored(tmp_path)["calibration"], stored(calibrated[0])["calibration"]
    assert found.pop("temperatures") == pytest.approx(expected["temperatures"], rel=1e-4)
    assert found == {name: value for name, value in expected.items() if name != "temperatures"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same(calibrated, videos, tmp_path, dtype):
    model = copy_of_demo(tmp_path / "model")
    result = invoke("evaluate", *options(videos, model, tmp_path / "scores"), "--calibrate", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    found, expected = stored(tmp_path)["calibration"], stored(calibrated[0])["calibration"]
    assert found["temperatures"] == pytest.approx(expected["temperatures"], rel=0.1)
    assert found["weights"] == expected["weights"]


def test_probabilities_of_every_entry_point_are_calibrated(calibrated, videos):
    folder, _, _ = calibrated
    (temperature,) = stored(folder)["calibration"]["temperatures"]
    model = ViViTForVideoClassification.from_pretrained(folder / "model").eval()
    processor = ViViTVideoProcessor.from_pretrained(folder / "model")
    file = videos / "test" / "down_left" / "003.mp4"
    with torch.no_grad():
        rows_of_views = model(**processor(file, num_clips=2, num_crops=1)).logits.log_softmax(-1)
        one = (model(**processor(file)).logits[0] / temperature).softmax(-1)
    expected = ((rows_of_views.logsumexp(0) - np.log(2)) / temperature).softmax(-1)

    (row,) = rows(invoke("classify", file, "--model", folder / "model", *VIEWS, "--json").stdout)
    scores = {one["label"]: one["score"] for one in row["predictions"]}
    assert [scores[name] for name in sorted(MOTIONS)] == pytest.approx(expected.tolist(), abs=1e-4)

    found = {one["label"]: one["score"] for one in pipeline("video-classification", model=str(folder / "model"))(file)}
    assert [found[name] for name in sorted(MOTIONS)] == pytest.approx(one.tolist(), abs=1e-5)

    segments = video_timeline(model, processor, file, min_duration=0)
    (line, *_) = rows(invoke("timeline", file, "--model", folder / "model", "--min-duration", 0, "--json").stdout)
    assert line["score"] == pytest.approx(segments[0].score, abs=1e-4)
    model.config.calibration = None
    plain = video_timeline(model, processor, file, min_duration=0)
    assert abs(plain[0].score - segments[0].score) > 1e-3


def test_sets_hold_the_labels_above_the_stored_probability(calibrated, videos):
    folder, _, printed = calibrated
    found = stored(folder)["calibration"]
    assert list(found["sets"]) == ["0.8", "0.85"] and found["num_units"] == 6  # 0.9 needs nine groups
    assert "labels per set (classify --sets) by coverage: 0.8: " in printed
    files = [videos / "test" / name / "002.mp4" for name in sorted(MOTIONS)]
    arguments = ("classify", *files, "--model", folder / "model", *VIEWS, "--sets", "--coverage", 0.8)
    of_sets = rows(invoke(*arguments, "--json").stdout)
    scores = predicted(folder / "scores")
    plain = dict(zip(scores["video"], scores["probabilities"], strict=True))
    for row in of_sets:
        expected = {
            one for one, value in zip(sorted(MOTIONS), plain[row["file"]], strict=True) if value >= least(found)
        }
        expected.add(sorted(MOTIONS)[int(np.argmax(plain[row["file"]]))])
        assert {one["label"] for one in row["predictions"]} == expected and row["coverage"] == 0.8
    assert invoke(*arguments).exit_code == 0


def least(calibration):
    return calibration["sets"]["0.8"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets"], "needs at least 9 labelled files or groups of files, got 6"),
        (["--sets", "--coverage", 0.99], "needs at least 99"),
        (["--sets", "--coverage", 7], "is not stored; the model has 0.8"),
        (["--coverage", 0.9], "add --sets, whose coverage it is"),
        (["--sets", "--coverage", 0.8, "--num-clips", 4], "take the same views, or calibrate with these"),
    ],
)
def test_sets_that_cannot_be_given_are_named(calibrated, videos, arguments, message):
    file = videos / "test" / "down_left" / "003.mp4"
    check_refusal(["classify", file, "--model", calibrated[0] / "model", *VIEWS, *arguments], 2, message)


def test_sets_of_the_plain_model_are_refused(videos, tmp_path):
    file, model = videos / "test" / "down_left" / "003.mp4", copy_of_demo(tmp_path / "model")
    check_refusal(["classify", file, "--model", model, "--sets"], 2, "Label sets need a calibrated model")


def test_a_multi_label_model_gives_the_labels_that_reach_their_thresholds(videos, tmp_path):
    model = copy_of_demo(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    result = invoke("evaluate", *options(videos, model, tmp_path / "scores"), "--calibrate")
    assert result.exit_code == 0 and "macro F1" in result.stdout, result.output
    found = stored(tmp_path)["calibration"]
    assert "sets" not in found and len(found["thresholds"]) == 4
    file = videos / "test" / "down_left" / "003.mp4"
    arguments = ("classify", file, "--model", model, *VIEWS)
    (row,) = rows(invoke(*arguments, "--json").stdout)
    thresholds = dict(zip(sorted(MOTIONS), found["thresholds"], strict=True))
    assert row["predictions"] and all(one["score"] >= thresholds[one["label"]] for one in row["predictions"])
    assert len(row["predictions"]) < 4
    config = json.loads((model / "config.json").read_text())
    config["calibration"]["thresholds"] = [1.0] * 4
    (model / "config.json").write_text(json.dumps(config))
    assert rows(invoke(*arguments, "--json").stdout)[0]["predictions"] == []
    assert "no label reaches its threshold" in invoke(*arguments).stdout
    check_refusal([*arguments, "--sets"], 2, "a multi-label model, which has thresholds instead")


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Videos of noise, which no shape is in."""
    folder = tmp_path_factory.mktemp("strange")
    for number in range(6):
        write_video(folder / f"{number}.mp4", np.random.default_rng(number).integers(0, 256, (24, 80, 96, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def knowing(videos, strange, tmp_path_factory):
    """The demo model with a rule for unknown videos. No groups: 19 files are needed for 5 % of false alarms."""
    folder = tmp_path_factory.mktemp("knowing")
    arguments = [*options(videos, copy_of_demo(folder / "model"), folder / "scores"), "--calibrate"]
    arguments.remove("--group-column")
    arguments.remove("scene")
    data = ("--known-data", videos / "train", "--unknown-data", strange)
    result = invoke("evaluate", *arguments, "--unknown", "neighbours", *data)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_a_rule_for_unknown_videos_is_stored_and_measured(knowing):
    folder, printed = knowing
    rule = stored(folder)["calibration"]["unknown"]
    assert rule["score"] == "neighbours" and rule["false_alarms"] == 0.05
    assert (folder / "model" / "known_features.safetensors").stat().st_size < 4 * 96 * 2 + 500
    results = json.loads((folder / "scores" / "results.json").read_text())["unknown"]
    assert results["known_videos"] == 4 and results["aurocs"]["neighbours"] == 1.0
    assert results["unknown_videos_called"] == 1.0
    assert "unknown answer: by neighbours, to the nearest of 4 training videos, at 5.0% false alarms" in printed


def test_every_entry_point_says_none_of_these(knowing, videos, strange):
    model, file = knowing[0] / "model", strange / "0.mp4"
    known = videos / "test" / "up_left" / "001.mp4"
    found = rows(invoke("classify", known, file, "--model", model, *VIEWS, "--json").stdout)
    assert [row["unknown"] for row in found] == [False, True] and len(found[1]["predictions"]) == 4
    table = invoke("classify", file, "--model", model, *VIEWS).stdout
    assert f"none of these (otherwise {found[1]['predictions'][0]['label']})" in table
    segments = rows(invoke("timeline", file, "--model", model, "--json").stdout)
    assert [(one["label"], one["score"]) for one in segments] == [("none of these", 1.0)]
    watched = rows(invoke("watch", file, "--model", model, "--policy", "wait", "--json").stdout)
    assert [(one["label"], one["score"]) for one in watched] == [("none of these", 1.0)]
    classify = pipeline("video-classification", model=str(model))
    assert classify(str(file)) == [{"label": "none of these", "score": 1.0}]
    assert classify(str(known))[0]["label"] in MOTIONS


def test_a_rule_is_the_same_on_two_processes(knowing, videos, strange, tmp_path):
    model = copy_of_demo(tmp_path / "model")
    arguments = [*options(videos, model, tmp_path / "scores"), "--calibrate", "--unknown", "neighbours"]
    place = arguments.index("--group-column")
    del arguments[place : place + 2]
    data = ("--known-data", videos / "train", "--unknown-data", strange)
    process = start([*TORCHRUN, "-m", "vivit_hf", "evaluate", *arguments, *data])
    assert process.returncode == 0, process.stderr[-3000:]
    found, expected = (stored(one)["calibration"]["unknown"] for one in (tmp_path, knowing[0]))
    for name in ("threshold", "window_threshold"):
        assert found.pop(name) == pytest.approx(expected[name], rel=1e-3)
        expected.pop(name)
    assert found == expected
    first, second = (folder / "model" / "known_features.safetensors" for folder in (tmp_path, knowing[0]))
    torch.testing.assert_close(load_file(first)["features"], load_file(second)["features"], atol=2e-3, rtol=1e-2)


def test_a_model_without_its_known_features_goes_on(knowing, strange, tmp_path):
    shutil.copytree(knowing[0] / "model", tmp_path / "model")
    (tmp_path / "model" / "known_features.safetensors").unlink()
    process = start(
        [sys.executable, "-m", "vivit_hf", "classify", strange / "0.mp4", "--model", tmp_path / "model", *VIEWS]
    )
    assert process.returncode == 0 and "known_features.safetensors is not beside the weights" in process.stderr
    assert "none of these (" not in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unknown", "energy"], "--unknown goes with --calibrate"),
        (["--calibrate", "--known-data", "{videos}/train"], "go with --unknown auto, energy or neighbours"),
        (["--calibrate", "--unknown", "auto"], "--unknown auto needs training videos: give --known-data"),
        (["--calibrate", "--unknown", "energy"], "needs at least 19 labelled files or groups of files, got 6"),
    ],
)
def test_rules_that_cannot_be_chosen_are_named(videos, tmp_path, arguments, message):
    arguments = [one.replace("{videos}", str(videos)) for one in arguments]
    given = options(videos, copy_of_demo(tmp_path / "model"), tmp_path / "out")
    check_refusal(["evaluate", *given, *arguments], 2, message)
    assert "calibration" not in stored(tmp_path)


def test_other_views_are_named(calibrated, videos):
    file = videos / "test" / "down_left" / "003.mp4"
    arguments = (file, "--model", calibrated[0] / "model", "--num-crops", 1)
    assert "calibrated on 2 clips x 1 crop" in invoke("classify", *arguments, "--num-clips", 3).stderr
    assert "calibrated" not in invoke("classify", *arguments, "--num-clips", 2).stderr


def test_a_calibrated_model_is_scored_with_its_calibration(calibrated, videos, tmp_path):
    folder, _, _ = calibrated
    result = invoke("evaluate", *options(videos, folder / "model", tmp_path))
    assert result.exit_code == 0 and "calibration error, calibrated: " in result.stdout
    errors = json.loads((tmp_path / "results.json").read_text())["calibration_error"]
    first = json.loads((folder / "scores" / "results.json").read_text())["calibration"]
    assert errors["plain"]["labels"] == pytest.approx(first["error_before"], abs=1e-6)
    assert (tmp_path / "reliability.png").exists()
    assert np.abs(np.array(predicted(tmp_path)["probabilities"])).sum() == pytest.approx(24)


def test_finetuning_leaves_the_calibration_out(calibrated, videos, tmp_path):
    arguments = ("--train_dir", videos / "train", "--model_name_or_path", calibrated[0] / "model", "--use_cpu")
    small = (
        "--max_steps",
        1,
        "--dataloader_num_workers",
        0,
        "--validation_dir",
        videos / "test",
        "--num_clips",
        1,
        "--num_crops",
        1,
    )
    process = start([sys.executable, "-m", "vivit_hf", "finetune", *arguments, *small, "--output_dir", tmp_path])
    assert process.returncode == 0, process.stderr[-2000:]
    assert "its calibration is left out" in process.stdout + process.stderr
    assert ViViTConfig.from_pretrained(tmp_path).calibration is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hub", "someone/model is not a folder: download it first"),
        ("vivit", "is for 'vivit': convert it first with `vivit-hf convert transformers`"),
        ("regression", "The model is a regression: it has no probabilities to calibrate"),
        ("adapter", "has no config.json to write to; merge an adapter"),
    ],
)
def test_models_that_cannot_hold_a_calibration_are_named(kind, message, videos, tmp_path):
    model = "someone/model" if kind == "hub" else copy_of_demo(tmp_path / "model")
    if kind == "vivit":
        (model / "config.json").write_text('{"model_type": "vivit"}')
    if kind == "regression":
        make_model(ViViTConfig.from_preset("vivit-tiny", num_labels=1)).save_pretrained(model)
    if kind == "adapter":
        (model / "config.json").unlink()
    check_refusal(["evaluate", *options(videos, model, tmp_path / "out"), "--calibrate"], 2, message)
    assert not (tmp_path / "out").exists()


def test_too_few_files_are_named_before_the_model_is_loaded(videos, tmp_path):
    lines = (videos / "table.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:12]))
    arguments = [*options(videos, copy_of_demo(tmp_path / "model"), tmp_path / "out"), "--data", tmp_path / "few.csv"]
    check_refusal(["evaluate", *arguments, "--calibrate"], 2, "needs at least 20 files that can be read")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named_first():
    """In a process without the rights of root, which can write everywhere."""
    program = (
        "import os, sys\n"
        "from vivit_hf.inference.calibration_files import check_folder\n"
        "os.geteuid() or os.seteuid(65534)\n"
        "try:\n    check_folder(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = copy_of_demo(Path(folder) / "model")
        Path(folder).chmod(0o755)
        model.chmod(0o555)
        process = start([sys.executable, "-c", program, model])
        model.chmod(0o755)
    assert "the folder cannot be written: Permission denied" in process.stdout, process.stderr[-2000:]


def test_the_table_has_scenes_of_several_files(videos):
    with (videos / "table.csv").open() as file:
        scenes = [row["scene"] for row in csv.DictReader(file)]
    assert sorted(set(scenes)) == [f"{number:03d}" for number in range(6)] and len(scenes) == 24
