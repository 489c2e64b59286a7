"""Each shortcut taken for speed gives the numbers of the plain path, and is not taken where it could be seen."""

import itertools

import pytest
import torch
from tiny_models import ATTENTION_TYPES, CASES, case_config, first, make_clips, make_model, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vivit_hf import ViViTModel, fast_paths_vivit
from vivit_hf.layers_vivit import ViViTMLP, eager_attention_forward


ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "relu")
# oneDNN multiplies bfloat16 from AVX-512 on; where it does not, that path cannot be reached.
FUSED_DTYPES = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Two roundings of different places, in the units of outputs around 1.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=["fused", "in place"])
def machine(request, monkeypatch):
    """A machine whose oneDNN is worth asking, and one where it is not."""
    for check in ("_has_avx512", "has_bfloat16_units"):
        monkeypatch.setattr(fast_paths_vivit, check, lambda: request.param == "fused")
    return request.param


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
def test_the_mlp_in_one_product_or_in_place_is_the_mlp(hidden_act, dtype, machine):
    mlp = ViViTMLP(tiny_config("spatio_temporal", hidden_act=hidden_act)).to(dtype)
    hidden_states = torch.randn(2, 7, mlp.fc1.in_features).to(dtype)
    kept = hidden_states.clone()
    expected = mlp.fc2(mlp.activation(mlp.fc1(hidden_states))).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), torch.profiler.profile() as profile:
            found = mlp(hidden_states)
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
        assert machine == "fused" or torch.equal(found, expected)
        num_fused = sum("_linear_pointwise" in event.name for event in profile.events())
        # The GELU is fused into the first product; of the second, in bfloat16, the bias.
        assert num_fused == (machine == "fused") * ((hidden_act != "relu") + (dtype == torch.bfloat16))
    assert torch.equal(hidden_states, kept)


def test_an_activation_that_is_put_in_later_is_the_one_that_counts(machine):
    mlp = ViViTMLP(tiny_config("spatio_temporal", hidden_act="gelu_pytorch_tanh"))
    hidden_states = 3 * torch.randn(2, 7, mlp.fc1.in_features)
    for name in ("gelu", "gelu_python", "quick_gelu", "gelu_pytorch_tanh"):
        mlp.activation = ACT2FN[name]
        expected = mlp(hidden_states).detach()
        with torch.no_grad():
            torch.testing.assert_close(mlp(hidden_states), expected, atol=2e-6, rtol=2e-6)
            assert (fast_paths_vivit._gelu_approximation(mlp.activation) is not None) == (
                name in ("gelu", "gelu_pytorch_tanh")
            )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_models_give_the_same_with_and_without_gradients(attention_type, machine):
    model = make_model(tiny_config(attention_type))
    clips = make_clips(model.config)
    with torch.enable_grad():
        expected = model(clips).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(clips).logits, expected.detach(), atol=1e-5, rtol=1e-5)
    expected.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_not_a_plain_linear_layer_is_called(machine):
    """Replaced, wrapped, in another dtype or under autocast: the layer itself runs, and what it does counts."""

    class Doubled(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    mlp = ViViTMLP(tiny_config("spatio_temporal")).eval()
    hidden_states = torch.randn(2, 7, mlp.fc1.in_features)
    doubled = Doubled(mlp.fc1.in_features, mlp.fc1.out_features)
    doubled.load_state_dict(mlp.fc1.state_dict())
    plain, mlp.fc1 = mlp.fc1, doubled
    expected = mlp.fc2(mlp.activation(2 * plain(hidden_states))).detach()
    with torch.no_grad():
        torch.testing.assert_close(mlp(hidden_states), expected)
        mlp.fc1, forward = plain, plain.forward
        plain.forward = lambda hidden_states: 2 * forward(hidden_states)  # as accelerate's offloading does
        torch.testing.assert_close(mlp(hidden_states), expected)
        del plain.forward
        with torch.autocast("cpu", torch.bfloat16):
            assert mlp(hidden_states).dtype == torch.bfloat16
        mlp.fc1 = torch.nn.Identity()
        mlp.fc2 = torch.nn.Identity()
        kept = hidden_states.clone()
        mlp(hidden_states)
        assert torch.equal(hidden_states, kept)


def test_what_a_wrapper_has_kept_stays_as_it_was(machine):
    """A probe around the layer keeps its output, which a GELU in place would change behind its back."""
    mlp = ViViTMLP(tiny_config("spatio_temporal")).eval()
    hidden_states, kept = torch.randn(2, 7, mlp.fc1.in_features), []
    expected = mlp.fc1(hidden_states).detach()
    mlp.fc1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    mlp.fc1 = torch.nn.Sequential(mlp.fc1)
    with torch.no_grad():
        mlp(hidden_states)
    assert torch.equal(kept[0], expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_forward_derivatives_need_no_gradients(attention_type, machine):
    """`no_grad` is about the backward mode alone."""
    model = make_model(tiny_config(attention_type, attn_implementation="eager")).to(torch.float64)
    clips = make_clips(model.config).double()
    direction = torch.randn_like(clips)
    _, expected = torch.func.jvp(lambda given: model(given).logits, (clips,), (direction,))
    with torch.no_grad():
        _, found = torch.func.jvp(lambda given: model(given).logits, (clips,), (direction,))
        model.float()
        _, single = torch.func.jvp(lambda given: model(given).logits, (clips.float(),), (direction.float(),))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(single, expected.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_hook_on_the_features_sees_all_of_them(attention_type):
    model = make_model(tiny_config(attention_type))
    clips, seen = make_clips(model.config), []
    plain = model(clips).logits
    with torch.no_grad():
        expected = model.vivit(clips)
    handle = model.vivit.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(model(clips).logits, plain)
    handle.remove()
    torch.testing.assert_close(seen[0].last_hidden_state, expected.last_hidden_state)


def test_multiply_adds_are_counted_without_gradients_too(machine):
    for attention_type in ATTENTION_TYPES:
        model = make_model(tiny_config(attention_type, attn_implementation="eager")).to(torch.float32)
        clips, counts = make_clips(model.config), []
        for is_needed in (True, False):
            with torch.set_grad_enabled(is_needed), FlopCounterMode(display=False) as counter:
                model(clips)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


WITH_CLASS_TOKEN = [case for case in CASES if case_config(case).pooling == "cls"]


def outputs_and_gradients(model, clips):
    model.zero_grad()
    outputs = model(clips)
    found = getattr(outputs, "logits", None)
    found = outputs.pooler_output if found is None else found
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return found.detach(), gradients


@pytest.mark.parametrize("case", WITH_CLASS_TOKEN)
def test_tokens_that_nobody_reads_are_spared_and_not_missed(case):
    model = make_model(case_config(case, attn_implementation="eager"))
    clips = make_clips(model.config)
    with FlopCounterMode(display=False) as spared:
        found, gradients = outputs_and_gradients(model, clips)
    handle = model.vivit.encoder.layer[-1].mlp.register_forward_hook(lambda *_: None)
    if model.vivit.temporal_encoder is not None:
        model.vivit.temporal_layernorm.register_full_backward_hook(lambda *_: None)
    with FlopCounterMode(display=False) as everything:
        expected, expected_gradients = outputs_and_gradients(model, clips)
    assert spared.get_total_flops() < 0.85 * everything.get_total_flops(), "of two layers, most of one is spared"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)
    handle.remove()


@pytest.mark.parametrize("case", WITH_CLASS_TOKEN)
def test_who_looks_sees_every_token(case):
    model = make_model(case_config(case))
    clips, vivit = make_clips(model.config), model.vivit
    steps = 1 if model.config.attention_type == "spatio_temporal" else model.config.grid_size[0]
    tokens = (
        1 + (model.config.grid_size[0] if steps == 1 else 1) * model.config.grid_size[1] * model.config.grid_size[2]
    )
    shape = (2 * steps, tokens, model.config.hidden_size)
    seen = []
    for module in (vivit.encoder, vivit.encoder.layer[-1], vivit.encoder.layer[-1].layernorm_after, vivit.layernorm):
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        model(clips)
        handle.remove()
        model(clips)
    assert seen == [shape] * 4
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(output.shape) if module is vivit.layernorm else None
    )
    model(clips)
    handle.remove()
    assert seen == [shape] * 5
    hidden_states = model(clips, output_hidden_states=True).hidden_states
    assert hidden_states[len(vivit.encoder.layer)].shape == shape
    assert {weights.shape[-2] for weights in model(clips, output_attentions=True).attentions} >= {tokens}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clips)  # transformers' recorders are there now, and asleep
    with torch.no_grad(), FlopCounterMode(display=False) as everything:
        model(clips, output_hidden_states=True)
    assert counter.get_total_flops() < everything.get_total_flops()


def test_a_base_model_gives_every_token_unless_told_otherwise():
    model = make_model(tiny_config("spatio_temporal"), ViViTModel)
    clips = make_clips(model.config)
    whole, pooled = model(clips), model(clips, pooled_only=True)
    assert whole.last_hidden_state.shape[1] == 61 and pooled.last_hidden_state.shape[1] == 1
    torch.testing.assert_close(pooled.pooler_output, whole.pooler_output)
    torch.testing.assert_close(pooled.last_hidden_state, whole.last_hidden_state[:, :1])
    for attention_type in ATTENTION_TYPES[2:]:
        model = make_model(tiny_config(attention_type), ViViTModel)
        torch.testing.assert_close(first(model(clips, pooled_only=True)), first(model(clips)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scores", [1, 100, 800_000])
def test_attention_block_by_block_is_eager_attention(case, scores, monkeypatch):
    """One row at a time, some rows of a sequence or a few sequences at a time, and all in one."""
    monkeypatch.setattr(fast_paths_vivit, "BLOCK_SCORES", scores)
    config = case_config(case)
    clips = make_clips(config)
    logits = {}
    for name in ("eager", "blockwise"):
        model = make_model(case_config(case, attn_implementation=name))
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = model(clips).logits
    torch.testing.assert_close(logits["blockwise"], logits["eager"], atol=1e-5, rtol=1e-5)


def test_attention_block_by_block_has_the_gradients_of_sdpa():
    for attention_type in ATTENTION_TYPES:
        found = []
        for name in ("sdpa", "blockwise"):
            model = make_model(tiny_config(attention_type, attn_implementation=name)).train()
            found.append(outputs_and_gradients(model, make_clips(model.config)))
        assert torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_are_as_exact_as_the_dtype(dtype):
    """No further from the attention of float64 than the eager path is, with a scale that is no power of two."""
    torch.manual_seed(0)
    exact = [4 * torch.randn(2, 3, 40, 24, dtype=torch.float64).to(dtype).double() for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, scale=0.21).transpose(1, 2)
    module = torch.nn.Module()
    errors = {}
    for name in ("eager", "blockwise"):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        with torch.no_grad():
            context, _ = attention(module, *(tensor.to(dtype) for tensor in exact), None, scaling=0.21)
        errors[name] = (context.double() - expected).square().mean().sqrt().item()
    assert errors["blockwise"] <= 1.1 * errors["eager"] + 1e-14


def test_scores_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(fast_paths_vivit, "BLOCK_SCORES", 5_000)
    query = torch.randn(2, 4, 700, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        fast_paths_vivit.blockwise_attention_forward(torch.nn.Module(), query, query, query, None, scaling=0.3)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == max(query.nbytes, 4 * 5_000 * torch.get_num_threads() // 700 * 700)
    assert 4 * 700 * 700 > 4 * largest


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_sdpa_goes_block_by_block_where_that_pays(attention_type, monkeypatch):
    monkeypatch.setattr(fast_paths_vivit, "LEAST_SCORES", 0)
    # oneDNN has no bfloat16 products for a CPU that only claims to have the units.
    monkeypatch.setattr(fast_paths_vivit, "_is_for_onednn", lambda layer, hidden_states: False)
    calls = []

    def recorded(*arguments, **keywords):
        calls.append(arguments[1].shape)
        return fast_paths_vivit.blockwise_attention_forward(*arguments, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "blockwise", recorded)
    model = make_model(tiny_config(attention_type, attention_probs_dropout_prob=0.1))
    clips = make_clips(model.config)
    for has_units, dtype, context, name in itertools.product(
        (True, False), (torch.bfloat16, torch.float32), (torch.no_grad, torch.enable_grad), ("sdpa", "eager")
    ):
        monkeypatch.setattr(fast_paths_vivit, "has_bfloat16_units", lambda has_units=has_units: has_units)
        model.to(dtype).set_attn_implementation(name)
        calls.clear()
        with context():
            model(clips)
            assert bool(calls) == (
                has_units and dtype == torch.bfloat16 and context is torch.no_grad and name == "sdpa"
            )
            calls.clear()
            model.train()(clips)  # with dropout
            assert not calls
            model.eval()


def test_less_memory_is_taken():
    """The widest tensor is there once, not twice: counted by what the allocator hands out."""
    mlp = ViViTMLP(tiny_config("spatio_temporal", hidden_size=32, intermediate_size=512))
    hidden_states = torch.randn(1, 1000, 32)
    wide = 1000 * 512 * 4

    def allocated():
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            mlp(hidden_states)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    mlp(hidden_states)
    assert allocated() < 1.5 * wide
    mlp.fc1.register_forward_hook(lambda *_: None)
    assert allocated() > 1.9 * wide


@pytest.mark.parametrize("watched", ["fc1", "activation", "everything"])
def test_what_a_hook_saw_is_not_overwritten(watched):
    mlp = ViViTMLP(tiny_config("spatio_temporal"))
    hidden_states = torch.randn(2, 7, mlp.fc1.in_features)
    seen = []

    def hook(module, inputs, output):
        if module is mlp.fc1:
            seen.append(output)
        if module is mlp.activation:
            seen.append(inputs[0])

    if watched == "everything":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = getattr(mlp, watched).register_forward_hook(hook)
    try:
        with torch.no_grad():
            mlp(hidden_states)
    finally:
        handle.remove()
    with torch.no_grad():
        expected = torch.nn.functional.linear(hidden_states, mlp.fc1.weight, mlp.fc1.bias)
    assert seen and all(torch.equal(output, expected) for output in seen)
