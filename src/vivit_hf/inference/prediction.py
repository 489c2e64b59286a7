"""Classify video files: decode the views of each file once, in worker processes, and average their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.labels import LabelMap, to_probabilities
from ..video_processing_vivit import ViViTVideoProcessor
from .finite_outputs import check_finite
from .unknown import UnknownRule, classifier_inputs, energies
from .view_batches import Views, compute_on_views, each_or_error, run_on_views
from .views import average_views, predict_views


@dataclass
class VideoOutputs:
    """
    What the views of a video gave, to choose a rule for unknown videos.

    `energy`: the mean energy of the views.
    `features`: their mean features, float32 (hidden,).
    `view_logits`, `view_features`: those of the middle one, float32 (num_labels,) and (hidden,).
    """

    energy: float
    features: np.ndarray
    view_logits: np.ndarray
    view_features: np.ndarray


@dataclass
class VideoPrediction:
    """
    The scores of one video, or the reason why it has none.

    `index`: the place of the video in the input.
    `logits`, `probabilities`: float32 (num_labels,), None after an error. In a regression both hold its values.
    `error`: None if the video was read.
    `unknown`: whether the answer is "none of these", None for a model without a rule for that.
    `outputs`: on request, see `VideoOutputs`.
    """

    index: int
    logits: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None
    unknown: bool | None = None
    outputs: VideoOutputs | None = None


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
    with_outputs: bool = False,
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
        with_outputs: give each prediction its `outputs`.

    Raises:
        ValueError: if the processor cannot make these views, or the model does not accept its clips.
        NonFiniteError: if scores are NaN or infinite.
    """
    middle = num_clips // 2 * num_crops + num_crops // 2
    answers = Answers.of(model, averaging, batch_size, middle if with_outputs else None)
    settings = {"num_clips": num_clips, "num_crops": num_crops, "batch_size": batch_size, "num_workers": num_workers}
    for views, row in run_on_views(model, processor, videos, answers.compute, **settings):
        yield answers.prediction(views, row)


def prediction_row(file: str, prediction: VideoPrediction, label_map: LabelMap, top_k: int) -> dict[str, Any]:
    """Return a prediction for JSON: {"file", "predictions": [{"label", "score"}]}, also "group"; or {"file", "error"}.

    A model with a rule for unknown videos adds "unknown", true or false.

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
    known = {} if prediction.unknown is None else {"unknown": prediction.unknown}
    return {"file": file, **known, "predictions": predictions}


@dataclass(frozen=True)
class Answers:
    """
    A row of numbers for each video, computed from its views, and the prediction in it.

    Made once for a model as it was loaded: that reads the rule for unknown videos, and checks it against the weights.

    `rule`: adds a score to the averaged logits of each row.
    `middle`: in place of the rule, the view in `VideoOutputs`; rows have the logits and features of all views.
    """

    model: Any
    label_map: LabelMap
    averaging: str
    batch_size: int
    rule: UnknownRule | None = None
    middle: int | None = None

    @classmethod
    def of(cls, model: Any, averaging: str, batch_size: int, middle: int | None = None) -> Answers:
        """
        Read the rule of a model.

        Raises:
            ValueError: if its known features are damaged or belong to other weights.
        """
        rule = UnknownRule.of(model) if middle is None else None
        return cls(model, LabelMap.from_config(model.config), averaging, batch_size, rule, middle)

    def compute(
        self, pixel_values: torch.Tensor, frame_ids: np.ndarray, frame_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a row per video, for `compute_on_views`."""
        needs_features = self.rule is not None or self.middle is not None
        nothing: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        with classifier_inputs(self.model) if needs_features else nothing as seen:
            logits = predict_views(self.model, pixel_values, self.batch_size, frame_ids, frame_mask)
        check_finite(logits, self.model, pixel_values)
        rows = average_views(logits, self.label_map, self.averaging)
        if not needs_features:
            return rows
        features = torch.cat(seen).unflatten(0, logits.shape[:2])  # (videos, views, hidden)
        if self.rule is not None:
            return torch.cat([rows, self.rule.scores(logits, features)[:, None]], dim=1)
        return torch.cat([rows, torch.cat([logits, features], dim=-1).to(rows.dtype).flatten(1)], dim=1)

    def of_decoded(self, items: Sequence[Views]) -> list[VideoPrediction]:
        """
        Classify videos whose views are decoded, together, as `predict_videos` does. The model is optimised already.

        Raises:
            ValueError: if the model does not accept the clips.
            NonFiniteError: if scores are NaN or infinite.
        """
        rows = compute_on_views(self.model, items, self.compute)
        return [self.prediction(views, row) for views, row in zip(items, rows, strict=True)]

    def prediction(self, views: Views, row: torch.Tensor | None) -> VideoPrediction:
        if row is None or views.pixel_values is None:
            return VideoPrediction(views.index, error=views.error)
        logits, rest = row.tensor_split([len(self.label_map.names)])
        found = VideoPrediction(views.index, logits.numpy(), to_probabilities(logits, self.label_map).numpy())
        num_views = len(views.pixel_values)
        if self.rule is not None:
            found.unknown = self.rule.is_unknown(float(rest), num_views)
        elif self.middle is not None:
            found.outputs = self._outputs(rest.unflatten(0, (num_views, -1)), self.middle)
        return found

    def _outputs(self, views: torch.Tensor, middle: int) -> VideoOutputs:
        """Return the outputs of a video from the logits and features of its views, (views, num_labels + hidden)."""
        logits, features = views.tensor_split([len(self.label_map.names)], dim=1)
        energy = float(energies(logits, self.label_map).mean())
        return VideoOutputs(energy, features.mean(dim=0).numpy(), logits[middle].numpy(), features[middle].numpy())


def predict_each(
    model: Any, processor: ViViTVideoProcessor, videos: Sequence[Any], **settings: Any
) -> Iterator[VideoPrediction]:
    """
    Like `predict_videos`, but a video whose scores are NaN or infinite has an `error`, and the others go on.

    Args:
        settings: as for `predict_videos`.
    """
    return each_or_error(lambda part: predict_videos(model, processor, part, **settings), videos, VideoPrediction)
