"""`vivit-hf export` checks what it writes, says what it costs, and leaves no files of failed exports."""

import json
import re
import subprocess
import sys

import pytest
import torch
from image_conversion import assert_refused
from onnx_files import metadata, rounding_logits, run_onnx
from paths import ROOT
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model
from video_files import write_video

from vivit_hf import ViViTConfig, ViViTVideoProcessor
from vivit_hf.calibration_vivit import answer_fingerprint
from vivit_hf.conversion import onnx_models
from vivit_hf.conversion.command import main
from vivit_hf.conversion.export_onnx import INT8_FILE, MODEL_FILE, REPORT_FILE
from vivit_hf.conversion.onnx_int8 import static_scales
from vivit_hf.conversion.onnx_models import write_onnx
from vivit_hf.conversion.parity import random_clip
from vivit_hf.initialisation.model_processor import processor_for


SCRIPT = ROOT / "conversion" / "export_onnx.py"
CASES = [*ATTENTION_TYPES, "average_pool_baseline", "uniform_frames", "temporal_attention_pooling"]
CASES += ["registers_as_in_dinov2", "pre_layernorm_as_in_clip", "merged_tokens", "merged_tokens_in_space"]
LABELS = {0: "wave", 1: "Größe", 2: "run", 3: "sit", 4: "jump"}
FILES = {MODEL_FILE, "config.json", "preprocessor_config.json", REPORT_FILE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny Model 2 with named labels and a processor, as written by `save_pretrained`."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def save_tiny(folder, processor=None, **overrides):
    fields = {"id2label": LABELS, **overrides}
    if "num_labels" in overrides:
        del fields["id2label"]
    model = make_model(case_config("factorised_encoder", **fields))
    model.save_pretrained(folder)
    made = processor_for(model.config)
    for name, value in (processor or {}).items():
        setattr(made, name, value)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def export(tmp_path, folder, capfd):
    """Return a function that runs the command: (exit code, printed text without line breaks, errors, output folder)."""

    def run(*arguments, model=folder):
        capfd.readouterr()  # what was printed before
        output = tmp_path / "exported"
        code = main("export", ["--model", str(model), "--output", str(output), *map(str, arguments)])
        printed, errors = capfd.readouterr()
        return code, re.sub(r"[\s│]+", " ", printed), errors, output

    return run


# The script


def test_the_script_writes_a_complete_folder(tmp_path, folder):
    output = tmp_path / "exported"
    command = [sys.executable, SCRIPT, "--model", folder, "--output", output, "--int8", "--num-clips-checked", 6]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert {path.name for path in output.iterdir()} == FILES | {INT8_FILE}

    config = ViViTConfig.from_pretrained(output)
    assert config.id2label == LABELS
    assert ViViTVideoProcessor.from_pretrained(output).num_frames == config.num_frames
    for name in (MODEL_FILE, INT8_FILE):
        said = metadata(output / name)
        assert json.loads(said["id2label"]) == {str(index): label for index, label in LABELS.items()}
        assert (said["num_frames"], said["image_size"], said["value_range"]) == ("8", "[24, 40]", "[-1.0, 1.0]")
        assert said["expects"].startswith("pixel_values (batch, 8, 3, 24, 40) of float32")
        assert said["model"] == "model"  # and not where it was

    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    clips = torch.cat([random_clip(config, seed) for seed in range(6)])
    model = make_model(case_config("factorised_encoder", id2label=LABELS))
    with torch.no_grad():
        expected = model(clips).logits
    assert (run_onnx(output / MODEL_FILE, clips) - expected).abs().max() < 1e-4
    assert report["float32"]["max_abs_difference_of_logits"] < 1e-4
    # One by one: in a batch, the activations of all clips are on one scale.
    quantised = torch.cat([run_onnx(output / INT8_FILE, clip[None]) for clip in clips])
    difference = (quantised.softmax(dim=-1) - expected.softmax(dim=-1)).abs()
    int8 = report["int8"]
    assert int8["top1_agreement"] == (quantised.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean().item()
    assert int8["max_abs_difference_of_probabilities"] == pytest.approx(difference.max().item(), abs=1e-5)
    assert int8["mean_abs_difference_of_probabilities"] == pytest.approx(difference.mean().item(), abs=1e-5)
    assert difference.max() > 1e-4
    assert report["clips"]["count"] == 6 and report["input"]["shape"] == ["batch", 8, 3, 24, 40]
    for part in ("float32", "int8"):
        assert report[part]["bytes"] == (output / report[part]["file"]).stat().st_size

    printed = re.sub(r"[\s│]+", " ", process.stdout)
    assert float(re.search(r"max abs difference (\S+):", printed)[1]) < 1e-4
    assert f"top-1 agreement {int8['top1_agreement']:.3f}" in printed
    assert f"{int8['max_abs_difference_of_probabilities']:.1e} at most" in printed


def write_videos(folder, count):
    for index in range(count):
        (folder / str(index // 2)).mkdir(parents=True, exist_ok=True)
        write_video(folder / str(index // 2) / f"{index}.mp4", num_frames=18 + index, width=96)
    return folder


def test_the_result_is_checked_with_clips_of_videos(tmp_path, export):
    videos = write_videos(tmp_path / "videos", 6)
    code, printed, errors, output = export("--videos", videos, "--num-clips-checked", 4)
    assert (code, errors) == (0, "")
    assert "one of each of 4 videos of the 6 in videos" in printed
    for path in output.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} tells where it was made"
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["clips"]["files"] == ["0/0.mp4", "1/2.mp4", "1/3.mp4", "2/5.mp4"]
    assert "int8" not in report and {path.name for path in output.iterdir()} == FILES

    (videos / "1" / "2.mp4").write_bytes(b"no video")
    (tmp_path / "exported").rename(tmp_path / "first")
    assert_refused(export("--videos", videos, "--num-clips-checked", 4), tmp_path, "2.mp4")


def test_fixed_scales_come_from_other_videos_than_the_check(tmp_path, export):
    videos = write_videos(tmp_path / "videos", 10)
    code, printed, errors, output = export("--int8", "--calibration", videos)
    assert (code, errors) == (0, "")
    assert {path.name for path in output.iterdir()} == FILES | {INT8_FILE}
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["int8_calibration"]["files"] == ["0/0.mp4", "1/2.mp4", "2/4.mp4", "3/7.mp4", "4/9.mp4"]
    assert report["clips"]["files"] == ["0/1.mp4", "1/3.mp4", "2/5.mp4", "3/6.mp4", "4/8.mp4"]
    int8 = report["int8"]
    assert (int8["scales"], int8["float32_layers"]) == ("fixed", [])
    assert "one of each of 5 videos of the 10 in videos" in printed

    model = make_model(case_config("factorised_encoder", id2label=LABELS))
    processor = ViViTVideoProcessor.from_pretrained(output)
    clips = {
        part: torch.cat([one_clip(processor, videos / name) for name in report[part]["files"]])
        for part in ("int8_calibration", "clips")
    }
    scales, _ = static_scales(model, clips["int8_calibration"].split(1))
    expected = rounding_logits(model, scales, clips["clips"])
    assert (run_onnx(output / INT8_FILE, clips["clips"]) - expected).abs().max() < 0.02 * expected.abs().max()


def one_clip(processor, path):
    return processor(path, num_clips=1, num_crops=1, generator=0)["pixel_values"]


def test_calibration_and_check_may_have_folders_of_their_own(tmp_path, export):
    videos = write_videos(tmp_path / "videos", 8)
    arguments = ("--int8", "--calibration", videos / "0")
    assert_refused(
        export(*arguments), tmp_path, "has 1 video files besides the 1 of the calibration; expected 4 or more"
    )
    code, _, errors, output = export(*arguments, "--videos", videos)
    assert (code, errors) == (0, "")
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["int8_calibration"]["files"] == ["0.mp4", "1.mp4"]
    assert report["clips"]["files"] == ["1/2.mp4", "1/3.mp4", "2/4.mp4", "2/5.mp4", "3/6.mp4", "3/7.mp4"]

    (tmp_path / "none").mkdir()
    (tmp_path / "exported").rename(tmp_path / "first")
    assert_refused(export("--int8", "--calibration", tmp_path / "none"), tmp_path, "none has 0 video files")
    (videos / "0" / "1.mp4").write_bytes(b"no video")
    assert_refused(export(*arguments, "--videos", videos), tmp_path, "1.mp4")


@pytest.mark.parametrize("has_several", [False, True])
def test_a_calibrated_model_keeps_plain_logits_and_says_how_to_read_them(tmp_path, export, has_several):
    calibration = {"temperatures": [2.5], "num_files": 40, "num_units": 40, "num_clips": 1, "num_crops": 1}
    calibration |= {"averaging": "probabilities", **({"thresholds": [0.4] * 5} if has_several else {})}
    problem = "multi_label_classification" if has_several else "single_label_classification"
    calibration["weights"] = answer_fingerprint(make_model(case_config("factorised_encoder", id2label=LABELS)))
    source = save_tiny(tmp_path / "sure", calibration=calibration, problem_type=problem)
    code, _, errors, output = export("--int8", "--num-clips-checked", 6, model=source)
    assert (code, errors) == (0, "")
    model = make_model(case_config("factorised_encoder", id2label=LABELS))
    clips = torch.cat([random_clip(model.config, seed) for seed in range(6)])
    with torch.no_grad():
        expected = model(clips).logits
    assert (run_onnx(output / MODEL_FILE, clips) - expected).abs().max() < 1e-4
    for name in (MODEL_FILE, INT8_FILE):
        said = metadata(output / name)
        assert said["temperatures"] == "[2.5]" and said["problem_type"] == problem
        assert json.loads(said.get("thresholds", "null")) == ([0.4] * 5 if has_several else None)
    quantised = torch.cat([run_onnx(output / INT8_FILE, clip[None]) for clip in clips])
    link = torch.sigmoid if has_several else lambda logits: logits.softmax(dim=-1)
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["int8"]
    difference = (link(quantised / 2.5) - link(expected / 2.5)).abs().max().item()
    assert report["max_abs_difference_of_probabilities"] == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision_are_exported_in_float32(tmp_path, export, dtype):
    source = save_tiny(tmp_path / "half")
    model = make_model(case_config("factorised_encoder", id2label=LABELS)).to(dtype)
    model.save_pretrained(source)
    code, _, errors, output = export("--int8", "--calibration", write_videos(tmp_path / "videos", 8), model=source)
    assert (code, errors) == (0, "")
    clips = make_clips(model.config, 3)
    with torch.no_grad():
        expected = model.float()(clips).logits
    assert (run_onnx(output / MODEL_FILE, clips) - expected).abs().max() < 1e-4
    assert (run_onnx(output / INT8_FILE, clips) - expected).abs().max() < 0.1 * expected.abs().max()


# Merged tokens


def test_tokens_merge_on_request(tmp_path, export):
    model = make_model(case_config("factorised_encoder", id2label=LABELS, merge_tokens=[5, 3]))
    code, printed, errors, output = export("--merge-tokens", 5, 3, "--int8", "--num-clips-checked", 6)
    assert (code, errors) == (0, "")
    assert ViViTConfig.from_pretrained(output).merge_tokens == [5, 3]
    assert metadata(output / MODEL_FILE)["merge_tokens"] == "[5, 3]"
    clips = torch.cat([random_clip(model.config, seed) for seed in range(6)])
    given = make_model(case_config("factorised_encoder", id2label=LABELS))
    with torch.no_grad():
        merged, plain = model(clips).logits, given(clips).logits
    assert (run_onnx(output / MODEL_FILE, clips) - merged).abs().max() < 1e-4 < (merged - plain).abs().max()

    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    difference = (merged.softmax(dim=-1) - plain.softmax(dim=-1)).abs().max().item()
    assert report["merging"]["max_abs_difference_of_probabilities"] == pytest.approx(difference, abs=1e-5)
    assert report["merging"]["merge_tokens"] == [5, 3]
    assert "tokens merged from 15 to 7 per time step" in printed
    # The price of int8 is measured against the model as it was given, too.
    quantised = torch.cat([run_onnx(output / INT8_FILE, clip[None]) for clip in clips])
    difference = (quantised.softmax(dim=-1) - plain.softmax(dim=-1)).abs().max().item()
    assert report["int8"]["max_abs_difference_of_probabilities"] == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("variant", ["factorised_self_attention", "factorised_dot_product_attention"])
def test_models_that_need_the_whole_grid_refuse_to_merge(tmp_path, export, variant):
    folder = tmp_path / "grid"
    model = make_model(case_config(variant))
    model.save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    assert_refused(export("--merge-tokens", 2, model=folder), tmp_path, "`merge_tokens=2`", variant, "Model 1 or 2")


def test_a_schedule_of_another_length_is_refused(tmp_path, export):
    assert_refused(export("--merge-tokens", 2, 2, 2), tmp_path, "has 3 numbers", "`num_hidden_layers=2`")


def add_to_logits(monkeypatch, additions):
    """Let the exported model's logits of the checked clips, by their place, be larger than they are."""
    plain = onnx_models.onnx_logits

    def larger(*arguments):
        logits = plain(*arguments)
        for place in additions:
            logits[place, 0] += 1
        return logits

    monkeypatch.setattr(onnx_models, "onnx_logits", larger)


def test_a_few_clips_may_merge_other_tokens(export, monkeypatch):
    add_to_logits(monkeypatch, [2, 4])
    code, printed, _, output = export("--merge-tokens", 2, "--num-clips-checked", 8)
    assert code == 0 and "the 5 of 8 clips that differ least (most: 1.0e+00)" in printed
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["float32"]["max_abs_difference_of_logits"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("additions", "options"), [([2], []), ([1, 2], ["--merge-tokens", 2]), ([0, 4, 5], ["--merge-tokens", 2])]
)
def test_more_other_logits_are_not_kept(tmp_path, export, monkeypatch, additions, options):
    add_to_logits(monkeypatch, additions)
    assert_refused(export("--num-clips-checked", 8, *options), tmp_path, "parity: logits", "nothing was written")


def test_settings_of_tune_stay_with_the_model_in_pytorch(tmp_path, export):
    stored = {"name": "merging", "weights": "abc", "device": "cpu", "dtype": "float32", "int8_inputs": None}
    stored |= {"merge_tokens": [2, 2], "measured": {}}
    source = save_tiny(tmp_path / "tuned", optimization=stored)
    assert ViViTConfig.from_pretrained(source).optimization["merge_tokens"] == [2, 2]
    code, _, errors, output = export("--num-clips-checked", 4, model=source)
    assert (code, errors) == (0, "")
    assert ViViTConfig.from_pretrained(output).optimization is None
    clips = make_clips(ViViTConfig.from_pretrained(output), 3)
    with torch.no_grad():
        expected = make_model(case_config("factorised_encoder", id2label=LABELS))(clips).logits
    assert (run_onnx(output / MODEL_FILE, clips) - expected).abs().max() < 1e-4


# What is not kept


@pytest.mark.parametrize("options", [[], ["--merge-tokens", 2]])
def test_a_graph_with_other_logits_is_not_kept(tmp_path, export, monkeypatch, options):
    def write_damaged(model, *arguments):
        with torch.no_grad():
            model.vivit.encoder.layer[1].mlp.fc2.weight.view(-1)[-1] += 1e-1
        write_onnx(model, *arguments)

    monkeypatch.setattr(onnx_models, "write_onnx", write_damaged)
    assert_refused(export(*options), tmp_path, "parity: logits", "nothing was written")


def test_a_graph_with_a_fixed_batch_size_is_not_kept(tmp_path, export, monkeypatch):
    static = torch.export.Dim.STATIC
    monkeypatch.setattr(torch.export, "Dim", lambda name: static)
    assert_refused(export(), tmp_path, "cannot run model.onnx", "index: 0 Got: 1 Expected: 2")


def test_a_full_output_folder_is_left_alone(tmp_path, export):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "precious.txt").write_text("keep")
    code, _, errors, output = export()
    assert code == 1 and "not an empty folder" in errors
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--opset", 17], "--opset 17 is too old; torch exports to 18 or newer"),
        (["--num-clips-checked", 3], "--num-clips-checked 3 is too few: 4 are needed"),
        (["--videos", "nowhere"], "nowhere"),
        (["--calibration", "nowhere"], "--calibration requires --int8"),
        (["--int8", "--calibration", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, export, options, expected):
    assert_refused(export(*options), tmp_path, expected)


def test_an_opset_that_torch_does_not_know_is_refused(export):
    code, _, errors, output = export("--opset", 99)
    assert code == 1 and not output.exists()
    assert "to opset 99" in errors and "choose another --opset, such as 20" in errors


def test_models_that_cannot_be_exported_are_refused(tmp_path, export):
    def refuse(name, *expected, options=(), **fields):
        assert_refused(export(*options, model=save_tiny(tmp_path / name, **fields)), tmp_path, *expected)

    refuse("headless", "num_labels=0", num_labels=0)
    refuse("regression", "leave --int8 out", options=["--int8"], problem_type="regression")
    refuse("one_output", "leave --merge-tokens out", options=["--merge-tokens", 1], num_labels=1)
    refuse("longer", "num_frames=9, but config.json has 8", processor={"num_frames": 9})
    (tmp_path / "empty").mkdir()
    assert_refused(export(model=tmp_path / "empty"), tmp_path, "empty has no config.json")
    assert_refused(export(model=tmp_path / "nowhere"), tmp_path, "nowhere")

    write_video(tmp_path / "one.mp4")
    assert_refused(export("--videos", tmp_path), tmp_path, "has 1 video files; expected 4 or more")
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4", num_frames=18, width=96)
    wrong = {"crop_size": {"height": 24, "width": 24}}
    refuse("cropped", "(1, 8, 3, 24, 24)", "crop_size", options=["--videos", tmp_path], processor=wrong)
