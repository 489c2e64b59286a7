"""How a forward is called: arguments, empty batches, symbolic sizes, torch.func, hooks, gradient modes."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import MODEL_CLASSES, case_config, first, make_clips, make_model
from torch.utils.flop_counter import FlopCounterMode

from vivit_hf import modeling_vivit


@pytest.mark.parametrize("cls", MODEL_CLASSES)
@pytest.mark.parametrize("arguments", [{"foo": 1}, {"input_ids": torch.ones(2, 3)}, {"pixel_mask": False}], ids=str)
def test_an_unknown_argument_is_a_type_error_that_names_it(variant, cls, arguments):
    model = make_model(case_config(variant), cls)
    with pytest.raises(TypeError, match=f"unexpected argument '{next(iter(arguments))}'"):
        model(make_clips(model.config), **arguments)


@pytest.mark.parametrize("cls", MODEL_CLASSES)
def test_arguments_that_transformers_passes_to_every_model_are_taken(cls):
    model = make_model(case_config("spatio_temporal"), cls)
    clips = make_clips(model.config)
    given = {"num_items_in_batch": 2, "output_attentions": True, "output_hidden_states": True, "return_dict": True}
    outputs = model(clips, attention_mask=None, inputs_embeds=None, cu_seq_lens_q=None, **given)
    assert outputs.attentions and outputs.hidden_states
    torch.testing.assert_close(first(outputs), first(model(clips)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_empty_batch_is_an_error(case, implementation):
    model = make_model(case_config(case))
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=r"\(0, 8, 3, 24, 40\) hold no clip"):
        model(make_clips(model.config)[:0])


UNIFORM = ["uniform_frames", "uniform_frames_factorised_encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("case", UNIFORM)
@pytest.mark.parametrize("interpolate", [False, True])
@torch.no_grad()
def test_uniform_frames_compile_with_symbols_for_sizes(case, interpolate):
    model = make_model(case_config(case))
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for batch in (2, 3):
        clips = make_clips(model.config, batch, **({"num_frames": 12} if interpolate else {}))
        expected = model(clips, interpolate_pos_encoding=interpolate).logits
        actual = compiled(clips, interpolate_pos_encoding=interpolate).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", UNIFORM)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_uniform_frames_are_traced_and_exported_for_any_batch(case):
    model = make_model(case_config(case))
    clips, more = make_clips(model.config), make_clips(model.config, 3)
    traced = torch.jit.trace(model, clips, strict=False)
    torch.testing.assert_close(traced(clips)["logits"], model(clips).logits)
    for axes in ({0: torch.export.Dim("batch")}, dict.fromkeys(range(5), torch.export.Dim.AUTO)):
        exported = torch.export.export(model, (clips,), dynamic_shapes={"pixel_values": axes}).module()
        torch.testing.assert_close(exported(more).logits, model(more).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_vmap_gives_the_logits_without_a_warning(variant, dtype):
    model = make_model(case_config(variant, attn_implementation="eager")).to(dtype)
    clips = torch.stack([make_clips(model.config, seed=seed) for seed in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = torch.func.vmap(lambda clip: model(clip).logits)(clips)
    expected = model(clips.flatten(0, 1)).logits.unflatten(0, (3, 2))
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


def test_forward_derivatives_do_not_need_gradient_mode(variant):
    """`no_grad` turns off the backward mode only."""
    model = make_model(case_config(variant, attn_implementation="eager")).double()
    clips = make_clips(model.config).double()
    direction = torch.randn_like(clips)
    _, expected = torch.func.jvp(lambda given: model(given).logits, (clips,), (direction,))
    with torch.no_grad():
        _, found = torch.func.jvp(lambda given: model(given).logits, (clips,), (direction,))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("cls", MODEL_CLASSES)
def test_the_same_is_computed_with_gradients_without_and_under_a_hook(case, cls):
    """Bit for bit, and with the same multiply-adds."""
    model = make_model(case_config(case, attn_implementation="eager"), cls)
    clips, found, counts = make_clips(model.config), [], []

    def run():
        with FlopCounterMode(display=False) as counter:
            found.append(first(model(clips)))
        counts.append(counter.get_total_flops())

    run()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            run()
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    handles.append(torch.nn.modules.module.register_module_forward_hook(lambda *_: None))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    assert all(torch.equal(one, found[0]) for one in found) and len(set(counts)) == 1


def test_the_model_file_does_not_look_at_its_surroundings():
    """Except for one function, which tells whether Python may branch on the values of a mask."""
    source = Path(modeling_vivit.__file__).read_text()
    choice = inspect.getsource(modeling_vivit.becomes_graph)
    assert choice in source and len(choice.splitlines()) == 3
    source = source.replace(choice, "")
    assert not re.findall(
        r"torch\._C|forward_ad|_hooks\b|is_grad_enabled|is_compiling|is_tracing|cpu_capability", source
    )
