"""
Score probes by cross-validation.

No division separates the videos of a group: the parts of a file, the videos of a patient or of a tape. This holds for
training and held-out videos, and for the inner cross-validation that chooses a head's settings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..conversion.terminal import needs_extra
from .probe_data import LabelledFeatures
from .probe_heads import HEADS, SINGLE_STEP_HEADS, Fold, Head


with needs_extra("probe"):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold


NUM_FOLDS = 5
_MANY_VIDEOS = 500  # with so many, one division into folds is precise enough
_REPEATS_OF_FEW = 3
_INNER_FOLDS = 3
_MOST_ATTEMPTS = 20  # to find grouped folds whose training videos have every class

_Division = tuple[np.ndarray, np.ndarray, list[Fold]]  # training and held-out videos, and the folds of the former


@dataclass(frozen=True)
class HeadScore:
    """
    The held-out scores of a head, as fractions from 0 to 1.

    `accuracies`: one per fold, repeat after repeat.
    `balanced_accuracies`: one per repeat: the mean of the classes' accuracies over all videos that it held out.
    `seconds`: the time to fit and score all folds.
    """

    head: str
    accuracies: tuple[float, ...]
    balanced_accuracies: tuple[float, ...]
    seconds: float

    @property
    def accuracy(self) -> float:
        """The mean over the folds."""
        return float(np.mean(self.accuracies))

    @property
    def spread(self) -> float | None:
        """The standard deviation over the folds; None for one fold."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    @property
    def balanced_accuracy(self) -> float:
        """The mean over the repeats."""
        return float(np.mean(self.balanced_accuracies))


@dataclass(frozen=True)
class ProbeReport:
    """
    The scores of all heads, in the order of `HEADS`, and how they were measured.

    `majority_class`, `majority_class_accuracy`: the most frequent class of the scored videos, and its share of them.
    `num_scored`: the number of scored videos.
    `num_folds`: 1 if the annotations name the videos to hold out.
    `protocol`: a description of the videos and of their division.
    `notes`: departures from the arguments, with the reasons.
    """

    scores: tuple[HeadScore, ...]
    majority_class: str
    majority_class_accuracy: float
    num_scored: int
    num_folds: int
    protocol: str
    notes: tuple[str, ...] = ()

    def best(self, heads: Sequence[str] = tuple(HEADS)) -> HeadScore:
        """Return the score of the most accurate of these heads; of equal ones the first."""
        return max((score for score in self.scores if score.head in heads), key=lambda score: score.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and means, for a JSON file."""
        means = ("accuracy", "spread", "balanced_accuracy")
        heads = {score.head: {name: getattr(score, name) for name in means} | asdict(score) for score in self.scores}
        return {**asdict(self), "scores": heads}


def score_probes(
    data: LabelledFeatures, *, num_folds: int = NUM_FOLDS, num_repeats: int | None = None, seed: int = 0
) -> ProbeReport:
    """
    Score every head on the videos that the annotations hold out, or else by stratified cross-validation.

    Args:
        num_folds: parts of the videos, each held out once. A class with fewer videos or groups lowers it, with a note.
        num_repeats: divisions into folds, with different seeds; None is 3, or 1 from 500 videos on.
        seed: the seed of the divisions. Equal seeds give equal scores.

    Raises:
        ValueError: if the numbers are too small, or a class or the groups cannot be divided.
    """
    if num_repeats is None:
        num_repeats = _REPEATS_OF_FEW if len(data.labels) < _MANY_VIDEOS else 1
    if num_folds < 2 or num_repeats < 1:
        raise ValueError(f"Expected at least 2 folds and 1 repeat, got {num_folds} and {num_repeats}.")
    notes = []
    if data.held_out is not None:
        repeats = [[(np.flatnonzero(~data.held_out), np.flatnonzero(data.held_out))]]
    else:
        possible = num_possible_folds(data.labels, data.groups, data.names, num_folds)
        if possible < num_folds:
            notes.append(f"{possible} folds instead of {num_folds}: a class has only {possible} videos or groups")
        repeats = [make_folds(data.labels, data.groups, possible, seed + repeat) for repeat in range(num_repeats)]
    divisions = [
        [(train, test, inner_folds(data.labels[train], data.groups[train], seed)) for train, test in folds]
        for folds in repeats
    ]
    if not all(inner for folds in divisions for _, _, inner in folds):
        notes.append("a class has a single training video or group: penalty and neighbours are not chosen by trying")
    scored = np.concatenate([test for _, test in repeats[0]])
    counts = np.bincount(data.labels[scored], minlength=len(data.names))
    names = HEADS if data.vectors.shape[1] > 1 else SINGLE_STEP_HEADS
    return ProbeReport(
        scores=tuple(_score(name, data, divisions) for name in names),
        majority_class=data.names[int(counts.argmax())],
        majority_class_accuracy=float(counts.max() / len(scored)),
        num_scored=len(scored),
        num_folds=len(repeats[0]),
        protocol=_protocol(data, repeats),
        notes=tuple(notes),
    )


def _protocol(data: LabelledFeatures, repeats: Sequence[Sequence[Fold]]) -> str:
    num_videos, steps, hidden = data.vectors.shape
    of_each = f"{steps} steps of {hidden} features" if steps > 1 else f"{hidden} features"
    described = f"{num_videos} videos of {len(data.names)} classes, {of_each} each"
    if data.held_out is not None:
        return f"{described}; scored on the {int(data.held_out.sum())} {data.held_out_split} videos"
    num_groups = len(np.unique(data.groups))
    grouped = f" of {num_groups} whole groups" if num_groups < num_videos else ""
    repeated = f", drawn {len(repeats)} times" if len(repeats) > 1 else ""
    return f"{described}; {len(repeats[0])} folds{grouped}{repeated}"


def fit_probe(head: str, data: LabelledFeatures, seed: int = 0) -> Head:
    """Fit the head of this name in `HEADS` to all videos, except for those that the annotations hold out."""
    train = np.arange(len(data.labels)) if data.held_out is None else np.flatnonzero(~data.held_out)
    labels = data.labels[train]
    return HEADS[head](data.vectors[train], labels, inner_folds(labels, data.groups[train], seed))


def _score(head: str, data: LabelledFeatures, repeats: Sequence[Sequence[_Division]]) -> HeadScore:
    begin = time.perf_counter()
    accuracies, balanced_accuracies = [], []
    for divisions in repeats:
        predicted, correct = [], []
        for train, test, inner in divisions:
            predicted.append(HEADS[head](data.vectors[train], data.labels[train], inner).predict(data.vectors[test]))
            correct.append(data.labels[test])
            accuracies.append(float(accuracy_score(correct[-1], predicted[-1])))
        balanced_accuracies.append(float(balanced_accuracy_score(np.concatenate(correct), np.concatenate(predicted))))
    return HeadScore(head, tuple(accuracies), tuple(balanced_accuracies), time.perf_counter() - begin)


# Folds


def num_possible_folds(labels: np.ndarray, groups: np.ndarray, names: Sequence[str], num_folds: int) -> int:
    """
    Return `num_folds`, or the largest number of folds that can each hold out every class, if that is smaller.

    Args:
        labels: class indices, int64 (videos,).
        groups: videos with the same number stay together, int64 (videos,).
        names: the names of the classes.

    Raises:
        ValueError: if a class has a single group, so that it cannot be both in training and held out.
    """
    groups_per_class = _groups_per_class(labels, groups)
    rarest = int(np.argmin(groups_per_class))
    if groups_per_class[rarest] < 2:
        count = int((labels == rarest).sum())
        videos = "a single video" if count == 1 else f"{count} videos, which all belong to one group"
        raise ValueError(
            f"The class {names[rarest]!r} has {videos}: it cannot be both in training and held out. Add videos of it, "
            "or leave the class out."
        )
    return min(num_folds, groups_per_class[rarest])


def make_folds(labels: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> list[Fold]:
    """
    Divide videos into folds with about equal shares of every class; groups stay together.

    The training videos of every fold have every class. For the arguments see `num_possible_folds`.

    Raises:
        ValueError: if no such folds are found, because the groups cannot be divided.
    """
    num_groups, num_classes = len(np.unique(groups)), len(np.unique(labels))
    is_grouped = num_groups < len(groups)
    kind = StratifiedGroupKFold if is_grouped else StratifiedKFold
    for attempt in range(_MOST_ATTEMPTS):
        state = int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0])  # scikit-learn takes 32 bits
        divide = kind(num_folds, shuffle=True, random_state=state)
        found = list(divide.split(labels, labels, groups if is_grouped else None))
        if all(len(test) and len(np.unique(labels[train])) == num_classes for train, test in found):
            return found
    raise ValueError(
        f"The {num_groups} groups cannot be divided into {num_folds} folds whose training videos have all "
        f"{num_classes} classes: use fewer folds, or leave out classes that few groups have."
    )


def inner_folds(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[Fold]:
    """Return the folds that choose a head's settings; none if the groups of a class cannot be divided."""
    num_folds = min(_INNER_FOLDS, *_groups_per_class(labels, groups))
    try:
        return make_folds(labels, groups, num_folds, seed) if num_folds > 1 else []
    except ValueError:
        return []


def _groups_per_class(labels: np.ndarray, groups: np.ndarray) -> list[int]:
    return [len(np.unique(groups[labels == index])) for index in range(labels.max() + 1)]
