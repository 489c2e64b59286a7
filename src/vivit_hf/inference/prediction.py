"""Classify video files: decode the views of each file once, in worker processes, and average their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.labels import LabelMap, to_probabilities
from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import VideoDecodingError
from .finite_outputs import NonFiniteError, check_finite
from .optimization import optimized
from .views import average_views, predict_views


@dataclass
class VideoPrediction:
    """
    The scores of one video, or the reason why it has none.

    `index`: of the video in the input.
    `logits`, `probabilities`: float32 (num_labels,), None after an error. In a regression both hold its values.
    `error`: None if the video was read.
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
        """Return the index, the `pixel_values` of the views and their `frame_ids`, and the error message, if any."""
        video = self.videos[index]
        try:
            features = self.processor(video() if callable(video) else video, **self.views)
            return index, features["pixel_values"], features.frame_ids, None
        except (VideoDecodingError, OSError, ValueError) as error:
            return index, None, None, str(error)


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
    Classify videos in the given order. For a video that cannot be read, the prediction has an `error`.

    Args:
        model: a `ViViTForVideoClassification` in eval mode. It runs on its own device and in its own dtype, optimised
            for the time of the iteration (see `vivit_hf.inference.optimize`).
        processor: makes clips with the model's number of frames and size.
        videos: inputs of the processor (paths, addresses, arrays ...), or functions without arguments that return one.
        num_clips, num_crops: views per video.
        averaging: "probabilities" or "logits", see `average_views`.
        batch_size: clips that the model sees at a time.
        num_workers: processes that decode; 0 decodes in this process.

    Raises:
        ValueError: if the processor cannot make these views, or the model does not accept its clips.
        NonFiniteError: if scores are NaN or infinite.
    """
    processor.settings_with({"num_clips": num_clips, "num_crops": num_crops})
    label_map = LabelMap.from_config(model.config)
    loader = DataLoader(
        _Views(videos, processor, num_clips, num_crops),
        batch_size=max(1, batch_size // (num_clips * num_crops)),
        num_workers=num_workers,
        collate_fn=list,
    )
    with optimized(model):
        for items in loader:
            good = [(views, ids) for _, views, ids, _ in items if views is not None]
            # Without a crop, videos can differ in size.
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


def predict_each(
    model: Any, processor: ViViTVideoProcessor, videos: Sequence[Any], **settings: Any
) -> Iterator[VideoPrediction]:
    """
    Like `predict_videos`, but a video whose scores are NaN or infinite has an `error`, and the others go on.

    Args:
        settings: as for `predict_videos`.
    """
    num_done = 0
    try:
        for prediction in predict_videos(model, processor, videos, **settings):
            yield prediction
            num_done += 1
    except NonFiniteError:  # somewhere in a batch: classify the remaining videos one by one
        for index in range(num_done, len(videos)):
            try:
                yield replace(
                    next(predict_videos(model, processor, videos[index : index + 1], **settings)), index=index
                )
            except NonFiniteError as error:
                yield VideoPrediction(index, error=str(error))
