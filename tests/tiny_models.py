"""Models small enough to try every promise on every variant, and the clips that they take."""

from typing import Any

import torch

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel
from vivit_hf.configuration_vivit import ATTENTION_TYPES as ATTENTION_TYPES


MODEL_CLASSES = [ViViTModel, ViViTForVideoClassification]

# Everything that changes how a model computes: the variants, and in what they differ from their default.
CASES: dict[str, dict[str, Any]] = {
    **{attention_type: {"attention_type": attention_type} for attention_type in ATTENTION_TYPES},
    "average_pool_baseline": {"attention_type": "factorised_encoder", "num_temporal_layers": 0},
    "time_space": {"attention_type": "factorised_self_attention", "attention_order": "time_space"},
    "uniform_frames": {"attention_type": "spatio_temporal", "embedding_type": "uniform_frame_sampling"},
    "uniform_frames_factorised_encoder": {
        "attention_type": "factorised_encoder",
        "embedding_type": "uniform_frame_sampling",
    },
    "mean_pooling": {"attention_type": "factorised_encoder", "pooling": "mean"},
    "temporal_mean_pooling": {"attention_type": "factorised_encoder", "temporal_pooling": "mean"},
    "temporal_attention_pooling": {"attention_type": "factorised_encoder", "temporal_pooling": "attention"},
    "max_pooling_pre_logits": {"attention_type": "spatio_temporal", "pooling": "max", "representation_size": 12},
    "sum_pooling": {"attention_type": "factorised_dot_product_attention", "pooling": "sum"},
    "other_temporal_widths": {
        "attention_type": "factorised_encoder",
        "temporal_num_attention_heads": 2,
        "temporal_intermediate_size": 40,
    },
    "registers_as_in_dinov2": {"attention_type": "factorised_encoder", "num_register_tokens": 3},
    "registers_mean_pooling": {"attention_type": "spatio_temporal", "num_register_tokens": 2, "pooling": "mean"},
    "pre_layernorm_as_in_clip": {"attention_type": "spatio_temporal", "pre_layernorm": True, "patch_bias": False},
    "pre_layernorm_grid": {"attention_type": "factorised_dot_product_attention", "pre_layernorm": True},
    "merged_tokens": {"attention_type": "spatio_temporal", "merge_tokens": 9},
    "merged_tokens_in_space": {"attention_type": "factorised_encoder", "merge_tokens": 3, "num_register_tokens": 1},
}


def tiny_config(attention_type: str, **overrides: Any) -> ViViTConfig:
    """8 frames of 24 x 40 pixels in tubelets of 2 x 8 x 8: a grid of 4 x 3 x 5 tokens, no two sides alike."""
    uniform = overrides.get("embedding_type") == "uniform_frame_sampling"
    fields: dict[str, Any] = {
        "attention_type": attention_type,
        "num_frames": 8,
        "image_size": (24, 40),
        "tubelet_size": (1 if uniform else 2, 8, 8),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_labels": 5,
    }
    if attention_type == "factorised_encoder":
        fields["num_temporal_layers"] = 2
    if "id2label" in overrides:
        del fields["num_labels"]
    return ViViTConfig(**{**fields, **overrides})


def case_config(case: str, **overrides: Any) -> ViViTConfig:
    return tiny_config(**{**CASES[case], **overrides})


def make_model(
    config: ViViTConfig, cls: type = ViViTForVideoClassification, seed: int = 0
) -> ViViTForVideoClassification | ViViTModel:
    """A model in eval mode whose every parameter counts: none is left at the zeros or ones of an initialisation."""
    return randomise(cls(config), seed).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "layernorm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)
    return model


def checkpoint_activations(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Compute activations again in the backward pass, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def make_clips(config: ViViTConfig, batch: int = 2, seed: int = 1, **sizes: Any) -> torch.Tensor:
    """(batch, frames, channels, height, width) in the configured size, or in `num_frames` and `image_size`."""
    height, width = sizes.get("image_size", config.frame_size)
    shape = (batch, sizes.get("num_frames", config.num_frames), config.num_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_counts(config: ViViTConfig) -> tuple[int, int, int]:
    """
    (time, space, prefix tokens) of a clip: class and register tokens, which precede the tokens of the grid.

    Model 2 may have no class token over time, see `num_temporal_class_tokens`.
    """
    time, height, width = config.grid_size
    return time, height * width, int(config.pooling == "cls") + config.num_register_tokens


def num_temporal_class_tokens(config: ViViTConfig) -> int:
    return int((config.temporal_pooling or config.pooling) == "cls")


def first(outputs: Any) -> torch.Tensor:
    """The first output: logits of a classifier, `last_hidden_state` of a base model."""
    return outputs.to_tuple()[0].detach()
