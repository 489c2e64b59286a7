"""Read image ViTs as transformers' `ViTModel`: transformers' own files, timm's, and the original JAX ones."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, Dinov2Model, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from ..initialisation.inflation import fold_layer_scales
from .image_arrays import ImageSource, fill_vit, origins_of, raise_problems, reason_for, renamed
from .jax_images import read_jax_vit
from .timm_images import read_timm_vit
from .weight_files import (
    ConversionError,
    check_weights,
    find_file,
    find_weights,
    read_config,
    read_json,
    shards,
    weights_error,
)


def read_image_source(source: str, num_heads: int | None = None) -> ImageSource:
    """
    Read an image ViT.

    Args:
        source: a Hub id or folder with transformers' or timm's `config.json`, a safetensors file of timm, or an `.npz`
            of the original JAX ViTs.
        num_heads: attention heads, which timm's weights do not store; by default those of timm's models of this width.

    Raises:
        ConversionError: naming what is missing, left over, of the wrong shape, or of another architecture.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".npz", ".safetensors"):
        if not path.is_file():
            raise ConversionError(f"There is no file {source}.")
        if path.suffix == ".npz":
            return read_jax_vit(path)
        if path.suffix == ".safetensors":
            return read_timm_vit(path, {}, num_heads)
        raise ConversionError(f"{source} is neither a folder, nor a Hub id, nor an .npz or .safetensors file.")
    config = read_config(source)
    if "model_type" in config:
        return read_transformers_vit(source, config)
    if "architecture" in config:
        weights = shards(find_weights(source))
        if len(weights) != 1:
            raise ConversionError(f"{source}: expected timm's weights in one file, found {len(weights)}.")
        return read_timm_vit(weights[0], config, num_heads)
    raise ConversionError(f"{source}: config.json has neither transformers' `model_type` nor timm's `architecture`.")


_MASK_TOKEN = "embeddings.mask_token"
# Models with the names and the computation of ViT.
_VIT_TYPES = ("vit", "vit_msn", "vit_mae")
_REFUSED_TYPES = {
    "deit": "a distilled DeiT, whose distillation token a ViViT cannot use; the plain DeiTs, such as "
    "facebook/deit-base-patch16-224, are published as type 'vit'"
}
_UNUSED = {
    r"(vit\.)?pooler\..*": "pooler",
    r"classifier\..*": "classification head",
    r"(vit\.)?embeddings\.mask_token": "mask token",
    r"decoder\..*": "decoder of masked image modelling",
}
_DINOV2_NAMES = {
    r"((?:embeddings|layernorm)\..*)": r"\1",
    r"encoder\.layer\.(\d+)\.norm1\.(.*)": r"layers.\1.layernorm_before.\2",
    r"encoder\.layer\.(\d+)\.norm2\.(.*)": r"layers.\1.layernorm_after.\2",
    r"encoder\.layer\.(\d+\.(?:attention|mlp)\..*)": r"layers.\1",
}
_DINOV2_LAYER_SCALES = {
    r"(encoder\.layer\.\d+)\.layer_scale1\.lambda1": r"\1.attention.o_proj",
    r"(encoder\.layer\.\d+)\.layer_scale2\.lambda1": r"\1.mlp.fc2",
}


def read_transformers_vit(source: str, raw_config: Mapping[str, Any]) -> ImageSource:
    """Read transformers' ViT or DINOv2, with or without pooler and head, in any of transformers' file layouts."""
    model_type = raw_config["model_type"]
    if model_type not in (*_VIT_TYPES, "dinov2"):
        kind = f"of type {model_type!r}, not a plain ViT ({', '.join(_VIT_TYPES)} or dinov2)"
        raise ConversionError(f"{source} is {_REFUSED_TYPES.get(model_type, kind)}.")
    stored = AutoConfig.for_model(**raw_config)  # with the defaults of its own type
    weights = find_weights(source)
    check_weights(weights)
    if getattr(stored, "use_swiglu_ffn", False):
        raise ConversionError(f"{source} has SwiGLU layers (use_swiglu_ffn), which a ViViT cannot use.")
    if model_type == "dinov2":
        dinov2, unused = _load(Dinov2Model, source, weights, stored)
        vit, origins, folded = _without_layer_scale(source, dinov2)
        unused |= {name: "mask token" for name in dinov2.state_dict() if name == _MASK_TOKEN}
    else:
        vit, unused = _load(ViTModel, source, weights, _vit_config(stored), add_pooling_layer=False)
        origins, folded = {name: name for name in vit.state_dict()}, []
    file_kind = "safetensors" if "safetensors" in weights.name else "torch file"
    return ImageSource(
        vit,
        f"transformers ({model_type}, {file_kind})",
        origins,
        unused,
        _image_processor_settings(source),
        folded=folded,
    )


def _vit_config(stored: Any, **overrides: Any) -> ViTConfig:
    """Return the fields that ViT shares with the configuration of another type."""
    names = set(ViTConfig.__annotations__) - {"model_type"}
    return ViTConfig(**{**{name: getattr(stored, name) for name in names if hasattr(stored, name)}, **overrides})


def _load(
    cls: type[PreTrainedModel], source: str, weights: Path, config: PreTrainedConfig, **options: Any
) -> tuple[Any, dict[str, str]]:
    """Load a model in float32; return it, and its unused arrays with the reasons."""
    try:
        model, info = cls.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors="safetensors" in weights.name,
            ignore_mismatched_sizes=True,  # mismatches are reported by name below
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise weights_error(weights, error) from error
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"wrong shape: {name} is {tuple(there)}, {source}'s config.json expects {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
    ]
    unused = {name: reason_for(name, _UNUSED) for name in sorted(info["unexpected_keys"])}
    problems += [f"no place for: {name}" for name, reason in unused.items() if reason is None]
    raise_problems(source, problems)
    return model, {name: reason for name, reason in unused.items() if reason is not None}


def _without_layer_scale(source: str, dinov2: Dinov2Model) -> tuple[ViTModel, dict[str, str], list[str]]:
    """Return a plain ViT that computes the same, the origins of its weights, and the arrays that were folded."""
    tensors = {name: tensor for name, tensor in dinov2.state_dict().items() if name != _MASK_TOKEN}
    scales = {name: place for name in tensors if (place := renamed(name, _DINOV2_LAYER_SCALES))}
    folded = fold_layer_scales(tensors, scales)
    state = {renamed(name, _DINOV2_NAMES) or name: (name, tensor) for name, tensor in folded.items()}
    config = dinov2.config
    vit_config = _vit_config(config, intermediate_size=int(config.hidden_size * config.mlp_ratio))
    return fill_vit(source, vit_config, state, []), origins_of(state), list(scales)


def _image_processor_settings(source: str) -> dict[str, Any] | None:
    """Read the image processor's settings from either file that transformers writes; return None without one."""
    if (file := find_file(source, "preprocessor_config.json")) is not None:
        settings = read_json(file)
    elif (file := find_file(source, "processor_config.json")) is not None:
        settings = stored.get("image_processor") if isinstance(stored := read_json(file), dict) else None
    else:
        return None
    if not isinstance(settings, dict):
        raise ConversionError(f"{file} does not hold the settings of an image processor.")
    return settings
