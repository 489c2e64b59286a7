"""Scores of video classification: averaged views, top-1 and top-5, mean average precision, noun-verb actions, chance.

A video's views are averaged as class probabilities ("probabilities", the softmax of each view) or before the softmax
("logits", as the paper's section 4 has it). Whatever the way, a score depends on the views: state them with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.labels import IGNORED, LabelMap


AVERAGINGS = ("probabilities", "logits")
_COLLAPSE = 0.95  # share of the predictions that are of one class
_MIN_PREDICTIONS = 12  # among fewer it can be chance
_SIGNIFICANCE = 0.05  # a score that chance reaches more often than this is near chance


def average_views(logits: torch.Tensor, label_map: LabelMap, averaging: str = "probabilities") -> torch.Tensor:
    """
    The views of each video as one row of logits, whose softmax (sigmoid with several labels) is the averaged score; in
    a regression the mean of the values.

    Args:
        logits: (batch, views, num_labels).
        averaging: "probabilities" or "logits".

    Returns:
        float32 or wider, (batch, num_labels).
    """
    if averaging not in AVERAGINGS:
        raise ValueError(f"`averaging` must be one of {', '.join(AVERAGINGS)}, got {averaging!r}.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if averaging == "logits" or logits.shape[1] == 1 or label_map.is_regression:
        return logits.mean(dim=1)
    if label_map.has_several:  # log(p / (1 - p)) of the mean p
        log_count = np.log(logits.shape[1])
        yes, no = (torch.nn.functional.logsigmoid(sign * logits).logsumexp(dim=1) - log_count for sign in (1, -1))
        return yes - no
    parts = logits.split(label_map.sizes, dim=-1)
    return torch.cat([part.log_softmax(dim=-1).logsumexp(dim=1) - np.log(part.shape[1]) for part in parts], dim=-1)


def to_probabilities(logits: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """(..., num_labels): softmax within each group, sigmoid with several labels per video, a regression's values."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if label_map.is_regression:
        return logits
    if label_map.has_several:
        return logits.sigmoid()
    return torch.cat([part.softmax(dim=-1) for part in logits.split(label_map.sizes, dim=-1)], dim=-1)


def classification_metrics(logits: np.ndarray, labels: np.ndarray, label_map: LabelMap) -> dict[str, float]:
    """
    Return the scores of predictions, fractions from 0 to 1, and the number of videos that they come from.

    Args:
        logits: (videos, num_labels).
        labels: as `LabelMap.encode` gives them; -100 does not count.

    Returns:
        `top1`; `top5` if there are more than five classes; `balanced_accuracy`, the mean over the classes that occur of
        the share of their videos that is right; `majority_class_accuracy`, the top-1 of always answering the most
        frequent class; and `samples`, the number of videos that count. With groups, the scores of each, such as
        `noun_top1`, and those of all together (`action_top1`, from the product of the softmaxes; `top1` and so on are
        the same numbers). With several labels `map`, the mean over the labels that occur, and `samples`. A video whose
        logits are not finite counts as wrong.
    """
    logits = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels)
    labels = labels if label_map.has_several else labels.reshape(len(labels), -1)
    counted = (labels != IGNORED).all(axis=1)
    logits, labels = logits[counted], labels[counted]
    samples = {"samples": int(counted.sum())}
    if label_map.has_several:
        return {"map": mean_average_precision(logits, labels), **samples}
    if not label_map.is_grouped:
        return {**_scores(ranks(logits, labels[:, 0]), labels[:, 0], logits.shape[1]), **samples}
    metrics: dict[str, float] = {}
    parts = np.split(logits, np.cumsum(label_map.sizes)[:-1], axis=1)
    for group, (name, part) in enumerate(zip(label_map.groups, parts, strict=True)):
        scores = _scores(ranks(part, labels[:, group]), labels[:, group], part.shape[1])
        metrics |= {f"{name}_{key}": value for key, value in scores.items()}
    actions = np.ravel_multi_index(tuple(labels.T), label_map.sizes)
    together = _scores(joint_ranks(parts, labels), actions, math.prod(label_map.sizes))
    return metrics | {f"action_{key}": value for key, value in together.items()} | together | samples


def _scores(found: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """The scores of one label per video, from the ranks (videos,) of the right classes `labels` (videos,)."""
    tops = (1, 5) if num_classes > 5 else (1,)  # among five classes, the best five are always right
    if len(found) == 0:
        names = [*(f"top{k}" for k in tops), "balanced_accuracy", "majority_class_accuracy"]
        return dict.fromkeys(names, float("nan"))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return {
        **{f"top{k}": float((found < k).mean()) for k in tops},
        "balanced_accuracy": float((np.bincount(classes, weights=found < 1) / counts).mean()),
        "majority_class_accuracy": float(counts.max() / len(labels)),
    }


def is_near_chance(top1: float, majority_class_accuracy: float, samples: int) -> bool:
    """
    Return whether a top-1 accuracy could be chance: whether answers that are right as often as the most frequent class
    occurs would score as much or more on so many videos in over 5 % of all cases (a one-sided binomial test).
    """
    if samples == 0 or majority_class_accuracy == 1:
        return True
    hits = round(top1 * samples)
    logs = math.log(majority_class_accuracy), math.log1p(-majority_class_accuracy)
    tail = 0.0
    for k in range(hits, samples + 1):
        ways = math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1)
        tail += math.exp(ways + k * logs[0] + (samples - k) * logs[1])
    return tail > _SIGNIFICANCE


def describe_chance(metrics: Mapping[str, float]) -> str | None:
    """Return a line that says that the scores of `classification_metrics` are near chance; None if they are not."""
    if "top1" not in metrics or not is_near_chance(
        metrics["top1"], metrics["majority_class_accuracy"], int(metrics["samples"])
    ):
        return None
    return (
        f"Near chance: top-1 accuracy {metrics['top1']:.1%} on {int(metrics['samples'])} videos is not reliably above "
        f"the {metrics['majority_class_accuracy']:.1%} of always answering the most frequent class "
        f"(balanced accuracy {metrics['balanced_accuracy']:.1%})."
    )


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before the right one, int64 (videos,). Of equal scores the lower index stands first."""
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    found = ((scores > right) | ((scores == right) & before)).sum(axis=1)
    return np.where(np.isfinite(scores).all(axis=1), found, scores.shape[1])


def joint_ranks(parts: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """`ranks` of the tuples of one class of each part, by the product of the parts' softmaxes: int64 (videos,)."""
    found = np.empty(len(labels), dtype=np.int64)
    for row in range(len(labels)):
        joint, right = np.zeros(1), 0
        for part, label in zip(parts, labels[row], strict=True):
            logits = part[row] - part[row].max()
            log_probabilities = logits - np.log(np.exp(logits).sum())
            joint = (joint[:, None] + log_probabilities[None]).reshape(-1)
            right = right * part.shape[1] + int(label)
        found[row] = ranks(joint[None], np.array([right]))[0]
    return found


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the labels that occur of the area under their precision-recall steps. (videos, num_labels) both."""
    occurring = np.flatnonzero((labels > 0.5).any(axis=0))
    if len(occurring) == 0:
        return float("nan")
    return float(np.mean([_average_precision(scores[:, index], labels[:, index] > 0.5) for index in occurring]))


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    # Equal scores are one step: no order among them is better than another.
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    precision = hits[ends] / (ends + 1)
    recall_steps = np.diff(hits[ends], prepend=0) / hits[-1]
    return float((precision * recall_steps).sum())


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many videos of class i (rows) are taken for class j (columns), int64 (classes, classes)."""
    labels = np.asarray(labels).reshape(-1)
    counted = labels != IGNORED
    num_classes = logits.shape[1]
    places = labels[counted] * num_classes + logits[counted].argmax(axis=1)
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def collapsed_class(predictions: np.ndarray, labels: np.ndarray) -> int | None:
    """The class that nearly all predictions are of although the labels are not; None if there is none, or too few."""
    if len(predictions) < _MIN_PREDICTIONS:
        return None
    counts = np.bincount(predictions)
    winner = int(counts.argmax())
    is_collapsed = counts[winner] >= _COLLAPSE * len(predictions) and (labels == winner).mean() < (1 + _COLLAPSE) / 3
    return winner if is_collapsed else None
