"""Which classes a model confuses: the confusion matrix, the accuracy of each class, and a picture of both."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.labels import IGNORED


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


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | os.PathLike, title: str = "") -> Path:
    """
    Save a picture of a confusion matrix (classes, classes). Colours show shares of each row. Needs matplotlib.

    Class names are written for up to 100 classes, counts for up to 20.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(names)
    side = min(40.0, max(4.0, 0.28 * size + 2.5))
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the videos of a class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(textwrap.fill(title, round(12 * side)), fontsize=9)
    if size <= 100:
        axes.set_xticks(range(size), names, rotation=90, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    if size <= 20:
        for row, column in np.ndindex(size, size):
            if matrix[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(matrix[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    path = Path(path)
    figure.savefig(path)
    return path
