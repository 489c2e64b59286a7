"""The files of an evaluation: scores, every probability, a table per class, and the confusion matrix."""

import csv
import json
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.annotations import LabelledVideo
from ..data.labels import to_probabilities
from ..data.whole_files import as_utf8, written_whole
from ..video_sources import source_name
from .calibration import CalibrationReport, Reliability, reliabilities
from .calibration_files import draw_reliability
from .evaluation import Evaluation
from .metrics import class_accuracies
from .unknown_choice import UnknownChoice


_RELIABILITY, _CONFUSION = "reliability.png", "confusion_matrix.png"


def save_evaluation(
    evaluation: Evaluation,
    folder: Path,
    report: CalibrationReport | None = None,
    choice: UnknownChoice | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """
    Write results.json and predictions.parquet, and for one label per video per_class.csv.

    Pictures of an earlier evaluation are removed; see `draw_evaluation`.

    Args:
        report, choice: what these videos were just used for; their numbers go to results.json.
        folder: is created if it does not exist.
        settings: further fields of results.json, such as the name of the model.

    Returns:
        The contents of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
        "eval_protocol": evaluation.protocol,
        "eval_damaged_files": int((~evaluation.is_readable).sum()),
        **settings,
        "split": evaluation.videos[0].split,
        "num_processes": evaluation.num_processes,
    }
    compared = _reliability(evaluation, report)
    if report is not None:
        results["calibration"] = report.results
    elif compared:
        results["calibration_error"] = {
            name: {group or "labels": one.error for group, one in groups.items()} for name, groups in compared.items()
        }
    called = [one.unknown for one in evaluation.predictions if one.unknown is not None]
    if choice is not None:
        results["unknown"] = choice.results
    elif called:
        results["unknown"] = {"called": float(np.mean(called))}
    for name in (_RELIABILITY, _CONFUSION):
        (folder / name).unlink(missing_ok=True)
    with written_whole(folder / "results.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _write_predictions(folder / "predictions.parquet", evaluation)
    if evaluation.confusion_matrix is not None:
        _write_classes(folder, evaluation, evaluation.confusion_matrix)
    return results


def draw_evaluation(evaluation: Evaluation, folder: Path, report: CalibrationReport | None = None) -> None:
    """
    Draw confusion_matrix.png, for one label per video, and reliability.png, with a report or a calibrated model.

    Needs matplotlib.

    Args:
        folder, report: see `save_evaluation`.
    """
    if compared := _reliability(evaluation, report):
        draw_reliability(compared, folder / _RELIABILITY, evaluation.protocol)
    if evaluation.confusion_matrix is not None:
        names = [as_utf8(name) for name in evaluation.label_map.names]
        title = f"top-1 {evaluation.metrics['top1']:.1%}: {evaluation.protocol}"
        draw_confusion_matrix(evaluation.confusion_matrix, names, folder / _CONFUSION, title)


def _reliability(evaluation: Evaluation, report: CalibrationReport | None) -> dict[str, dict[str, Reliability]]:
    """Return the reliability before and after a calibration, or without and with the stored one; none without it."""
    if report is not None:
        return {"before": report.before, "after": report.after}
    label_map = evaluation.label_map
    if not label_map.temperatures:
        return {}
    logits, targets = torch.from_numpy(evaluation.logits), evaluation.targets[evaluation.is_readable]
    return {
        name: reliabilities(to_probabilities(logits, one).numpy(), targets, label_map)
        for name, one in (("plain", replace(label_map, temperatures=())), ("calibrated", label_map))
    }


def _write_classes(folder: Path, evaluation: Evaluation, matrix: np.ndarray) -> None:
    names = [as_utf8(name) for name in evaluation.label_map.names]
    rows = [("class", "videos", "accuracy", "most often taken for"), *class_accuracies(matrix, names)]
    with (
        written_whole(folder / "per_class.csv") as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows(rows)


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
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
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _write_predictions(path: Path, evaluation: Evaluation) -> None:
    """
    Write a row per video: its file, its labels, every probability, the error, and the best label of each group, or all
    labels that reach their thresholds.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    label_map, predictions = evaluation.label_map, evaluation.predictions
    top_k = len(label_map.names) if label_map.thresholds else 1
    columns: dict[str, list[Any]] = {
        "video": [as_utf8(_shown(one)) for one in evaluation.videos],
        "labels": [[as_utf8(label) for label in one.labels] for one in evaluation.videos],
        "predicted": [
            None if one.error is not None else [as_utf8(label) for label in label_map.best(one.probabilities, top_k)]
            for one in predictions
        ],
        "probabilities": [None if one.probabilities is None else one.probabilities.tolist() for one in predictions],
        "error": [None if one.error is None else as_utf8(one.error) for one in predictions],
    }
    table = pyarrow.table(columns).replace_schema_metadata({"labels": json.dumps(label_map.names)})
    with written_whole(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)


def _shown(one: LabelledVideo) -> str:
    """Return the path or address of a video without secrets, with its start and end, or the place it was read from."""
    if callable(one.video):
        return one.where
    if isinstance(one.video, dict):
        return str({**one.video, "path": source_name(one.video)})
    return source_name(one.video)
