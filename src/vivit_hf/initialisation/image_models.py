"""
The image transformers that a ViViT starts from: the settings of each type in the words of `ViViTConfig`, and the names
of its weights.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..loading_vivit import TRANSFORMERS_VIVIT_NAMES
from .image_arrays import Mapped, raise_problems, reason_for, renamed


# Types whose configurations hold those of an image and of a text model.
TWO_TOWERS = ("clip", "siglip")
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
DINOV2, DINOV2_WITH_REGISTERS = "dinov2", "dinov2_with_registers"

# Types that look like the others but compute what a ViViT does not.
_REFUSED_TYPES = {
    "deit": "a distilled DeiT, whose distillation token a ViViT cannot use; the plain DeiTs, such as "
    "facebook/deit-base-patch16-224, are published as type 'vit'",
    "dinov3_vit": "a DINOv3, whose attention rotates queries and keys by their positions (RoPE), unlike a ViViT's",
    "dinov3_convnext": "a DINOv3 of convolutions, not a transformer",
    **dict.fromkeys(
        ("siglip2", "siglip2_vision_model"),
        "a NaFlex SigLIP 2, which takes images of any shape as lists of patches and resizes its position embeddings "
        "for each; the SigLIP 2 of one image size, such as google/siglip2-base-patch16-224, are of type 'siglip'",
    ),
    **dict.fromkeys(("beit", "data2vec-vision"), "a BEiT, whose attention has relative position biases"),
    **dict.fromkeys(("aimv2", "aimv2_vision_model"), "an AIMv2, which has RMSNorm and SwiGLU layers"),
    **dict.fromkeys(("clip_text_model", "siglip_text_model"), "a text model, which sees no images"),
}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "hidden_act", "layer_norm_eps")

# Names of weights, without the prefix of the whole model -> names in a ViViT (which folds LayerScale).
_NAMES = {
    # CLIP and SigLIP
    r"^embeddings\.class_embedding$": "embeddings.cls_token",
    r"^embeddings\.patch_embedding\.": "embeddings.patch_embeddings.projection.",
    r"^embeddings\.position_embedding\.weight$": "embeddings.position_embeddings",
    r"^pre_layrnorm\.": "pre_layernorm.",
    r"^post_layernorm\.": "layernorm.",
    r"^encoder\.layers\.": "encoder.layer.",
    r"\.layer_norm1\.": ".layernorm_before.",
    r"\.layer_norm2\.": ".layernorm_after.",
    r"\.self_attn\.out_proj\.": ".attention.o_proj.",
    r"\.self_attn\.": ".attention.",
    # ViT
    **TRANSFORMERS_VIVIT_NAMES,
    # DINOv2
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
}
_LAYER_SCALES = {r"(.*)\.layer_scale1\.lambda1": r"\1.attention.o_proj", r"(.*)\.layer_scale2\.lambda1": r"\1.mlp.fc2"}
_PREFIXES = re.compile(r"^(?:(?:vit|deit|dinov2|dinov2_with_registers|vision_model)\.)+")
_THREE_AXES = {"embeddings.cls_token", "embeddings.position_embeddings"}
_UNUSED = {
    r"pooler\..*": "pooler",
    r"classifier\..*": "classification head",
    r"embeddings\.mask_token": "mask token",
    r"decoder\..*": "decoder of masked image modelling",
    r"head\..*": "attention-pooling head",
    r"text_model\..*|text_projection\..*": "text tower",
    r"visual_projection\..*": "projection for comparison with texts",
    r"logit_(scale|bias)": "scale of the comparison with texts",
    r"embeddings\.position_ids": "numbers of the positions",
}


@dataclass(frozen=True)
class ImageStructure:
    """
    The settings that decide what the weights of an image transformer compute.

    `settings`: fields of `ViViTConfig` by name. `image_size`, `patch_size`: (height, width) in pixels.
    `has_class_token`: whether a class token comes before the patches. `position_mode`: how the model resizes its
    position embeddings, as in `resample_position_embeddings`.
    """

    settings: Mapping[str, Any]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    has_class_token: bool
    position_mode: str

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_register_tokens(self) -> int:
        return self.settings["num_register_tokens"]

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class and register tokens."""
        return int(self.has_class_token) + self.num_register_tokens


def image_structure(config: Any) -> ImageStructure:
    """
    Describe an image transformer by its configuration, or by that of a CLIP or SigLIP with both towers.

    Raises:
        ValueError: if a ViViT cannot start from such a model; the message gives the reason.
    """
    config = vision_config(config)
    model_type = getattr(config, "model_type", None)
    if isinstance(config, PretrainedConfig) and (reason := refusal(str(model_type), vars(config))):
        raise ValueError(f"The image model is {reason}.")
    has_sizes = all(getattr(config, name, None) is not None for name in (*_NEEDED, "image_size", "patch_size"))
    has_mlp = hasattr(config, "intermediate_size") or model_type in (DINOV2, DINOV2_WITH_REGISTERS)
    is_known = model_type in (CLIP, SIGLIP) or hasattr(config, "qkv_bias")
    if not isinstance(config, PretrainedConfig) or not (has_sizes and has_mlp and is_known):
        raise ValueError(
            "A ViViT starts from a ViT, DeiT, DINOv2, CLIP or SigLIP; expected a folder, a Hub id or the configuration "
            f"of such a model (`vit.config`), got {model_type or type(config).__name__!r}."
        )
    return ImageStructure(
        settings={
            **{name: getattr(config, name) for name in _NEEDED},
            "intermediate_size": intermediate_size(config),
            "hidden_dropout_prob": getattr(config, "hidden_dropout_prob", 0.0),
            "attention_probs_dropout_prob": getattr(
                config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0)
            ),
            "initializer_range": getattr(config, "initializer_range", 0.02),
            "qkv_bias": getattr(config, "qkv_bias", True),
            "num_register_tokens": getattr(config, "num_register_tokens", 0),
            "pre_layernorm": model_type == CLIP,
            "patch_bias": model_type != CLIP,
        },
        image_size=_pair(config.image_size),
        patch_size=_pair(config.patch_size),
        has_class_token=model_type != SIGLIP,
        position_mode="antialiased_bicubic" if model_type == DINOV2_WITH_REGISTERS else "bicubic",
    )


def vision_config(config: Any) -> Any:
    """Return the configuration of the image tower of CLIP and SigLIP, and any other one as it is."""
    return config.vision_config if getattr(config, "model_type", None) in TWO_TOWERS else config


def refusal(model_type: str, settings: Mapping[str, Any]) -> str | None:
    """Return why a ViViT cannot start from a model, in words that follow "is"; None if it may be usable."""
    if settings.get("use_swiglu_ffn"):
        return f"of type {model_type!r} with SwiGLU layers (use_swiglu_ffn), which a ViViT cannot use"
    return _REFUSED_TYPES.get(model_type)


def intermediate_size(config: Any) -> int:
    """Return the width of the MLPs; DINOv2 stores its ratio to the hidden size."""
    size = getattr(config, "intermediate_size", None)
    return int(config.hidden_size * config.mlp_ratio) if size is None else size


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def why_unused(name: str) -> str | None:
    """Return why a ViViT does not use a weight of this name; None if there is no known reason."""
    return reason_for(_PREFIXES.sub("", name), _UNUSED)


def name_in_vivit(name: str) -> str:
    """Return the name in a ViViT for the name of a weight in any of the image models."""
    name = _PREFIXES.sub("", name)
    for pattern, target in _NAMES.items():
        name = re.sub(pattern, target, name)
    return name


@dataclass(frozen=True)
class ImageWeights:
    """
    The weights of an image transformer by their names in a ViViT.

    `names` maps these names to the model's own. `layer_scales` maps LayerScale arrays to the projections before them.
    """

    tensors: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    layer_scales: Mapping[str, str]


def image_weights(model: PreTrainedModel) -> ImageWeights:
    """Return the weights of an image transformer under the names, and in the shapes, that a ViViT has."""
    state = model.state_dict()
    names = {name_in_vivit(own.removeprefix(f"{model.base_model_prefix}.")): own for own in state}
    tensors = {name: state[own] for name, own in names.items()}
    for name in _THREE_AXES & tensors.keys():  # without the axes of length 1 in CLIP and SigLIP
        tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    scales = {name: place for name in tensors if (place := renamed(name, _LAYER_SCALES))}
    return ImageWeights(tensors, names, scales)


def fill_model(
    source: Any, build: Callable[[], PreTrainedModel], state: Mapped, problems: list[str]
) -> tuple[PreTrainedModel, dict[str, str]]:
    """
    Return a model with these tensors, and the origins of its weights.

    Args:
        source: the name of the file, for error messages.
        build: makes the model.
        state: names in any of the image models, each with the name in the source ("" for a constant) and the tensor.
        problems: the problems that were found so far.

    Raises:
        ConversionError: if there are problems, a parameter has no tensor, or a tensor has no place or another shape.
    """
    with no_init_weights():
        model = build()
    parameters = model.state_dict()
    own_names = {name_in_vivit(name): name for name in parameters}
    problems += [f"missing: the source of {own_names[name]}" for name in own_names.keys() - map(name_in_vivit, state)]
    tensors, origins = {}, {}
    for target, (origin, tensor) in state.items():
        name = own_names.get(name_in_vivit(target))
        if name is None:
            problems.append(f"no place for: {origin}")
            continue
        shape = parameters[name].shape
        if name_in_vivit(name) in _THREE_AXES and tensor.numel() == shape.numel():
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            problems.append(f"wrong shape: {origin} gives {tuple(tensor.shape)} for {name}, {tuple(shape)}")
        tensors[name] = tensor.to(torch.float32).contiguous()
        if origin:
            origins[name] = origin
    raise_problems(source, sorted(problems))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model, origins
