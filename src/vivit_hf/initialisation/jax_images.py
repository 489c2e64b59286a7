"""Read the original JAX ViTs: `.npz` files of google-research/vision_transformer (AugReg), scenic and big_vision."""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTModel

from .image_arrays import (
    ImageSource,
    Mapped,
    int_or_pair,
    raise_problems,
    reason_for,
    refuse,
    renamed,
    square_image_size,
)
from .image_models import fill_model
from .weight_files import ConversionError, as_float32, from_flax


_NAMES = {
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
_UNUSED = {
    r"head/(kernel|bias)|output_projection/(kernel|bias)": "classification head",
    r"pre_logits/(kernel|bias)": "representation layer",
}
_REFUSED = {
    r"(.*/)?MAPHead_0/.*": "attention pooling (MAPHead), in place of a class token",
    r"(img|txt)/.*": "two towers (an image and text model)",
}
# Arrays that determine the sizes.
_NEEDED = {
    "cls": "embeddings.cls_token",
    "pos_embedding": "embeddings.position_embeddings",
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_N/query/kernel": "layers.0.attention.q_proj.weight",
    "Transformer/encoderblock_0/MlpBlock_N/Dense_0/kernel": "layers.0.mlp.fc1.weight",
}
_PREFIXES = ("", "params/", "opt/target/")
# The models were trained with flax's defaults, the tanh approximation of GELU and this epsilon. transformers' own
# conversions of the same files use the exact GELU and 1e-12 instead.
_SETTINGS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def read_jax_vit(path: Path) -> ImageSource:
    """Read an `.npz` file of a JAX ViT; nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: as_float32(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{path} is not a complete .npz of plain arrays: {error}") from error
    refuse(path, arrays, _REFUSED)
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in arrays), None)
    if prefix is None:
        raise ConversionError(f"{path} has no embedding/kernel, so it is not a JAX ViT; it has {list(arrays)[:4]}.")

    state: Mapped = {}
    unused: dict[str, str] = {}
    problems: list[str] = []
    for full_name, array in arrays.items():
        name = full_name.removeprefix(prefix)
        target = renamed(name, _NAMES)
        if not full_name.startswith(prefix):
            unused[full_name] = "optimiser state"
        elif target is not None:
            target = re.sub(r"\.(kernel|scale)$", ".weight", target)
            if target in state:
                problems.append(f"twice: {state[target][0]} and {full_name}")
            state[target] = (full_name, torch.from_numpy(from_flax(target, array)))
        elif reason := reason_for(name, _UNUSED):
            unused[full_name] = reason
        else:
            problems.append(f"no place for: {full_name}")

    missing = [f"missing: {theirs}" for theirs, ours in _NEEDED.items() if ours not in state]
    if missing:
        raise_problems(path, missing + problems)
    height, width, channels, hidden = arrays[f"{prefix}embedding/kernel"].shape
    num_positions = state["embeddings.position_embeddings"][1].shape[1]
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=len({name for name in state if name.endswith("layernorm_before.weight")}),
        num_attention_heads=arrays[state["layers.0.attention.q_proj.weight"][0]].shape[1],
        intermediate_size=state["layers.0.mlp.fc1.weight"][1].shape[0],
        num_channels=channels,
        patch_size=int_or_pair((height, width)),
        image_size=int_or_pair(square_image_size(path, num_positions, (height, width))),
        qkv_bias="layers.0.attention.q_proj.bias" in state,
        **_SETTINGS,
    )
    vit, origins = fill_model(path, lambda: ViTModel(config, add_pooling_layer=False), state, problems)
    return ImageSource(vit, "JAX (.npz)", origins, unused)
