"""
Shortcuts that give what the plain path gives, sooner: each says for itself where it may be taken.

Three things are spared: a pass over the widest tensor of a layer for its GELU, the tokens of a last layer that nobody
reads, and PyTorch's bfloat16 attention on CPUs, which does not reach the rate of their matrix units.
"""

import functools
import math
from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Attention scores that are in memory at once, per thread: what of them a core's caches hold (1.6 MB in bfloat16).
BLOCK_SCORES = 800_000
# More threads than this get no more, so that memory stays bounded: 13 million scores at the most.
MOST_THREADS = 16
# Fewer scores than this are as fast in PyTorch's own attention (measured at 17 tokens and 12 heads).
LEAST_SCORES = 20_000

# Hooks from there look at no tensor: transformers' recorders of hidden states stay after the first call that asked for
# them, and sleep; counters of multiply-adds only want the module's name.
_BLIND = ("transformers.utils.output_capturing", "torch.utils.module_tracker")


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook may see what goes through one of the modules; those of `_BLIND` do not count."""
    hooks = [
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    ]
    for module in modules:
        hooks += [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    return any(getattr(hook, "__module__", "") not in _BLIND for group in hooks for hook in group.values())


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `layer(hidden_states)`, (batch, ..., hidden) -> (batch, ..., features).

    In bfloat16 PyTorch first writes the bias into the output and then adds the product to it; oneDNN does both at once.
    """
    is_slow = hidden_states.dtype == torch.bfloat16 and _is_plain_inference(hidden_states)
    if is_slow and not is_watched((layer,)) and _is_for_onednn(layer, hidden_states):
        return torch.ops.mkldnn._linear_pointwise(hidden_states, layer.weight, layer.bias, "none", [], None)
    return layer(hidden_states)


def linear_with_activation(layer: nn.Module, activation: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `activation(layer(hidden_states))`, (batch, ..., hidden) -> (batch, ..., inner).

    Without gradients nobody needs what a GELU was computed from, and a second tensor of that size costs more time than
    the GELU: it is computed inside the product, where oneDNN has that, or else in place.
    """
    approximation = None
    if _is_bare(layer) and _is_plain_inference(hidden_states) and not is_watched((layer, activation)):
        approximation = _gelu_approximation(activation)
    if approximation is None:
        return activation(layer(hidden_states))
    if _is_for_onednn(layer, hidden_states):
        fused = torch.ops.mkldnn._linear_pointwise
        return fused(hidden_states, layer.weight, layer.bias, "gelu", [], approximation)
    return torch.ops.aten.gelu_(layer(hidden_states), approximate=approximation)


def _is_plain_inference(tensor: torch.Tensor) -> bool:
    """No gradient, and nobody who records the operations: a compiler, a tracer, a counter of multiply-adds."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0:  # derivatives in forward mode, which `no_grad` does not turn off
        return False
    if _is_transformed():
        return False
    return type(tensor) is torch.Tensor and not torch._C._len_torch_dispatch_stack()


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, such as vmap, which warns of every fused operation."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _gelu_approximation(activation: nn.Module) -> str | None:
    """Which GELU it is, in PyTorch's word, or None; asked of the module itself, since users put in another one."""
    function = getattr(activation, "act", None)
    if isinstance(function, functools.partial) and function.func is nn.functional.gelu and not function.args:
        return function.keywords.get("approximate", "none")
    return "none" if function is nn.functional.gelu else None


def _is_bare(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nobody but the caller can get hold of the output: what wraps a layer (LoRA, a probe) may keep it."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def _is_for_onednn(layer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether oneDNN is worth asking for a product with something fused in: with AVX2 alone it is the slower one."""
    if not _is_bare(layer) or hidden_states.device.type != "cpu":
        return False
    weight, dtype = layer.weight, hidden_states.dtype
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype != dtype or torch.is_autocast_enabled("cpu"):
        return False
    if not (hidden_states.is_contiguous() and weight.is_contiguous() and hidden_states.numel()):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return has_bfloat16_units() if dtype == torch.bfloat16 else dtype == torch.float32 and _has_avx512()


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX)."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return _has_avx512() and any(check() for check in checks if check is not None)


def attention_implementation(name: str, query: torch.Tensor, key: torch.Tensor, has_dropout: bool) -> str:
    """
    `name`, or "blockwise" for an "sdpa" that does without the matrix units that the machine has, or "eager" for one
    under `torch.func`.

    Query and key (batch, tokens, heads, head_dim).
    """
    if name == "sdpa" and not torch.compiler.is_compiling() and _is_transformed():
        return "eager"
    if name != "sdpa" or has_dropout or not _is_plain_inference(query):
        return name
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and has_bfloat16_units()
    batch, queries, heads, _ = query.shape
    return "blockwise" if is_slow and batch * heads * queries * key.shape[1] >= LEAST_SCORES else name


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
    Attention as matrix products of the tensors' own dtype, a bounded number of scores at a time.

    transformers knows it as `attn_implementation="blockwise"`. The numbers are those of the eager path, whose scores
    are rounded to the dtype, too. Under gradients, masks and dropout it is PyTorch's attention.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, heads, tokens, head_dim), floats like the query.

    Returns:
        The context (batch, queries, heads, head_dim), and None for the weights.
    """
    if attention_mask is not None or dropout or not _is_plain_inference(query):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    batch, heads, queries, head_dim = query.shape
    tokens = key.shape[2]
    # (batch, heads, tokens, head_dim) -> (batch * heads, tokens, head_dim)
    query, key, value = (tensor.reshape(-1, tensor.shape[2], head_dim) for tensor in (query, key, value))
    key = key.transpose(1, 2)  # (batch * heads, head_dim, tokens)
    context = torch.empty_like(query)

    budget = BLOCK_SCORES * min(torch.get_num_threads(), MOST_THREADS)
    group = max(1, budget // (queries * tokens))
    rows = math.ceil(queries / math.ceil(queries * tokens / budget))  # blocks of one size
    buffer = query.new_empty(min(group, len(query)) * rows * tokens)
    # A matrix at a time is multiplied faster as a matrix than as a batch of one.
    scale_and_multiply, multiply = (torch.addmm, torch.mm) if group == 1 else (torch.baddbmm, torch.bmm)
    for start in range(0, len(query), group):
        sequences = start if group == 1 else slice(start, start + group)
        for row in range(0, queries, rows):
            block = query[sequences, row : row + rows]  # ([group,] rows, head_dim)
            scores = buffer[: block.numel() // head_dim * tokens].view(*block.shape[:-1], tokens)
            scale_and_multiply(scores, block, key[sequences], beta=0, alpha=scaling, out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            multiply(scores, value[sequences], out=context[sequences, row : row + rows])
    return context.unflatten(0, (batch, heads)).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("blockwise", blockwise_attention_forward)
