"""
Scores of video classification: top-1 and top-5, balanced accuracy, noun-verb actions, mean average precision, whether
they are better than chance, and which classes are confused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.labels import IGNORED, LabelMap


_COLLAPSE = 0.95  # share of the predictions that belong to one class
_MIN_PREDICTIONS = 12  # with fewer, a collapse can be chance
_SIGNIFICANCE = 0.05  # a score that chance reaches more often than this is near chance


def classification_metrics(logits: np.ndarray, labels: np.ndarray, label_map: LabelMap) -> dict[str, float]:
    """
    Return the scores of predictions, as fractions from 0 to 1, and the number of videos.

    Args:
        logits: (videos, num_labels).
        labels: encoded by `LabelMap.encode`; videos labelled -100 are ignored.

    Returns:
        - One label per video: `top1`; `top5` if there are more than five classes; `balanced_accuracy`, the accuracy of
            each class that occurs, averaged over these classes; `majority_class_accuracy`, the top-1 accuracy of always
            predicting the most frequent class.
        - Groups of labels: these scores for each group (`noun_top1`) and for all groups at once (`action_top1`, from
            the product of their softmaxes; repeated as `top1` and so on).
        - Several labels per video: `map`, the mean average precision over the labels that occur.
        - Always: `samples`, the number of videos that were scored. A video with non-finite logits counts as wrong.
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
    """Return the scores of one label per video from the ranks (videos,) of the correct classes `labels` (videos,)."""
    tops = (1, 5) if num_classes > 5 else (1,)  # the top five of five classes are always right
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
    Return whether a top-1 accuracy is not significantly above that of always predicting the most frequent class.

    This is a one-sided binomial test at 5 %: would random answers with the accuracy `majority_class_accuracy` reach
    `top1` on this many videos in more than 5 % of all cases?
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
    """Return a warning if the scores of `classification_metrics` are near chance, else None."""
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
    """
    Return the rank of the correct class of each video, int64 (videos,), counted from 0.

    Ties are broken by index, the lower one first. With non-finite scores the rank is the number of classes.
    """
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    found = ((scores > right) | ((scores == right) & before)).sum(axis=1)
    return np.where(np.isfinite(scores).all(axis=1), found, scores.shape[1])


def joint_ranks(parts: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """
    Return the rank of the correct combination of one class per part, int64 (videos,).

    Combinations are ranked by the product of the parts' softmaxes.

    Args:
        parts: logits of each group of labels, (videos, classes of the group).
        labels: the correct class in each group, (videos, groups).
    """
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
    """
    Return the average precision (area under the precision-recall steps), averaged over the labels that occur.

    Args:
        scores, labels: (videos, num_labels); labels are 1 or 0. NaN is returned if no label occurs.
    """
    occurring = np.flatnonzero((labels > 0.5).any(axis=0))
    if len(occurring) == 0:
        return float("nan")
    return float(np.mean([_average_precision(scores[:, index], labels[:, index] > 0.5) for index in occurring]))


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    # Videos with equal scores form one step, whatever their order.
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    precision = hits[ends] / (ends + 1)
    recall_steps = np.diff(hits[ends], prepend=0) / hits[-1]
    return float((precision * recall_steps).sum())


def collapsed_class(predictions: np.ndarray, labels: np.ndarray) -> int | None:
    """
    Return the class that nearly all videos are predicted as although their labels vary, or None.

    Args:
        predictions, labels: class indices (videos,). With fewer than 12 videos the result is None.
    """
    if len(predictions) < _MIN_PREDICTIONS:
        return None
    counts = np.bincount(predictions)
    winner = int(counts.argmax())
    is_collapsed = counts[winner] >= _COLLAPSE * len(predictions) and (labels == winner).mean() < (1 + _COLLAPSE) / 3
    return winner if is_collapsed else None


class ClassAccuracy(NamedTuple):
    """The accuracy on the videos of one class, and the class that they are most often mistaken for ("" if none)."""

    name: str
    videos: int
    accuracy: float
    mistaken_for: str


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    Count how many videos of class i (rows) are predicted as class j (columns), int64 (classes, classes).

    Args:
        logits: (videos, classes).
        labels: class indices, (videos,) or (videos, 1); -100 is ignored.
    """
    labels = np.asarray(labels).reshape(-1)
    counted = labels != IGNORED
    num_classes = logits.shape[1]
    places = labels[counted] * num_classes + logits[counted].argmax(axis=1)
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(matrix: np.ndarray, names: Sequence[str]) -> list[ClassAccuracy]:
    """Return the accuracy of every class of a confusion matrix, in its order; NaN for a class without videos."""
    rows = []
    for index, name in enumerate(names):
        total, others = int(matrix[index].sum()), matrix[index].copy()
        others[index] = 0
        mistaken_for = names[int(others.argmax())] if others.any() else ""
        accuracy = float(matrix[index, index] / total) if total else float("nan")
        rows.append(ClassAccuracy(name, total, accuracy, mistaken_for))
    return rows
