"""Masks of frames for models of clips of 8 frames, and the shorter models that masked ones must equal."""

import copy
from typing import Any

import numpy as np
import torch
from tiny_models import CASES, num_temporal_class_tokens, tiny_config, token_counts

from vivit_hf.frame_sampling import sample_frames_uniformly


MASKED_CASES: dict[str, dict[str, Any]] = {
    **{case: fields for case, fields in CASES.items() if case != "merged_tokens"},
    "concatenated_steps": {"attention_type": "factorised_encoder", "temporal_pooling": "concatenate"},
    "temporal_max_pooling": {"attention_type": "factorised_encoder", "temporal_pooling": "max"},
    "attention_without_temporal_layers": {
        "attention_type": "factorised_encoder",
        "num_temporal_layers": 0,
        "temporal_pooling": "attention",
    },
}
# Visible time steps of 4, one row per clip: the tail masked, the head, the middle, all but one, none.
STEPS = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()


def masked_config(case, **overrides):
    return tiny_config(**{**MASKED_CASES[case], **overrides})


def sampled(config):
    """The frames of a clip of 8 that the model takes."""
    if config.embedding_type == "uniform_frame_sampling":
        return sample_frames_uniformly(config.num_frames, config.num_sampled_frames)
    return np.arange(config.num_frames)


def frame_mask_of(config, steps):
    """Masks of frames, bool (batch, 8), that make these time steps visible, bool (batch, 4), and no others."""
    if config.embedding_type == "tubelet":
        return steps.repeat_interleave(2, dim=1)
    mask = torch.ones(len(steps), 8, dtype=torch.bool)
    mask[:, sampled(config)] = steps
    return mask


@torch.no_grad()
def cut(model, kept):
    """A model for the kept time steps alone, with their position embeddings, not interpolated."""
    config = copy.deepcopy(model.config)
    time, space, _ = token_counts(config)
    config.num_frames = len(kept) * config.tubelet_size[0]
    if config.embedding_type == "uniform_frame_sampling":
        config.num_sampled_frames = len(kept)
    state, short = model.state_dict(), type(model)(config).to(model.dtype).eval()
    name = "vivit.embeddings.position_embeddings"
    if config.attention_type != "factorised_encoder":
        has_class_token = state[name].shape[1] - time * space
        grid = state[name][:, has_class_token:].unflatten(1, (time, space))[:, kept].flatten(1, 2)
        state[name] = torch.cat([state[name][:, :has_class_token], grid], dim=1)
    if (name := "vivit.temporal_embeddings.position_embeddings") in state:
        first = num_temporal_class_tokens(config)
        state[name] = torch.cat([state[name][:, :first], state[name][:, first:][:, kept]], dim=1)
    if config.temporal_pooling == "concatenate":
        weight = state["classifier.weight"]
        state["classifier.weight"] = weight.unflatten(1, (time, -1))[:, kept].flatten(1)
    short.load_state_dict(state)
    return short


def kept_frames(model, clip, kept):
    """The frames of these time steps: (1, frames, channels, height, width)."""
    taken = clip[None, sampled(model.config)]
    return taken.unflatten(1, (-1, model.config.tubelet_size[0]))[:, kept].flatten(1, 2)


def with_nan_pixels(clips, mask):
    return clips.masked_fill(~mask[:, :, None, None, None], float("nan"))
