"""Exported graphs give the logits of PyTorch for any batch size, in float32 and int8."""

import numpy as np
import onnx
import pytest
import torch
from onnx_files import metadata, rounding_logits, run_onnx
from paths import ROOT
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model
from torch import nn

from vivit_hf.conversion import onnx_int8, onnx_models
from vivit_hf.conversion.command import DEFAULT_OPSET
from vivit_hf.conversion.export_onnx import INT8_FILE, MODEL_FILE, REPORT_FILE, measure_agreement
from vivit_hf.conversion.onnx_int8 import static_scales, write_dynamic_int8, write_static_int8
from vivit_hf.conversion.onnx_models import LEAST_OPSET, size_of, write_onnx
from vivit_hf.data.labels import LabelMap
from vivit_hf.initialisation.weight_files import ConversionError
from vivit_hf.modeling_vivit import ViViTAttention, ViViTMLP


SCRIPT = ROOT / "conversion" / "export_onnx.py"
CASES = [*ATTENTION_TYPES, "average_pool_baseline", "uniform_frames", "temporal_attention_pooling"]
CASES += ["registers_as_in_dinov2", "pre_layernorm_as_in_clip", "merged_tokens", "merged_tokens_in_space"]
LABELS = {0: "wave", 1: "Größe", 2: "run", 3: "sit", 4: "jump"}
FILES = {MODEL_FILE, "config.json", "preprocessor_config.json", REPORT_FILE}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A model and the ONNX file it was exported to."""
    model = make_model(case_config(request.param))
    path = tmp_path_factory.mktemp("exported") / MODEL_FILE
    write_onnx(model, path, DEFAULT_OPSET, {"key": "value"})
    return model, path


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
