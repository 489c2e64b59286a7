"""From video files to scores: views decoded once per file, in workers, averaged per video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.labels import LabelMap
from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import VideoDecodingError
from .evaluation import average_views, to_probabilities
from .finite_outputs import check_finite
from .streaming import BATCH, predict_clips


def demo_model_path() -> Path:
    """
    The folder of a small trained model that ships in the package, to try everything without a download.

    A factorised encoder for 16 frames of 64 x 64 that tells along which diagonal a shape moves: `down_left`,
    `down_right`, `up_left` or `up_right`. `examples/train_demo_model.py` made it.
    """
    return Path(__file__).parents[1] / "demo_model"


@dataclass
class VideoPrediction:
    """
    `index` of the video in the input; `logits` and `probabilities`, float32 (num_labels,), or `error`. In a regression
    both are its values.
    """

    index: int
    logits: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None


class _Views(Dataset):
    def __init__(self, videos: Sequence[Any], processor: ViViTVideoProcessor, num_clips: int, num_crops: int):
        self.videos, self.processor = videos, processor
        self.views: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, np.ndarray | None, str | None]:
        """Number, `pixel_values` of the views and their `frame_ids`, or the error."""
        video = self.videos[index]
        try:
            features = self.processor(video() if callable(video) else video, **self.views)
            return index, features["pixel_values"], features.frame_ids, None
        except (VideoDecodingError, OSError, ValueError) as error:
            return index, None, None, str(error)


def predict_views(
    model: torch.nn.Module, pixel_values: torch.Tensor, max_clips: int = BATCH, frame_ids: np.ndarray | None = None
) -> torch.Tensor:
    """
    Logits (batch, views, labels) of (batch, views, frames, channels, height, width), some clips at a time.

    With `frame_ids` (batch, views, frames), what clips of a video share is computed once; see `predict_clips`.
    """
    batch, views = pixel_values.shape[:2]
    if frame_ids is not None:  # frames of one video are none of another
        frame_ids = (frame_ids * batch + np.arange(batch)[:, None, None]).reshape(batch * views, -1)
    logits = predict_clips(model, pixel_values.flatten(0, 1), frame_ids, max_clips)
    return logits.unflatten(0, (batch, views))


def predict_videos(
    model: Any,
    processor: ViViTVideoProcessor,
    videos: Sequence[Any],
    *,
    num_clips: int = 1,
    num_crops: int = 1,
    averaging: str = "probabilities",
    batch_size: int = 8,
    num_workers: int = 0,
) -> Iterator[VideoPrediction]:
    """
    Classifies videos in their order; one that cannot be read has an `error` in its place.

    Args:
        model: a `ViViTForVideoClassification`, which is used on its device and in its dtype; put it in eval mode.
        processor: makes clips of the model's frames and size.
        videos: what the processor takes, or functions without arguments that give it.
        num_clips, num_crops: the views of a video.
        averaging: see `average_views`.
        batch_size: clips that the model sees at a time.
        num_workers: processes that decode.

    Raises ValueError for views that the processor does not give and for clips that the model does not take, and
    NonFiniteError for scores that are NaN or infinite.
    """
    processor.settings_with({"num_clips": num_clips, "num_crops": num_crops})
    label_map = LabelMap.from_config(model.config)
    loader = DataLoader(
        _Views(videos, processor, num_clips, num_crops),
        batch_size=max(1, batch_size // (num_clips * num_crops)),
        num_workers=num_workers,
        collate_fn=list,
    )
    for items in loader:
        good = [(views, ids) for _, views, ids, _ in items if views is not None]
        # Without a crop, videos can be of different sizes.
        is_one_size = len({views.shape for views, _ in good}) == 1
        alike = [good] if is_one_size else [[one] for one in good]
        rows: list[torch.Tensor] = []
        with torch.inference_mode():
            for group in alike:
                pixel_values = torch.stack([views for views, _ in group]).to(model.device, model.dtype)
                ids = np.stack([ids for _, ids in group])
                logits = predict_views(model, pixel_values, batch_size, ids)
                check_finite(logits, model, pixel_values)
                rows += average_views(logits, label_map, averaging).cpu()
        remaining = iter(rows)
        for index, views, _, error in items:
            if views is None:
                yield VideoPrediction(index, error=error)
            else:
                row = next(remaining)
                yield VideoPrediction(index, row.numpy(), to_probabilities(row, label_map).numpy())


def describe_views(
    processor: ViViTVideoProcessor, num_clips: int, num_crops: int, averaging: str = "probabilities"
) -> str:
    """The protocol that a score has to be stated with."""
    rate = f"stride {processor.frame_stride}"
    if processor.frames_per_second is not None:
        rate = f"{processor.frames_per_second:g} per second"
    if processor.frame_sampling == "uniform":
        rate = "spread over the video"
    parts = [f"{num_clips} clip{'s' * (num_clips > 1)} x {num_crops} crop{'s' * (num_crops > 1)}"]
    parts[0] += f" of {processor.num_frames} frames, {rate}"
    if processor.do_resize:
        edge = processor.size.get("shortest_edge")
        sides = f"short side {edge}" if edge else f"{processor.size['height']} x {processor.size['width']}"
        parts.append(f"resized to {sides}")
    if processor.do_center_crop:
        parts.append(f"cropped to {processor.crop_size['height']} x {processor.crop_size['width']}")
    if num_clips * num_crops > 1:
        parts.append(f"{averaging} averaged")
    return ", ".join(parts)
