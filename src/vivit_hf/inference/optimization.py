"""
Faster inference, on request: `optimize` swaps the classes of a trained model's modules, `restore` swaps them back.

Outputs stay those of the plain model up to rounding, unless `int8` or `merge_tokens` is given. Parameters keep their
names and values. The faster classes run the plain code for gradients, compiling and recorded outputs; weights that are
laid out for oneDNN raise an error that names `restore` instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import logging

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import (
    ViViTAttention,
    ViViTKwargs,
    ViViTLayer,
    ViViTMergingLayer,
    ViViTMLP,
    ViViTPreTrainedModel,
)
from .blockwise_attention import blockwise_attention_forward
from .gpu_quantisation import TorchaoLinear, quantise_layers_by_torchao
from .int8_linear import Int8Linear
from .onednn import (
    gelu_approximation,
    has_amx,
    has_avx512,
    has_bfloat16_units,
    is_observed,
    is_plain_linear,
    needs_plain_code,
)
from .quantisation import (
    PLAIN_CLASSES,
    QuantisationReport,
    apply_scales,
    check_int8,
    quantise_layers,
)
from .stored_settings import OptimizationSetting, stored_setting
from .token_merging import describe_merging, is_merging_as_configured, merging_config, set_merging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OptimizationReport:
    """
    The changes that `optimize` made, in words, and the device and dtype that they were made for.

    `quantisation` lists the layers that were quantised and those that were not; None without `calibration`.
    `setting`: the name of the stored setting that was taken up; None without one.
    `note`: why the stored setting was not taken up; None otherwise.
    """

    device: str
    dtype: str
    changes: tuple[str, ...]
    quantisation: QuantisationReport | None = None
    setting: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        lines = [*self.changes] or ["nothing: no module of this model has a faster class"]
        if self.setting is not None:
            lines.insert(0, f"the setting {self.setting!r} that `vivit-hf tune` stored")
        if self.note is not None:
            lines.append(self.note)
        return "\n".join([f"Optimised for inference on {self.device} in {self.dtype}:", *(f"- {one}" for one in lines)])


def optimize(
    model: Any,
    *,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    calibration: Iterable[torch.Tensor] | torch.Tensor | None = None,
    merge_tokens: int | Sequence[int] | None = None,
    stored: bool = True,
) -> OptimizationReport:
    """
    Speed up inference of a trained model, in place.

    - Everywhere: GELU overwrites its input, which saves a pass over the widest tensor of a layer, and where only the
      class token is pooled, the last layer computes that token alone.
    - On CPUs with AVX-512, in float32: GELU is fused into the matrix product of oneDNN.
    - On CPUs with bfloat16 units, in bfloat16: GELU and bias are fused, linear weights are laid out for oneDNN (the
      plain copies are dropped, so memory does not grow). Without AMX, `attn_implementation="sdpa"` also becomes
      "blockwise".

    Outputs equal the plain model's up to rounding, hidden states and attentions included. Gradients, compiling and
    tracing run the plain code; where weights are laid out for oneDNN, they raise a RuntimeError that names `restore`.
    Copies, pickles and saved files hold plain weights under the plain names; `.to()` with another dtype or device and
    `load_state_dict` make the weights plain again. Forward hooks see what the faster modules compute. Optimising again
    starts from the plain model.

    `int8` changes outputs, so it is off by default: the linear layers of attention and MLPs multiply in int8. Their
    plain weights stay in memory. LayerNorm, softmax, attention and the residual stream keep their dtype. On GPUs it
    needs torchao, and a model that is compiled afterwards.

    With `merge_tokens`, Models 1 and 2 compute fewer tokens, and outputs are no longer those of the plain model:
    measure the agreement on videos of your own. Hidden states and attentions are then those of the tokens that each
    layer computes. The configuration and saved files stay those of the plain model.

    Without arguments, the setting that `vivit-hf tune` stored in the model's configuration is taken up, its dtype
    included. If it does not hold here (other weights than it was measured with, a CPU without the units that it
    needs, another kind of device), a warning says why, and the model is optimised without changes of its outputs.
    Arguments override it, and `stored=False` leaves it out.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification`, on the device that it will run on.
        dtype: dtype to cast the model to first, as `model.to(dtype)` does; unchanged if None. `restore` does not undo
            the cast, whose rounding is final.
        int8: whether to quantise; needs float32 or bfloat16, and a CPU with VNNI and `calibration`, or a CUDA GPU and
            torchao.
        calibration: clips of the kind that the model will see: pixel values (batch, frames, channels, height, width),
            or an iterable of such batches. 16 clips are enough. On a GPU they may be left out: errors of layers are
            then not measured.
        merge_tokens: tokens that each layer of the (spatial) encoder merges into similar ones: one number, or one per
            layer, such as `decreasing_schedule` returns; see `ViViTConfig.merge_tokens`. None leaves the model's own
            setting, and 0 switches it off.
        stored: whether to take up the stored setting if no other argument is given. Code that optimises a model for a
            while, such as `predict_videos`, never does: a cast cannot be undone.

    Returns:
        The report; printing it shows what was done.

    Raises:
        ImportError: for `int8` on a GPU without torchao.
        TypeError: for another kind of model, or one wrapped in an adapter.
        ValueError: for a dtype that is not a floating-point one, for `int8` on a machine, in a dtype or without the
            clips that it needs, and for `merge_tokens` that the model cannot have (Models 3 and 4 need the whole grid
            of tokens).
    """
    if not isinstance(model, ViViTPreTrainedModel):
        raise TypeError(
            f"`optimize` expects a ViViTModel or ViViTForVideoClassification, got {type(model).__name__}. Merge "
            "adapters and unwrap the model first."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype={dtype!r}` must be a floating-point torch.dtype, such as torch.bfloat16.")
    if int8:
        check_int8(model, dtype or model.dtype, calibration)
    merging = None if merge_tokens is None else merging_config(model.config, merge_tokens)
    restore(model)
    setting, note = None, None
    if stored and not int8 and dtype is None and merge_tokens is None:
        setting, note = stored_setting(model)
    if setting is not None:
        return optimize_as(model, setting)
    if note is not None:
        logger.warning(note)
    quantise: Callable[[], QuantisationReport] | None = None
    if int8 and model.device.type != "cpu":
        quantise = partial(quantise_layers_by_torchao, model, calibration)
    elif int8 and calibration is not None:
        quantise = partial(quantise_layers, model, calibration)
    return replace(_speed_up(model, dtype, merging, quantise), note=note)


def optimize_as(model: ViViTPreTrainedModel, setting: OptimizationSetting) -> OptimizationReport:
    """Optimise a model as a setting says, in place, without videos; ValueError if the setting is not for this model."""
    merging = None if setting.merge_tokens is None else merging_config(model.config, setting.merge_tokens)
    if setting.input_scales is None:
        restore(model)
        return replace(_speed_up(model, setting.dtype, merging, None), setting=setting.name)
    check_int8(model, setting.dtype, setting.input_scales)
    restore(model)
    report = _speed_up(model, setting.dtype, merging, partial(apply_scales, model, setting.input_scales))
    words = f"{len(setting.input_scales)} linear layers multiply in int8, with stored scales"
    return replace(report, changes=(words, *report.changes), setting=setting.name)


def _speed_up(
    model: Any, dtype: torch.dtype | None, merging: ViViTConfig | None, quantise: Callable[[], Any] | None
) -> OptimizationReport:
    """Swap the modules of a plain model for faster ones; `quantise` swaps the linear layers."""
    changes: Counter[str] = Counter()
    if dtype not in (None, model.dtype):
        changes[f"weights cast from {_word(model.dtype)} to {_word(dtype)}"] += 1
        model.to(dtype)
    backbone = model.base_model
    if merging is not None and set_merging(backbone.encoder, merging):
        changes[describe_merging(merging)] += 1
    try:
        quantisation = None if quantise is None else quantise()
    except Exception:
        restore(model)  # no tokens merge after an error
        raise
    runs_bfloat16 = model.device.type == "cpu" and model.dtype == torch.bfloat16 and has_bfloat16_units()
    for module in list(backbone.modules()):
        if type(module) is ViViTMLP and gelu_approximation(module.activation) is not None:
            fuses = runs_bfloat16 or (model.device.type == "cpu" and model.dtype == torch.float32 and has_avx512())
            module.__class__ = OneDNNMLP if fuses else InPlaceMLP
            changes["GELU fused into the product by oneDNN" if fuses else "GELU computed in place"] += 1
        if runs_bfloat16 and isinstance(module, (ViViTMLP, ViViTAttention)):
            packed = [PackedLinear.pack(child) for child in module.children() if is_plain_linear(child)]
            changes["linear layers with bias fused and weights laid out for oneDNN"] += len(packed)
    for layer, cls in _class_token_layers(backbone):
        layer.__class__ = cls
        changes["last layer computes the class token alone"] += 1
    if runs_bfloat16 and not has_amx() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("blockwise")
        changes["attention by matrix products, a block of scores at a time"] += 1
    words = [f"{name} ({count} modules)" if count > 1 else name for name, count in changes.items() if count]
    if quantisation is not None:
        words[:0] = quantisation.words()
    if model.device.type != "cpu":
        words.append("fused products and laid-out weights are for CPUs, and left out")
    return OptimizationReport(str(model.device), _word(model.dtype), tuple(words), quantisation)


def restore(model: Any) -> None:
    """
    Undo `optimize`: swap every module back to its plain class, and rebuild plain weights, equal bit for bit. Tokens
    merge as the configuration says.

    A model that is not optimised is left as it is. A cast by `optimize(dtype=...)` stays.
    """
    faster = [module for module in model.modules() if type(module) in _PLAIN]
    for module in faster:
        if isinstance(module, (PackedLinear, Int8Linear)):
            module.unpack()
        else:
            module.__class__ = _PLAIN[type(module)]
    if faster and model.config._attn_implementation == "blockwise":
        model.set_attn_implementation("sdpa")
    if isinstance(model, ViViTPreTrainedModel):
        set_merging(model.base_model.encoder, model.config)


@contextmanager
def optimized(model: Any) -> Iterator[None]:
    """Optimise a model within the block; no-op if it is optimised already, in training, or of another package."""
    is_changed = optimize_if_plain(model)
    try:
        yield
    finally:
        if is_changed:
            restore(model)


def optimize_if_plain(model: Any) -> bool:
    """Optimise a model of this package that is in eval mode and not optimised yet; return whether it was."""
    is_ours = isinstance(model, ViViTPreTrainedModel) and not model.training
    if not is_ours or any(type(module) in _PLAIN for module in model.modules()):
        return False
    if not is_merging_as_configured(model.base_model.encoder, model.config):
        return False
    return bool(optimize(model, stored=False).changes)


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# Faster classes


class InPlaceMLP(ViViTMLP):
    """GELU overwrites the output of the first product: a second tensor of that size costs more time than the GELU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden)."""
        approximation = gelu_approximation(self.activation)
        if approximation is None or torch.is_grad_enabled() or not is_plain_linear(self.fc1):
            return super().forward(hidden_states)
        inner = torch.ops.aten.gelu_(self.fc1(hidden_states), approximate=approximation)  # (batch, ..., intermediate)
        return self.dropout(self.fc2(self.dropout(inner)))


class OneDNNMLP(InPlaceMLP):
    """GELU is computed inside the first product."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden)."""
        approximation = gelu_approximation(self.activation)
        if approximation is None or needs_plain_code(hidden_states):
            return super().forward(hidden_states)
        if isinstance(self.fc1, PackedLinear):
            inner = self.fc1.product(hidden_states, "gelu", approximation)
        elif hidden_states.dtype == torch.float32 and hidden_states.device.type == "cpu" and is_plain_linear(self.fc1):
            fused: Callable = torch.ops.mkldnn._linear_pointwise
            weight, bias = self.fc1.weight, self.fc1.bias
            inner = fused(hidden_states.contiguous(), weight, bias, "gelu", [], approximation)
        else:
            return super().forward(hidden_states)
        return self.dropout(self.fc2(self.dropout(inner)))


class PackedLinear(nn.Linear):
    """A linear layer whose weight is laid out for oneDNN, for inference alone; `to_dense` gives the plain weight."""

    _packed: torch.Tensor
    _requires_grad: bool

    @staticmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(layer: nn.Linear) -> PackedLinear:
        """Turn a plain layer into a packed one, in place. The plain weight is dropped."""
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        state = vars(layer)
        state["_packed"], state["_requires_grad"] = packed, layer.weight.requires_grad
        del layer.weight
        layer.__class__ = PackedLinear
        return layer  # type: ignore[return-value]

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_dense(self) -> torch.Tensor:
        """Return the plain weight (out_features, in_features), equal bit for bit to the one that was packed."""
        return self._packed.to_dense()

    def unpack(self) -> None:
        """Turn this layer back into a plain one, in place."""
        weight = nn.Parameter(self.to_dense(), requires_grad=self._requires_grad)
        bias = self._parameters.pop("bias")
        del self._packed, self._requires_grad
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self._parameters.update(weight=weight, bias=bias)  # in the order of a new layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, ..., in_features) -> (batch, ..., out_features)."""
        needs_gradients = torch.is_grad_enabled() and (input.requires_grad or self._requires_grad)
        if needs_gradients or is_observed(input):
            raise RuntimeError(
                "The linear weights of this model are laid out for inference: they have no gradients, and cannot be "
                "compiled or traced. Use `torch.inference_mode()`, or call `vivit_hf.inference.restore(model)` first."
            )
        return self.product(input, "none", None)

    def product(self, tokens: torch.Tensor, post: str, algorithm: str | None) -> torch.Tensor:
        """(batch, ..., in_features) -> (batch, ..., out_features), with the pointwise operation `post` on top."""
        tokens = tokens.to(self._packed.dtype).contiguous()
        return torch.ops.mkldnn._linear_pointwise(tokens, self._packed, self.bias, post, [], algorithm)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        example = torch.empty(0, dtype=self._packed.dtype)
        applied = fn(example)
        if (applied.dtype, applied.device) == (example.dtype, example.device):
            return self
        self.unpack()
        return self._apply(fn, recurse)  # that of nn.Linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*args, **kwargs)  # that of nn.Linear

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "This weight is laid out for inference. `to_dense()` returns a plain copy; to change it, call "
                "`vivit_hf.inference.restore(model)` first."
            )
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain layers: the layout fits this machine alone."""
        state = {name: value for name, value in vars(self).items() if name not in ("_packed", "_requires_grad")}
        weight = nn.Parameter(self.to_dense(), requires_grad=self._requires_grad)
        state["_parameters"] = {"weight": weight, **self._parameters}
        return object.__new__, (nn.Linear,), state


class ClassTokenLayer(ViViTLayer):
    """The last layer of an encoder of which only the class token is pooled: it computes that token alone."""

    def needs_all_tokens(self, **kwargs: Any) -> bool:
        mask = kwargs.get("attention_mask")
        has_mask_per_query = mask is not None and mask.ndim == 4
        return bool(kwargs.get("output_hidden_states") or kwargs.get("output_attentions") or has_mask_per_query)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ViViTKwargs]) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, 1, hidden), or (batch, tokens, hidden) if an output needs all tokens."""
        if torch.is_grad_enabled() or self.needs_all_tokens(**kwargs):
            return super().forward(hidden_states, **kwargs)
        return self.class_token(hidden_states, **kwargs)

    def class_token(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, 1, hidden); `kwargs` as in `ViViTDotProductAttention`."""
        attention, tokens = self.attention, self.layernorm_before(hidden_states)
        heads = (attention.num_heads, attention.head_dim)
        query = attention.q_proj(tokens[:, :1]).unflatten(-1, heads)  # (batch, 1, heads, head_dim)
        key = attention.k_proj(tokens).unflatten(-1, heads)  # (batch, tokens, heads, head_dim)
        value = attention.v_proj(tokens).unflatten(-1, heads)
        attended = attention.o_proj(attention.attend(query, key, value, **kwargs).flatten(-2))  # (batch, 1, hidden)
        class_token = hidden_states[:, :1] + self.drop_path(self.dropout(attended))
        return class_token + self.drop_path(self.mlp(self.layernorm_after(class_token)))


class FinalClassTokenLayer(ClassTokenLayer):
    """A `ClassTokenLayer` in the encoder whose tokens are the backbone's `last_hidden_state`."""

    def needs_all_tokens(self, **kwargs: Any) -> bool:
        return kwargs.get("output_last_hidden_state", True) or super().needs_all_tokens(**kwargs)


class MergingClassTokenLayer(ClassTokenLayer, ViViTMergingLayer):
    """A `ClassTokenLayer` after layers that merge tokens."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, sizes: torch.Tensor | None = None, **kwargs: Unpack[ViViTKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(batch, tokens, hidden) -> (batch, 1, hidden), None, None, or all that a `ViViTMergingLayer` returns."""
        if torch.is_grad_enabled() or self.needs_all_tokens(**kwargs):
            return ViViTMergingLayer.forward(self, hidden_states, sizes, **kwargs)
        return self.class_token(hidden_states, sizes=sizes, **kwargs), None, None


class FinalMergingClassTokenLayer(MergingClassTokenLayer, FinalClassTokenLayer):
    """A `MergingClassTokenLayer` in the encoder whose tokens are the backbone's `last_hidden_state`."""


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    InPlaceMLP: ViViTMLP,
    OneDNNMLP: ViViTMLP,
    PackedLinear: nn.Linear,
    TorchaoLinear: nn.Linear,
    ClassTokenLayer: ViViTLayer,
    FinalClassTokenLayer: ViViTLayer,
    MergingClassTokenLayer: ViViTMergingLayer,
    FinalMergingClassTokenLayer: ViViTMergingLayer,
    **PLAIN_CLASSES,
}


def _class_token_layers(backbone: Any) -> list[tuple[nn.Module, type[ClassTokenLayer]]]:
    """Return the last layers whose other tokens are not pooled, with the faster class for each."""
    config, found = backbone.config, list[tuple[nn.Module, type[ClassTokenLayer]]]()
    if config.pooling == "cls":
        is_encoder = config.attention_type == "factorised_encoder"
        last: nn.Module = backbone.encoder.layer[-1]
        if type(last) is ViViTMergingLayer:
            found.append((last, MergingClassTokenLayer if is_encoder else FinalMergingClassTokenLayer))
        else:
            found.append((last, ClassTokenLayer if is_encoder else FinalClassTokenLayer))
    if backbone.temporal_encoder is not None and config.pooling_over_time == "cls":
        found.append((backbone.temporal_encoder.layer[-1], FinalClassTokenLayer))
    return [(layer, cls) for layer, cls in found if type(layer) in (ViViTLayer, ViViTMergingLayer)]


ALL_ATTENTION_FUNCTIONS.register("blockwise", blockwise_attention_forward)
