"""Read the models of timm's `VisionTransformer`: ViT, DeiT, DINOv2, and the image towers of CLIP and SigLIP."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from .image_arrays import ImageSource, Mapped, int_or_pair, reason_for, refuse, renamed, square_image_size
from .image_models import fill_model
from .inflation import fold_layer_scales
from .weight_files import ConversionError, read_tensors


_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"reg_token": "embeddings.register_tokens",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"norm_pre\.(weight|bias)": r"pre_layernorm.\1",
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
    r"attn_pool\..*": "attention-pooling head",
}
_REFUSED = {
    r".*\.gamma_[12]": "LayerScale of another kind than ls1 and ls2",
    r"fc_norm\..*": "a LayerNorm behind average pooling (fc_norm)",
    r"dist_token|head_dist\..*": "a distillation token (distilled DeiT)",
    r".*\.[qk]_norm\..*": "query-key normalisation",
    r".*\.mlp\.(fc1_[gx]|w\d+)\..*": "SwiGLU layers",
    r".*rel_pos.*|.*relative_position.*": "relative position embeddings",
    r".*rope.*": "rotary position embeddings (RoPE)",
}
_ARCHITECTURES = r"(vit|deit3?|flexivit)_.*"
_REFUSED_ARCHITECTURES = {
    r".*_dinov3.*|.*_rope_.*|eva02_.*|vit_pe_.*": "rotary position embeddings (RoPE)",
    r"naflexvit_.*": "position embeddings for images of any shape (NaFlex)",
}
# Activations by architecture, where it is not the exact GELU, and the names of timm's `act_layer`.
_ACTIVATIONS = {
    r".*_quickgelu_.*": "quick_gelu",
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_.*|vit_large_patch16_siglip_(gap_)?512": (
        "gelu_pytorch_tanh"
    ),
}
_ACT_LAYERS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# `model_args` that are read here or show in the weights.
_MODEL_ARGS = (
    "img_size patch_size embed_dim depth num_heads num_classes mlp_ratio act_layer class_token reg_tokens "
    "no_embed_class init_values pre_norm qkv_bias global_pool dynamic_img_size"
).split()
# Heads by width, where the head size is not 64: so400m, huge, giant, giantopt, gigantic.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}
_HEADS_OF = {"vit_base_patch16_gap_224": 16}  # the only other of that width has 12
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def read_timm_model(path: Path, timm_config: Mapping[str, Any], num_heads: int | None = None) -> ImageSource:
    """
    Read a model of timm's `VisionTransformer` as the model of transformers that computes the same.

    Args:
        path: the weights.
        timm_config: the contents of timm's `config.json`; may be empty.
        num_heads: attention heads; by default those of timm's models of this width.
    """
    _check_architecture(path, timm_config)
    tensors = read_tensors(path)
    refuse(path, tensors, _REFUSED)
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        if name not in tensors:
            raise ConversionError(
                f"{path} has no {name!r}, so it is not a plain ViT of timm; it has {list(tensors)[:4]}."
            )
    if tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[-1]:
        raise ConversionError(f"{path} has SwiGLU layers, which a ViViT cannot use: blocks.0.mlp.fc1.weight.")
    scales = {name: place for name in tensors if (place := renamed(name, _LAYER_SCALES))}
    try:
        tensors = fold_layer_scales(tensors, scales)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error

    image_size, tensors["pos_embed"] = _positions(path, timm_config, tensors)
    build, notes = _model_for(path, timm_config, tensors, image_size, num_heads)
    state, unused, problems = _mapped(tensors)
    settings = _processor_settings(timm_config)
    if settings is None:
        notes.append("no timm config.json with mean and std: frames are scaled to [-1, 1]")
    if scales:
        notes.append(f"{len(scales)} arrays of LayerScale folded into the projections before them")
    model, origins = fill_model(path, build, state, problems)
    return ImageSource(model, "timm (safetensors)", origins, unused, settings, notes, folded=list(scales))


def _check_architecture(path: Path, timm_config: Mapping[str, Any]) -> None:
    architecture = timm_config.get("architecture", "vit_")
    if reason := reason_for(architecture, _REFUSED_ARCHITECTURES):
        raise ConversionError(f"{path} is timm's {architecture!r}, which has {reason}; a ViViT cannot use them.")
    if not re.fullmatch(_ARCHITECTURES, architecture):
        raise ConversionError(f"{path} is timm's {architecture!r}, not a plain ViT (vit_..., deit_...).")
    if unknown := set(timm_config.get("model_args") or {}) - {*_MODEL_ARGS}:
        raise ConversionError(
            f"{path}: timm's model_args {sorted(unknown)} are not supported; only plain ViTs can be used."
        )


def _mapped(tensors: Mapping[str, torch.Tensor]) -> tuple[Mapped, dict[str, str], list[str]]:
    """Return the arrays by names of transformers, the unused ones with the reasons, and problems."""
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
    if "reg_token" in tensors:  # `Dinov2WithRegistersModel` has LayerScale, which is folded here, and a mask token
        hidden, layers = tensors["reg_token"].shape[-1], _num_layers(tensors)
        scales = [f"encoder.layer.{index}.layer_scale{number}.lambda1" for index in range(layers) for number in (1, 2)]
        state |= {name: ("", torch.ones(hidden)) for name in scales}
        state["embeddings.mask_token"] = ("", torch.zeros(1, hidden))
    return state, unused, problems


def _num_layers(tensors: Mapping[str, torch.Tensor]) -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))


def _positions(
    path: Path, timm_config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return (height, width) in pixels, and the position embeddings with a zero for a class token that has none."""
    positions, patch = tensors["pos_embed"], tuple(tensors["patch_embed.proj.weight"].shape[2:])
    num_positions, has_class_token = positions.shape[1], "cls_token" in tensors
    _, height, width = (timm_config.get("pretrained_cfg") or {}).get("input_size") or (3, 0, 0)
    prefixes = (1, 0) if has_class_token else (0,)
    num_patches = (height // patch[0]) * (width // patch[1])
    if not num_patches or num_positions - num_patches not in prefixes:
        height, width = square_image_size(path, num_positions, patch, prefixes)
        num_patches = (height // patch[0]) * (width // patch[1])
    if has_class_token and num_positions == num_patches:
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return (height, width), positions


def _model_for(
    path: Path,
    timm_config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    image_size: tuple[int, ...],
    num_heads: int | None,
) -> tuple[Callable[[], PreTrainedModel], list[str]]:
    """Return a maker of the model of transformers that computes what these arrays compute, and notes for the user."""
    hidden, channels, *patch = tensors["patch_embed.proj.weight"].shape
    inner = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    has_class_token, has_pre_norm = "cls_token" in tensors, "norm_pre.weight" in tensors
    heads, notes = _heads(path, hidden, timm_config, num_heads)
    activation = _activation(path, timm_config)
    if activation is None:
        activation = "gelu"
        if has_pre_norm or not has_class_token:
            notes.append("exact GELU is assumed: only timm's config.json tells whether it is another activation")
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": _num_layers(tensors),
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_channels": channels,
        "patch_size": int_or_pair(tuple(patch)),
        "image_size": int_or_pair(image_size),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5 if has_pre_norm else 1e-6,
    }
    if "reg_token" in tensors:
        if not has_class_token or has_pre_norm or inner % hidden:
            raise ConversionError(
                f"{path} has register tokens (reg_token) in a model that is not built like DINOv2: expected a class "
                f"token, no norm_pre, and MLPs of a multiple of {hidden}, got {inner}."
            )
        config |= {"mlp_ratio": inner // hidden, "num_register_tokens": tensors["reg_token"].shape[1]}
        config["qkv_bias"] = "blocks.0.attn.qkv.bias" in tensors
        return lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config)), notes
    if has_class_token and not has_pre_norm:
        config["qkv_bias"] = "blocks.0.attn.qkv.bias" in tensors
        return lambda: ViTModel(ViTConfig(**config), add_pooling_layer=False), notes
    if isinstance(config["image_size"], list) or isinstance(config["patch_size"], list):
        raise ConversionError(f"{path}: expected square images and patches in a CLIP or SigLIP, got {image_size}.")
    if has_class_token:
        return lambda: CLIPVisionModel(CLIPVisionConfig(**config)), notes
    return lambda: SiglipVisionModel(SiglipVisionConfig(**config, vision_use_head=False)), notes


def _activation(path: Path, timm_config: Mapping[str, Any]) -> str | None:
    """Return transformers' name of the activation; None without a configuration that tells it."""
    stated = (timm_config.get("model_args") or {}).get("act_layer")
    if stated is not None and stated not in _ACT_LAYERS:
        raise ConversionError(f"{path}: timm's act_layer={stated!r} is not one of {', '.join(_ACT_LAYERS)}.")
    if stated is not None:
        return _ACT_LAYERS[stated]
    if "architecture" not in timm_config:
        return None
    return reason_for(timm_config["architecture"], _ACTIVATIONS) or "gelu"


def _heads(path: Path, hidden: int, timm_config: Mapping[str, Any], num_heads: int | None) -> tuple[int, list[str]]:
    stated = num_heads or (timm_config.get("model_args") or {}).get("num_heads")
    stated = stated or _HEADS_OF.get(timm_config.get("architecture", ""))
    heads = stated or _HEADS.get(hidden, hidden // 64)
    if not heads or hidden % heads or (not stated and hidden not in _HEADS and hidden % 64):
        raise ConversionError(
            f"{path} is {hidden} wide, which does not determine the number of heads; convert it with "
            f"`vivit-hf convert vit --source {path} --num-heads N --output DIR`."
        )
    return heads, [] if stated else [f"{heads} heads, as in timm's models of this width (else give --num-heads)"]


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
    short_side = int(min(height, width) / (stored.get("crop_pct") or 0.875))
    return {
        **settings,
        "size": {"shortest_edge": short_side},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
