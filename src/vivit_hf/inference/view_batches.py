"""Decode the views of videos in worker processes, and run a model on some videos at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import VideoDecodingError
from .clips import check_takes_masks, shown_masks
from .finite_outputs import NonFiniteError
from .optimization import optimized


# `pixel_values` (videos, views, frames, channels, height, width), `frame_ids` and `frame_mask` (videos, views, frames),
# which is None unless the processor masks -> (videos, ...)
Compute = Callable[[torch.Tensor, np.ndarray, torch.Tensor | None], torch.Tensor]
Result = TypeVar("Result", bound=Any)  # a dataclass with the fields `index` and `error`


@dataclass(frozen=True)
class Views:
    """
    The views of one video, or the reason why it has none.

    `index`: the place of the video in the input.
    `pixel_values`: float32 (views, frames, channels, height, width), None after an error.
    `frame_ids`, `frame_times`: (views, frames), see `VideoFeatures`.
    `frame_mask`: the visible frames, bool (views, frames), with short_video_policy="mask".
    """

    index: int
    pixel_values: torch.Tensor | None = None
    frame_ids: np.ndarray | None = None
    frame_times: np.ndarray | None = None
    frame_mask: torch.Tensor | None = None
    error: str | None = None


class _Videos(Dataset):
    def __init__(self, videos: Sequence[Any], processor: ViViTVideoProcessor, views: dict[str, Any]):
        self.videos, self.processor, self.views = videos, processor, views

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Views:
        return decode_views(self.processor, self.videos[index], index, **self.views)


def decode_views(processor: ViViTVideoProcessor, video: Any, index: int = 0, **settings: Any) -> Views:
    """
    Return the views of a video, or the reason why it has none.

    Args:
        video: an input of the processor, or a function without arguments that returns one.
        index: the place of the video in the input.
        settings: `num_clips`, `num_crops` and other overrides of the processor.
    """
    try:
        features = processor(video() if callable(video) else video, **settings)
    except (VideoDecodingError, OSError, ValueError) as error:
        return Views(index, error=str(error))
    frame_mask = features.get("frame_mask")
    return Views(index, features["pixel_values"], features.frame_ids, features.frame_times, frame_mask)


def load_views(
    videos: Sequence[Any],
    processor: ViViTVideoProcessor,
    *,
    num_clips: int,
    num_crops: int,
    batch_size: int,
    num_workers: int,
    **settings: Any,
) -> DataLoader:
    """
    Return an iterable over the views of videos, in the given order: a list of `Views` for some videos at a time.

    Args:
        batch_size: views that are wanted at a time.
        num_workers: processes that decode; 0 decodes in this process.
        settings: further settings of the processor, such as do_rescale=False.

    Raises:
        ValueError: if the processor cannot make these views.
    """
    views: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops, **settings}
    processor.settings.updated(views)
    return DataLoader(
        _Videos(videos, processor, views),
        batch_size=max(1, batch_size // (num_clips * num_crops)),
        num_workers=num_workers,
        collate_fn=list,
    )


def run_on_views(
    model: Any,
    processor: ViViTVideoProcessor,
    videos: Sequence[Any],
    compute: Compute,
    *,
    num_clips: int,
    num_crops: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[Views, torch.Tensor | None]]:
    """
    Yield the views of each video, in the given order, and what `compute` returns for it; None after an error.

    Args:
        model: in eval mode; it is optimised for the time of the iteration.
        compute: see `Compute`.
        batch_size: clips that the model sees at a time.

    Raises:
        ValueError: if the processor cannot make these views, or masks frames and the model does not take masks.
    """
    views = {"num_clips": num_clips, "num_crops": num_crops}
    loader = load_views(videos, processor, **views, batch_size=batch_size, num_workers=num_workers)
    with optimized(model):
        check_takes_masks(model, processor)
        for loaded in loader:
            yield from zip(loaded, compute_on_views(model, loaded, compute), strict=True)


def compute_on_views(model: Any, items: Sequence[Views], compute: Compute) -> list[torch.Tensor | None]:
    """
    Return what `compute` returns for each video, None for one without views; the videos are computed together.

    Args:
        model, compute: see `run_on_views`.
    """
    good: list[tuple[torch.Tensor, Any, Any]] = [
        (one.pixel_values, one.frame_ids, one.frame_mask) for one in items if one.pixel_values is not None
    ]
    # Without a crop, videos can differ in size.
    is_one_size = len({pixel_values.shape for pixel_values, _, _ in good}) == 1
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        for group in [good] if is_one_size else [[one] for one in good]:
            clips, ids, masks = zip(*group, strict=True)
            pixel_values = torch.stack(clips).to(model.device, model.dtype)
            frame_mask = None if masks[0] is None else shown_masks(torch.stack(masks), model.config).to(model.device)
            rows += compute(pixel_values, np.stack(ids), frame_mask).cpu()
    remaining = iter(rows)
    return [None if one.pixel_values is None else next(remaining) for one in items]


def each_or_error(
    run: Callable[[Sequence[Any]], Iterator[Result]], videos: Sequence[Any], result_class: type[Result]
) -> Iterator[Result]:
    """Yield the results of `run(videos)`; a video with NaN or infinite outputs has an error, and the others go on."""
    num_done = 0
    try:
        for result in run(videos):
            yield result
            num_done += 1
    except NonFiniteError:  # somewhere in a batch: the remaining videos one by one
        for index in range(num_done, len(videos)):
            try:
                yield replace(next(run(videos[index : index + 1])), index=index)
            except NonFiniteError as error:
                yield result_class(index=index, error=str(error))
