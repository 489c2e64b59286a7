"""`optimize` changes the speed of a model and nothing else, says what it does, and can be undone."""

import pytest
import torch
from optimized_models import ONEDNN_HAS_BFLOAT16, assert_close, faster_modules, make_pair, optimised
from safetensors.torch import load_file
from tiny_models import CASES, MODEL_CLASSES, case_config, make_clips, make_model, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from vivit_hf import ViViTForVideoClassification
from vivit_hf.inference import optimization, optimize, restore
from vivit_hf.inference.optimization import PackedLinear, optimized
from vivit_hf.modeling_vivit import ViViTMLP


# `temporal_pooling` replaces the class token over time, and with it one of two faster layers.
WITH_CLASS_TOKEN = [
    case for case in CASES if case_config(case).pooling == "cls" and case_config(case).temporal_pooling is None
]


# The same outputs


@torch.no_grad()
def test_logits_are_those_of_the_plain_model(case, machine):
    plain, twin = make_pair(case, machine)
    assert faster_modules(twin)
    for sizes in ({}, {"num_frames": 12, "image_size": (32, 48)}, {"num_frames": 4}):
        clips = make_clips(plain.config, batch=3, **sizes)
        any_size = {"interpolate_pos_encoding": bool(sizes)}
        assert_close(twin(clips, **any_size).logits, plain(clips, **any_size).logits)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_in_bfloat16_are_those_of_the_plain_model(case):
    plain, twin = (make_model(case_config(case)) for _ in range(2))
    report = optimize(twin, dtype=torch.bfloat16)
    assert twin.dtype == torch.bfloat16 and "weights cast from float32 to bfloat16" in str(report)
    plain.to(torch.bfloat16)
    for sizes in ({}, {"num_frames": 12, "image_size": (32, 48)}):
        clips = make_clips(plain.config, **sizes)
        any_size = {"interpolate_pos_encoding": bool(sizes)}
        assert_close(twin(clips, **any_size).logits, plain(clips, **any_size).logits)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_plain_model(case):
    plain, twin = make_pair(case, "laid out")
    clips = make_clips(plain.config)
    for options in ({"output_hidden_states": True}, {"output_attentions": True}, {"output_hidden_states": [1, 2]}):
        for one, other in ((plain, twin), (plain.vivit, twin.vivit)):
            expected, actual = one(clips, **options), other(clips, **options)
            for name in ("hidden_states", "attentions"):
                assert (actual[name] is None) == (expected[name] is None) if name in expected else name not in actual
            pairs = zip(
                (*(expected.hidden_states or ()), *(expected.attentions or ())),
                (*(actual.hidden_states or ()), *(actual.attentions or ())),
                strict=True,
            )
            for tensor, found in pairs:
                assert (tensor is None) == (found is None)
                if tensor is not None:
                    assert_close(found, tensor)
    twin.config.output_hidden_states = True
    assert len(twin(clips).hidden_states) == len(plain(clips, output_hidden_states=True).hidden_states)


@torch.no_grad()
def test_recorders_that_were_there_before_keep_recording(variant, machine):
    model = make_model(case_config(variant))
    clips = make_clips(model.config)
    expected = model(clips, output_hidden_states=True).hidden_states
    optimised(model, machine)
    actual = model(clips, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for found, tensor in zip(actual, expected, strict=True):
        assert_close(found, tensor)


@pytest.mark.parametrize("cls", MODEL_CLASSES)
@torch.no_grad()
def test_features_are_those_of_the_plain_model(case, cls):
    model = make_model(case_config(case), cls)
    clips = make_clips(model.config)
    backbone = model.base_model
    expected = backbone(clips)
    optimised(model, "laid out")
    actual = backbone(clips)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_steps_that_a_stream_keeps_are_those_of_the_plain_model(machine):
    plain, twin = (make_model(tiny_config("factorised_encoder")) for _ in range(2))
    optimised(twin, machine)
    clips = make_clips(plain.config)
    steps = twin.vivit.encode_steps(clips)
    assert_close(steps, plain.vivit.encode_steps(clips))
    assert_close(twin.classify_steps(steps), plain(clips).logits)


# Less work


@pytest.mark.parametrize("case", WITH_CLASS_TOKEN)
def test_tokens_that_are_not_pooled_are_left_out(case, monkeypatch):
    monkeypatch.setattr(optimization, "has_avx512", lambda: False)  # the counter does not count oneDNN's operations
    model = make_model(case_config(case, attn_implementation="eager"))
    clips = make_clips(model.config)

    def multiply_adds(**options):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(clips, **options)
        return counter.get_total_flops()

    everything = multiply_adds()
    optimize(model)
    assert multiply_adds() < 0.85 * everything, "of two layers, most of one is left out"
    assert multiply_adds(output_hidden_states=True) == multiply_adds(output_attentions=True) == everything


def test_the_widest_tensor_exists_once():
    config = tiny_config("spatio_temporal", hidden_size=32, intermediate_size=512)
    mlp, hidden_states, wide = ViViTMLP(config), torch.randn(1, 1000, 32), 1000 * 512 * 4

    def allocated():
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            mlp(hidden_states)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    mlp(hidden_states)
    assert allocated() > 1.9 * wide
    mlp.__class__ = optimization.InPlaceMLP
    assert allocated() < 1.5 * wide


def test_laid_out_weights_take_no_more_memory():
    model = make_model(tiny_config("spatio_temporal", hidden_size=256, intermediate_size=1024))
    plain_bytes = sum(parameter.nbytes for parameter in model.parameters())
    optimised(model, "laid out")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 12
    kept = sum(parameter.nbytes for parameter in model.parameters()) + sum(one._packed.nbytes for one in packed)
    assert kept <= 1.05 * plain_bytes
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.2 * plain_bytes, "no plain copy is kept"


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu", "gelu_python", "quick_gelu", "relu"])
@torch.no_grad()
def test_every_activation_gives_the_output_of_the_plain_mlp(name, machine):
    model = make_model(tiny_config("spatio_temporal", hidden_act=name))
    mlp = model.vivit.encoder.layer[0].mlp
    hidden_states = 3 * torch.randn(2, 7, 32)
    kept, expected = hidden_states.clone(), mlp(hidden_states)
    optimised(model, machine)
    assert isinstance(mlp, optimization.InPlaceMLP) == (name in ("gelu_pytorch_tanh", "gelu"))
    with torch.profiler.profile() as profile:
        assert_close(mlp(hidden_states), expected)
    assert torch.equal(hidden_states, kept)
    fused = sum("_linear_pointwise" in event.name for event in profile.events())
    is_gelu = isinstance(mlp, optimization.InPlaceMLP)
    assert fused == {"plain CPU": 0, "AVX-512": int(is_gelu), "laid out": 2}[machine]


@torch.no_grad()
def test_modules_replaced_afterwards_are_the_ones_that_run(machine):
    model = make_model(tiny_config("spatio_temporal"))
    optimised(model, machine)
    mlp = model.vivit.encoder.layer[0].mlp
    hidden_states = torch.randn(2, 7, 32)
    kept = hidden_states.clone()
    mlp.activation = ACT2FN["relu"]
    assert_close(mlp(hidden_states), mlp.fc2(torch.relu(mlp.fc1(hidden_states))))
    mlp.activation, mlp.fc1, mlp.fc2 = ACT2FN["gelu"], torch.nn.Identity(), torch.nn.Identity()
    assert_close(mlp(hidden_states), torch.nn.functional.gelu(hidden_states))
    assert torch.equal(hidden_states, kept)


# Undone, repeated, saved


@torch.no_grad()
def test_restore_gives_the_plain_model_back_bit_for_bit(pair):
    plain, twin = pair
    clips = make_clips(plain.config)
    restore(twin)
    assert not faster_modules(twin)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        again = twin.get_parameter(name)
        assert torch.equal(again, parameter) and again.requires_grad, name
    assert [type(module) for module in twin.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(twin(clips).logits, plain(clips).logits)
    restore(twin)
    assert torch.equal(twin(clips).logits, plain(clips).logits)


def test_a_frozen_weight_is_frozen_afterwards():
    model = make_model(tiny_config("spatio_temporal"))
    frozen = model.vivit.encoder.layer[0].mlp.fc1.requires_grad_(False)
    optimised(model, "laid out")
    restore(model)
    assert not frozen.weight.requires_grad and model.vivit.encoder.layer[0].mlp.fc2.weight.requires_grad


@torch.no_grad()
def test_optimising_again_changes_nothing(pair, machine):
    plain, twin = pair
    clips = make_clips(plain.config)
    types = [type(module) for module in twin.modules()]
    expected = twin(clips).logits
    report = optimised(twin, machine)
    assert report.changes and [type(module) for module in twin.modules()] == types
    assert torch.equal(twin(clips).logits, expected)


@torch.no_grad()
def test_plain_weights_are_saved_under_plain_names(pair, tmp_path):
    plain, twin = pair
    plain.save_pretrained(tmp_path / "plain")
    twin.save_pretrained(tmp_path / "optimised")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "optimised"))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in ("config.json", "modeling_vivit.py"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "optimised" / name).read_bytes()
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        path.name for path in (tmp_path / "optimised").iterdir()
    }
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path / "optimised")
    assert not faster_modules(loaded)


@torch.no_grad()
def test_weights_that_are_loaded_afterwards_count(pair):
    plain, twin = pair
    clips = make_clips(plain.config)
    other = make_model(plain.config, seed=5)
    twin.load_state_dict(other.state_dict())
    assert_close(twin(clips).logits, other(clips).logits)


@torch.no_grad()
def test_within_the_block_and_no_longer(machine):
    model = make_model(tiny_config("spatio_temporal"))
    with optimized(model):
        assert faster_modules(model)
        with optimized(model):
            pass
        assert faster_modules(model), "the outer block goes on"
    assert not faster_modules(model)
    with optimized(model.train()):
        assert not faster_modules(model), "training never sees it"
    with optimized(torch.nn.Linear(2, 2)):
        pass


# What it says


def test_the_report_says_what_was_done(machine):
    model = make_model(tiny_config("factorised_encoder"))
    text = str(optimize(model))
    gelu = "GELU computed in place" if machine == "plain CPU" else "GELU fused into the product by oneDNN"
    assert text.splitlines() == [
        "Optimised for inference on cpu in float32:",
        f"- {gelu} (4 modules)",
        "- last layer computes the class token alone (2 modules)",
    ]
    nothing = make_model(tiny_config("spatio_temporal", hidden_act="relu", pooling="mean"))
    assert "nothing" in str(optimize(nothing)) and not faster_modules(nothing)


def test_other_devices_get_what_they_have_and_the_report_says_so():
    with torch.device("meta"):
        model = ViViTForVideoClassification(tiny_config("spatio_temporal")).eval()
    text = str(optimize(model, dtype=torch.bfloat16))
    assert "on meta in bfloat16" in text and "GELU computed in place" in text and "class token" in text
    assert "fused products and laid-out weights are for CPUs, and left out" in text


def test_what_cannot_be_optimised_is_an_error():
    with pytest.raises(TypeError, match=r"got Linear\. Merge adapters"):
        optimize(torch.nn.Linear(2, 2))
    model = make_model(tiny_config("spatio_temporal"))
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match=r"must be a floating-point torch\.dtype"):
            optimize(model, dtype=dtype)
    assert not faster_modules(model)


def test_a_laid_out_weight_says_so():
    model = make_model(tiny_config("spatio_temporal"))
    layer = model.vivit.encoder.layer[0].mlp.fc1
    weight = layer.weight.detach().clone()
    optimised(model, "laid out")
    assert torch.equal(layer.to_dense(), weight)
    with pytest.raises(AttributeError, match=r"vivit_hf\.inference\.restore"):
        layer.weight  # noqa: B018 (reading it is the test)


@pytest.mark.skipif(not ONEDNN_HAS_BFLOAT16, reason="oneDNN has no bfloat16 products on this CPU")
@pytest.mark.parametrize(("has_amx", "attention"), [(False, "blockwise"), (True, "sdpa")])
@torch.no_grad()
def test_bfloat16_units_get_laid_out_weights_and_the_faster_attention(monkeypatch, has_amx, attention):
    monkeypatch.setattr(optimization, "has_avx512", lambda: True)
    monkeypatch.setattr(optimization, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(optimization, "has_amx", lambda: has_amx)
    plain, twin = (make_model(tiny_config("factorised_encoder")).to(torch.bfloat16) for _ in range(2))
    text = str(optimize(twin))
    assert "laid out for oneDNN (24 modules)" in text and twin.config._attn_implementation == attention
    clips = make_clips(plain.config)
    assert_close(twin(clips).logits, plain(clips).logits)
    restore(twin)
    assert twin.config._attn_implementation == "sdpa" and torch.equal(twin(clips).logits, plain(clips).logits)
