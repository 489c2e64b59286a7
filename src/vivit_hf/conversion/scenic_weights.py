"""Configurations and weights of google-research/scenic's ViViT as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import ViViTForVideoClassification
from .weight_files import ConversionError


def config_from_scenic(
    model_config: Mapping[str, Any],
    *,
    num_frames: int,
    image_size: int | tuple[int, int],
    num_labels: int,
    **overrides: Any,
) -> ViViTConfig:
    """
    Return the configuration for the `model` entry of an official configuration.

    Args:
        model_config: `config.model` of google-research/scenic `projects/vivit/configs/`, as nested mappings.
        num_frames: frames in a clip.
        image_size: pixels of a frame, one number or (height, width).
        num_labels: outputs of the classifier.
        overrides: any other field of `ViViTConfig`.

    Raises:
        ValueError: for a configuration that the official model does not support either.
    """
    attention = dict(model_config.get("attention_config") or {})
    encoding = dict(model_config["temporal_encoding_config"])
    attention_type = attention.get("type", "spacetime")
    factorised_encoder = attention_type == "factorized_encoder"
    encoder = model_config["spatial_transformer"] if factorised_encoder else model_config
    height, width, *time = model_config["patches"]["size"]  # (height, width) or (height, width, time)
    fields: dict[str, Any] = {
        "num_frames": num_frames,
        "image_size": image_size,
        "num_labels": num_labels,
        "attention_type": attention_type,
        "embedding_type": encoding["method"],
        "num_sampled_frames": encoding.get("n_sampled_frames"),
        "tubelet_size": (*(time or [1]), height, width),
        "hidden_size": model_config["hidden_size"],
        "num_hidden_layers": encoder["num_layers"],
        "num_attention_heads": encoder["num_heads"],
        "intermediate_size": encoder["mlp_dim"],
        "pooling": model_config.get("classifier", "gap"),
        "representation_size": model_config.get("representation_size"),
        "hidden_dropout_prob": model_config.get("dropout_rate", 0.1),
        "attention_probs_dropout_prob": model_config.get("attention_dropout_rate", 0.1),
        "drop_path_rate": model_config.get("stochastic_droplayer_rate") or 0.0,
    }
    if attention_type == "factorized_self_attention_block":
        fields["attention_order"] = attention.get("attention_order", "time_space")
    if factorised_encoder:
        temporal = model_config.get("temporal_transformer") or {}
        fields["num_temporal_layers"] = 0 if attention.get("spatial_only_baseline") else temporal["num_layers"]
        if fields["num_temporal_layers"]:
            fields["temporal_num_attention_heads"] = temporal["num_heads"]
            fields["temporal_intermediate_size"] = temporal["mlp_dim"]
    return ViViTConfig(**{**fields, **overrides})


# Conversions of official arrays to tensors. Dense kernels are (in, out), projections to heads (in, heads, head_dim),
# projections from heads (heads, head_dim, out), and convolutions (time, height, width, in, out).
def _keep(array: np.ndarray) -> np.ndarray:
    return array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def _dense(array: np.ndarray) -> np.ndarray:
    return array.T


def _to_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1).T


def _from_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]).T


def _convolution(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1))


Mapped = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


def _linear(official: str, ours: str, bias: bool = True) -> Iterator[Mapped]:
    yield f"{official}/kernel", f"{ours}.weight", _dense
    if bias:
        yield f"{official}/bias", f"{ours}.bias", _keep


def _layernorm(official: str, ours: str) -> Iterator[Mapped]:
    yield f"{official}/scale", f"{ours}.weight", _keep
    yield f"{official}/bias", f"{ours}.bias", _keep


def _attention(official: str, ours: str, bias: bool) -> Iterator[Mapped]:
    for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield f"{official}/{name}/kernel", f"{ours}.{projection}.weight", _to_heads
        if bias:
            yield f"{official}/{name}/bias", f"{ours}.{projection}.bias", _flat
    yield f"{official}/out/kernel", f"{ours}.o_proj.weight", _from_heads
    yield f"{official}/out/bias", f"{ours}.o_proj.bias", _keep


def _mlp(official: str, ours: str) -> Iterator[Mapped]:
    yield from _linear(f"{official}/Dense_0", f"{ours}.fc1")
    yield from _linear(f"{official}/Dense_1", f"{ours}.fc2")


def _encoder(official: str, ours: str, norm: str, num_layers: int, config: ViViTConfig) -> Iterator[Mapped]:
    for index in range(num_layers):
        block, layer = f"{official}/encoderblock_{index}", f"{ours}.layer.{index}"
        if config.attention_type == "factorised_self_attention":
            for axis in ("space", "time"):
                yield from _layernorm(f"{block}/LayerNorm_{axis}", f"{layer}.layernorm_{axis}")
                names = f"{block}/MultiHeadDotProductAttention_{axis}", f"{layer}.attention_{axis}"
                yield from _attention(*names, config.qkv_bias)
            yield from _layernorm(f"{block}/LayerNorm_mlp", f"{layer}.layernorm_after")
            yield from _mlp(f"{block}/MlpBlock", f"{layer}.mlp")
        else:
            yield from _layernorm(f"{block}/LayerNorm_0", f"{layer}.layernorm_before")
            yield from _attention(f"{block}/MultiHeadDotProductAttention_0", f"{layer}.attention", config.qkv_bias)
            yield from _layernorm(f"{block}/LayerNorm_1", f"{layer}.layernorm_after")
            yield from _mlp(f"{block}/MlpBlock_0", f"{layer}.mlp")
    yield from _layernorm(f"{official}/encoder_norm", norm)


def name_map(config: ViViTConfig) -> list[Mapped]:
    """Return (official name, our name, conversion of the array) for every parameter of a model with this config."""

    def pairs() -> Iterator[Mapped]:
        two_encoders = config.attention_type == "factorised_encoder"
        encoder = "SpatialTransformer" if two_encoders else "Transformer"
        yield "embedding/kernel", "vivit.embeddings.patch_embeddings.projection.weight", _convolution
        yield "embedding/bias", "vivit.embeddings.patch_embeddings.projection.bias", _keep
        if config.pooling == "cls":
            yield f"cls_{encoder}" if two_encoders else "cls", "vivit.embeddings.cls_token", _keep
        yield f"{encoder}/posembed_input/pos_embedding", "vivit.embeddings.position_embeddings", _keep
        yield from _encoder(encoder, "vivit.encoder", "vivit.layernorm", config.num_hidden_layers, config)
        if two_encoders and config.num_temporal_layers:
            encoder, ours = "TemporalTransformer", "vivit.temporal_embeddings"
            if config.pooling == "cls":
                yield f"cls_{encoder}", f"{ours}.cls_token", _keep
            yield f"{encoder}/posembed_input/pos_embedding", f"{ours}.position_embeddings", _keep
            norm, layers = "vivit.temporal_layernorm", config.num_temporal_layers
            yield from _encoder(encoder, "vivit.temporal_encoder", norm, layers, config)
        if config.representation_size is not None:
            yield from _linear("pre_logits", "vivit.pre_logits")
        if config.num_labels:
            yield from _linear("output_projection", "classifier")

    return list(pairs())


def state_dict_from_scenic(params: Mapping[str, np.ndarray], config: ViViTConfig) -> dict[str, torch.Tensor]:
    """
    Return the state dict of `ViViTForVideoClassification(config)` from official parameters.

    Args:
        params: arrays by their `/`-joined names, as in `SpatialTransformer/encoderblock_0/LayerNorm_0/scale`.
        config: the configuration of the model; see `config_from_scenic`.

    Raises:
        ConversionError: naming the arrays that are missing, left over, or have the wrong shape.
    """
    with torch.device("meta"):
        expected = ViViTForVideoClassification(config).state_dict()
    mapping = name_map(config)
    problems = [f"missing: {official} (for {ours})" for official, ours, _ in mapping if official not in params]
    known = {official for official, _, _ in mapping}
    problems += [f"no place for: {name} {np.shape(params[name])}" for name in sorted(set(params) - known)]
    state_dict = {}
    for official, ours, convert in mapping:
        if official not in params:
            continue
        tensor = torch.from_numpy(np.array(convert(np.asarray(params[official])), order="C"))
        if tensor.shape != expected[ours].shape:
            shapes = f"{tuple(tensor.shape)}, but the model's {ours} is {tuple(expected[ours].shape)}"
            problems.append(f"wrong shape: {official} gives {shapes}")
        state_dict[ours] = tensor
    problems += [f"not mapped: {name}" for name in sorted(set(expected) - {ours for _, ours, _ in mapping})]
    problems += _head_problems(params, config)
    if problems:
        listing = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ConversionError(f"The checkpoint does not fit the configuration in {len(problems)} places:\n  {listing}")
    return state_dict


def _head_problems(params: Mapping[str, np.ndarray], config: ViViTConfig) -> Iterator[str]:
    """Compare the heads, an axis of the official kernels (in, heads, head_dim) that our weights do not have."""
    for name, array in params.items():
        if not name.endswith("/query/kernel") or np.ndim(array) != 3:
            continue
        is_temporal = name.startswith("TemporalTransformer/")
        heads = (is_temporal and config.temporal_num_attention_heads) or config.num_attention_heads
        if array.shape[1] != heads:
            yield f"wrong number of heads: {name} has {array.shape[1]}, the configuration {heads}"
