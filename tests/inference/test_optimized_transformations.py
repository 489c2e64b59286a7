"""Optimised models under autograd, compilation, copies and casts: like the plain model, or an error with a way out."""

import copy
import io
import pickle

import pytest
import torch
from optimized_models import assert_close, gradients_of, optimised
from tiny_models import make_clips, make_model, tiny_config

from vivit_hf.inference import optimize, restore
from vivit_hf.inference.optimization import PackedLinear


def equals_or_names_restore(machine, function, expected):
    """Laid-out weights may refuse, with the way out; everything else gives what the plain model gives."""
    if machine == "laid out":
        with pytest.raises(Exception, match=r"vivit_hf\.inference\.restore") as caught:
            function()
        assert caught.value
    else:
        assert_close(function(), expected)


def test_gradients(pair, machine):
    plain, twin = pair
    clips = make_clips(plain.config)
    equals_or_names_restore(machine, lambda: gradients_of(twin, clips), gradients_of(plain, clips))
    frozen = twin.requires_grad_(False)
    leaf = clips.clone().requires_grad_()
    if machine != "laid out":
        frozen(leaf).logits.sum().backward()
        expected = clips.clone().requires_grad_()
        plain(expected).logits.sum().backward()
        assert_close(leaf.grad, expected.grad)


@torch.no_grad()
def test_derivatives_in_forward_mode(variant, machine):
    plain, twin = (make_model(tiny_config(variant, attn_implementation="eager")) for _ in range(2))
    optimised(twin, machine)
    clips = make_clips(plain.config)
    direction = torch.randn_like(clips)

    def derivative(model):
        return torch.func.jvp(lambda given: model(given).logits, (clips,), (direction,))[1]

    equals_or_names_restore(machine, lambda: derivative(twin), derivative(plain))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_compiling_exporting_and_tracing(machine):
    config = tiny_config("factorised_encoder", num_hidden_layers=1, num_temporal_layers=1)
    plain, twin = (make_model(config) for _ in range(2))
    optimised(twin, machine)
    clips = make_clips(plain.config)
    expected = plain(clips).logits
    torch.compiler.reset()
    equals_or_names_restore(
        machine, lambda: torch.compile(twin, backend="eager", fullgraph=True)(clips).logits, expected
    )
    equals_or_names_restore(machine, lambda: torch.export.export(twin, (clips,)).module()(clips).logits, expected)
    equals_or_names_restore(machine, lambda: torch.jit.trace(twin, clips, strict=False)(clips)["logits"], expected)


@torch.no_grad()
def test_copies_and_pickles_hold_plain_weights(pair, machine):
    plain, twin = pair
    clips = make_clips(plain.config)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    for again in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), torch.load(file, weights_only=False)):
        assert not any(isinstance(module, PackedLinear) for module in again.modules())
        assert_close(again(clips).logits, plain(clips).logits)
        again.vivit.encoder.layer[0].mlp.fc1.weight.zero_()
        assert_close(twin(clips).logits, plain(clips).logits)
        restore(again)
        assert {type(module) for module in again.modules()} == {type(module) for module in plain.modules()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_cast_gives_the_plain_model_in_that_dtype(variant, machine, dtype):
    plain, twin = (make_model(tiny_config(variant)) for _ in range(2))
    optimised(twin, machine)
    clips = make_clips(plain.config)
    twin.to("cpu")
    assert any(isinstance(module, PackedLinear) for module in twin.modules()) == (machine == "laid out")
    twin.to(dtype)
    plain.to(dtype)
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name
    torch.testing.assert_close(twin(clips).logits.float(), plain(clips).logits.float(), atol=0.2, rtol=0.2)


@torch.no_grad()
def test_autocast_gives_the_dtype_of_the_plain_model(variant, machine):
    plain, twin = (make_model(tiny_config(variant)) for _ in range(2))
    optimised(twin, machine)
    clips = make_clips(plain.config)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(clips).logits, twin(clips).logits
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected)


def test_a_step_of_training_is_that_of_the_plain_model(variant):
    """Also with dropout: the same random numbers are drawn in the same places."""
    losses = []
    for is_optimised in (False, True):
        model = make_model(tiny_config(variant, hidden_dropout_prob=0.2, drop_path_rate=0.2))
        if is_optimised:
            optimize(model)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(2):
            loss = model(make_clips(model.config), labels=torch.tensor([1, 4])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]
