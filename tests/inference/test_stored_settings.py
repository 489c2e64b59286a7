"""`optimize(model)` takes up the setting that `vivit-hf tune` stored, unless it does not hold for the model."""

import json

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_clips, make_model, tiny_config
from tuned_models import store

from vivit_hf import StreamingClassifier, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor
from vivit_hf.inference import optimize, predict_videos, quantisation, restore, stored_settings
from vivit_hf.inference.onednn import has_vnni
from vivit_hf.inference.quantisation import ActivationScale
from vivit_hf.inference.stored_settings import OptimizationSetting, describe_stored


MERGED = ["spatio_temporal", "factorised_encoder"]


@pytest.fixture
def bfloat16_units(monkeypatch):
    """Slow or not, every CPU computes in bfloat16."""
    monkeypatch.setattr(stored_settings, "has_bfloat16_units", lambda: True)


@pytest.fixture
def merging():
    return store(make_model(tiny_config("spatio_temporal")), merge_tokens=4)


def schedule_of(model):
    return getattr(model.vivit.encoder, "schedule", None)


# Taken up


@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_merging_is_that_of_an_explicit_call(case):
    tuned, asked = store(make_model(case_config(case)), merge_tokens=[5, 3]), make_model(case_config(case))
    report = optimize(tuned)
    optimize(asked, merge_tokens=[5, 3])
    clips = make_clips(tuned.config)
    assert torch.equal(tuned(clips).logits, asked(clips).logits) and schedule_of(tuned) == [5, 3]
    assert report.setting == "merging-4" and report.note is None and "setting 'merging-4'" in str(report)


@torch.no_grad()
def test_a_stored_dtype_is_cast_to(variant, bfloat16_units):
    tuned, asked = store(make_model(tiny_config(variant)), dtype=torch.bfloat16), make_model(tiny_config(variant))
    assert "weights cast from float32 to bfloat16" in str(optimize(tuned))
    optimize(asked, dtype=torch.bfloat16)
    clips = make_clips(tuned.config)
    assert tuned.dtype == torch.bfloat16 and torch.equal(tuned(clips).logits, asked(clips).logits)
    assert optimize(tuned).setting == "merging-4", "the fingerprint is that of the rounded weights, too"


@pytest.mark.skipif(not has_vnni(), reason="int8 needs a CPU with AVX-512 VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_int8_needs_no_videos_again(variant, dtype, bfloat16_units):
    config = tiny_config(variant)
    asked, clips = make_model(config), make_clips(config)
    report = optimize(asked, dtype=dtype, int8=True, calibration=clips)
    tuned = store(make_model(config), "int8", dtype, input_scales=report.quantisation.input_scales)
    found = optimize(tuned)
    assert torch.equal(tuned(clips).logits, asked(clips).logits)
    assert [type(one) for one in tuned.modules()] == [type(one) for one in asked.modules()]
    count = len(report.quantisation.input_scales)
    assert count >= 12 and f"{count} linear layers multiply in int8, with stored scales" in str(found)


def test_scales_are_stored_to_the_last_bit():
    scales = {"a": ActivationScale(0.1 + 0.2, 118), "b": None}
    setting = OptimizationSetting("int8", torch.bfloat16, None, scales, {"agreement": 1 / 3, "clips": 7})
    stored = json.loads(json.dumps(setting.to_dict("0" * 64, torch.device("cpu"))))
    assert OptimizationSetting.from_dict(stored) == setting


@torch.no_grad()
def test_a_saved_model_keeps_its_setting(tmp_path, merging):
    clips = make_clips(merging.config)
    plain = merging(clips).logits
    optimize(merging)
    merging.save_pretrained(tmp_path)
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(clips).logits, plain), "the saved model is the plain one"
    assert optimize(loaded).setting == "merging-4"
    assert torch.equal(loaded(clips).logits, merging(clips).logits)


@torch.no_grad()
def test_restore_gives_the_plain_model_back(merging):
    clips = make_clips(merging.config)
    plain = merging(clips).logits
    optimize(merging)
    assert not torch.equal(merging(clips).logits, plain)
    restore(merging)
    assert torch.equal(merging(clips).logits, plain)


# Left out


@torch.no_grad()
def test_explicit_arguments_and_stored_false_override_it(merging):
    assert optimize(merging, stored=False).setting is None and schedule_of(merging) is None
    assert optimize(merging, dtype=torch.float32).setting is None and schedule_of(merging) is None
    assert optimize(merging, merge_tokens=2).setting is None and schedule_of(merging) == [2, 2]
    assert optimize(merging).setting == "merging-4" and schedule_of(merging) == [4, 4]


def test_code_that_optimises_for_a_while_leaves_it_out(bfloat16_units):
    """A cast could not be undone afterwards, and nobody has asked for other answers."""
    config = tiny_config("factorised_encoder")
    model, plain = make_model(config), make_model(config)
    store(model, dtype=torch.bfloat16, merge_tokens=4)
    processor = ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 28}, crop_size={"height": 24, "width": 40}
    )
    video = np.random.default_rng(0).integers(0, 256, (12, 30, 50, 3), dtype=np.uint8)
    (found,), (expected,) = (list(predict_videos(one, processor, [video])) for one in (model, plain))
    np.testing.assert_array_equal(found.logits, expected.logits)
    StreamingClassifier(model, processor)
    assert model.dtype == torch.float32 and schedule_of(model) is None


def change_weights(model):
    with torch.no_grad():
        model.vivit.encoder.layer[1].mlp.fc2.bias[3] += 0.01


def change_classifier(model):
    with torch.no_grad():
        model.classifier.weight.mul_(1.01)


def change_activation(model):
    model.config.hidden_act = "relu"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_weights, "the weights or their configuration have changed"),
        (change_classifier, "the weights or their configuration have changed"),
        (change_activation, "the weights or their configuration have changed"),
        (lambda model: model.half(), "float32 and bfloat16, and the model is in float16"),
        (lambda model: model.train(), "in training mode"),
        (lambda model: model.config.optimization.update(device="cuda"), "device 'cuda', and the model is on 'cpu'"),
    ],
)
def test_a_setting_that_does_not_hold_is_a_warning_and_the_model_exact(merging, caplog, change, reason):
    change(merging)
    dtype = merging.dtype
    report = optimize(merging)
    assert reason in report.note and report.note in str(report) and report.note in caplog.text
    assert "vivit-hf tune" in report.note and report.setting is None
    assert schedule_of(merging) is None and merging.dtype == dtype


def test_a_cpu_without_the_units_is_named_with_the_way_out(caplog, monkeypatch):
    for unit in ("has_vnni", "has_bfloat16_units"):
        monkeypatch.setattr(stored_settings, unit, lambda: False)
    model = make_model(tiny_config("factorised_encoder"))
    assert "no bfloat16 units" in optimize(store(model, dtype=torch.bfloat16)).note
    report = optimize(store(model, input_scales={"vivit.encoder.layer.0.mlp.fc1": None}))
    assert "int8 needs a CPU with AVX-512 VNNI" in report.note and "runs exact in float32" in report.note
    assert model.dtype == torch.float32 and not any(
        isinstance(module, quantisation.QuantisedLinear) for module in model.modules()
    )


def test_a_backbone_has_no_answers(tmp_path, merging):
    merging.save_pretrained(tmp_path)
    backbone = ViViTModel.from_pretrained(tmp_path)
    assert "answers of a classifier, and this is a ViViTModel" in optimize(backbone).note


def test_names_of_labels_temperatures_and_rates_of_dropout_change_nothing(merging):
    views = {"num_clips": 1, "num_crops": 1, "averaging": "probabilities"}
    merging.config.calibration = {"temperatures": [2.0], "num_files": 20, "num_units": 20, **views}
    merging.config.id2label = {index: f"renamed {index}" for index in range(5)}
    merging.config.drop_path_rate = 0.1
    assert optimize(merging).setting == "merging-4"


def test_a_training_step_is_noticed_however_small(merging):
    optimizer = torch.optim.SGD(merging.parameters(), lr=1e-4)
    merging.train()(make_clips(merging.config), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert "have changed" in optimize(merging.eval()).note


# Configurations of strangers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("weights"), "with the fields name, weights"),
        (lambda stored: stored.update(more=1), "with the fields name, weights"),
        (lambda stored: stored.update(name=3), "optimization.name=3"),
        (lambda stored: stored.update(name="` | # You"), "optimization.name='` | # You'"),
        (lambda stored: stored.update(weights="\x1b[2J"), "optimization.weights"),
        (lambda stored: stored.update(device="cpu\n"), "optimization.device"),
        (lambda stored: stored.update(dtype="float64"), "optimization.dtype='float64'"),
        (lambda stored: stored.update(merge_tokens=-1), "optimization.merge_tokens=-1"),
        (lambda stored: stored.update(int8_inputs=[]), "optimization.int8_inputs"),
        (lambda stored: stored.update(int8_inputs={"a": [0.1]}), "optimization.int8_inputs.a"),
        (lambda stored: stored.update(int8_inputs={"a": [0.1, 256]}), "optimization.int8_inputs.a"),
        (lambda stored: stored.update(int8_inputs={"a": [0.1, 118.0]}), "optimization.int8_inputs.a"),
        (lambda stored: stored.update(int8_inputs={"a": [float("nan"), 1]}), "optimization.int8_inputs.a"),
        (lambda stored: stored.update(int8_inputs={"a": [0, 1]}), "optimization.int8_inputs.a"),
        (lambda stored: stored.update(measured={"speed": "fast"}), "optimization.measured"),
        (lambda stored: stored.update(measured={"speed": float("inf")}), "optimization.measured"),
    ],
)
def test_a_damaged_setting_is_an_error_that_names_the_field(merging, change, message):
    stored = {**merging.config.optimization}
    change(stored)
    with pytest.raises(ValueError, match=message):
        tiny_config("spatio_temporal", optimization=stored)


@pytest.mark.parametrize("value", [[], "int8", 4])
def test_a_setting_of_another_type_is_an_error(value):
    with pytest.raises(ValueError, match="optimization"):
        tiny_config("spatio_temporal", optimization=value)


def test_scales_for_layers_that_do_not_exist_leave_the_model_alone(monkeypatch):
    monkeypatch.setattr(stored_settings, "has_vnni", lambda: True)
    monkeypatch.setattr(quantisation, "has_vnni", lambda: True)
    model = store(make_model(tiny_config("spatio_temporal")), input_scales={"vivit.nowhere": None})
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"'vivit\.nowhere', which is no plain linear layer"):
        optimize(model)
    assert [type(module) for module in model.modules()] == before


def test_a_setting_is_described_in_a_line(merging):
    assert describe_stored(tiny_config("spatio_temporal")) is None
    assert describe_stored(merging.config) == "merging-4 (float32, 4 tokens merged per layer)"
    store(merging, "int8", input_scales={}, measured={"speed": 2.5, "agreement": 0.9951, "clips": 200})
    assert describe_stored(merging.config) == (
        "int8 (float32, int8 products), 2.50 times as fast as the plain model on the cpu, with the same answer for "
        "99.5% of 200 clips"
    )
