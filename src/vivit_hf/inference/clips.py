"""Run a model on clips, some at a time, and encode every tubelet that clips share only once."""

from typing import Any

import numpy as np
import torch

from ..frame_sampling import sample_frames_uniformly
from ..modeling_vivit import check_pixel_values


# Tubelets or clips that go through the model at a time.
BATCH = 16


def reuses_tubelets(config: Any) -> bool:
    """
    Return whether the encoding of a tubelet depends on that tubelet alone, so that overlapping clips can share it.

    This holds for Model 2 with tubelet embeddings.
    """
    return config.attention_type == "factorised_encoder" and config.embedding_type == "tubelet"


def unique_frame_ids(frame_ids: np.ndarray) -> np.ndarray:
    """Return ids (batch, views, frames) as (batch * views, frames), with no id in common between videos."""
    ids = frame_ids * len(frame_ids) + np.arange(len(frame_ids))[:, None, None]
    return ids.reshape(-1, ids.shape[-1])


def step_starts(config: Any) -> np.ndarray:
    """Return the first frame of each time step of a clip, int64 (time,)."""
    if config.embedding_type == "uniform_frame_sampling":
        return sample_frames_uniformly(config.num_frames, config.num_sampled_frames)
    return np.arange(config.grid_size[0]) * config.tubelet_size[0]


def predict_clips(
    model: Any, clips: torch.Tensor, frame_ids: np.ndarray | None = None, max_clips: int = BATCH
) -> torch.Tensor:
    """
    Return the logits of clips, float (clips, num_labels).

    The clips of one video overlap if the video is short or the clips are many. Given `frame_ids`, the factorised
    encoder encodes every distinct tubelet once. The logits are the same either way.

    Args:
        clips: floats (clips, frames, channels, height, width).
        frame_ids: int64 (clips, frames), as in `VideoFeatures`: equal ids mark equal frames.
        max_clips: clips that the model sees at a time.

    Raises:
        ValueError: if the clips do not have the model's number of frames and size.
    """
    check_pixel_values(clips, model.config, any_size=False)
    steps = shared_steps(model, clips, frame_ids, max_clips)
    if steps is not None:
        return torch.cat([model.classify_steps(part) for part in steps.split(max_clips)])
    return torch.cat([model(pixel_values=part, return_dict=True).logits for part in clips.split(max_clips)])


def shared_steps(
    model: Any, clips: torch.Tensor, frame_ids: np.ndarray | None, max_clips: int = BATCH
) -> torch.Tensor | None:
    """
    Encode every distinct tubelet of the clips once: one token per time step, (clips, time, hidden).

    None if there is nothing to share. For the arguments see `predict_clips`.
    """
    if frame_ids is None or not reuses_tubelets(model.config):
        return None
    tubelet = model.config.tubelet_size[0]
    time = clips.shape[1] // tubelet
    ids = np.asarray(frame_ids)[:, : time * tubelet].reshape(-1, tubelet)
    _, firsts, places = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    if len(firsts) == len(ids):
        return None
    # (clips, frames, ...) -> (clips * time, tubelet, ...)
    tubelets = clips[:, : time * tubelet].unflatten(1, (time, tubelet)).flatten(0, 1)
    groups = torch.from_numpy(firsts).split(max_clips * time)
    encoded = torch.cat([model.base_model.encode_steps(tubelets[group])[:, 0] for group in groups])
    return encoded[torch.from_numpy(places.reshape(-1, time)).to(encoded.device)]  # (clips, time, hidden)
