"""
Label sets that hold the true label with a probability asked for, by split conformal prediction.

The score of a labelled file is 1 - p, with p the plain softmax of its true label, before any temperature: scores may
depend on no other file. A set holds the labels with a score up to the one of rank ceil((n + 1) * coverage) among n
files, and always the likeliest label. If a new file is as likely as the others to be drawn, its true label is in its
set with at least this probability, on average over the draws of the files.

Files of one group, such as a patient, are not drawn independently. So one file per group counts, chosen at random, n is
the number of groups, and the guarantee is for a file of a new group.

Source: Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", JASA 2019;
Dunn, Wasserman and Ramdas, "Distribution-Free Prediction Sets for Two-Layer Hierarchical Models", JASA 2023 (groups).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..calibration_vivit import COVERAGES, Calibration
from ..data.labels import LabelMap, to_probabilities


def conformal_rank(num_files: int, coverage: float) -> int:
    """
    Return the rank of the score that bounds the sets, counted from 1.

    Raises:
        ValueError: if the coverage is not between 0 and 1, or there are too few files for it.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"`coverage={coverage!r}` must be a probability between 0 and 1, such as 0.9.")
    rank = math.ceil(round((num_files + 1) * coverage, 9))  # 0.95 * 20 is 19, whatever the rounding of 0.95
    if rank > num_files:
        least = math.ceil(round(coverage / (1 - coverage), 9))
        raise ValueError(
            f"A coverage of {coverage:g} needs at least {least} labelled files or groups of files, got {num_files}: "
            "give more, or ask for less."
        )
    return rank


def least_probabilities(probabilities: np.ndarray, coverage: float) -> float:
    """
    Return the probability from which on a label belongs to a set.

    Args:
        probabilities: the plain softmax of the true label of each file, (files,).

    Raises:
        ValueError: see `conformal_rank`.
    """
    return float(np.sort(probabilities)[::-1][conformal_rank(len(probabilities), coverage) - 1])


def in_sets(probabilities: np.ndarray, least: float) -> np.ndarray:
    """
    Return which labels are in the set of each file, bool (files, labels). No set is empty.

    Args:
        probabilities: plain softmax, (files, labels).
    """
    found = probabilities >= least
    np.put_along_axis(found, probabilities.argmax(axis=1)[:, None], True, axis=1)
    return found


def fit_sets(
    logits: np.ndarray, targets: np.ndarray, units: Sequence[Sequence[int]], label_map: LabelMap, seed: int = 0
) -> dict[str, list[float]]:
    """
    Return the `least_probabilities` of each group of labels for every coverage of `COVERAGES` with enough files.

    Args:
        logits: (files, num_labels).
        targets: (files, ...), see `LabelMap.encode`.
        units: files that belong together; one of each counts.
    """
    rng = np.random.default_rng(seed)
    chosen = [unit[int(rng.integers(len(unit)))] for unit in units]
    columns = targets.reshape(len(targets), -1)[chosen].T
    parts = [
        np.take_along_axis(part[chosen], column[:, None], axis=1)[:, 0]
        for part, column in zip(plain_parts(logits, label_map), columns, strict=True)
    ]
    enough = [one for one in COVERAGES if math.ceil(round((len(units) + 1) * one, 9)) <= len(units)]
    return {f"{coverage:g}": [least_probabilities(part, coverage) for part in parts] for coverage in enough}


def plain_parts(logits: np.ndarray, label_map: LabelMap) -> list[np.ndarray]:
    """Return the plain softmax of each group of labels, (files, labels of the group) each."""
    plain = to_probabilities(torch.from_numpy(logits), replace(label_map, temperatures=())).numpy()
    return np.split(plain, np.cumsum(label_map.sizes)[:-1], axis=1)


def check_sets(config: Any, coverage: float, views: dict[str, int]) -> None:
    """Raise ValueError if a model cannot give label sets of this coverage from these views, with the way out."""
    label_map, calibration = LabelMap.from_config(config), Calibration.of(config)
    if label_map.is_regression or label_map.has_several:
        kind = "a regression" if label_map.is_regression else "a multi-label model, which has thresholds instead"
        raise ValueError(f"Label sets hold one true label per video, and this is {kind}.")
    if calibration is None or calibration.sets is None:
        raise ValueError("Label sets need a calibrated model: run `vivit-hf evaluate --calibrate` on labelled files.")
    fitted = {"num_clips": calibration.num_clips, "num_crops": calibration.num_crops}
    if views != fitted:
        raise ValueError(
            f"The guarantee of label sets holds for {fitted}, on which the model was calibrated, and not for {views}: "
            "take the same views, or calibrate with these."
        )
    if f"{coverage:g}" not in calibration.sets:
        if coverage in COVERAGES:
            conformal_rank(calibration.num_units, coverage)
        raise ValueError(f"`coverage={coverage:g}` is not stored; the model has {', '.join(calibration.sets)}.")


def label_set(logits: np.ndarray, config: Any, coverage: float) -> list[tuple[str, str, float]]:
    """
    Return group, name and calibrated probability of the labels in the set of a file, the likeliest of a group first.

    With groups of labels, each group has a set with this coverage.

    Args:
        logits: (num_labels,), averaged over the views that the model was calibrated on.
        config: of a model for which `check_sets` passes.
    """
    label_map, calibration = LabelMap.from_config(config), Calibration.of(config)
    if calibration is None or calibration.sets is None:
        raise ValueError("Label sets need a calibrated model: run `vivit-hf evaluate --calibrate` on labelled files.")
    shown = to_probabilities(torch.from_numpy(logits), label_map).numpy()
    found, start = [], 0
    parts = zip(label_map.groups.items(), plain_parts(logits[None], label_map), strict=True)
    for ((group, names), part), least in zip(parts, calibration.sets[f"{coverage:g}"], strict=True):
        order = np.argsort(-part[0], kind="stable")
        kept = [index for index in order if in_sets(part, least)[0, index]]
        found += [(group, names[index], float(shown[start + index])) for index in kept]
        start += len(names)
    return found
