"""Whether a CPU is fast with oneDNN's operations, and whether these can take a module or a call."""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad


def gelu_approximation(activation: nn.Module) -> str | None:
    """Return PyTorch's name for the variant of GELU that a module computes; None for another activation."""
    function = getattr(activation, "act", None)
    if isinstance(function, functools.partial) and function.func is nn.functional.gelu and not function.args:
        return function.keywords.get("approximate", "none")
    return "none" if function is nn.functional.gelu else None


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer computes what nn.Linear computes: no wrapper, no offloading, no quantised weight."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and type(layer.weight) is nn.Parameter


def needs_plain_code(tensor: torch.Tensor) -> bool:
    """Return whether oneDNN's operations have no rule for a call: gradients, autocast, or `is_observed`."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return True
    return is_observed(tensor)


def is_observed(tensor: torch.Tensor) -> bool:
    """Return whether the call is compiled, traced, or differentiated in forward mode, which `no_grad` leaves on."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


@functools.cache
def has_avx512() -> bool:
    """Return whether this CPU has AVX-512; with AVX2 alone, oneDNN's fused product is slower than PyTorch's code."""
    has_onednn = bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    return has_onednn and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX)."""
    return has_avx512() and (_cpu_has("avx512_bf16") or has_amx())


@functools.cache
def has_amx() -> bool:
    """Return whether this CPU has AMX, with which PyTorch's bfloat16 attention is twice as fast as `blockwise`."""
    return _cpu_has("amx_tile")


@functools.cache
def has_vnni() -> bool:
    """Return whether this CPU multiplies int8 fast; without VNNI, oneDNN's products can also overflow."""
    return has_avx512() and _cpu_has("vnni")


def _cpu_has(feature: str) -> bool:
    """Return whether PyTorch reports a feature of the CPU; older versions do not know all of them."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return check is not None and check()
