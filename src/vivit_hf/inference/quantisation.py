"""
Linear layers with int8 weights and activations on CPUs, by oneDNN's operators in PyTorch.

Weights have one scale per output channel. Activations are uint8 with a zero point, because signed ones are not
accelerated; their scale is fixed per tensor, from a calibration on a few clips, or computed per token for layers whose
outliers would spoil a fixed one. Layers that neither suits stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling_vivit import ViViTAttention, ViViTEmbeddings, ViViTFactorisedDotProductAttention, ViViTMLP
from .finite_outputs import NonFiniteError
from .int8_linear import Int8Linear
from .onednn import gelu_approximation, has_vnni, is_plain_linear, needs_plain_code


# The largest relative error (root mean square) of a layer's output on the calibration clips.
LARGEST_ERROR = 0.03
SAMPLED_TOKENS = 1024  # per layer
_LEVELS, _ZERO = 255, 128
_SHRINKAGES = [1 - step / 20 for step in range(15)]  # of the largest activation, tried in turn
_ROWS = 256  # tokens that are quantised at a time, so that they stay in a core's cache


@dataclass(frozen=True)
class ActivationScale:
    """The scale and zero point of quantised activations, which are `scale * (uint8 - zero_point)`."""

    scale: float
    zero_point: int

    @classmethod
    def fitted(cls, values: torch.Tensor) -> ActivationScale:
        """Return the scale with the smallest mean squared error on these values, of ranges that clip the largest."""
        values = values.float().flatten()
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        scales = []
        for share in _SHRINKAGES:
            limit = share * max(-low, high)
            first, last = max(low, -limit), min(high, limit)
            scale = max((last - first) / _LEVELS, torch.finfo(torch.float32).tiny)
            scales.append(cls(scale, min(max(round(-first / scale), 0), _LEVELS)))
        return min(scales, key=lambda scale: float((scale.rounded(values) - values).square().mean()))

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values, in any shape, that their uint8 numbers stand for."""
        return (quantised(values, self).float() - self.zero_point) * self.scale


def quantised(values: torch.Tensor, scale: ActivationScale) -> torch.Tensor:
    """Round values (..., channels) to uint8 of the same shape."""
    rows = values.reshape(-1, values.shape[-1])  # (tokens, channels)
    result = torch.empty(rows.shape, dtype=torch.uint8)
    buffer = torch.empty(min(_ROWS, len(rows)), rows.shape[1])
    offset = torch.tensor([scale.zero_point + 0.5])  # conversion to uint8 rounds down
    for block, target in zip(rows.split(_ROWS), result.split(_ROWS), strict=True):
        numbers = buffer[: len(block)].copy_(block)
        target.copy_(torch.add(offset, numbers, alpha=1 / scale.scale, out=numbers).clamp_(0, _LEVELS))
    return result.view(values.shape)


class QuantisedLinear(Int8Linear):
    """
    A linear layer that multiplies in int8 by oneDNN. The plain weight stays, for everything but inference.

    `input_scale` is None for scales per token.
    """

    added = ("input_scale", "_weight")
    input_scale: ActivationScale | None
    _weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # packed, scales and zero points per output channel

    @staticmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def quantise(layer: nn.Linear, input_scale: ActivationScale | None) -> QuantisedLinear:
        """Turn a plain layer into a quantised one, in place."""
        whole, scales = quantised_weight(layer.weight)
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        state = vars(layer)
        state["input_scale"] = input_scale
        state["_weight"] = (packed, scales, torch.zeros(len(scales), dtype=torch.int64))
        layer.__class__ = QuantisedLinear
        return layer  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, ..., in_features) -> (batch, ..., out_features), in the dtype of the plain weight."""
        if input.dtype != torch.uint8 and needs_plain_code(input):
            return super().forward(input)
        return self.product(input) if self.input_scale else self._product_per_token(input)

    def product(
        self, tokens: torch.Tensor, gelu: str | None = None, output_scale: ActivationScale | None = None
    ) -> torch.Tensor:
        """
        Multiply tokens (batch, ..., in_features), floats or uint8 of `input_scale`.

        `gelu`: PyTorch's name for the variant to apply. `output_scale`: the scale of a uint8 result; without it, the
        result has the dtype of the plain weight.
        """
        scale = self.input_scale
        assert scale is not None
        if tokens.dtype != torch.uint8:
            tokens = quantised(tokens, scale)
        out = output_scale or ActivationScale(1.0, 0)
        dtype = torch.uint8 if output_scale else self.weight.dtype
        post, algorithm = ("none", "none") if gelu is None else ("gelu", gelu)
        return torch.ops.onednn.qlinear_pointwise(
            tokens, scale.scale, scale.zero_point, *self._weight, self._float_bias(), out.scale, out.zero_point, dtype,
            post, [], algorithm,
        )  # fmt: skip

    def _product_per_token(self, tokens: torch.Tensor) -> torch.Tensor:
        numbers, scales = quantised_per_token(tokens)
        product = torch.ops.onednn.qlinear_pointwise(
            numbers, 1.0, _ZERO, *self._weight, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        product.mul_(scales)
        bias = self._float_bias()
        return (product if bias is None else product.add_(bias)).to(self.weight.dtype)

    def _float_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.float()


class QuantisedMLP(ViViTMLP):
    """The first product applies GELU and gives the second one its uint8 numbers."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden)."""
        if self.training or needs_plain_code(hidden_states):
            return super().forward(hidden_states)
        assert isinstance(self.fc1, QuantisedLinear) and isinstance(self.fc2, QuantisedLinear)
        inner = self.fc1.product(hidden_states, gelu_approximation(self.activation), self.fc2.input_scale)
        return self.fc2.product(inner)


class QuantisedAttention(ViViTAttention):
    """Queries, keys and values are computed from the same uint8 numbers."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, ..., hidden) -> query, key and value, (batch, ..., heads, head_dim)."""
        return super().project(_shared_numbers(self, hidden_states))


class QuantisedFactorisedDotProductAttention(ViViTFactorisedDotProductAttention):
    """A `QuantisedAttention` of Model 4."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, ..., hidden) -> query, key and value, (batch, ..., heads, head_dim)."""
        return super().project(_shared_numbers(self, hidden_states))


def _shared_numbers(attention: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states if needs_plain_code(hidden_states) else quantised(hidden_states, attention.q_proj.input_scale)


class FiniteEmbeddings(ViViTEmbeddings):
    """Embeddings that refuse NaN and infinite numbers, which uint8 numbers would hide from the output."""

    def forward(
        self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `ViViTEmbeddings` returns. Raises NonFiniteError."""
        tokens, prefix_tokens = super().forward(pixel_values, *args, **kwargs)
        if not needs_plain_code(tokens) and not tokens.isfinite().all():
            raise NonFiniteError(
                "The embedded clips contain NaN or infinite numbers: check the frames, the scaling of the processor, "
                "and the weights of the patch embedding."
            )
        return tokens, prefix_tokens


_ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    ViViTAttention: QuantisedAttention,
    ViViTFactorisedDotProductAttention: QuantisedFactorisedDotProductAttention,
}
PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    QuantisedLinear: nn.Linear,
    QuantisedMLP: ViViTMLP,
    FiniteEmbeddings: ViViTEmbeddings,
    **{quantised: plain for plain, quantised in _ATTENTIONS.items()},
}


# Choosing scales


@dataclass(frozen=True)
class QuantisationReport:
    """
    The layers that `quantise_layers` quantised or kept, by name.

    `errors` has the relative error of the output on the calibration clips for each layer that was quantised, and
    `input_scales` the scale of its input, None for scales per token; `per_token` and `kept` name the layers with scales
    per token, and those that stay as they are.
    """

    errors: dict[str, float]
    input_scales: dict[str, ActivationScale | None]
    kept: tuple[str, ...]

    @property
    def per_token(self) -> tuple[str, ...]:
        return tuple(name for name, scale in self.input_scales.items() if scale is None)

    def words(self) -> list[str]:
        """Return lines for people."""
        worst = max(self.errors.values(), default=0.0)
        lines = [f"{len(self.errors)} linear layers multiply in int8 (largest error of a layer {worst:.1%})"]
        if self.per_token:
            lines.append(f"scales per token, because of outliers: {', '.join(self.per_token)}")
        if self.kept:
            lines.append(f"not quantised, because the error is above {LARGEST_ERROR:.0%}: {', '.join(self.kept)}")
        return lines


def check_int8(model: Any, dtype: torch.dtype, calibration: object) -> None:
    """Raise ValueError if a model cannot be quantised on this machine."""
    if model.device.type == "cpu" and not has_vnni():
        raise ValueError(
            "`int8=True` needs a CPU with AVX-512 VNNI, and this CPU has no AVX-512 VNNI. Leave `int8` out."
        )
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"`int8=True` needs a CPU with AVX-512 VNNI or a CUDA GPU, and the model is on {model.device}. Leave "
            "`int8` out."
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`int8=True` needs a model in float32 or bfloat16, got {dtype}: pass `dtype=torch.bfloat16`.")
    if model.training:
        raise ValueError("`int8=True` is for inference, and the model is in training mode: call `model.eval()` first.")
    if calibration is None and model.device.type == "cpu":
        raise ValueError("`int8=True` needs `calibration`, the pixel values of a few clips (16 are enough).")


@torch.no_grad()
def quantise_layers(model: Any, calibration: Iterable[torch.Tensor] | torch.Tensor) -> QuantisationReport:
    """
    Quantise the linear layers of attention and MLPs of a plain model, in place.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification` on a CPU, in eval mode.
        calibration: pixel values (batch, frames, channels, height, width), or an iterable of such batches.

    Raises:
        NonFiniteError: if the model computes NaN or infinite numbers on these clips.
    """
    layers = linear_layers(model)
    inputs = sampled_inputs(model, layers, calibration)
    errors, scales, kept = dict[str, float](), dict[str, ActivationScale | None](), list[str]()
    for name, layer in layers.items():
        scale = ActivationScale.fitted(inputs[name])
        error = output_error(layer, inputs[name], scale)
        error_per_token = output_error(layer, inputs[name], None)
        if min(error, error_per_token) > LARGEST_ERROR:
            kept.append(name)
            continue
        errors[name] = error_per_token if error > LARGEST_ERROR else error
        scales[name] = None if error > LARGEST_ERROR else scale
    apply_scales(model, scales)
    return QuantisationReport(errors, scales, tuple(kept))


def apply_scales(model: Any, input_scales: Mapping[str, ActivationScale | None]) -> None:
    """
    Quantise the linear layers of a plain model that have a scale, in place.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification` on a CPU, in eval mode.
        input_scales: the scale of each layer's input by the name of the layer; None for scales per token.

    Raises:
        ValueError: for a name that is not that of a plain linear layer; no layer is quantised then.
    """
    modules = dict(model.named_modules())
    for name in input_scales:
        if name not in modules or not is_plain_linear(modules[name]):
            raise ValueError(f"There are int8 scales for {name!r}, which is no plain linear layer of this model.")
    for name, scale in input_scales.items():
        QuantisedLinear.quantise(modules[name], scale)
    _fuse(model)
    model.base_model.embeddings.__class__ = FiniteEmbeddings


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the plain linear layers in attention and MLPs, which quantisation is for, by name."""
    return {
        f"{name}.{child_name}": child
        for name, module in model.named_modules()
        if isinstance(module, (ViViTAttention, ViViTMLP))
        for child_name, child in module.named_children()
        if is_plain_linear(child)
    }


@torch.no_grad()
def sampled_inputs(
    model: Any, layers: dict[str, nn.Linear], calibration: Iterable[torch.Tensor] | torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Run a model on clips, and return tokens (tokens, in_features) that each layer took, evenly spread over clips.

    Raises:
        ValueError: if there are no clips.
        NonFiniteError: if a layer takes NaN or infinite numbers.
    """
    clips = [calibration] if isinstance(calibration, torch.Tensor) else list(calibration)
    if not clips:
        raise ValueError("`calibration` is empty: int8 needs the pixel values of a few clips (16 are enough).")
    share = -(-SAMPLED_TOKENS // len(clips))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str, tokens: torch.Tensor) -> None:
        rows = tokens.reshape(-1, tokens.shape[-1])
        found[name].append(rows[:: max(1, len(rows) // share)].clone())

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for pixel_values in clips:
            model(pixel_values.to(model.device, model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {name: torch.cat(tokens) for name, tokens in found.items()}
    for name, tokens in inputs.items():
        if not tokens.isfinite().all():
            raise NonFiniteError(
                f"The input of {name} contains NaN or infinite numbers on the calibration clips: check the clips and "
                "the model's weights."
            )
    return inputs


def output_error(layer: nn.Linear, tokens: torch.Tensor, scale: ActivationScale | None) -> float:
    """Return the relative error (root mean square) of a layer's outputs without bias; per token if `scale` is None."""
    tokens, weight = tokens.float(), layer.weight.float()
    whole, scales = quantised_weight(weight)
    if scale is None:
        numbers, token_scales = quantised_per_token(tokens)
        rounded = (numbers.float() - _ZERO) * token_scales
    else:
        rounded = scale.rounded(tokens)
    expected = tokens @ weight.T
    error = rounded @ (whole.float() * scales[:, None]).T - expected
    return float(error.norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def quantised_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (out, in) to int8; return it with its float32 scales (out,)."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (out,)
    return (weight / scales[:, None]).round().to(torch.int8), scales


def quantised_per_token(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round tokens (..., channels) to uint8 with the zero point 128; return them with their scales (..., 1)."""
    tokens = tokens.float()
    scales = (tokens.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (tokens / scales).add_(_ZERO + 0.5).to(torch.uint8), scales


def _fuse(model: Any) -> None:
    """Let quantised layers that follow each other, or share an input, exchange uint8 numbers."""
    for module in model.modules():
        if type(module) is ViViTMLP:
            if _is_static(module.fc1, module.fc2) and gelu_approximation(module.activation) is not None:
                module.__class__ = QuantisedMLP
        elif type(module) in _ATTENTIONS and _is_static(module.q_proj, module.k_proj, module.v_proj):
            module.__class__ = _ATTENTIONS[type(module)]


def _is_static(*layers: nn.Module) -> bool:
    return all(isinstance(layer, QuantisedLinear) and layer.input_scale is not None for layer in layers)
