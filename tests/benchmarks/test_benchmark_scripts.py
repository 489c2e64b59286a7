"""The benchmarks run as a user runs them, on tiny sizes and few rounds, and write rows that can be read."""

import json
import re
import subprocess
import sys

import pytest
import torch
from moving_shapes import write_moving_shapes
from paths import ROOT
from PIL import Image
from transformers import ViTConfig, ViTModel
from video_files import write_video


sys.path.append(str(ROOT / "benchmarks"))


pytestmark = pytest.mark.benchmarks


LISTS = ("all_labels_0_epochs_rate_0.001_seed_0/train.csv", "validation.csv", "unlabelled.csv", "test.csv")


def start(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)  # two minutes when it is alone


def test_video_benchmark_writes_its_rows(tmp_path):
    options = {"bf": "3", "x264-params": "scenecut=0:mbtree=0"}
    write_video(tmp_path / "video.mp4", num_frames=80, height=96, width=128, gop=40, options=options)
    write_video(tmp_path / "short.mp4")
    process = start("video.py", "--videos", tmp_path, "--rounds", 1, "--smoke", "--json", tmp_path / "rows.json")
    assert process.returncode in (0, 1), process.stderr  # speed is not for a test to judge
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == {"name", "value", "unit", "target", "passed"} for row in rows)
    assert all((row["target"] is None) == (row["passed"] is None) for row in rows)
    assert process.returncode == int(any(row["passed"] is False for row in rows))
    names = [row["name"] for row in rows]
    assert not any("short.mp4" in name for name in names)
    assert [name for name in names if name.startswith("video.mp4: time over decoding alone")]
    assert sum(row["target"] is not None for row in rows) >= 5
    (memory,) = (row for row in rows if "memory" in row["name"])
    assert 0 <= memory["value"] < 300 and memory["passed"]


def test_fine_tuning_benchmark_writes_its_table(tmp_path):
    rows = ["Model 3", "average pool, 2D patches"]
    process = start("finetuning.py", "--output", tmp_path, "--smoke", "--only", *rows, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    assert re.search(r"^\| Model 3 \| \d\.\d\d \(\d\.\d\d to \d\.\d\d\) \|$", process.stdout, re.MULTILINE)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found) == 2 and all(0 <= row["value"] <= 1 and row["target"] is None for row in found)
    again = start("finetuning.py", "--output", tmp_path, "--smoke", "--only", *rows)
    assert again.returncode == 0 and "The image ViT tells" not in again.stdout, "what is finished is not repeated"


def test_masked_pretraining_is_compared_with_random_weights(tmp_path):
    process = start("masked_pretraining.py", "--output", tmp_path, "--smoke", "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    for row in ("1 | 0", "1 | 1", "all | 0", "all | 1"):
        assert re.search(
            rf"^\| {re.escape(row)} \| .* \| \d\.\d{{3}} \(\d\.\d{{3}} to", process.stdout, re.MULTILINE
        ), row
    folder = tmp_path / "shapes"
    arms = json.loads((folder / "arms.json").read_text())
    for arm in arms:
        tried = arm["validation"]
        assert set(tried) == {"0.001", "0.002"} and tried[str(arm["learning_rate"])] == max(tried.values())
        assert (arm["pretraining_minutes"] > 0) == (arm["epochs"] > 0)
    names = {name: {line.split(",")[0] for line in (folder / name).read_text().splitlines()[1:]} for name in LISTS}
    train, validation, unlabelled, test = (names[name] for name in LISTS)
    assert not train & validation and train | validation == unlabelled and not unlabelled & test
    with Image.open(folder / "figure.png") as picture:
        assert picture.width > 400
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0]["name"] == "shapes: majority class" and rows[0]["value"] == 0.25 and len(rows) == 5
    again = start("masked_pretraining.py", "--output", tmp_path, "--smoke")
    assert again.returncode == 0 and "pretrained for" not in again.stdout, "what is finished is not repeated"


@pytest.mark.timeout(600)
def test_speed_benchmark_runs_on_tiny_sizes(tmp_path):
    sections = ["start", "float32", "bfloat16", "memory", "training", "batches", "growth"]
    process = start("run.py", "--smoke", "--no-download", "--only", *sections, "--output", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["target"] is None and row["passed"] is None for row in rows), "tiny sizes measure nothing"
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    for number in range(1, 5):
        for line in ("plain", "optimised"):
            what = f"float32, batch 1: Model {number} {line}"
            assert {f"{what}, latency", f"{what}, share of the limit", f"{what}, speed over the plain copy"} <= set(
                names
            )
    assert sum("training step" in name for name in names) == 10
    values = {row["name"]: row["value"] for row in rows}
    assert values["import of the model and processor over transformers' own"] > 0.5
    assert values["from_pretrained over reading the bytes"] > 0
    assert values["vivit-hf classify: first answer of the demo model"] > 0.5
    assert "skipped: lucidrains' ViViT" in process.stdout
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in names) and "Skipped: lucidrains'" in table
    with Image.open(tmp_path / "figures.png") as picture:
        assert 600 < picture.width < 1000 and picture.height > picture.width, "four panels, one below the other"


def test_what_is_cheaper_is_measured_against_the_exact_model(tmp_path):
    process = start("run.py", "--smoke", "--no-download", "--only", "cheaper", "--output", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())]
    assert len(set(names)) == len(names)
    for dtype in ("bfloat16", "float32"):
        for way in ("Model 1, merging 300", "Model 1, merging 150, decreasing", "Model 2, merging 8"):
            assert {f"{dtype}, batch 1: {way}: {what}" for what in ("latency", "speed over exact")} <= set(names)
    assert "bfloat16, batch 1: Model 1, merging 300: speed over transformers' Vivit in float32" in names


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    takes_output = ("finetuning.py", "feature_cache.py", "few_labels.py", "masked_pretraining.py")
    for script in (*takes_output, "run.py", "streaming.py", "video.py", "conversion.py", "training_step.py"):
        needed = ["--output", tmp_path] if script in takes_output else []
        needed += ["--data", tmp_path, "--image_model", tmp_path] if script == "few_labels.py" else []
        process = start(script, *needed, "--json", tmp_path / "nowhere" / "rows.json")
        assert process.returncode == 2 and "rows.json' cannot be written" in process.stderr, script


def test_the_streaming_benchmark_runs_on_a_tiny_model(tmp_path):
    process = start("streaming.py", "--smoke", "--rounds", 1, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in rows] == ["x", "x", "x", "MB"] and all(row["target"] is None for row in rows)


def test_exported_models_are_compared_on_tiny_sizes(tmp_path):
    process = start("export.py", "--smoke", "--rounds", 1, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    for model in ("Model 1", "Model 2"):
        for way in ("float32", "int8, scales at run time", "int8, fixed scales"):
            assert rows[f"{model}, onnxruntime, {way}: latency"] > 0


def test_a_screen_recording_is_measured_with_and_without_its_unchanged_steps(tmp_path):
    process = start("screen_recording.py", "--smoke", "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    encoded = {
        name.split(": ")[0]: (row["value"], int(name.split()[-1]))
        for name, row in rows.items()
        if "steps encoded of" in name
    }
    assert list(encoded) == ["real-time, threshold 0.0", "default, threshold 0.0", "default, threshold 1.0"]
    # A tenth of the recording changes, and x264's defaults make still pictures flicker.
    (exact, total), (flickering, _), (tolerant, _) = encoded.values()
    assert 0.1 * total < exact < 0.3 * total < flickering < total and tolerant < 0.3 * total
    assert rows["real-time, threshold 0.0: largest difference of a logit"]["passed"] is True
    assert all(row["value"] > 0 for name, row in rows.items() if name.endswith(("decoding", "comparison")))


def test_an_epoch_from_stored_tokens_is_measured_against_one_from_videos(tmp_path):
    process = start("feature_cache.py", "--smoke", "--output", tmp_path, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in rows] == ["s", "s", ""] * 2 and all(row["target"] is None for row in rows)
    assert all(row["value"] > 0 for row in rows)


def write_few_labels(folder):
    """Motions of shapes with 3 training clips a class, as a task of two draws, and a tiny image model."""
    write_moving_shapes(folder / "videos", 3, test_clips_per_class=2, num_frames=8, height=48, width=48)
    for name, split in (("motion_train_0", "train"), ("motion_train_1", "train"), ("motion_test", "test")):
        videos = sorted((folder / "videos" / split).rglob("*.mp4"))
        rows = [f"{path},{path.parent.name},{split}{number}" for number, path in enumerate(videos)]
        (folder / f"{name}.csv").write_text("\n".join(["path,label,group", *rows]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "vit")


@pytest.mark.timeout(600)
def test_few_labels_are_tried_by_probes_and_by_fine_tuning(tmp_path):
    write_few_labels(tmp_path)
    options = ["--data", tmp_path, "--image_model", tmp_path / "vit", "--output", tmp_path / "runs", "--image_size", 32]
    process = start("few_labels.py", *options, "--smoke", "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    for row in ("random ViViT", "image model, end to end", "probe, ordered", "probe on a single frame"):
        assert re.search(rf"^\| {row} \| \d\.\d\d \|  \| \d+\.\d \|$", process.stdout, re.MULTILINE), row
    assert "| majority class | 0.25 |" in process.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 10 and all(row["target"] is None for row in rows)
    again = start("few_labels.py", *options, "--smoke", "--only", "probe, mean")
    assert again.returncode == 0, "what is finished is not repeated"


def test_groups_on_both_sides_are_refused(tmp_path):
    write_few_labels(tmp_path)
    rows = (tmp_path / "motion_test.csv").read_text()
    (tmp_path / "motion_test.csv").write_text(rows.replace("test0", "train0"))
    process = start("few_labels.py", "--data", tmp_path, "--image_model", tmp_path / "vit", "--output", tmp_path)
    assert process.returncode == 1 and "the group train0 is in motion_test.csv, too" in process.stderr


def test_a_step_of_fine_tuning_is_measured_against_one_by_hand(tmp_path):
    options = ["--smoke", "--rounds", 1, "--steps", 2, "--json", tmp_path / "rows.json"]
    process = start("training_step.py", *options)
    assert process.returncode == 0, process.stderr[-3000:]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["value"] > 0.3 and row["target"] is None
    assert re.search(r"CPU seconds per step: finetune.py \d\.\d{3}, by hand \d\.\d{3}", process.stdout)


def test_a_server_is_measured_against_classify(tmp_path):
    process = start("serving.py", "--smoke", "--clients", 4, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    values = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert values["serve: files per second"] > 0 and values["4 clients for 3 s: answers"] >= 4
    assert (
        values["4 clients for 3 s: requests without labels"] == values["4 clients for 3 s: answers of other files"] == 0
    )


def test_compiled_models_are_measured_against_the_eager_ones(tmp_path):
    process = start("run.py", "--smoke", "--no-download", "--only", "compiled", "--output", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["value"] for row in rows if row["name"].endswith("eager: speed over eager")] == [1.0] * 4
    assert "skipped: flash attention by itself and CUDA graphs: they need --device cuda" in process.stdout


def test_groups_in_training_and_test_are_an_error(tmp_path):
    for name in ("a_train_all.csv", "a_test.csv"):
        (tmp_path / name).write_text("path,label,tape\none.mp4,run,7\n")
    process = start("masked_pretraining.py", "--output", tmp_path / "out", "--data", tmp_path, "--task", "a")
    assert process.returncode == 1 and "training and test of 'a' have groups in common" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "nowhere"], "there is no folder nowhere"),
        (["--videos", "."], "no video of at least 64 frames"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start("video.py", *arguments)
    assert process.returncode == 2 and message in process.stderr


@pytest.mark.timeout(600)
def test_strange_videos_and_classes_left_out_are_measured(tmp_path):
    write_few_labels(tmp_path)
    (tmp_path / "motion_train_0.csv").rename(tmp_path / "motion_train_all.csv")
    (tmp_path / "others").mkdir()
    write_video(tmp_path / "others" / "other.mp4", num_frames=40)
    given = ["--data", tmp_path, "--task", "motion", "--image_model", tmp_path / "vit", "--image_size", 32]
    given += ["--other", tmp_path / "others", "--groups", 9, "--seeds", 0, "--output", tmp_path / "runs", "--smoke"]
    process = start("how_sure.py", *given, "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stderr[-3000:]
    assert re.search(r"^folder others: \d+ of \d+ windows, .*, 1 videos$", process.stdout, re.MULTILINE)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3 + 3 * 3 and all(0 <= row["value"] <= 1 and row["target"] is None for row in rows)
    again = start("how_sure.py", *given, "--only", "shapes", "features")
    assert again.returncode == 0 and "without down_left" in again.stdout
