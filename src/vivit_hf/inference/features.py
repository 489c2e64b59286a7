"""Features of videos: a vector per video, or a vector and a time per step of the model's token grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import check_pixel_values, mask_frames, visible_steps
from ..video_processing_vivit import ViViTVideoProcessor
from .clips import shared_steps, split_mask, step_starts, unique_frame_ids
from .finite_outputs import check_finite
from .view_batches import each_or_error, run_on_views


@dataclass
class VideoEmbedding:
    """
    The features of one video, or the reason why it has none.

    `index`: the place of the video in the input.
    `vectors`: float32 (hidden,), or per step (steps, hidden); None after an error.
    `times`: per step float64 (steps,), in order: seconds from the first frame of the file to the middle frame of the
        step. NaN for frames in memory.
    `error`: None if the video was read.
    """

    index: int
    vectors: np.ndarray | None = None
    times: np.ndarray | None = None
    error: str | None = None


def embed_videos(
    model: Any,
    processor: ViViTVideoProcessor,
    videos: Sequence[Any],
    *,
    per_step: bool = False,
    num_clips: int = 1,
    num_crops: int = 1,
    batch_size: int = 8,
    num_workers: int = 0,
) -> Iterator[VideoEmbedding]:
    """
    Embed videos in the given order. A video that cannot be read, or whose features are not finite, has an `error`.

    A video's vector is the model's `pooler_output`, averaged over the views. A step's vector is Model 2's
    `encode_steps`; in the other variants it is the step's final tokens, averaged over space. It is averaged over the
    crops, and the steps of all clips are sorted by time. With short_video_policy="mask", masked steps have no vector,
    so that a short video has fewer.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification` in eval mode, see `predict_videos`.
        processor, videos, num_clips, num_crops, batch_size, num_workers: see `predict_videos`.
        per_step: a vector per time step instead of one per video.

    Raises:
        ValueError: if the processor cannot make these views, or the model does not accept its clips.
    """
    settings = {"num_clips": num_clips, "num_crops": num_crops, "batch_size": batch_size, "num_workers": num_workers}
    encode = encode_clip_steps if per_step else encode_clips

    def compute(pixel_values: torch.Tensor, frame_ids: np.ndarray, frame_mask: torch.Tensor | None) -> torch.Tensor:
        mask = None if frame_mask is None else frame_mask.flatten(0, 1)
        vectors = encode(model, pixel_values.flatten(0, 1), unique_frame_ids(frame_ids), batch_size, mask).float()
        check_finite(vectors, model, pixel_values)
        vectors = vectors.unflatten(0, pixel_values.shape[:2])
        if not per_step:
            return vectors.mean(dim=1)  # (batch, hidden)
        vectors = vectors.unflatten(1, (num_clips, -1)).mean(dim=2)  # (batch, clips, time, hidden)
        return vectors.flatten(1, 2)  # (batch, clips * time, hidden)

    def run(part: Sequence[Any]) -> Iterator[VideoEmbedding]:
        for views, row in run_on_views(model, processor, part, compute, **settings):
            if row is None or views.frame_times is None:
                yield VideoEmbedding(views.index, error=views.error)
            elif per_step:
                times = views.frame_times[::num_crops, step_frames(model.config)].reshape(-1)
                order = np.argsort(times, kind="stable")
                if views.frame_mask is not None:
                    visible = visible_steps(views.frame_mask[::num_crops], model.config).flatten().numpy()
                    order = order[visible[order]]
                yield VideoEmbedding(views.index, row.numpy()[order], times[order])
            else:
                yield VideoEmbedding(views.index, row.numpy())

    return each_or_error(run, videos, VideoEmbedding)


def encode_clips(
    model: Any, clips: torch.Tensor, frame_ids: np.ndarray, max_clips: int, frame_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return the model's `pooler_output` for clips, (clips, hidden).

    Args:
        clips, frame_ids, max_clips, frame_mask: see `predict_clips`.
    """
    check_pixel_values(clips, model.config, any_size=False)
    backbone = model.base_model
    steps = shared_steps(model, clips, frame_ids, max_clips, frame_mask)
    if steps is not None:
        pooled = [backbone.encode_time(*part, output_last_hidden_state=False)[1] for part in steps.split(max_clips)]
        return backbone.represent(torch.cat(pooled))
    options = {"output_last_hidden_state": False, "return_dict": True}
    parts = zip(clips.split(max_clips), split_mask(frame_mask, len(clips), max_clips), strict=True)
    return torch.cat([backbone(part, frame_mask=mask, **options).pooler_output for part, mask in parts])


def encode_clip_steps(
    model: Any, clips: torch.Tensor, frame_ids: np.ndarray, max_clips: int, frame_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return a vector for each time step of clips, (clips, time, hidden), arbitrary for masked steps; see `embed_videos`.

    Args:
        clips, frame_ids, max_clips, frame_mask: see `predict_clips`.
    """
    check_pixel_values(clips, model.config, any_size=False)
    backbone = model.base_model
    if model.config.attention_type == "factorised_encoder":
        steps = shared_steps(model, clips, frame_ids, max_clips, frame_mask)
        if steps is not None:
            return steps.tokens
        if frame_mask is not None:
            clips, _ = mask_frames(clips, frame_mask, model.config)
        return torch.cat([backbone.encode_steps(part) for part in clips.split(max_clips)])
    time, height, width = model.config.grid_size
    found = []
    for part, mask in zip(clips.split(max_clips), split_mask(frame_mask, len(clips), max_clips), strict=True):
        # (clips, prefix + time * space, hidden)
        tokens = backbone(part, frame_mask=mask, return_dict=True).last_hidden_state
        tokens = tokens[:, -time * height * width :].unflatten(1, (time, -1))  # (clips, time, space, hidden)
        found.append(tokens.mean(dim=2))
    return torch.cat(found)


def step_frames(config: ViViTConfig) -> np.ndarray:
    """Return the middle frame of each time step of a clip, int64 (time,)."""
    return step_starts(config) + config.tubelet_size[0] // 2
