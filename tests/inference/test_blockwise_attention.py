"""Attention block by block: exact, in bounded memory, and only where it pays."""

import pytest
import torch
from optimized_models import gradients_of
from tiny_models import ATTENTION_TYPES, CASES, case_config, make_clips, make_model, tiny_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vivit_hf.inference import blockwise_attention
from vivit_hf.modeling_vivit import eager_attention_forward


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scores", [1, 100, 800_000])
def test_attention_block_by_block_is_eager_attention(case, scores, monkeypatch):
    """One row at a time, some rows or some sequences at a time, and all in one."""
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(blockwise_attention, "BLOCK_SCORES", scores)
    clips = make_clips(case_config(case))
    logits = {}
    for name in ("eager", "blockwise"):
        model = make_model(case_config(case, attn_implementation=name))
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = model(clips).logits
    torch.testing.assert_close(logits["blockwise"], logits["eager"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_attention_block_by_block_has_the_gradients_of_sdpa(attention_type, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    found = []
    for name in ("sdpa", "blockwise"):
        model = make_model(tiny_config(attention_type, attn_implementation=name)).train()
        found.append(gradients_of(model, make_clips(model.config)))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_are_as_exact_as_the_dtype(dtype, monkeypatch):
    """No further from the attention of float64 than the eager path is, with a scale that is no power of two."""
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    exact = [4 * torch.randn(2, 3, 40, 24, dtype=torch.float64).to(dtype).double() for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, scale=0.21).transpose(1, 2)
    errors = {}
    for name in ("eager", "blockwise"):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        with torch.no_grad():
            context, _ = attention(torch.nn.Module(), *(tensor.to(dtype) for tensor in exact), None, scaling=0.21)
        errors[name] = (context.double() - expected).square().mean().sqrt().item()
    assert errors["blockwise"] <= 1.1 * errors["eager"] + 1e-14


def test_scores_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(blockwise_attention, "BLOCK_SCORES", 5_000)
    query = torch.randn(2, 4, 700, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        blockwise_attention.blockwise_attention_forward(torch.nn.Module(), query, query, query, None, scaling=0.3)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == max(query.nbytes, 4 * 5_000 * torch.get_num_threads() // 700 * 700)
    assert 4 * 700 * 700 > 4 * largest


def test_sdpa_takes_over_where_blocks_do_not_pay_or_are_wrong(monkeypatch):
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: calls.append(1) or sdpa(*a, **k)
    )
    query = torch.randn(1, 2, 120, 8)

    def is_sdpa(query, mask=None, dropout=0.0):
        calls.clear()
        module = torch.nn.Module().eval()
        blockwise_attention.blockwise_attention_forward(module, query, query, query, mask, scaling=0.3, dropout=dropout)
        return bool(calls)

    with torch.no_grad():
        assert not is_sdpa(query)
        assert is_sdpa(query[:, :, :20]), "few scores"
        assert is_sdpa(query, mask=torch.zeros(1, 1, 120, 120)) and is_sdpa(query, dropout=0.1)
    assert is_sdpa(query), "gradients"
