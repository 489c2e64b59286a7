"""Attention as matrix products, a block of scores at a time: `attn_implementation="blockwise"`."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .onednn import needs_plain_code


# Attention scores in memory at once, per thread: as many as a core's caches hold (1.6 MB in bfloat16).
BLOCK_SCORES = 800_000
# Further threads get no scores of their own, which bounds the memory at 13 million scores.
MOST_THREADS = 16
# Below this many scores PyTorch's own attention is as fast (measured at 17 tokens and 12 heads).
LEAST_SCORES = 20_000


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """
    Compute attention as matrix products in the dtype of the tensors, a bounded number of scores at a time.

    Registered with transformers as `attn_implementation="blockwise"`. On CPUs with AVX512-BF16 alone it is faster than
    PyTorch's attention, which does not reach the rate of those units. Scores are rounded to the dtype, as in the eager
    implementation. Gradients, other masks, dropout, compilers and short sequences use PyTorch's attention.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, heads, tokens, head_dim), floats of the same dtype.
        attention_mask: a bias of the keys, floats (batch, 1, 1, tokens), or None.

    Returns:
        The context (batch, queries, heads, head_dim), and None for the weights.
    """
    batch, heads, queries, head_dim = query.shape
    tokens = key.shape[2]
    is_short = batch * heads * queries * tokens < LEAST_SCORES
    is_mask = attention_mask is not None and not (
        attention_mask.is_floating_point() and attention_mask.shape[1:3] == (1, 1)
    )
    if is_mask or dropout or needs_plain_code(query) or is_short:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # (batch, heads, tokens, head_dim) -> (batch * heads, tokens, head_dim)
    query, key, value = (tensor.reshape(-1, tensor.shape[2], head_dim) for tensor in (query, key, value))
    key = key.transpose(1, 2)  # (batch * heads, head_dim, tokens)
    bias = None
    if attention_mask is not None:  # (batch, 1, 1, tokens) -> (batch * heads, 1, tokens)
        bias = attention_mask.expand(batch, heads, 1, tokens).flatten(0, 1)
    context = torch.empty_like(query)  # (batch * heads, queries, head_dim)

    budget = BLOCK_SCORES * min(torch.get_num_threads(), MOST_THREADS)
    group = max(1, budget // (queries * tokens))
    rows = math.ceil(queries / math.ceil(queries * tokens / budget))  # blocks of equal size
    buffer = query.new_empty(min(group, len(query)) * rows * tokens)
    # A single matrix is multiplied faster as a matrix than as a batch of one.
    scale_and_multiply, multiply = (torch.addmm, torch.mm) if group == 1 else (torch.baddbmm, torch.bmm)
    for start in range(0, len(query), group):
        sequences = start if group == 1 else slice(start, start + group)
        for row in range(0, queries, rows):
            block = query[sequences, row : row + rows]  # ([group,] rows, head_dim)
            scores = buffer[: block.numel() // head_dim * tokens].view(*block.shape[:-1], tokens)
            if bias is None:
                scale_and_multiply(scores, block, key[sequences], beta=0, alpha=scaling, out=scores)
            else:
                scores.copy_(bias[sequences])
                scale_and_multiply(scores, block, key[sequences], beta=1, alpha=scaling, out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            multiply(scores, value[sequences], out=context[sequences, row : row + rows])
    return context.unflatten(0, (batch, heads)).transpose(1, 2), None  # (batch, queries, heads, head_dim)
