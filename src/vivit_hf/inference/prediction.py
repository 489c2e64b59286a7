"""Classify video files: decode the views of each file once, in worker processes, and average their scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.labels import LabelMap, to_probabilities
from ..video_processing_vivit import ViViTVideoProcessor
from .finite_outputs import check_finite
from .view_batches import Views, compute_on_views, each_or_error, run_on_views
from .views import average_views, predict_views


@dataclass
class VideoPrediction:
    """
    The scores of one video, or the reason why it has none.

    `index`: the place of the video in the input.
    `logits`, `probabilities`: float32 (num_labels,), None after an error. In a regression both hold its values.
    `error`: None if the video was read.
    """

    index: int
    logits: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None


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
    label_map = LabelMap.from_config(model.config)
    compute = _averaged_logits(model, label_map, averaging, batch_size)
    settings = {"num_clips": num_clips, "num_crops": num_crops, "batch_size": batch_size, "num_workers": num_workers}
    for views, row in run_on_views(model, processor, videos, compute, **settings):
        yield _prediction(views, row, label_map)


def predict_decoded(model: Any, items: Sequence[Views], batch_size: int = 8) -> list[VideoPrediction]:
    """
    Classify videos whose views are decoded, together, as `predict_videos` does. The model is optimised already.

    Raises:
        ValueError: if the model does not accept the clips.
        NonFiniteError: if scores are NaN or infinite.
    """
    label_map = LabelMap.from_config(model.config)
    rows = compute_on_views(model, items, _averaged_logits(model, label_map, "probabilities", batch_size))
    return [_prediction(views, row, label_map) for views, row in zip(items, rows, strict=True)]


def prediction_row(file: str, prediction: VideoPrediction, label_map: LabelMap, top_k: int) -> dict[str, Any]:
    """Return a prediction for JSON: {"file", "predictions": [{"label", "score"}]}, also "group"; or {"file", "error"}.

    Args:
        file: the name of the video.
        top_k: labels to name, in each group.
    """
    if prediction.probabilities is None:
        return {"file": file, "error": prediction.error}
    predictions = [
        {"label": label, "score": round(score, 4), **({"group": group} if group else {})}
        for group, label, score in label_map.ranked(prediction.probabilities, top_k)
    ]
    return {"file": file, "predictions": predictions}


def _averaged_logits(
    model: Any, label_map: LabelMap, averaging: str, batch_size: int
) -> Callable[[torch.Tensor, np.ndarray], torch.Tensor]:
    """Return a function for `compute_on_views`: the logits of each video, averaged over its views."""

    def compute(pixel_values: torch.Tensor, frame_ids: np.ndarray) -> torch.Tensor:
        logits = predict_views(model, pixel_values, batch_size, frame_ids)
        check_finite(logits, model, pixel_values)
        return average_views(logits, label_map, averaging)

    return compute


def _prediction(views: Views, row: torch.Tensor | None, label_map: LabelMap) -> VideoPrediction:
    if row is None:
        return VideoPrediction(views.index, error=views.error)
    return VideoPrediction(views.index, row.numpy(), to_probabilities(row, label_map).numpy())


def predict_each(
    model: Any, processor: ViViTVideoProcessor, videos: Sequence[Any], **settings: Any
) -> Iterator[VideoPrediction]:
    """
    Like `predict_videos`, but a video whose scores are NaN or infinite has an `error`, and the others go on.

    Args:
        settings: as for `predict_videos`.
    """
    return each_or_error(lambda part: predict_videos(model, processor, part, **settings), videos, VideoPrediction)
