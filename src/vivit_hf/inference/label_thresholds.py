"""Thresholds per label of multi-label models: from which probability on a label is given, for the best F1 score."""

from collections.abc import Sequence

import numpy as np


UNKNOWN_THRESHOLD = 0.5  # of a label that no file has


def best_thresholds(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    Return the threshold of each label with the best F1 score, float64 (labels,): halfway between two files.

    Among equal scores, the highest threshold is taken. A label that no file has gets 0.5.

    Args:
        probabilities, targets: (files, labels); targets are 1 or 0.
    """
    return np.array([_best_threshold(*columns) for columns in zip(probabilities.T, targets.T > 0.5, strict=True)])


def _best_threshold(probabilities: np.ndarray, is_true: np.ndarray) -> float:
    if not is_true.any():
        return UNKNOWN_THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    descending = probabilities[order]
    ends = np.flatnonzero(np.append(np.diff(descending) != 0, True))  # equal probabilities are on one side
    f1 = 2 * np.cumsum(is_true[order])[ends] / (ends + 1 + is_true.sum())
    end = ends[f1.argmax()]
    below = descending[end + 1] if end + 1 < len(descending) else 0.0
    return float((descending[end] + below) / 2)


def macro_f1(is_given: np.ndarray, targets: np.ndarray) -> float:
    """
    Return the F1 score, averaged over the labels that occur.

    Args:
        is_given: which labels are given, bool (files, labels).
        targets: (files, labels), 1 or 0.
    """
    is_true = targets > 0.5
    occurring = is_true.any(axis=0)
    hits, both = (is_given & is_true).sum(axis=0), is_given.sum(axis=0) + is_true.sum(axis=0)
    return float((2 * hits[occurring] / both[occurring]).mean())


def unseen(targets: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return the labels that no file has."""
    occurs = (targets > 0.5).any(axis=0)
    return [names[index] for index in np.flatnonzero(~occurs).tolist()]
