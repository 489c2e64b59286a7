"""
int8 linear layers by torchao stay close to the plain ones, and can be undone; `make test-engines` runs this.

torchao computes the same numbers on a CPU, so only speed needs a GPU.
"""

import copy

import pytest
import torch
from optimized_models import through_pickle
from tiny_models import CASES, case_config, make_clips, make_model, tiny_config
from torch import nn

from vivit_hf import ViViTForVideoClassification
from vivit_hf.inference import optimization, optimize, restore


pytest.importorskip("torchao", reason="make test-engines installs it")
from vivit_hf.inference.gpu_quantisation import TorchaoLinear, quantise_layers_by_torchao


pytestmark = pytest.mark.engines


def quantised_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, TorchaoLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_stays_close_and_comes_back(case, dtype):
    config = case_config(case)
    model, clips = make_model(config).to(dtype), make_clips(config).to(dtype)
    with torch.no_grad():
        expected = model(clips).logits
        report = quantise_layers_by_torchao(model, clips)
        actual = model(clips).logits
        assert set(quantised_layers(model)) == set(report.errors) == set(report.input_scales)
        assert all(0 < error < 0.03 for error in report.errors.values()) and not report.kept
        assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
        restore(model)
        assert not quantised_layers(model)
        assert torch.equal(model(clips).logits, expected)


def test_a_layer_rounds_tokens_and_weights_to_whole_numbers():
    torch.manual_seed(0)
    layer, tokens = nn.Linear(64, 48).eval(), torch.randn(2, 40, 64)
    with torch.no_grad():
        expected = layer(tokens)
        actual = TorchaoLinear.quantise(layer)(tokens)
    # Rounding to 255 levels is off by a uniform half step at most: amax / 127 / sqrt(12) per number, in both factors.
    steps = (tokens.abs().amax(-1) / 127).square().mean() / 12 / tokens.square().mean()
    steps += (layer.weight.abs().amax(-1) / 127).square().mean() / 12 / layer.weight.square().mean()
    relative = (actual - expected).norm() / (expected - layer.bias).norm()
    assert 0.7 < relative / steps.sqrt() < 1.4


def test_a_few_tokens_are_multiplied_by_the_plain_weight():
    layer, tokens = nn.Linear(64, 48).eval(), torch.randn(2, 40, 64)
    with torch.no_grad():
        expected = layer(tokens)
        TorchaoLinear.quantise(layer)
        assert torch.equal(layer(tokens[:, :8]), expected[:, :8])
        assert not torch.equal(layer(tokens), expected)


def test_odd_sizes_and_outliers_stay_as_they_are():
    config = tiny_config("spatio_temporal", intermediate_size=44)
    model, clips = make_model(config), make_clips(config)
    with torch.no_grad():
        layer = model.vivit.encoder.layer[1]
        layer.layernorm_before.weight[3] = 1e4
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.weight[:, 3] = 0  # the outlier takes the levels, and nothing else
    report = quantise_layers_by_torchao(model, clips)
    odd = {f"vivit.encoder.layer.{layer}.mlp.{name}" for layer in (0, 1) for name in ("fc1", "fc2")}
    assert odd < set(report.kept)
    assert {f"vivit.encoder.layer.1.attention.{name}_proj" for name in "qkv"} <= set(report.kept)
    assert set(quantised_layers(model)).isdisjoint(report.kept)
    assert all(name in report.words()[1] for name in report.kept)


def test_errors_are_not_claimed_without_clips():
    report = quantise_layers_by_torchao(make_model(tiny_config("factorised_encoder")))
    assert not report.errors and "pass `calibration`" in report.words()[0]


@pytest.fixture
def pair():
    config = tiny_config("factorised_encoder")
    plain, twin = make_model(config), make_model(config)
    quantise_layers_by_torchao(twin)
    return plain, twin, make_clips(config)


def test_a_compiled_model_is_as_close_as_an_eager_one(pair):
    plain, twin, clips = pair
    with torch.no_grad():
        expected, eager = plain(clips).logits, twin(clips).logits
        compiled = torch.compile(twin, fullgraph=True)(clips).logits
    assert 0 < (compiled - expected).norm() < 1.5 * (eager - expected).norm()


def test_gradients_are_those_of_the_plain_model(pair):
    plain, twin, clips = pair
    for model in (plain, twin):
        model(clips).logits.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_forward_mode_derivatives_are_those_of_the_plain_model(pair):
    found = []
    for model in pair[:2]:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found.append(torch.func.jvp(lambda clips, model=model: model(clips).logits, (pair[2],), (pair[2],))[1])
    torch.testing.assert_close(*found)


def test_exported_models_are_plain(pair):
    plain, twin, clips = pair
    with torch.no_grad():
        exported = torch.export.export(twin, (clips,)).module()(clips).logits
        torch.testing.assert_close(exported, plain(clips).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, lambda model: model.to(torch.float64).float()])
def test_copies_and_casts_have_plain_layers(pair, copied):
    plain, twin, clips = pair
    copy_ = copied(twin)
    assert not quantised_layers(copy_)
    with torch.no_grad():
        assert torch.equal(copy_(clips).logits, plain(clips).logits)


def test_saved_files_hold_the_plain_weights(pair, tmp_path):
    plain, twin, clips = pair
    twin.save_pretrained(tmp_path)
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(clips).logits, plain(clips).logits)


def test_new_weights_are_used(pair):
    plain, twin, clips = pair
    state = {name: tensor * 1.5 for name, tensor in plain.state_dict().items()}
    for model in (plain, twin):
        model.load_state_dict(state)
    assert not quantised_layers(twin)
    with torch.no_grad():
        assert torch.equal(twin(clips).logits, plain(clips).logits)


def test_nan_is_not_hidden(pair):
    _, twin, clips = pair
    clips[0, 0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        logits = twin(clips).logits
    assert logits[0].isnan().all() and logits[1:].isfinite().all()


def test_settings_of_the_compiler_stay():
    import torch._inductor.config as settings

    before = copy.deepcopy(settings.save_config_portable())
    quantise_layers_by_torchao(make_model(tiny_config("spatio_temporal")))
    assert settings.save_config_portable() == before


def test_optimize_takes_torchao_for_models_that_are_not_on_a_cpu(pair, monkeypatch):
    plain = pair[0]
    monkeypatch.setattr(optimization, "check_int8", lambda *_: None)
    monkeypatch.setattr(type(plain), "device", property(lambda self: Elsewhere()))
    report = optimize(plain, int8=True)
    assert quantised_layers(plain) and "by torchao" in str(report)


class Elsewhere:
    """Stands in for the device of a GPU; the weights stay on the CPU."""

    type = "cuda"

    def __str__(self):
        return "cuda:0"
