"""
Image transformers from wherever they are published, as transformers' `ViTModel` in memory: transformers' own files,
timm's, and the original JAX ones. Every array of a source is mapped, deliberately unused, or an error that names it.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, ViTConfig, ViTModel

from ..initialisation.inflation import fold_layer_scales
from .weight_files import (
    ConversionError,
    as_float32,
    check_weights,
    find_file,
    find_weights,
    read_config,
    read_json,
    read_tensors,
    shards,
    weights_error,
)


@dataclass
class ImageSource:
    """A ViT that was read, and what became of the arrays of its file."""

    vit: ViTModel
    kind: str
    origins: dict[str, str]  # name in the ViT -> name of the array that it comes from
    unused: dict[str, str] = field(default_factory=dict)  # name of an array -> why
    processor_settings: dict[str, Any] | None = None  # as in transformers' preprocessor_config.json
    notes: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)  # names of arrays that are part of others now


def read_image_source(source: str, num_heads: int | None = None) -> ImageSource:
    """
    Args:
        source: a Hub id or folder with transformers' or timm's `config.json`, a safetensors file of timm, or an `.npz`
            of the original JAX ViTs.
        num_heads: attention heads, which timm's weights do not show; by default what timm has for the width.

    Raises:
        ConversionError: naming what is missing, left over, of another shape, or of another architecture.
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
            raise ConversionError(f"{source}: timm's weights are expected in one file, not in {len(weights)}.")
        return read_timm_vit(weights[0], config, num_heads)
    raise ConversionError(f"{source}: config.json has neither transformers' `model_type` nor timm's `architecture`.")


# transformers

# Encoders with the names and the computation of ViT.
_VIT_TYPES = ("vit", "vit_msn", "vit_mae")
_REFUSED_TYPES = {
    "deit": "a distilled DeiT, whose distillation token has no place in a ViViT; the plain DeiTs, such as "
    "facebook/deit-base-patch16-224, are published as type 'vit'"
}
_UNUSED = {
    r"(vit\.)?pooler\..*": "pooler",
    r"classifier\..*": "classification head",
    r"(vit\.)?embeddings\.mask_token": "mask token",
    r"decoder\..*": "decoder of masked image modelling",
}


def read_transformers_vit(source: str, raw_config: Mapping[str, Any]) -> ImageSource:
    """transformers' ViT, with or without pooler and head, in safetensors or torch's old file, in either key layout."""
    model_type = raw_config["model_type"]
    if model_type not in _VIT_TYPES:
        why = _REFUSED_TYPES.get(model_type, f"of type {model_type!r}, not a plain ViT ({', '.join(_VIT_TYPES)})")
        raise ConversionError(f"{source} is {why}.")
    stored = AutoConfig.for_model(**raw_config)  # for the defaults of its own type
    names = set(ViTConfig.__annotations__) - {"model_type"}
    config = ViTConfig(**{name: getattr(stored, name) for name in names if hasattr(stored, name)})
    weights = find_weights(source)
    check_weights(weights)
    try:
        vit, info = ViTModel.from_pretrained(
            source,
            config=config,
            add_pooling_layer=False,
            dtype=torch.float32,
            use_safetensors="safetensors" in weights.name,
            ignore_mismatched_sizes=True,  # what does not match is an error below, by name
            output_loading_info=True,
        )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise weights_error(weights, error) from error
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"another shape: {name} is {tuple(there)}, {source}'s config.json makes it {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
    ]
    unused = {name: _reason(name, _UNUSED) for name in sorted(info["unexpected_keys"])}
    problems += [f"no place for: {name}" for name, why in unused.items() if why is None]
    _raise_problems(source, problems)
    reasons = {name: why for name, why in unused.items() if why is not None}
    return ImageSource(
        vit,
        f"transformers ({model_type}, {'safetensors' if 'safetensors' in weights.name else 'torch file'})",
        {name: name for name in vit.state_dict()},
        reasons,
        _image_processor_settings(source),
    )


def _image_processor_settings(source: str) -> dict[str, Any] | None:
    """Of a folder or repository, from either of the files that transformers writes; None if it has none."""
    if (file := find_file(source, "preprocessor_config.json")) is not None:
        settings = read_json(file)
    elif (file := find_file(source, "processor_config.json")) is not None:
        settings = stored.get("image_processor") if isinstance(stored := read_json(file), dict) else None
    else:
        return None
    if not isinstance(settings, dict):
        raise ConversionError(f"{file} does not hold the settings of an image processor.")
    return settings


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    return next(
        (re.sub(f"^{pattern}$", new, name) for pattern, new in names.items() if re.fullmatch(pattern, name)), None
    )


def _reason(name: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)


def _raise_problems(source: Any, problems: list[str]) -> None:
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(
            f"{source} does not fit a plain ViT in {len(problems)} places: {'; '.join(problems[:8])}{rest}."
        )


# From named arrays to a ViT: target name -> (source name, tensor)
Mapped = dict[str, tuple[str, torch.Tensor]]


def _fill_vit(source: Any, config: ViTConfig, state: Mapped, problems: list[str]) -> ViTModel:
    """A ViT that holds these very tensors; every parameter comes from `state`, and all of `state` has a place."""
    with torch.device("meta"):
        vit = ViTModel(config, add_pooling_layer=False)
    expected = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    problems += [f"missing: what becomes {name}" for name in expected if name not in state]
    for name, (origin, tensor) in state.items():
        if name not in expected:
            problems.append(f"no place for: {origin}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"another shape: {origin} gives {tuple(tensor.shape)} for {name}, {expected[name]}")
    _raise_problems(source, problems)
    tensors = {name: tensor.to(torch.float32).contiguous() for name, (_, tensor) in state.items()}
    vit.load_state_dict(tensors, strict=True, assign=True)
    return vit


def _origins(state: Mapped) -> dict[str, str]:
    return {target: origin for target, (origin, _) in state.items()}


def _square_image_size(source: Any, num_positions: int, patch: tuple[int, ...]) -> int | list[int]:
    side = round((num_positions - 1) ** 0.5)
    if side * side != num_positions - 1:
        raise ConversionError(
            f"{source} has {num_positions} position embeddings, which is not a class token and a square grid."
        )
    return _int_or_pair((side * patch[0], side * patch[1]))


def _int_or_pair(size: tuple[int, ...]) -> int | list[int]:
    return size[0] if len(set(size)) == 1 else list(size)


# timm

_TIMM_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"layernorm.\1",
}
# LayerScale multiplies the outputs of a residual branch: it is folded into the projection that they come from.
_TIMM_LAYER_SCALES = {r"(blocks\.\d+)\.ls1\.gamma": r"\1.attn.proj", r"(blocks\.\d+)\.ls2\.gamma": r"\1.mlp.fc2"}
_TIMM_UNUSED = {
    r"head\.(weight|bias)": "classification head",
    r"pre_logits\.fc\.(weight|bias)": "representation layer",
}
_TIMM_REFUSED = {
    r".*\.gamma_[12]": "LayerScale of another kind than ls1 and ls2",
    r"reg_token": "register tokens",
    r"fc_norm\..*": "a LayerNorm behind average pooling (fc_norm)",
    r"dist_token|head_dist\..*": "a distillation token (distilled DeiT)",
    r"norm_pre\..*": "a LayerNorm before the first layer (norm_pre)",
    r".*\.[qk]_norm\..*": "query-key normalisation",
    r"attn_pool\..*": "attention pooling",
    r".*rel_pos.*|.*relative_position.*": "relative position embeddings",
}
_TIMM_ARCHITECTURES = r"(vit|deit|flexivit)_.*"
# Heads by width where they are not of 64 dimensions: huge, giant, gigantic.
_TIMM_HEADS = {1280: 16, 1408: 16, 1664: 16}
_TIMM_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def read_timm_vit(path: Path, timm_config: Mapping[str, Any], num_heads: int | None = None) -> ImageSource:
    """
    timm's `VisionTransformer`: fused query, key and value, exact GELU, LayerNorm epsilon 1e-6.

    Args:
        path: the weights.
        timm_config: the contents of timm's `config.json`; may be empty.
        num_heads: attention heads, if not those that timm has for the width.
    """
    architecture = timm_config.get("architecture", "vit_")
    if not re.fullmatch(_TIMM_ARCHITECTURES, architecture):
        raise ConversionError(f"{path} is timm's {architecture!r}, not a plain ViT (vit_..., deit_...).")
    tensors = read_tensors(path)
    scales = {name: place for name in tensors if (place := _renamed(name, _TIMM_LAYER_SCALES))}
    try:
        tensors = fold_layer_scales(tensors, scales)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    refused = {name: why for name in tensors if (why := _reason(name, _TIMM_REFUSED))}
    if refused:
        name, why = next(iter(refused.items()))
        raise ConversionError(f"{path} has {why}, which a ViViT has no place for: {name}.")
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            raise ConversionError(
                f"{path} has no {name!r}, and so is not a plain ViT of timm; it has {list(tensors)[:4]}."
            )

    state: Mapped = {}
    unused, problems = {}, []
    for name, tensor in tensors.items():
        target = _renamed(name, _TIMM_NAMES)
        if target is not None:
            state[target] = (name, tensor)
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"layers.{match[1]}.attention.{projection}_proj.{match[2]}"] = (name, part)
        elif why := _reason(name, _TIMM_UNUSED):
            unused[name] = why
        else:
            problems.append(f"no place for: {name}")

    kernel = tensors["patch_embed.proj.weight"]
    hidden, channels, *patch = kernel.shape
    heads, notes = _timm_heads(path, hidden, timm_config, num_heads)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        num_attention_heads=heads,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        num_channels=channels,
        patch_size=_int_or_pair(tuple(patch)),
        image_size=_timm_image_size(path, timm_config, tensors["pos_embed"].shape[1], tuple(patch)),
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    settings = _timm_processor_settings(timm_config)
    if settings is None:
        notes.append("no timm config.json with mean and std: frames are scaled to [-1, 1]")
    if scales:
        notes.append(f"{len(scales)} arrays of LayerScale folded into the projections before them")
    vit = _fill_vit(path, config, state, problems)
    return ImageSource(vit, "timm (safetensors)", _origins(state), unused, settings, notes, folded=list(scales))


def _timm_heads(
    path: Path, hidden: int, timm_config: Mapping[str, Any], num_heads: int | None
) -> tuple[int, list[str]]:
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
            f"{path}: timm's model_args {sorted(unknown)} are not known; only plain ViTs can be used."
        )
    stated = num_heads or model_args.get("num_heads")
    heads = stated or _TIMM_HEADS.get(hidden, hidden // 64)
    if not heads or hidden % heads or (not stated and hidden not in _TIMM_HEADS and hidden % 64):
        raise ConversionError(
            f"{path} is {hidden} wide, which says nothing about its heads: convert it with `python "
            f"conversion/convert_vit_checkpoint.py --source {path} --num-heads N --output DIR`."
        )
    return heads, [] if stated else [f"{heads} heads, as timm has for this width (else give --num-heads)"]


def _timm_image_size(
    path: Path, timm_config: Mapping[str, Any], num_positions: int, patch: tuple[int, ...]
) -> int | list[int]:
    input_size = (timm_config.get("pretrained_cfg") or {}).get("input_size")
    if input_size and (input_size[1] // patch[0]) * (input_size[2] // patch[1]) == num_positions - 1:
        return _int_or_pair((input_size[1], input_size[2]))
    return _square_image_size(path, num_positions, patch)


def _timm_processor_settings(timm_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """timm's preparation of images, in transformers' words."""
    stored = timm_config.get("pretrained_cfg") or {}
    if "mean" not in stored or "std" not in stored:
        return None
    settings: dict[str, Any] = {"image_mean": list(stored["mean"]), "image_std": list(stored["std"])}
    settings["resample"] = _TIMM_INTERPOLATIONS.get(str(stored.get("interpolation")), 3)
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


# The original JAX files: google-research/vision_transformer (AugReg), scenic, and big_vision

_JAX_NAMES = {
    r"cls": "embeddings.cls_token",
    r"(?:Transformer/posembed_input/)?pos_embedding": "embeddings.position_embeddings",
    r"embedding/(kernel|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"Transformer/encoder_norm/(scale|bias)": r"layernorm.\1",
    r"Transformer/encoderblock_(\d+)/LayerNorm_0/(scale|bias)": r"layers.\1.layernorm_before.\2",
    r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/(scale|bias)": r"layers.\1.layernorm_after.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/(kernel|bias)": r"layers.\1.mlp.fc1.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/(kernel|bias)": r"layers.\1.mlp.fc2.\2",
    **{
        rf"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/{theirs}/(kernel|bias)": (
            rf"layers.\1.attention.{ours}.\2"
        )
        for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"))
    },
}
_JAX_UNUSED = {
    r"head/(kernel|bias)|output_projection/(kernel|bias)": "classification head",
    r"pre_logits/(kernel|bias)": "representation layer",
}
_JAX_REFUSED = {
    r"(.*/)?MAPHead_0/.*": "attention pooling (MAPHead), in place of a class token",
    r"(img|txt)/.*": "two towers (an image and text model)",
}
# What tells the sizes.
_JAX_NEEDED = {
    "cls": "embeddings.cls_token",
    "pos_embedding": "embeddings.position_embeddings",
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_N/query/kernel": "layers.0.attention.q_proj.weight",
    "Transformer/encoderblock_0/MlpBlock_N/Dense_0/kernel": "layers.0.mlp.fc1.weight",
}
_JAX_PREFIXES = ("", "params/", "opt/target/")
# flax's LayerNorm and its GELU, which is the tanh approximation unless asked otherwise. The models were trained with
# these; transformers' own conversions of the same files have the exact GELU and 1e-12 instead.
_JAX_SETTINGS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def read_jax_vit(path: Path) -> ImageSource:
    """An `.npz` of google-research/vision_transformer or big_vision; nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: as_float32(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{path} is not a whole .npz of plain arrays: {error}") from error
    refused = {name: why for name in arrays if (why := _reason(name, _JAX_REFUSED))}
    if refused:
        name, why = next(iter(refused.items()))
        raise ConversionError(f"{path} has {why}, which a ViViT has no place for: {name}.")
    prefix = next((prefix for prefix in _JAX_PREFIXES if f"{prefix}embedding/kernel" in arrays), None)
    if prefix is None:
        raise ConversionError(f"{path} has no embedding/kernel, and so is not a JAX ViT; it has {list(arrays)[:4]}.")

    state: Mapped = {}
    unused: dict[str, str] = {}
    problems: list[str] = []
    for full_name, array in arrays.items():
        name = full_name.removeprefix(prefix)
        target = _renamed(name, _JAX_NAMES)
        if not full_name.startswith(prefix):
            unused[full_name] = "optimiser state"
        elif target is not None:
            target = re.sub(r"\.(kernel|scale)$", ".weight", target)
            if target in state:
                problems.append(f"twice: {state[target][0]} and {full_name}")
            state[target] = (full_name, torch.from_numpy(_from_flax(target, array)))
        elif why := _reason(name, _JAX_UNUSED):
            unused[full_name] = why
        else:
            problems.append(f"no place for: {full_name}")

    missing = [f"missing: {theirs}" for theirs, ours in _JAX_NEEDED.items() if ours not in state]
    if missing:
        _raise_problems(path, missing + problems)
    height, width, channels, hidden = arrays[f"{prefix}embedding/kernel"].shape
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=len({name for name in state if name.endswith("layernorm_before.weight")}),
        num_attention_heads=arrays[state["layers.0.attention.q_proj.weight"][0]].shape[1],
        intermediate_size=state["layers.0.mlp.fc1.weight"][1].shape[0],
        num_channels=channels,
        patch_size=_int_or_pair((height, width)),
        image_size=_square_image_size(path, state["embeddings.position_embeddings"][1].shape[1], (height, width)),
        qkv_bias="layers.0.attention.q_proj.bias" in state,
        **_JAX_SETTINGS,
    )
    return ImageSource(_fill_vit(path, config, state, problems), "JAX (.npz)", _origins(state), unused)


def _from_flax(target: str, array: np.ndarray) -> np.ndarray:
    """flax's layout of an array as torch's: see the shapes in the comments."""
    if "projection.weight" in target:
        return array.transpose(3, 2, 0, 1)  # (height, width, in, out) -> (out, in, height, width)
    if "_proj." in target and "o_proj" not in target:
        if target.endswith("bias"):
            return array.reshape(-1)  # (heads, head_dim) -> (out,)
        return array.reshape(len(array), -1).T  # (in, heads, head_dim) -> (out, in)
    if target.endswith("o_proj.weight"):
        return array.reshape(-1, array.shape[-1]).T  # (heads, head_dim, out) -> (out, in)
    return array.T if array.ndim == 2 else array  # (in, out) -> (out, in)
