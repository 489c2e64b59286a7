"""Token merging in a model that was built without it, or with another schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import ViViTEncoder, ViViTLayer, ViViTMergingEncoder, ViViTMergingLayer


def decreasing_schedule(merge_tokens: int, num_layers: int) -> list[int]:
    """
    Return a schedule for `merge_tokens` that starts with twice as many tokens as given and falls linearly to 0.

    It merges about as many tokens as the same number in all layers, but earlier, so that it saves more.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 4.1.
    """
    return np.linspace(2 * merge_tokens, 0, num_layers).round().astype(int).tolist()


def merging_config(config: ViViTConfig, merge_tokens: int | Sequence[int]) -> ViViTConfig:
    """Return a copy of a configuration with another `merge_tokens`; ValueError if no such model can be."""
    return ViViTConfig.from_dict(config.to_dict(), merge_tokens=merge_tokens)


def set_merging(encoder: Any, config: ViViTConfig) -> bool:
    """Turn a (spatial) encoder into the one that `config` describes, in place; return whether that changes it."""
    if is_merging_as_configured(encoder, config):
        return False
    merges = config.merge_tokens is not None
    encoder.__class__ = ViViTMergingEncoder if merges else ViViTEncoder
    for layer in encoder.layer:
        layer.__class__ = ViViTMergingLayer if merges else ViViTLayer
        if not merges:
            del layer.merging
    if merges:
        encoder.set_schedule(config.num_prefix_tokens, config.merging_schedule)
    return True


def is_merging_as_configured(encoder: nn.Module, config: ViViTConfig) -> bool:
    """Return whether an encoder merges the tokens that `config` names, or none as it has no `merge_tokens`."""
    schedule = config.merging_schedule if config.merge_tokens is not None else None
    return _schedule(encoder) == schedule


def _schedule(encoder: Any) -> list[int] | None:
    return encoder.schedule if isinstance(encoder, ViViTMergingEncoder) else None


def tokens_of_layers(config: ViViTConfig) -> list[int]:
    """Return the tokens of a sequence, prefix aside, before the (spatial) encoder and behind each of its layers."""
    time, height, width = config.grid_size
    counts = [height * width * (time if config.attention_type == "spatio_temporal" else 1)]
    for num_merged in config.merging_schedule:
        counts.append(counts[-1] - min(num_merged, counts[-1] // 2))
    return counts


def describe_merging(config: ViViTConfig) -> str:
    """Describe in words what a configuration merges, for a report."""
    unit = "clip" if config.attention_type == "spatio_temporal" else "time step"
    before, *_, after = tokens_of_layers(config)
    if before == after:
        return "no tokens are merged"
    return f"tokens merged from {before:,} to {after:,} per {unit}, so outputs are no longer those of the plain model"
