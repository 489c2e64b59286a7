"""Run a model on clips, some at a time, and encode every tubelet that clips share only once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..frame_sampling import sample_frames_uniformly
from ..modeling_vivit import BIASED_ATTENTION, check_pixel_values, mask_frames, nearest_visible_frames, visible_steps


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


def check_takes_masks(model: Any, processor: Any, merging: Sequence[int] | None = None) -> None:
    """
    Raise ValueError if the processor masks the ends of short videos, and the model does not take masks.

    Args:
        merging: the tokens that each layer is to merge; None for what the model does now.
    """
    if processor.short_video_policy != "mask":
        return
    implementation, reason = model.config._attn_implementation, None
    merging = getattr(model.base_model.encoder, "schedule", ()) if merging is None else merging
    if model.config.attention_type == "spatio_temporal" and any(merging):
        reason = "it merges tokens (`merge_tokens`), so that masked ones would merge into visible ones"
    elif implementation not in BIASED_ATTENTION:
        reason = f"`attn_implementation={implementation!r}` is none of {', '.join(BIASED_ATTENTION)}"
    if reason is not None:
        raise ValueError(
            f"The processor has short_video_policy='mask', and the model takes no `frame_mask`: {reason}. Change that, "
            "or use short_video_policy='repeat_last' or 'loop'."
        )


def shown_masks(frame_mask: torch.Tensor, config: Any) -> torch.Tensor:
    """
    Return masks of frames, bool (..., frames), with every frame visible of clips that have no visible time step.

    A model with uniform frame sampling may take none of the frames of a very short video. It then sees the last one,
    which fills the clip.
    """
    masks = frame_mask.reshape(-1, frame_mask.shape[-1])
    has_steps = visible_steps(masks, config).any(dim=1, keepdim=True)
    return (masks | ~has_steps).reshape(frame_mask.shape)


@dataclass(frozen=True)
class Steps:
    """
    Encoded time steps of clips.

    `tokens`: floats (clips, time, hidden), arbitrary for masked steps.
    `visible`: the steps that take part, bool (clips, time); None if all do.
    """

    tokens: torch.Tensor
    visible: torch.Tensor | None = None

    def split(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield the tokens and the visible steps of `size` clips at a time."""
        return zip(self.tokens.split(size), split_mask(self.visible, len(self.tokens), size), strict=True)


def split_mask(mask: torch.Tensor | None, clips: int, size: int) -> list[torch.Tensor | None]:
    """Split a mask (clips, ...) into parts of `size` clips; None into as many times None."""
    return [None] * -(-clips // size) if mask is None else list(mask.split(size))


def predict_clips(
    model: Any,
    clips: torch.Tensor,
    frame_ids: np.ndarray | None = None,
    max_clips: int = BATCH,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return the logits of clips, float (clips, num_labels).

    The clips of one video overlap if the video is short or the clips are many. Given `frame_ids`, the factorised
    encoder encodes every distinct tubelet once. The logits are the same either way.

    Args:
        clips: floats (clips, frames, channels, height, width).
        frame_ids: int64 (clips, frames), as in `VideoFeatures`: equal ids mark equal frames.
        max_clips: clips that the model sees at a time.
        frame_mask: the visible frames, bool (clips, frames), as `ViViTVideoProcessor` gives them with
            short_video_policy="mask". None: all.

    Raises:
        ValueError: if the clips do not have the model's number of frames and size, or for a mask that the model does
            not take.
    """
    check_pixel_values(clips, model.config, any_size=False)
    steps = shared_steps(model, clips, frame_ids, max_clips, frame_mask)
    if steps is not None:
        return torch.cat([model.classify_steps(*part) for part in steps.split(max_clips)])
    parts = zip(clips.split(max_clips), split_mask(frame_mask, len(clips), max_clips), strict=True)
    return torch.cat([model(pixel_values=part, frame_mask=mask, return_dict=True).logits for part, mask in parts])


def shared_steps(
    model: Any,
    clips: torch.Tensor,
    frame_ids: np.ndarray | None,
    max_clips: int = BATCH,
    frame_mask: torch.Tensor | None = None,
) -> Steps | None:
    """
    Encode every distinct tubelet of the visible time steps of clips once: one token per step.

    None if there is nothing to share. For the arguments see `predict_clips`.
    """
    if frame_ids is None or not reuses_tubelets(model.config):
        return None
    tubelet = model.config.tubelet_size[0]
    time = clips.shape[1] // tubelet
    ids, visible = np.asarray(frame_ids), None
    if frame_mask is not None:
        ids = np.take_along_axis(ids, nearest_visible_frames(frame_mask).cpu().numpy(), axis=1)
        clips, visible = mask_frames(clips, frame_mask, model.config)
    ids = ids[:, : time * tubelet].reshape(-1, tubelet)  # (clips * time, tubelet)
    rows = np.arange(len(ids)) if visible is None else np.flatnonzero(visible.cpu().numpy())
    _, firsts, inverse = np.unique(ids[rows], axis=0, return_index=True, return_inverse=True)
    if len(firsts) == len(rows):
        return None
    places = np.zeros(len(ids), dtype=np.int64)  # masked steps take any token
    places[rows] = inverse.reshape(-1)
    # (clips, frames, ...) -> (clips * time, tubelet, ...)
    tubelets = clips[:, : time * tubelet].unflatten(1, (time, tubelet)).flatten(0, 1)
    groups = torch.from_numpy(rows[firsts]).split(max_clips * time)
    encoded = torch.cat([model.base_model.encode_steps(tubelets[group])[:, 0] for group in groups])
    return Steps(encoded[torch.from_numpy(places.reshape(-1, time)).to(encoded.device)], visible)
