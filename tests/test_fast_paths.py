"""Each shortcut taken for speed gives the numbers of the plain path, and is not taken where it could be seen."""

import pytest
import torch
from tiny_models import ATTENTION_TYPES, make_clips, make_model, tiny_config

from vivit_hf.layers_vivit import ACT2FN, ViViTMLP


ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "relu")


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_in_place_is_the_mlp(hidden_act, dtype):
    mlp = ViViTMLP(tiny_config("spatio_temporal", hidden_act=hidden_act)).to(dtype)
    hidden_states = torch.randn(2, 7, mlp.fc1.in_features).to(dtype)
    kept = hidden_states.clone()
    expected = mlp.fc2(mlp.activation(mlp.fc1(hidden_states)))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(mlp(hidden_states), expected.detach())
    assert torch.equal(hidden_states, kept)


def test_an_activation_that_is_put_in_later_is_the_one_that_counts():
    mlp = ViViTMLP(tiny_config("spatio_temporal", hidden_act="gelu_pytorch_tanh"))
    hidden_states = 3 * torch.randn(2, 7, mlp.fc1.in_features)
    for name in ("gelu", "gelu_python", "quick_gelu", "gelu_pytorch_tanh"):
        mlp.activation = ACT2FN[name]
        expected = mlp(hidden_states).detach()
        with torch.no_grad():
            assert torch.equal(mlp(hidden_states), expected), name
            assert (mlp.approximation_in_place() is not None) == (name in ("gelu", "gelu_pytorch_tanh"))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_models_give_the_same_with_and_without_gradients(attention_type):
    model = make_model(tiny_config(attention_type))
    clips = make_clips(model.config)
    with torch.enable_grad():
        expected = model(clips).logits
    with torch.inference_mode():
        assert torch.equal(model(clips).logits, expected.detach())
    expected.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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
