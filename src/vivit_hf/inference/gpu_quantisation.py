"""
Linear layers with int8 weights and activations on GPUs, by torchao's kernels.

Weights have one scale per output channel and activations one per token, computed while the model runs: these kernels
lose nothing by it, so no scale depends on calibration. Compile the model: torchao's eager code is slower than bfloat16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from .int8_linear import Int8Linear
from .quantisation import LARGEST_ERROR, QuantisationReport, linear_layers, output_error, sampled_inputs


_FEW_TOKENS = 16  # cuBLAS multiplies more rows than these in int8
_MULTIPLE = 8  # of both sizes of a weight that cuBLAS multiplies in int8


def has_torchao() -> bool:
    """Return whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


class TorchaoLinear(Int8Linear):
    """A linear layer that multiplies in int8 by torchao. The plain weight stays, for everything but inference."""

    added = ("_weight",)
    _weight: torch.Tensor  # torchao's subclass

    @staticmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def quantise(layer: nn.Linear) -> TorchaoLinear:
        """Turn a plain layer into a quantised one, in place."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        copy = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        holder = nn.Sequential(copy)
        # Settings of the compiler belong to the program, not to one model in it.
        quantize_(holder, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        vars(layer)["_weight"] = copy.weight.detach()
        layer.__class__ = TorchaoLinear
        return layer  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, ..., in_features) -> (batch, ..., out_features), in the dtype of the input."""
        is_short = input.numel() <= _FEW_TOKENS * self.in_features
        if is_short or torch.is_grad_enabled() or _is_traced_or_differentiated(input):
            return super().forward(input)
        return nn.functional.linear(input, self._weight, self.bias)


def _is_traced_or_differentiated(tensor: torch.Tensor) -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None


@dataclass(frozen=True)
class TorchaoReport(QuantisationReport):
    """A `QuantisationReport` of layers on a GPU; `errors` is empty without calibration clips."""

    def words(self) -> list[str]:
        """Return lines for people."""
        if self.errors:
            price = f"largest error of a layer {max(self.errors.values()):.1%}"
        else:
            price = "pass `calibration` to see their errors"
        lines = [
            f"{len(self.input_scales)} linear layers multiply in int8 by torchao, with scales per token ({price}): "
            "compile the model, which is slow otherwise"
        ]
        if self.kept:
            lines.append(
                f"not quantised, because the error is above {LARGEST_ERROR:.0%} or a size is no multiple of "
                f"{_MULTIPLE}: {', '.join(self.kept)}"
            )
        return lines


@torch.no_grad()
def quantise_layers_by_torchao(
    model: Any, calibration: Iterable[torch.Tensor] | torch.Tensor | None = None
) -> TorchaoReport:
    """
    Quantise the linear layers of attention and MLPs of a plain model, in place.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification` in eval mode.
        calibration: pixel values (batch, frames, channels, height, width), or an iterable of such batches, to measure
            the error of each layer on; layers with a large one stay as they are. None measures nothing.

    Raises:
        ImportError: if torchao is not installed.
        NonFiniteError: if the model computes NaN or infinite numbers on these clips.
    """
    if not has_torchao():
        raise ImportError(
            f"`int8=True` on {model.device} needs torchao: `pip install 'vivit-hf[gpu]'`, or leave `int8` out."
        )
    layers = linear_layers(model)
    errors: dict[str, float] = {}
    if calibration is not None:
        inputs = sampled_inputs(model, layers, calibration)
        errors = {name: output_error(layer, inputs[name], None) for name, layer in layers.items()}
    kept = tuple(
        name
        for name, layer in layers.items()
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE or errors.get(name, 0.0) > LARGEST_ERROR
    )
    quantised = [name for name in layers if name not in kept]
    for name in quantised:
        TorchaoLinear.quantise(layers[name])
    return TorchaoReport({name: errors[name] for name in quantised if errors}, dict.fromkeys(quantised), kept)
