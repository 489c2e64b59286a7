"""Configurations and weights of google-research/scenic's ViViT as ours."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..initialisation.weight_files import ConversionError, from_flax
from ..modeling_vivit import ViViTForVideoClassification


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


_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}


def name_map(config: ViViTConfig) -> dict[str, str]:
    """Return the official name of every parameter of a model with this config, and ours."""
    two_encoders = config.attention_type == "factorised_encoder"
    encoders = [("SpatialTransformer" if two_encoders else "Transformer", "", config.num_hidden_layers)]
    if two_encoders and config.num_temporal_layers:
        encoders.append(("TemporalTransformer", "temporal_", config.num_temporal_layers))
    modules = {"embedding": "vivit.embeddings.patch_embeddings.projection"}
    arrays = {}
    for official, prefix, num_layers in encoders:
        ours = f"vivit.{prefix}embeddings"
        arrays[f"{official}/posembed_input/pos_embedding"] = f"{ours}.position_embeddings"
        if config.pooling == "cls":
            arrays[f"cls_{official}" if two_encoders else "cls"] = f"{ours}.cls_token"
        for index in range(num_layers):
            block, layer = f"{official}/encoderblock_{index}", f"vivit.{prefix}encoder.layer.{index}"
            modules |= {f"{block}/{theirs}": f"{layer}.{part}" for theirs, part in _layer_modules(config).items()}
        modules[f"{official}/encoder_norm"] = f"vivit.{prefix}layernorm"
    if config.representation_size is not None:
        modules["pre_logits"] = "vivit.pre_logits"
    if config.num_labels:
        modules["output_projection"] = "classifier"
    for official, ours in modules.items():
        arrays[f"{official}/{'scale' if 'layernorm' in ours else 'kernel'}"] = f"{ours}.weight"
        if config.qkv_bias or not ours.endswith(("q_proj", "k_proj", "v_proj")):
            arrays[f"{official}/bias"] = f"{ours}.bias"
    return arrays


def _layer_modules(config: ViViTConfig) -> dict[str, str]:
    """Return the official names of the modules in a layer, and ours."""
    if config.attention_type == "factorised_self_attention":
        attentions = {f"MultiHeadDotProductAttention_{axis}": f"attention_{axis}" for axis in ("space", "time")}
        norms = {f"LayerNorm_{axis}": f"layernorm_{axis}" for axis in ("space", "time")}
        norms["LayerNorm_mlp"], mlp = "layernorm_after", "MlpBlock"
    else:
        attentions = {"MultiHeadDotProductAttention_0": "attention"}
        norms, mlp = {"LayerNorm_0": "layernorm_before", "LayerNorm_1": "layernorm_after"}, "MlpBlock_0"
    projections = {
        f"{official}/{theirs}": f"{ours}.{projection}"
        for official, ours in attentions.items()
        for theirs, projection in _PROJECTIONS.items()
    }
    return {**norms, **projections, f"{mlp}/Dense_0": "mlp.fc1", f"{mlp}/Dense_1": "mlp.fc2"}


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
    arrays = name_map(config)
    problems = [f"missing: {official} (for {ours})" for official, ours in arrays.items() if official not in params]
    problems += [f"no place for: {name} {np.shape(params[name])}" for name in sorted(params.keys() - arrays.keys())]
    problems += [f"not mapped: {ours}" for ours in sorted(expected.keys() - set(arrays.values()))]
    state_dict = {}
    for official, ours in arrays.items():
        if official not in params:
            continue
        tensor = torch.from_numpy(np.array(from_flax(ours, np.asarray(params[official])), order="C"))
        if tensor.shape != expected[ours].shape:
            shapes = f"{tuple(tensor.shape)}, but the model's {ours} is {tuple(expected[ours].shape)}"
            problems.append(f"wrong shape: {official} gives {shapes}")
        state_dict[ours] = tensor
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
