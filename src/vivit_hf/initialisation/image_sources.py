"""Read image models as those of transformers: from transformers' own files, timm's, and the original JAX ones."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from .image_arrays import ImageSource, raise_problems
from .image_models import (
    CLIP,
    DINOV2,
    DINOV2_WITH_REGISTERS,
    SIGLIP,
    TWO_TOWERS,
    refusal,
    vision_config,
    why_unused,
)
from .jax_images import read_jax_vit
from .timm_images import read_timm_model
from .weight_files import ConversionError, find_file, find_weights, loading_problems, read_config, read_json


def read_image_source(source: str, num_heads: int | None = None) -> ImageSource:
    """
    Read an image model: a ViT, a DINOv2 with or without registers, or the image tower of a CLIP or SigLIP.

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
            return read_timm_model(path, {}, num_heads)
        raise ConversionError(f"{source} is neither a folder, nor a Hub id, nor an .npz or .safetensors file.")
    config = read_config(source)
    if "model_type" in config:
        return read_transformers_model(source, config)
    if "architecture" in config:
        weights = find_weights(source)
        if weights.suffix == ".json":
            raise ConversionError(f"{source}: expected timm's weights in one file, found several.")
        return read_timm_model(weights, config, num_heads)
    raise ConversionError(f"{source}: config.json has neither transformers' `model_type` nor timm's `architecture`.")


def read_image_config(source: str) -> PreTrainedConfig:
    """Read the configuration of an image model, as `read_image_source` would; transformers' without its weights."""
    if not Path(source).is_file() and "model_type" in (config := read_config(source)):
        return read_transformers_config(source, config)
    return read_image_source(source).vit.config


# Models with the names and the computation of ViT.
_VIT_TYPES = ("vit", "vit_msn", "vit_mae")
_CLASSES: dict[str, type[PreTrainedModel]] = {
    **dict.fromkeys(_VIT_TYPES, ViTModel),
    DINOV2: Dinov2Model,
    DINOV2_WITH_REGISTERS: Dinov2WithRegistersModel,
    CLIP: CLIPVisionModel,
    SIGLIP: SiglipVisionModel,
}


def read_transformers_config(source: str, raw_config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration of an image model, of CLIP and SigLIP that of their image tower."""
    model_type = raw_config["model_type"]
    if reason := refusal(model_type, raw_config):
        raise ConversionError(f"{source} is {reason}.")
    if model_type not in (*_CLASSES, *TWO_TOWERS):
        known = ", ".join((*_CLASSES, *TWO_TOWERS))
        raise ConversionError(f"{source} is of type {model_type!r}, not a plain ViT or one of its kind ({known}).")
    stored = vision_config(AutoConfig.for_model(**raw_config))  # with the defaults of its own type
    if model_type not in _VIT_TYPES:
        return stored
    names = set(ViTConfig.__annotations__) - {"model_type"}
    return ViTConfig(**{name: getattr(stored, name) for name in names if hasattr(stored, name)})


def read_transformers_model(source: str, raw_config: Mapping[str, Any]) -> ImageSource:
    """Read transformers' ViT, DINOv2, CLIP or SigLIP, with or without its head and text tower, in any file layout."""
    config = read_transformers_config(source, raw_config)
    weights = find_weights(source)
    options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    model, unused = _load(_CLASSES[config.model_type], source, weights, config, **options)
    file_kind = "safetensors" if "safetensors" in weights.name else "torch file"
    return ImageSource(
        model,
        f"transformers ({raw_config['model_type']}, {file_kind})",
        {name: name for name in model.state_dict()},
        unused,
        _image_processor_settings(source),
    )


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
        raise ConversionError(f"{weights} cannot be loaded: {error}") from error
    problems = loading_problems(info)
    unused = {name: why_unused(name) for name in sorted(info["unexpected_keys"])}
    problems += [f"no place for: {name}" for name, reason in unused.items() if reason is None]
    raise_problems(source, problems)
    return model, {name: reason for name, reason in unused.items() if reason is not None}


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
