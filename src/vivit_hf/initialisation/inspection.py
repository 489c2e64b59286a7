"""Describe a model without its weights: sizes, parameters, multiply-adds, and expected input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .model_processor import value_range


_PAPER_NAMES = {
    "spatio_temporal": "Model 1",
    "factorised_encoder": "Model 2",
    "factorised_self_attention": "Model 3",
    "factorised_dot_product_attention": "Model 4",
}
_PARTS = {
    "embeddings": ("vivit.embeddings", "vivit.pre_layernorm"),
    "encoder": ("vivit.encoder", "vivit.layernorm"),
    "temporal encoder": (
        "vivit.temporal_embeddings",
        "vivit.temporal_encoder",
        "vivit.temporal_layernorm",
        "vivit.temporal_pooler",
    ),
    "pre-logits": ("vivit.pre_logits",),
    "classifier": ("classifier",),
}


@dataclass
class ModelPart:
    """The number of parameters of a part of the model, and its multiply-adds for one clip, attention included."""

    name: str
    parameters: int
    multiply_adds: int


def inspect_parts(config: ViViTConfig) -> list[ModelPart]:
    """Return the parts of the classifier that `config` describes, without computing anything or reading weights."""
    config = ViViTConfig.from_dict(config.to_dict(), attn_implementation="eager")
    with torch.device("meta"):
        model = ViViTForVideoClassification(config).eval()
        clip = torch.empty(1, config.num_frames, config.num_channels, *config.frame_size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(clip)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    parts, modules = [], dict(model.named_modules())
    for part, names in _PARTS.items():
        parameters = sum(one.numel() for name in names if name in modules for one in modules[name].parameters())
        flops = sum(counts.get(f"{type(model).__name__}.{name}", 0) for name in names)
        if parameters:
            parts.append(ModelPart(part, parameters, flops // 2))
    return parts


def describe_model(config: ViViTConfig, processor: ViViTVideoProcessor | None = None) -> dict[str, Any]:
    """
    Return variant, sizes, tokens, expected input, labels and processor of a model, ready for JSON.

    Without a processor, the range of the input is that of the official models.
    """
    time, height, width = config.grid_size
    parts = inspect_parts(config)
    is_encoder = config.attention_type == "factorised_encoder"
    return {
        "variant": {"attention_type": config.attention_type, "paper": _PAPER_NAMES[config.attention_type]},
        "input": {
            "shape": [config.num_frames, config.num_channels, *config.frame_size],
            "axes": "frames, channels, height, width",
            "range": [-1, 1] if processor is None else [round(value, 3) for value in value_range(processor)],
        },
        "tokens": {
            "embedding": config.embedding_type,
            "tubelet": list(config.tubelet_size),
            "grid": [time, height, width],
            "total": time * height * width,
            "class_tokens": int(config.pooling == "cls"),
            "register_tokens": config.num_register_tokens,
        },
        "sizes": {
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            **({"temporal_layers": config.num_temporal_layers} if is_encoder else {}),
            "heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "pooling": config.pooling,
            **({"temporal_pooling": config.temporal_pooling} if config.temporal_pooling else {}),
        },
        "parts": {part.name: {"parameters": part.parameters, "multiply_adds": part.multiply_adds} for part in parts},
        "parameters": sum(part.parameters for part in parts),
        "multiply_adds": sum(part.multiply_adds for part in parts),
        "labels": list(config.id2label.values()) if config.num_labels else [],
        "label_groups": config.label_groups,
        "pretraining": _describe_pretraining(config),
        "optimization": _describe_optimization(config),
        "processor": None if processor is None else processor.to_dict(),
    }


def _describe_optimization(config: ViViTConfig) -> dict[str, Any] | None:
    """Return the setting that `vivit-hf tune` stored, without its scales; None if there is none."""
    stored = config.optimization
    if stored is None:
        return None
    kept = {name: stored[name] for name in ("name", "device", "dtype", "merge_tokens", "measured")}
    return {**kept, "int8": stored["int8_inputs"] is not None}


def _describe_pretraining(config: ViViTConfig) -> dict[str, Any] | None:
    """Return the masks and the decoder of a `ViViTForPreTraining`, None for another model."""
    if "ViViTForPreTraining" not in (config.architectures or ()):
        return None
    width, layers, heads = config.decoder_sizes
    return {
        "mask_ratio": config.mask_ratio,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": layers,
        "decoder_num_attention_heads": heads,
    }
