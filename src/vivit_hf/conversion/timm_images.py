"""Read ViTs of timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ViTConfig

from ..initialisation.inflation import fold_layer_scales
from .image_arrays import (
    ImageSource,
    Mapped,
    fill_vit,
    int_or_pair,
    origins_of,
    reason_for,
    refuse,
    renamed,
    square_image_size,
)
from .weight_files import ConversionError, read_tensors


_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"layernorm.\1",
}
# LayerScale multiplies the output of a residual branch, so it can be folded into the projection before it.
_LAYER_SCALES = {r"(blocks\.\d+)\.ls1\.gamma": r"\1.attn.proj", r"(blocks\.\d+)\.ls2\.gamma": r"\1.mlp.fc2"}
_UNUSED = {
    r"head\.(weight|bias)": "classification head",
    r"pre_logits\.fc\.(weight|bias)": "representation layer",
}
_REFUSED = {
    r".*\.gamma_[12]": "LayerScale of another kind than ls1 and ls2",
    r"reg_token": "register tokens",
    r"fc_norm\..*": "a LayerNorm behind average pooling (fc_norm)",
    r"dist_token|head_dist\..*": "a distillation token (distilled DeiT)",
    r"norm_pre\..*": "a LayerNorm before the first layer (norm_pre)",
    r".*\.[qk]_norm\..*": "query-key normalisation",
    r"attn_pool\..*": "attention pooling",
    r".*rel_pos.*|.*relative_position.*": "relative position embeddings",
}
_ARCHITECTURES = r"(vit|deit|flexivit)_.*"
# Heads by width, where the head size is not 64: huge, giant, gigantic.
_HEADS = {1280: 16, 1408: 16, 1664: 16}
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def read_timm_vit(path: Path, timm_config: Mapping[str, Any], num_heads: int | None = None) -> ImageSource:
    """
    Read timm's `VisionTransformer`: fused query, key and value, exact GELU, LayerNorm epsilon 1e-6.

    Args:
        path: the weights.
        timm_config: the contents of timm's `config.json`; may be empty.
        num_heads: attention heads; by default those of timm's models of this width.
    """
    architecture = timm_config.get("architecture", "vit_")
    if not re.fullmatch(_ARCHITECTURES, architecture):
        raise ConversionError(f"{path} is timm's {architecture!r}, not a plain ViT (vit_..., deit_...).")
    tensors = read_tensors(path)
    scales = {name: place for name in tensors if (place := renamed(name, _LAYER_SCALES))}
    try:
        tensors = fold_layer_scales(tensors, scales)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    refuse(path, tensors, _REFUSED)
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            raise ConversionError(
                f"{path} has no {name!r}, so it is not a plain ViT of timm; it has {list(tensors)[:4]}."
            )

    state: Mapped = {}
    unused, problems = {}, []
    for name, tensor in tensors.items():
        target = renamed(name, _NAMES)
        if target is not None:
            state[target] = (name, tensor)
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"layers.{match[1]}.attention.{projection}_proj.{match[2]}"] = (name, part)
        elif reason := reason_for(name, _UNUSED):
            unused[name] = reason
        else:
            problems.append(f"no place for: {name}")

    kernel = tensors["patch_embed.proj.weight"]
    hidden, channels, *patch = kernel.shape
    heads, notes = _heads(path, hidden, timm_config, num_heads)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        num_attention_heads=heads,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        num_channels=channels,
        patch_size=int_or_pair(tuple(patch)),
        image_size=_image_size(path, timm_config, tensors["pos_embed"].shape[1], tuple(patch)),
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    settings = _processor_settings(timm_config)
    if settings is None:
        notes.append("no timm config.json with mean and std: frames are scaled to [-1, 1]")
    if scales:
        notes.append(f"{len(scales)} arrays of LayerScale folded into the projections before them")
    vit = fill_vit(path, config, state, problems)
    return ImageSource(vit, "timm (safetensors)", origins_of(state), unused, settings, notes, folded=list(scales))


def _heads(path: Path, hidden: int, timm_config: Mapping[str, Any], num_heads: int | None) -> tuple[int, list[str]]:
    model_args = timm_config.get("model_args") or {}
    unknown = set(model_args) - {
        "img_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "num_classes",
        "mlp_ratio",
    }
    if unknown:
        raise ConversionError(
            f"{path}: timm's model_args {sorted(unknown)} are not supported; only plain ViTs can be used."
        )
    stated = num_heads or model_args.get("num_heads")
    heads = stated or _HEADS.get(hidden, hidden // 64)
    if not heads or hidden % heads or (not stated and hidden not in _HEADS and hidden % 64):
        raise ConversionError(
            f"{path} is {hidden} wide, which does not determine the number of heads; convert it with "
            f"`vivit-hf convert vit --source {path} --num-heads N --output DIR`."
        )
    return heads, [] if stated else [f"{heads} heads, as in timm's models of this width (else give --num-heads)"]


def _image_size(
    path: Path, timm_config: Mapping[str, Any], num_positions: int, patch: tuple[int, ...]
) -> int | list[int]:
    input_size = (timm_config.get("pretrained_cfg") or {}).get("input_size")
    if input_size and (input_size[1] // patch[0]) * (input_size[2] // patch[1]) == num_positions - 1:
        return int_or_pair((input_size[1], input_size[2]))
    return square_image_size(path, num_positions, patch)


def _processor_settings(timm_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return timm's image preparation as transformers' processor settings."""
    stored = timm_config.get("pretrained_cfg") or {}
    if "mean" not in stored or "std" not in stored:
        return None
    settings: dict[str, Any] = {"image_mean": list(stored["mean"]), "image_std": list(stored["std"])}
    settings["resample"] = _INTERPOLATIONS.get(str(stored.get("interpolation")), 3)
    _, height, width = stored.get("input_size") or (3, 224, 224)
    if stored.get("crop_mode", "center") == "squash":
        return {**settings, "size": {"height": height, "width": width}}
    short_side = int(min(height, width) / stored.get("crop_pct", 0.875))
    return {
        **settings,
        "size": {"shortest_edge": short_side},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
