"""int8 linear layers compute what their rounded numbers say, stay close to the plain ones, and can be undone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from moving_shapes import MOTIONS, Scene
from optimized_models import through_pickle
from tiny_models import CASES, case_config, make_clips, make_model, tiny_config
from torch import nn

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference import NonFiniteError, demo_model_path, optimize, quantisation, restore
from vivit_hf.inference.onednn import has_vnni
from vivit_hf.inference.quantisation import ActivationScale, QuantisedLinear, QuantisedMLP, quantised
from vivit_hf.modeling_vivit import ViViTEmbeddings


MERGED = ["spatio_temporal", "factorised_encoder", "registers_mean_pooling", "mean_pooling"]
needs_vnni = pytest.mark.skipif(not has_vnni(), reason="int8 needs a CPU with AVX-512 VNNI")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 48).eval()


@pytest.fixture
def tokens():
    return torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))


def in_numpy(layer, tokens, scale):
    """The product in whole numbers, as the definition of symmetric weights and asymmetric activations says."""
    weight = layer.weight.detach().numpy()
    weight_scale = np.abs(weight).max(axis=1) / 127
    whole = np.rint(weight / weight_scale[:, None]).astype(np.int64)
    numbers = np.clip(np.floor(tokens.numpy() / scale.scale + scale.zero_point + 0.5), 0, 255).astype(np.int64)
    product = (numbers - scale.zero_point) @ whole.T
    return torch.from_numpy(product * (scale.scale * weight_scale) + layer.bias.detach().numpy()).float()


# Activations


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=300),
    st.floats(1e-3, 1e3),
    st.integers(0, 255),
)
def test_rounding_is_off_by_half_a_step_at_most(values, step, zero_point):
    scale = ActivationScale(step, zero_point)
    values = torch.tensor(values)[:, None]
    numbers = quantised(values, scale)
    lowest, highest = -zero_point * step, (255 - zero_point) * step
    expected = values.double().clamp(lowest, highest)
    assert numbers.dtype == torch.uint8 and numbers.shape == values.shape
    error = ((numbers.double() - zero_point) * step - expected).abs().max()
    assert error <= step * 0.5001 + 1e-4 * step * zero_point


@given(st.floats(-50, 0), st.floats(0, 50), st.integers(2, 400))
def test_zero_is_a_whole_number_and_the_ends_are_in_the_range(low, high, count):
    values = torch.linspace(low, high, count)
    scale = ActivationScale.fitted(values)
    assert 0 <= scale.zero_point <= 255
    assert scale.rounded(torch.zeros(1)).item() == 0
    assert (scale.rounded(values) - values).abs().max() <= max(0.05 * (high - low), 1e-6)


def test_a_single_outlier_does_not_take_all_levels():
    values = torch.cat([torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    assert ActivationScale.fitted(values).scale < 0.7 * (values.max() - values.min()) / 255


# Layers


@needs_vnni
def test_a_layer_computes_the_product_of_whole_numbers(layer, tokens):
    scale = ActivationScale.fitted(tokens)
    expected = in_numpy(layer, tokens, scale)
    quantised_layer = QuantisedLinear.quantise(layer, scale)
    with torch.no_grad():
        torch.testing.assert_close(quantised_layer(tokens), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(quantised_layer(quantised(tokens, scale)), expected, atol=1e-4, rtol=1e-5)


@needs_vnni
@pytest.mark.parametrize("approximation", ["none", "tanh"])
def test_gelu_and_rounding_are_fused(layer, tokens, approximation):
    scale, output = ActivationScale.fitted(tokens), ActivationScale(0.01, 17)
    inner = nn.functional.gelu(in_numpy(layer, tokens, scale), approximate=approximation)
    numbers = QuantisedLinear.quantise(layer, scale).product(tokens, approximation, output)
    assert numbers.dtype == torch.uint8
    assert (numbers.int() - quantised(inner, output).int()).abs().max() <= 1


@needs_vnni
def test_scales_per_token_bear_a_token_of_outliers(layer, tokens):
    tokens[0, 3] *= 1000
    with torch.no_grad():
        expected = layer(tokens)
        assert quantisation.output_error(layer, tokens.flatten(0, 1)[:3], ActivationScale.fitted(tokens)) > 0.5
        actual = QuantisedLinear.quantise(layer, None)(tokens)
    relative = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert relative.max() < 0.03


# Models


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_stays_close_and_comes_back(case, dtype):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    model.to(dtype)
    with torch.no_grad():
        expected = model(clips.to(dtype)).logits
        report = optimize(model, int8=True, calibration=clips)
        actual = model(clips.to(dtype)).logits
        assert report.quantisation.errors and "multiply in int8" in str(report)
        assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
        restore(model)
        assert torch.equal(model(clips.to(dtype)).logits, expected)
    assert not any(type(module) in quantisation.PLAIN_CLASSES for module in model.modules())


@pytest.fixture
def pair():
    """A plain model and its quantised twin, with clips."""
    if not has_vnni():
        pytest.skip("int8 needs a CPU with AVX-512 VNNI")
    config = tiny_config("factorised_encoder")
    plain, twin = make_model(config), make_model(config)
    clips = make_clips(config)
    optimize(twin, int8=True, calibration=[clips[:1], clips[1:]])
    assert any(isinstance(module, QuantisedMLP) for module in twin.modules())
    return plain, twin, clips


def test_gradients_are_those_of_the_plain_model(pair):
    plain, twin, clips = pair
    for model in (plain, twin):
        model(clips).logits.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_hidden_states_and_attentions_are_there(pair):
    plain, twin, clips = pair
    for model in pair[:2]:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = [model(clips, output_hidden_states=True, output_attentions=True) for model in (plain, twin)]
    for name in ("hidden_states", "attentions"):
        one, other = (output[name] for output in outputs)
        assert [tensor.shape for tensor in one] == [tensor.shape for tensor in other]


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, lambda model: model.to(torch.float64).float()])
def test_copies_and_casts_have_plain_layers(pair, copied):
    plain, twin, clips = pair
    copy_ = copied(twin)
    assert not any(isinstance(module, QuantisedLinear) for module in copy_.modules())
    restore(copy_)
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
    restore(twin)
    with torch.no_grad():
        assert torch.equal(twin(clips).logits, plain(clips).logits)


def test_a_layer_whose_error_is_too_large_stays_and_is_named(monkeypatch):
    if not has_vnni():
        pytest.skip("int8 needs a CPU with AVX-512 VNNI")
    config = tiny_config("spatio_temporal")
    model, clips = make_model(config), make_clips(config)
    measured = quantisation.output_error

    def error(layer, tokens, scale):
        if layer is model.vivit.encoder.layer[0].mlp.fc1:
            return 0.5 if scale is not None else 0.01
        return 0.5 if layer is model.vivit.encoder.layer[1].attention.q_proj else measured(layer, tokens, scale)

    monkeypatch.setattr(quantisation, "output_error", error)
    report = optimize(model, int8=True, calibration=clips)
    assert report.quantisation.per_token == ("vivit.encoder.layer.0.mlp.fc1",)
    assert report.quantisation.kept == ("vivit.encoder.layer.1.attention.q_proj",)
    assert "scales per token, because of outliers: vivit.encoder.layer.0.mlp.fc1" in str(report)
    assert "not quantised, because the error is above 3%: vivit.encoder.layer.1.attention.q_proj" in str(report)
    with torch.no_grad():
        assert (model(clips).logits - make_model(config)(clips).logits).abs().max() < 0.3


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_int8_with_merged_tokens_stays_close_to_merging_and_comes_back(case, dtype):
    model, clips = make_model(case_config(case)).to(dtype), make_clips(case_config(case))

    def logits(**options):
        optimize(model, **options)
        return model(clips.to(dtype)).logits.float()

    plain = model(clips.to(dtype)).logits
    merged = logits(merge_tokens=[5, 3])
    both = logits(int8=True, calibration=clips, merge_tokens=[5, 3])
    assert 0 < (both - merged).norm() < 0.1 * merged.norm()
    assert (both - merged).norm() < (merged - plain).norm(), "nearer to merging than to the plain model"
    restore(model)
    assert torch.equal(model(clips.to(dtype)).logits, plain)


@pytest.fixture(scope="module")
def trained():
    """The demo model, clips to calibrate on, and 224 clips that it was not trained on."""
    model = ViViTForVideoClassification.from_pretrained(demo_model_path())
    processor = ViViTVideoProcessor.from_pretrained(demo_model_path())
    scenes = [Scene.draw(np.random.default_rng([7, number]), 24, 80, 96) for number in range(60)]
    videos = [scene.render(motion, 24) for scene in scenes for motion in MOTIONS]
    clips = processor(videos, return_tensors="pt")["pixel_values"]  # (240, frames, channels, height, width)
    return model, clips[:16], clips[16:]


@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize("merge_tokens", [None, 1, [2, 2, 0, 0]])
@torch.no_grad()
def test_the_demo_model_answers_the_same(trained, merge_tokens):
    model, calibration, clips = trained
    restore(model)
    plain = model(clips).logits
    optimize(model, int8=True, calibration=calibration, merge_tokens=merge_tokens)
    logits = model(clips).logits
    changes = logits.softmax(-1) - plain.softmax(-1)
    assert (logits.argmax(-1) == plain.argmax(-1)).float().mean() >= 0.99
    assert changes.abs().mean() <= 0.01
    restore(model)
    assert torch.equal(model(clips).logits, plain)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), r"model.eval\(\)"),
        (lambda model: model.half(), "float32 or bfloat16, got torch.float16"),
    ],
)
def test_a_model_that_cannot_be_quantised_is_refused(change, message, monkeypatch):
    monkeypatch.setattr(quantisation, "has_vnni", lambda: True)
    config = tiny_config("spatio_temporal")
    with pytest.raises(ValueError, match=message):
        optimize(change(make_model(config)), int8=True, calibration=make_clips(config))


@pytest.mark.parametrize("calibration", [None, []])
def test_clips_are_needed(calibration, monkeypatch):
    monkeypatch.setattr(quantisation, "has_vnni", lambda: True)
    with pytest.raises(ValueError, match="the pixel values of a few clips"):
        optimize(make_model(tiny_config("spatio_temporal")), int8=True, calibration=calibration)


def test_a_cpu_without_vnni_is_refused(monkeypatch):
    monkeypatch.setattr(quantisation, "has_vnni", lambda: False)
    config = tiny_config("spatio_temporal")
    with pytest.raises(ValueError, match="needs a CPU with AVX-512 VNNI"):
        optimize(make_model(config), int8=True, calibration=make_clips(config))


@needs_vnni
@pytest.mark.parametrize("case", CASES)
def test_nan_in_a_clip_is_an_error_and_no_answer(case):
    """Rounded to uint8, it would be a number."""
    model = make_model(case_config(case))
    clips = make_clips(model.config)
    optimize(model, int8=True, calibration=clips)
    damaged = clips.clone()
    damaged[-1, ..., 3, 3] = float("nan")
    with torch.inference_mode(), pytest.raises(NonFiniteError, match="The embedded clips contain NaN"):
        model(damaged)
    restore(model)
    assert type(model.base_model.embeddings) is ViViTEmbeddings
    with torch.inference_mode():
        assert model(damaged).logits[-1].isnan().all()


@needs_vnni
def test_after_an_error_no_tokens_merge():
    model = make_model(tiny_config("factorised_encoder"))
    clips = make_clips(model.config)
    with torch.inference_mode():
        expected = model(clips).logits
    with pytest.raises(ValueError, match="`calibration` is empty"):
        optimize(model, int8=True, merge_tokens=2, calibration=[])
    with torch.inference_mode():
        assert torch.equal(model(clips).logits, expected)


@needs_vnni
def test_a_damaged_model_is_named_before_a_layer_is_quantised():
    model = make_model(tiny_config("factorised_encoder"))
    with torch.no_grad():
        model.vivit.encoder.layer[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"The input of vivit\.encoder\.layer\.1\.mlp\.fc2 contains NaN"):
        optimize(model, int8=True, calibration=make_clips(model.config))
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
