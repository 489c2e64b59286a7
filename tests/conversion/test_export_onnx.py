"""Exported graphs give the logits of PyTorch for any batch size, and failed exports leave no files."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from image_conversion import assert_refused
from paths import ROOT
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model
from torch import nn
from video_files import write_video

from vivit_hf import ViViTConfig, ViViTVideoProcessor
from vivit_hf.calibration_vivit import answer_fingerprint
from vivit_hf.conversion import onnx_int8, onnx_models
from vivit_hf.conversion.command import DEFAULT_OPSET, main
from vivit_hf.conversion.export_onnx import INT8_FILE, MODEL_FILE, REPORT_FILE, measure_agreement
from vivit_hf.conversion.onnx_int8 import static_scales, write_dynamic_int8, write_static_int8
from vivit_hf.conversion.onnx_models import LEAST_OPSET, size_of, write_onnx
from vivit_hf.conversion.parity import random_clip
from vivit_hf.data.labels import LabelMap
from vivit_hf.initialisation.model_processor import processor_for
from vivit_hf.initialisation.weight_files import ConversionError
from vivit_hf.modeling_vivit import ViViTAttention, ViViTMLP


SCRIPT = ROOT / "conversion" / "export_onnx.py"
CASES = [*ATTENTION_TYPES, "average_pool_baseline", "uniform_frames", "temporal_attention_pooling"]
CASES += ["registers_as_in_dinov2", "pre_layernorm_as_in_clip", "merged_tokens", "merged_tokens_in_space"]
LABELS = {0: "wave", 1: "Größe", 2: "run", 3: "sit", 4: "jump"}
FILES = {MODEL_FILE, "config.json", "preprocessor_config.json", REPORT_FILE}


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # of the errors that are asked for here, too
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path, clips):
    (logits,) = session(path).run(None, {"pixel_values": clips.numpy()})
    return torch.from_numpy(logits)


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A model and the ONNX file it was exported to."""
    model = make_model(case_config(request.param))
    path = tmp_path_factory.mktemp("exported") / MODEL_FILE
    write_onnx(model, path, DEFAULT_OPSET, {"key": "value"})
    return model, path


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


# The graph


def test_every_batch_gives_the_logits_of_pytorch(exported):
    model, path = exported
    for batch in (1, 2, 5):
        clips = make_clips(model.config, batch, seed=batch)
        with torch.no_grad():
            expected = model(clips).logits
        actual = run_onnx(path, clips)
        assert actual.shape == expected.shape == (batch, 5)
        assert (actual - expected).abs().max() < 1e-4
        assert expected.std(dim=-1).min() > 1e-2  # or anything would agree


@pytest.mark.parametrize(
    ("sizes", "index", "got", "expected"),
    [({"num_frames": 7}, 1, 7, 8), ({"image_size": (32, 40)}, 3, 32, 24), ({"image_size": (24, 48)}, 4, 48, 40)],
)
def test_a_clip_of_another_size_is_an_error_that_names_it(exported, sizes, index, got, expected):
    model, path = exported
    with pytest.raises(Exception, match=rf"pixel_values(.|\n)*index: {index} Got: {got} Expected: {expected}"):
        run_onnx(path, make_clips(model.config, 2, **sizes))


def test_the_file_is_valid_and_holds_no_local_paths(exported):
    _, path = exported
    onnx.checker.check_model(path, full_check=True)
    assert [file.name for file in path.parent.iterdir() if "int8" not in file.name] == [MODEL_FILE]
    content = path.read_bytes()
    assert str(ROOT).encode() not in content and b"stack_trace" not in content
    assert metadata(path) == {"key": "value"}


def test_int8_with_scales_at_run_time_quantises_every_linear_layer_and_runs_with_every_batch(exported):
    model, path = exported
    quantised = path.with_name(INT8_FILE)
    write_dynamic_int8(path, quantised)
    onnx.checker.check_model(quantised, full_check=True)
    operators = [node.op_type for node in onnx.load(quantised).graph.node]
    assert operators.count("MatMulInteger") == sum(isinstance(module, nn.Linear) for module in model.modules())
    assert quantised.stat().st_size < path.stat().st_size
    for batch in (1, 2, 5):
        clips = make_clips(model.config, batch, seed=batch)
        with torch.no_grad():
            expected = model(clips).logits
        difference = (run_onnx(quantised, clips) - expected).abs().max()
        assert 1e-4 < difference < 0.1 * expected.abs().max()


@torch.no_grad()
def rounding_logits(model, scales, clips):
    """The logits of a model whose linear layers round their inputs and weights, in float64, and multiply these."""
    layers, handles = dict(model.named_modules()), []
    for name, scale in scales.items():
        weight = layers[name].weight
        steps = weight.double().abs().amax(dim=1, keepdim=True) / 127
        weight_used = (weight.double() / steps).round() * steps

        def product(layer, inputs, output, scale=scale, rounded=weight_used):
            numbers = (inputs[0].double() / scale.scale).round() + scale.zero_point
            tokens = (numbers.clamp(0, 255) - scale.zero_point) * scale.scale
            return (tokens @ rounded.T + layer.bias.double()).float()

        handles.append(layers[name].register_forward_hook(product))
    logits = model(clips).logits
    for handle in handles:
        handle.remove()
    return logits


def test_int8_with_fixed_scales_computes_the_rounded_products(exported):
    model, path = exported
    scales, kept = static_scales(model, make_clips(model.config, 4, seed=9).split(1))
    blocks = [module for module in model.modules() if isinstance(module, (ViViTAttention, ViViTMLP))]
    assert len(scales) == sum(isinstance(child, nn.Linear) for block in blocks for child in block.children())
    assert kept == []
    quantised = path.with_name("static_int8.onnx")
    write_static_int8(path, quantised, scales)
    assert metadata(quantised) == {"key": "value"} and quantised.stat().st_size < path.stat().st_size
    clips = make_clips(model.config, 5, seed=1)
    with torch.no_grad():
        exact = model(clips).logits
    actual = run_onnx(quantised, clips)
    # Where a sum ends near the middle of two numbers, its rounding differs.
    assert (actual - rounding_logits(model, scales, clips)).abs().max() < 0.02 * exact.abs().max()
    assert 1e-4 < (actual - exact).abs().max() < 0.1 * exact.abs().max()
    alone = torch.cat([run_onnx(quantised, clip[None]) for clip in clips])
    torch.testing.assert_close(alone, actual, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_a_layer_that_one_scale_does_not_suit_stays_in_float32(tmp_path, monkeypatch):
    model = make_model(case_config("spatio_temporal"))
    measured, odd = onnx_int8.output_error, model.vivit.encoder.layer[1].mlp.fc2
    monkeypatch.setattr(onnx_int8, "output_error", lambda layer, *rest: 1 if layer is odd else measured(layer, *rest))
    scales, kept = static_scales(model, [make_clips(model.config)])
    assert kept == ["vivit.encoder.layer.1.mlp.fc2"]
    write_onnx(model, tmp_path / MODEL_FILE, DEFAULT_OPSET)
    write_static_int8(tmp_path / MODEL_FILE, tmp_path / INT8_FILE, scales)
    graph = onnx.load(tmp_path / INT8_FILE).graph
    weights = {weight.name: weight.data_type for weight in graph.initializer}
    (node,) = [node for node in graph.node if node.name == kept[0]]
    assert weights[node.input[1]] == onnx.TensorProto.FLOAT
    matrices = [name for name, kind in weights.items() if kind == onnx.TensorProto.INT8 and name.endswith("_int8")]
    assert len(matrices) == len(scales) == 11


def test_equal_weights_with_other_inputs_have_scales_of_their_own(tmp_path):
    """The exporter stores equal weights once."""
    model = make_model(case_config("spatio_temporal"))
    with torch.no_grad():
        for layer in model.vivit.encoder.layer:
            layer.mlp.fc1.weight.copy_(model.vivit.encoder.layer[0].mlp.fc1.weight)
    clips = make_clips(model.config, 3)
    scales, _ = static_scales(model, [clips])
    write_onnx(model, tmp_path / MODEL_FILE, DEFAULT_OPSET)
    write_static_int8(tmp_path / MODEL_FILE, tmp_path / INT8_FILE, scales)
    expected = rounding_logits(model, scales, clips)
    assert (run_onnx(tmp_path / INT8_FILE, clips) - expected).abs().max() < 0.02 * expected.abs().max()


def test_large_weights_are_written_to_a_second_file(tmp_path, monkeypatch):
    model = make_model(case_config("spatio_temporal"))
    monkeypatch.setattr(onnx_models, "MOST_BYTES_IN_ONE_FILE", 1000)
    write_onnx(model, tmp_path / MODEL_FILE, DEFAULT_OPSET, {"key": "value"})
    write_dynamic_int8(tmp_path / MODEL_FILE, tmp_path / INT8_FILE, is_large=True)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {MODEL_FILE, f"{MODEL_FILE}.data", INT8_FILE, f"{INT8_FILE}.data"}
    for name in (MODEL_FILE, INT8_FILE):
        assert size_of(tmp_path / name) > 4 * (tmp_path / name).stat().st_size / 3
    assert metadata(tmp_path / MODEL_FILE) == {"key": "value"}
    clips = make_clips(model.config, 3)
    scales, _ = static_scales(model, [clips])
    write_static_int8(tmp_path / MODEL_FILE, tmp_path / "static.onnx", scales, is_large=True)
    assert (tmp_path / "static.onnx.data").stat().st_size > 3 * (tmp_path / "static.onnx").stat().st_size / 4
    with torch.no_grad():
        expected = model(clips).logits
    assert (run_onnx(tmp_path / MODEL_FILE, clips) - expected).abs().max() < 1e-4
    assert (run_onnx(tmp_path / "static.onnx", clips) - expected).abs().max() < 0.1 * expected.abs().max()
    assert (run_onnx(tmp_path / INT8_FILE, clips) - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_file_has_the_requested_opset(tmp_path):
    model = make_model(case_config("spatio_temporal"))
    write_onnx(model, tmp_path / MODEL_FILE, LEAST_OPSET)
    (opset,) = onnx.load(tmp_path / MODEL_FILE).opset_import
    assert opset.version == LEAST_OPSET
    clips = make_clips(model.config, 3)
    with torch.no_grad():
        assert (run_onnx(tmp_path / MODEL_FILE, clips) - model(clips).logits).abs().max() < 1e-4


# What int8 costs


def test_agreement_compares_classes_and_probabilities():
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0]])
    actual = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    agreement = measure_agreement(actual, expected, LabelMap({"": ("a", "b")}))
    differences = [0, (2.718281828 - 1) / (2.718281828 + 1), 0, 1 / (1 + np.exp(-3)) - 1 / (1 + np.exp(-2))]
    assert agreement["top1_agreement"] == 0.75
    assert agreement["max_abs_difference_of_probabilities"] == pytest.approx(max(differences), rel=1e-5)
    assert agreement["mean_abs_difference_of_probabilities"] == pytest.approx(np.mean(differences), rel=1e-5)


def test_agreement_on_groups_means_agreement_on_each():
    label_map = LabelMap({"noun": ("a", "b"), "verb": ("c", "d", "e")})
    expected = torch.tensor([[0.0, 1.0, 3.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0]])
    actual = torch.tensor([[0.0, 2.0, 3.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 4.0]])
    assert measure_agreement(actual, expected, label_map)["top1_agreement"] == 0.5
    several = measure_agreement(actual, expected, LabelMap({"": tuple("abcde")}, has_several=True))
    assert several["max_abs_difference_of_probabilities"] == pytest.approx(1 / (1 + np.exp(-4)) - 0.5, rel=1e-5)


def test_logits_that_are_not_finite_are_an_error():
    logits = torch.zeros(2, 2)
    with pytest.raises(ConversionError, match="not finite"):
        measure_agreement(logits / 0, logits, LabelMap({"": ("a", "b")}))


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
