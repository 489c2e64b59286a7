"""
Fit the temperature of a model to labelled files, and measure how far its probabilities are from the truth.

A temperature divides the logits of a file, averaged over its views, before the softmax or sigmoid. It changes no order
of labels. The calibration error is measured on files that the temperature was not fitted on: the files are divided into
folds, and each fold gets the temperature of the others. The temperature that is stored is fitted on all files.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..calibration_vivit import LEAST_TEMPERATURE, MOST_TEMPERATURE, Calibration
from ..data.labels import LabelMap, to_probabilities, units_of
from .evaluation import Evaluation
from .label_sets import fit_sets, in_sets, plain_parts
from .label_thresholds import best_thresholds, macro_f1, unseen


FOLDS = 5
LEAST_FILES = 20
FEW_FILES = 100
NUM_BINS = 15  # as in the paper
_SIMULATIONS = 50
_STEPS = 60  # of a bisection, to a relative width of 1e-17


@dataclass(frozen=True)
class Reliability:
    """
    Probabilities of answers, and whether the answers are right: float64 and bool, (answers,).

    An answer is the likeliest label of a file, or with several labels per file each label of it.
    """

    confidence: np.ndarray
    is_right: np.ndarray

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Answers, mean probability and share of right answers, (`NUM_BINS`,) each; an empty bin has 0."""
        place = np.minimum((self.confidence * NUM_BINS).astype(int), NUM_BINS - 1)
        counts = np.bincount(place, minlength=NUM_BINS)
        confidence, is_right = (
            np.bincount(place, values, NUM_BINS) / np.maximum(counts, 1) for values in (self.confidence, self.is_right)
        )
        return counts, confidence, is_right

    @property
    def error(self) -> float:
        """Expected calibration error: the mean difference of probability and share of right answers over the bins."""
        counts, confidence, share = self.bins
        return float((counts * np.abs(confidence - share)).sum() / counts.sum())

    @property
    def error_by_chance(self) -> float:
        """The calibration error that probabilities without any fault show on as many files, on average."""
        rng = np.random.default_rng(0)
        draws = (rng.random(len(self.confidence)) < self.confidence for _ in range(_SIMULATIONS))
        return float(np.mean([Reliability(self.confidence, draw).error for draw in draws]))


@dataclass(frozen=True)
class CalibrationReport:
    """
    The calibration of a model, and how well it does on files that it was not fitted on, for each group of labels.

    `before`, `after`: by the name of the group, see `Reliability`.
    `ranges`: the least and the largest temperature of the folds, by the name of the group.
    `set_sizes`: by coverage, the mean number of labels in the sets of these files, one per group.
    `scores`: with several labels per file, the macro F1 score at 0.5 and at thresholds that come from other files.
    `unseen`: labels without a file, whose threshold is 0.5.
    """

    calibration: Calibration
    before: dict[str, Reliability]
    after: dict[str, Reliability]
    ranges: dict[str, tuple[float, float]]
    set_sizes: dict[str, list[float]]
    scores: dict[str, float]
    unseen: list[str]

    @property
    def results(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        groups = {
            group: {
                "temperature": temperature,
                "temperature_range": list(self.ranges[group]),
                "error_before": self.before[group].error,
                "error_after": self.after[group].error,
                "error_by_chance": self.after[group].error_by_chance,
            }
            for group, temperature in zip(self.before, self.calibration.temperatures, strict=True)
        }
        of_groups = groups[""] if list(groups) == [""] else {"groups": groups}
        counts = {"files": self.calibration.num_files, "units": self.calibration.num_units, "folds": FOLDS}
        return {**of_groups, **counts, "set_sizes": self.set_sizes, **self.scores}

    @property
    def lines(self) -> list[str]:
        """The numbers, in words."""
        found = []
        for group, temperature in zip(self.before, self.calibration.temperatures, strict=True):
            before, after, (least, most) = self.before[group], self.after[group], self.ranges[group]
            found.append(
                f"{f'{group}: ' if group else ''}temperature {temperature:.3f} ({least:.3f} to {most:.3f} over the "
                f"folds): calibration error {before.error:.4f} before, {after.error:.4f} after, on files that it was "
                f"not fitted on; probabilities without fault would show {after.error_by_chance:.4f}"
            )
            if temperature in (LEAST_TEMPERATURE, MOST_TEMPERATURE):
                found.append(f"  {temperature} is the limit of temperatures: the answers are no better than chance.")
        found += self._lines_of_labels()
        if self.calibration.num_files < FEW_FILES:
            found.append(
                f"Only {self.calibration.num_files} files: use at least {FEW_FILES} for temperatures to rely on."
            )
        return found

    def _lines_of_labels(self) -> list[str]:
        found = []
        if self.set_sizes:
            sizes = [f"{one}: {', '.join(f'{size:.2f}' for size in sizes)}" for one, sizes in self.set_sizes.items()]
            found.append(f"labels per set (classify --sets) by coverage: {'; '.join(sizes)}")
        if self.scores:
            found.append(
                f"macro F1 {self.scores['f1_at_half']:.4f} at 0.5, {self.scores['f1_at_thresholds']:.4f} at thresholds "
                "from other files"
            )
        if self.unseen:
            shown = ", ".join(self.unseen[:5]) + ", ..." * (len(self.unseen) > 5)
            found.append(f"{len(self.unseen)} labels have no file and the threshold 0.5: {shown}")
        return found


def calibrate(
    found: Evaluation, num_clips: int, num_crops: int, averaging: str, weights: str | None
) -> CalibrationReport:
    """
    Fit temperatures to an evaluation, and measure the calibration error of the files by cross-fitting in `FOLDS` folds.

    Args:
        found: parts of one file, and files with a common key in `keep_together`, are in one fold.
        num_clips, num_crops, averaging: the views of the evaluation.
        weights: the `answer_fingerprint` of the model.

    Raises:
        ValueError: if there are fewer than `LEAST_FILES` files that can be read, or fewer than `FOLDS` groups of them.
    """
    places = np.flatnonzero(found.is_readable)
    units = units_of([found.videos[place] for place in places.tolist()])
    check_enough(len(places), len(units))
    plain = LabelMap(found.label_map.groups, found.label_map.has_several)
    logits, targets = found.logits.astype(np.float64), found.targets[places]
    temperatures = fit_temperatures(logits, targets, plain)
    after, of_folds, is_given = np.empty_like(logits), [], np.zeros(logits.shape, dtype=bool)
    for part in divide(units, FOLDS):
        rest = np.setdiff1d(np.arange(len(logits)), part)
        of_folds.append(fit_temperatures(logits[rest], targets[rest], plain))
        after[part] = _probabilities(logits[part], plain, of_folds[-1])
        if plain.has_several:
            of_rest = _probabilities(logits[rest], plain, of_folds[-1])
            is_given[part] = after[part] >= best_thresholds(of_rest, targets[rest])
    stored = Calibration(temperatures, len(places), len(units), num_clips, num_crops, averaging, weights)
    sizes, scores = {}, {}
    if plain.has_several:
        thresholds = best_thresholds(_probabilities(logits, plain, temperatures), targets)
        stored = replace(stored, thresholds=tuple(thresholds.tolist()))
        scores = {"f1_at_half": macro_f1(after >= 0.5, targets), "f1_at_thresholds": macro_f1(is_given, targets)}
    else:
        stored = replace(stored, sets=fit_sets(logits, targets, units, plain))
        sizes = {one: _set_sizes(logits, plain, least) for one, least in (stored.sets or {}).items()}
    return CalibrationReport(
        stored,
        reliabilities(_probabilities(logits, plain, ()), targets, plain),
        reliabilities(after, targets, plain),
        dict(zip(plain.groups, [(min(one), max(one)) for one in zip(*of_folds, strict=True)], strict=True)),
        sizes,
        scores,
        unseen(targets, plain.names) if plain.has_several else [],
    )


def _set_sizes(logits: np.ndarray, label_map: LabelMap, least: Sequence[float]) -> list[float]:
    parts = zip(plain_parts(logits, label_map), least, strict=True)
    return [float(in_sets(part, probability).sum(axis=1).mean()) for part, probability in parts]


def check_enough(num_files: int, num_units: int) -> None:
    """Raise ValueError for too few files to fit and to measure a temperature."""
    if num_files < LEAST_FILES or num_units < FOLDS:
        raise ValueError(
            f"--calibrate needs at least {LEAST_FILES} files that can be read, in at least {FOLDS} groups, and better "
            f"{FEW_FILES}; there are {num_files} in {num_units}. Give more labelled files that the model was not "
            "trained on."
        )


def divide(units: Sequence[Sequence[int]], count: int, seed: int = 0) -> list[np.ndarray]:
    """Divide units of files at random into `count` folds of similar size; return the files of each."""
    folds: list[list[int]] = [[] for _ in range(count)]
    for number in np.random.default_rng(seed).permutation(len(units)):
        min(folds, key=len).extend(units[number])
    return [np.sort(np.array(fold)) for fold in folds]


def fit_temperatures(logits: np.ndarray, targets: np.ndarray, label_map: LabelMap) -> tuple[float, ...]:
    """
    Return the temperature of each group of labels that makes the labels of the files the likeliest.

    As in Platt scaling, the label of a file is not taken for certain, but for (files + 1) / (files + 2), so that files
    which are all right do not make the answers certain.

    Args:
        logits: float64 (files, num_labels).
        targets: (files, ...), see `LabelMap.encode`.
    """
    sure = (len(logits) + 1) / (len(logits) + 2)
    if label_map.has_several:
        return (_fit(logits, np.where(targets > 0.5, sure, 1 - sure), has_several=True),)
    found = []
    for part, column in zip(_parts(logits, label_map), targets.reshape(len(targets), -1).T, strict=True):
        wanted = np.full(part.shape, (1 - sure) / max(1, part.shape[1] - 1))
        np.put_along_axis(wanted, column[:, None], sure, axis=1)
        found.append(_fit(part, wanted, has_several=False))
    return tuple(found)


def _fit(logits: np.ndarray, wanted: np.ndarray, has_several: bool) -> float:
    """Return the temperature with the least cross-entropy, which is convex in its reciprocal."""

    def slope(temperature: float) -> float:
        scaled = torch.from_numpy(logits) / temperature
        probabilities = (scaled.sigmoid() if has_several else scaled.softmax(dim=-1)).numpy()
        return float(((probabilities - wanted) * logits).sum())  # by the reciprocal

    low, high = np.log(LEAST_TEMPERATURE), np.log(MOST_TEMPERATURE)
    if slope(LEAST_TEMPERATURE) <= 0:
        return LEAST_TEMPERATURE
    if slope(MOST_TEMPERATURE) >= 0:
        return MOST_TEMPERATURE
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(float(np.exp(middle))) > 0 else (low, middle)
    return float(np.exp(low))


def _parts(values: np.ndarray, label_map: LabelMap) -> list[np.ndarray]:
    return np.split(values, np.cumsum(label_map.sizes)[:-1], axis=1)


def _probabilities(logits: np.ndarray, label_map: LabelMap, temperatures: Sequence[float]) -> np.ndarray:
    scaled = LabelMap(label_map.groups, label_map.has_several, temperatures=temperatures)
    return to_probabilities(torch.from_numpy(logits), scaled).numpy()


def reliabilities(probabilities: np.ndarray, targets: np.ndarray, label_map: LabelMap) -> dict[str, Reliability]:
    """
    Return the reliability of each group of labels, by its name.

    Args:
        probabilities: (files, num_labels).
        targets: (files, ...), see `LabelMap.encode`.
    """
    if label_map.has_several:
        return {next(iter(label_map.groups)): Reliability(probabilities.reshape(-1), targets.reshape(-1) > 0.5)}
    columns = targets.reshape(len(targets), -1).T
    return {
        group: Reliability(part.max(axis=1), part.argmax(axis=1) == column)
        for group, part, column in zip(label_map.groups, _parts(probabilities, label_map), columns, strict=True)
    }
