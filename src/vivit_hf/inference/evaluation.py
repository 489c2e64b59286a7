"""Evaluate a model on labelled videos, on any number of processes with the same scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from ..data.annotations import AnnotationError, LabelledVideo, read_videos
from ..data.labels import LabelMap
from ..video_processing_vivit import ViViTVideoProcessor
from .metrics import classification_metrics, confusion_matrix
from .prediction import VideoPrediction, predict_videos
from .views import describe_views


@dataclass(frozen=True)
class Evaluation:
    """
    The predictions of a model for labelled videos, and the views that they come from.

    `targets`: the labels of the videos, encoded by `LabelMap.encode`.
    `predictions`: one per video, in their order.
    `protocol`: see `describe_views`.
    `num_processes`: the number of processes that shared the videos.

    Raises ValueError if none of the videos could be read.
    """

    videos: Sequence[LabelledVideo]
    label_map: LabelMap
    targets: np.ndarray
    predictions: Sequence[VideoPrediction]
    protocol: str
    num_processes: int

    def __post_init__(self) -> None:
        if not self.is_readable.any():
            raise ValueError(f"None of the videos can be read: {self.predictions[0].error}")

    @cached_property
    def is_readable(self) -> np.ndarray:
        """Whether each video was read, bool (videos,)."""
        return np.array([one.error is None for one in self.predictions])

    @cached_property
    def logits(self) -> np.ndarray:
        """Float32 (readable videos, num_labels)."""
        return np.stack([one.logits for one in self.predictions if one.logits is not None])

    @cached_property
    def metrics(self) -> dict[str, float]:
        """See `classification_metrics`. Videos that could not be read do not count."""
        return classification_metrics(self.logits, self.targets[self.is_readable], self.label_map)

    @cached_property
    def confusion_matrix(self) -> np.ndarray | None:
        """See `confusion_matrix`; None with several labels per video or groups of labels."""
        if self.label_map.has_several or self.label_map.is_grouped:
            return None
        return confusion_matrix(self.logits, self.targets[self.is_readable])


def read_split(path: str, split: str | None = None, **settings: Any) -> Sequence[LabelledVideo]:
    """
    Read the labelled videos of a folder or annotation file, or those of one split.

    Args:
        path: a folder of class folders, or a CSV or JSON file, see `read_videos`.
        split: "train", "validation" or "test", for a file with a column of splits. None if it has only one split.
        settings: other arguments of `read_videos`.

    Raises:
        AnnotationError: with file and line, if the videos cannot be read, or the split does not exist or is ambiguous.
    """
    videos = read_videos(path, choose_splits=partial(_choose_split, split), **settings).videos
    if split is not None and videos[0].split is None:
        raise AnnotationError(f"{path} has no column of splits: leave --split {split} out.")
    return videos


def _choose_split(wanted: str | None, where: str, counts: dict[str, int]) -> list[str]:
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    if wanted is None and len(counts) > 1:
        raise AnnotationError(f"{where}: there are {listed} rows: choose --split, or --split_column none for all.")
    if wanted is not None and wanted not in counts:
        raise AnnotationError(f"{where}: there are no {wanted} rows, only {listed}.")
    return [wanted] if wanted is not None else list(counts)


def evaluate_videos(
    model: Any,
    processor: ViViTVideoProcessor,
    videos: Sequence[LabelledVideo],
    *,
    num_clips: int = 4,
    num_crops: int = 3,
    averaging: str = "probabilities",
    batch_size: int = 16,
    num_workers: int = 0,
    with_outputs: bool = False,
) -> Evaluation | None:
    """
    Classify labelled videos and compare the predictions with their labels.

    In a group of processes (see `process_group`), each classifies a share of the videos. The main process returns the
    evaluation of all videos, and the others return None.

    Args:
        model, processor, num_clips, num_crops, averaging, batch_size, num_workers, with_outputs: see
            `predict_videos`.

    Raises:
        AnnotationError: if the model is a regression or does not know a label.
        ValueError, NonFiniteError: see `predict_videos`; ValueError also if none of the videos can be read.
    """
    label_map = LabelMap.from_config(model.config)
    if label_map.is_regression:
        raise AnnotationError("The model is a regression: its outputs cannot be compared with labels.")
    targets = torch.stack([label_map.encode(one) for one in videos]).numpy()
    predictions = predict_together(
        model,
        processor,
        [one.video for one in videos],
        num_clips=num_clips,
        num_crops=num_crops,
        averaging=averaging,
        batch_size=batch_size,
        num_workers=num_workers,
        with_outputs=with_outputs,
    )
    if predictions is None:
        return None
    protocol = describe_views(processor, num_clips, num_crops, averaging)
    return Evaluation(videos, label_map, targets, predictions, protocol, PartialState().num_processes)


def predict_together(
    model: Any, processor: ViViTVideoProcessor, videos: Sequence[Any], **settings: Any
) -> list[VideoPrediction] | None:
    """
    Classify videos on all processes of the group; the main process returns the predictions, the others None.

    Args:
        model, processor, videos, settings: see `predict_videos`.
    """
    state = PartialState()
    # Every n-th video, so that long videos and the classes of a sorted list are spread evenly.
    share = range(state.process_index, len(videos), state.num_processes)
    found = predict_videos(model, processor, [videos[index] for index in share], **settings)
    gathered = gather_object([(share[one.index], one) for one in found])
    if not state.is_main_process:
        return None
    return [one for _, one in sorted(gathered, key=lambda pair: pair[0])]
