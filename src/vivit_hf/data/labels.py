"""Encode label names, split videos into training and validation, and compute weights for imbalanced data."""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration_vivit import Calibration
from .annotation_rows import AnnotationError, json_errors, read_text
from .annotations import ONE_GROUP, LabelledVideo
from .stratification import choose_units


IGNORED = -100
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


@dataclass(frozen=True)
class LabelMap:
    """The labels of a data set, in the order of a model's output.

    `groups`: label names by group, such as {"noun": (...), "verb": (...)}; a single classification has the group "".
    `has_several`: True if a video has any number of labels (multi-label) instead of one per group.
    `is_regression`: True if the outputs are values rather than class scores.
    `has_positions`: True if labels may also be given as indices into their group, as in EPIC-Kitchens. This does not
    apply to groups with a number among the names, and is False for names collected from videos.
    `temperatures`: what to divide the logits of each group by before they become probabilities; empty for 1.
    `thresholds`: with several labels per video, the probability from which on each is given; empty without thresholds.
    """

    groups: Mapping[str, Sequence[str]]
    has_several: bool = False
    is_regression: bool = False
    has_positions: bool = True
    temperatures: Sequence[float] = ()
    thresholds: Sequence[float] = ()

    @classmethod
    def of(
        cls, videos: Iterable[LabelledVideo], groups: Sequence[str] = (ONE_GROUP,), has_several: bool = False
    ) -> LabelMap:
        """Collect the labels of the videos, sorted. Raises AnnotationError if a group has fewer than two."""
        names: dict[str, set[str]] = {group: set() for group in groups}
        for one in videos:
            if has_several:
                names[groups[0]].update(one.labels)
                continue
            if len(one.labels) != len(groups):
                raise AnnotationError(
                    f"{one.where}: got {len(one.labels)} labels ({', '.join(one.labels)}), expected {len(groups)}. For "
                    "any number of labels per video, set problem_type to 'multi_label_classification'."
                )
            for group, label in zip(groups, one.labels, strict=True):
                names[group].add(label)
        ordered = {group: tuple(sorted(group_names)) for group, group_names in names.items()}
        return cls(ordered, has_several, has_positions=False).checked("The training data")

    @classmethod
    def from_config(cls, config: Any) -> LabelMap:
        """Read the labels of a model. Raises ValueError for a model without a classifier."""
        if not config.num_labels:
            raise ValueError("The model has no classifier (num_labels is 0): choose one that was trained on labels.")
        names = [str(config.id2label[index]) for index in range(config.num_labels)]
        calibration = Calibration.of(config)
        temperatures = () if calibration is None else calibration.temperatures
        thresholds = () if calibration is None else calibration.thresholds or ()
        if getattr(config, "label_groups", None) is None:  # only our configurations have them
            problem = config.problem_type or ("regression" if len(names) == 1 else None)  # as transformers infers it
            has_several, is_regression = problem == "multi_label_classification", problem == "regression"
            kinds = {"has_several": has_several, "is_regression": is_regression}
            return cls({ONE_GROUP: tuple(names)}, **kinds, temperatures=temperatures, thresholds=thresholds)
        groups, start = {}, 0
        for group, size in config.label_groups.items():
            groups[group] = tuple(name.removeprefix(f"{group}: ") for name in names[start : start + size])
            start += size
        return cls(groups, temperatures=temperatures)

    @classmethod
    def from_file(cls, path: str | os.PathLike, has_several: bool = False) -> LabelMap:
        """Read label names from a file, in one of the forms of `read_label_groups`.

        Raises AnnotationError for another form, and for a group with fewer than two labels or with one twice.
        """
        return cls(read_label_groups(path), has_several).checked(str(path))

    def checked(self, source: str) -> LabelMap:
        """Return the label map. Raises AnnotationError if a group has fewer than two names, or one of them twice."""
        for group, names in self.groups.items():
            twice = [name for name, count in Counter(names).items() if count > 1]
            if len(names) < 2 or twice:
                found = f"repeated: {', '.join(twice)}" if twice else f"got {', '.join(names) or 'none'}"
                raise AnnotationError(
                    f"{source}: at least 2 labels{f' of {group!r}' * bool(group)} are needed, each only once; {found}."
                )
        return self

    @property
    def is_grouped(self) -> bool:
        return list(self.groups) != [ONE_GROUP]

    @property
    def names(self) -> list[str]:
        """All names in the order of the output; with several groups in the form `noun: pan`."""
        return [f"{group}: {name}" if group else name for group, names in self.groups.items() for name in names]

    @property
    def sizes(self) -> list[int]:
        return [len(names) for names in self.groups.values()]

    def config_fields(self) -> dict[str, Any]:
        """Return the equivalent fields of `ViViTConfig`."""
        groups = {group: len(names) for group, names in self.groups.items()} if self.is_grouped else None
        problem = "multi_label_classification" if self.has_several else "single_label_classification"
        return {"id2label": dict(enumerate(self.names)), "label_groups": groups, "problem_type": problem}

    def encode(self, one: LabelledVideo) -> torch.Tensor:
        """Encode the labels of a video as a model's `labels`.

        Returns int64 () for a single label, int64 (groups,) for label groups, or float32 (num_labels,) of 0 and 1 for
        multi-label data. Raises AnnotationError for an unknown label; see `has_positions` for indices.
        """
        if self.has_several:
            target = torch.zeros(len(self.names))
            target[[self._index(0, label, one.where) for label in one.labels]] = 1.0
            return target
        if len(one.labels) != len(self.groups):
            hint = f" (--label_column_name {','.join(self.groups)})" if self.is_grouped else ""
            raise AnnotationError(f"{one.where}: got {len(one.labels)} labels, expected {len(self.groups)}{hint}.")
        indices = [self._index(group, label, one.where) for group, label in enumerate(one.labels)]
        return torch.tensor(indices if self.is_grouped else indices[0])

    def numbers(self, one: LabelledVideo) -> list[int]:
        """Return the indices of a video's labels in the whole output. Raises AnnotationError as `encode` does."""
        encoded = self.encode(one)
        if self.has_several:
            return encoded.nonzero().flatten().tolist()
        starts = itertools.accumulate(self.sizes[:-1], initial=0)
        return [start + index for start, index in zip(starts, encoded.reshape(-1).tolist(), strict=True)]

    def ignored(self) -> torch.Tensor:
        """Return labels in the form of `encode` that the loss ignores."""
        if self.has_several:
            return torch.full((len(self.names),), float(IGNORED))
        return torch.tensor([IGNORED] * len(self.groups) if self.is_grouped else IGNORED)

    def ranked(self, probabilities: np.ndarray, top_k: int = 1) -> list[tuple[str, str, float]]:
        """
        Return group, name and probability of the `top_k` likeliest labels of each group.

        With `thresholds`, these are only the labels that reach theirs, and there may be none.
        """
        start, found = 0, []
        for group, names in self.groups.items():
            part = probabilities[start : start + len(names)]
            start += len(names)
            order = np.argsort(-part, kind="stable")[:top_k].tolist()
            if self.thresholds:
                order = [index for index in order if part[index] >= self.thresholds[index]]
            found += [(group, names[index], float(part[index])) for index in order]
        return found

    def best(self, probabilities: np.ndarray | None, top_k: int = 1, *, with_scores: bool = False) -> Any:
        """Return the names that `ranked` returns, in the form of `names`, optionally with scores; None for None."""
        if probabilities is None:
            return None
        ranked = self.ranked(probabilities, top_k)
        found = [(f"{group}: {name}" if group else name, score) for group, name, score in ranked]
        return found if with_scores else [name for name, _ in found]

    @cached_property
    def _indices(self) -> list[dict[str, int]]:
        """For each group the index of each unique name; and of each index as text, if no name looks like a number."""
        found = []
        for names in self.groups.values():
            counts = Counter(names)
            unique = {name: index for index, name in enumerate(names) if counts[name] == 1}
            has_positions = self.has_positions and not any(map(_NUMBER.fullmatch, names))
            positions = {str(index): index for index in range(len(names))} if has_positions else {}
            found.append({**positions, **unique})
        return found

    def _index(self, group: int, label: str, where: str) -> int:
        kind, names = list(self.groups.items())[group]
        index = self._indices[group].get(label)
        if index is not None:
            return index
        if label in names:
            raise AnnotationError(f"{where}: the model has several labels {label!r}: give each a unique name.")
        raise AnnotationError(
            f"{where}: the label {label!r} is not among the {len(names)}{f' {kind}s' * self.is_grouped} of the model: "
            f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}."
        )


def to_probabilities(logits: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """Return probabilities (..., num_labels): the softmax within each label group, or the sigmoid with several labels.

    Logits are divided by the model's temperature first, if it was calibrated. The outputs of a regression are returned
    as they are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if label_map.is_regression:
        return logits
    parts = logits.split(label_map.sizes, dim=-1)
    if label_map.temperatures:
        parts = [part / temperature for part, temperature in zip(parts, label_map.temperatures, strict=True)]
    if label_map.has_several:
        return parts[0].sigmoid()
    return torch.cat([part.softmax(dim=-1) for part in parts], dim=-1)


def read_label_groups(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """
    Read label names by group from a file; without groups, all of them are in the group "".

    Supported are one name per line; a CSV with a column `key` or `name`, in the order of the numbers in a column `id`
    if there is one; a JSON list; a JSON map from names to indices (as in Something-Something) or from indices to names;
    and a JSON map from groups to lists of names. Raises AnnotationError for any other content.
    """
    path = Path(path)
    if not path.is_file():
        raise AnnotationError(f"{path}: there is no such label file.")
    text = read_text(path)
    if path.suffix == ".json":
        with json_errors(path):
            stored = json.loads(text)
        if isinstance(stored, dict) and stored and all(isinstance(names, list) for names in stored.values()):
            return {group: tuple(map(str, names)) for group, names in stored.items()}
        return {ONE_GROUP: _ordered_names(stored, path)}
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        column = next((name for name in ("key", "name") if rows and name in rows[0]), None)
        if column is None:
            raise AnnotationError(f"{path}:1: there is no column 'key' or 'name' that holds the labels.")
        return {ONE_GROUP: tuple(row[column] for row in _in_order(rows, path))}
    return {ONE_GROUP: tuple(line.strip() for line in text.splitlines() if line.strip())}


def _in_order(rows: list[dict[str, str]], path: Path) -> list[dict[str, str]]:
    """Return the rows in the order of a column `id` of numbers. Raises AnnotationError for gaps and repetitions."""
    if not all((row.get("id") or "").isdecimal() for row in rows):
        return rows
    rows = sorted(rows, key=lambda row: int(row["id"]))
    numbers = [int(row["id"]) for row in rows]
    if numbers != list(range(numbers[0], numbers[0] + len(rows))):
        raise AnnotationError(f"{path}: the column 'id' must number the labels without gaps and repetitions.")
    return rows


def _ordered_names(stored: Any, path: Path) -> tuple[str, ...]:
    if isinstance(stored, list):
        return tuple(map(str, stored))
    if isinstance(stored, dict):
        by_index = {str(index): str(name) for name, index in stored.items()}
        if set(stored) == {str(index) for index in range(len(stored))}:
            by_index = {index: str(name) for index, name in stored.items()}
        if set(by_index) == {str(index) for index in range(len(stored))}:
            return tuple(by_index[str(index)] for index in range(len(stored)))
    raise AnnotationError(f"{path}: expected a list of names, or a map between names and indices starting at 0.")


def split_videos(
    videos: Sequence[LabelledVideo],
    fraction: float,
    seed: int = 0,
    *,
    groups: Sequence[str] = (ONE_GROUP,),
    allow_missing_labels: bool = False,
) -> tuple[list[LabelledVideo], list[LabelledVideo]]:
    """Split videos into training and validation; equal seeds give equal splits.

    Parts of the same file stay together, as do videos with a common key in `keep_together`. Within these limits,
    validation has about `fraction` of the videos of every class, and both sides have every class.

    Args:
        videos: the videos to split.
        fraction: the share of the videos for validation, between 0 and 1.
        seed: the random seed.
        groups: the label groups; each video has one label per group.
        allow_missing_labels: put a class that cannot be on both sides into training only, instead of raising.

    Raises:
        AnnotationError: if a class cannot be on both sides.
    """
    if not 0 < fraction < 1:
        raise AnnotationError(f"The validation share must be between 0 and 1, got {fraction}.")
    if not videos:
        raise AnnotationError("There are no videos to split into training and validation.")
    units, is_grouped = units_of(videos), len(groups) > 1
    counts = [Counter(label for index in unit for label in _positioned(videos[index], is_grouped)) for unit in units]
    num_units = Counter(name for unit_counts in counts for name in unit_counts)
    totals = Counter(label for one in videos for label in _positioned(one, is_grouped))
    names = sorted(totals, key=lambda name: (num_units[name], name))
    if num_units[names[0]] == 1 and not allow_missing_labels:
        raise AnnotationError(_undivided(videos, names[0], groups))
    targets = {name: min(max(1, round(fraction * totals[name])), totals[name] - 1) for name in names}

    def choose(num_missing: int) -> set[int] | None:
        return choose_units(counts, targets, names[num_missing:], np.random.default_rng(seed))

    chosen = choose(0)
    if not chosen and allow_missing_labels:
        # Find the smallest number of rarest classes to have in training only: a larger number is easier to satisfy.
        chosen = choose(bisect.bisect_left(range(len(names)), True, key=lambda num_missing: bool(choose(num_missing))))
    if not chosen:
        raise AnnotationError(
            f"No split of the {len(videos)} videos was found with all {len(names)} classes in both training and "
            f"validation: the {len(units)} files or groups of videos cannot be divided. Group by another column, "
            "leave rare classes out, or give a validation set."
        )
    validation = {index for unit in chosen for index in units[unit]}
    return (
        [one for index, one in enumerate(videos) if index not in validation],
        [one for index, one in enumerate(videos) if index in validation],
    )


def _positioned(one: LabelledVideo, is_grouped: bool) -> set[tuple[int, str]]:
    """Return the labels of a video, each with the index of its group."""
    return {(place if is_grouped else 0, label) for place, label in enumerate(one.labels)}


def units_of(videos: Sequence[LabelledVideo]) -> list[list[int]]:
    """Return lists of indices of videos that must stay together, ordered by their first index.

    These are parts of the same file, and videos with a common key in `keep_together`.
    """
    parents = list(range(len(videos)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    first: dict[Hashable, int] = {}
    for index, one in enumerate(videos):
        for key in one.unit_keys():
            ends = root(index), root(first.setdefault(key, index))
            parents[max(ends)] = min(ends)
    units: dict[int, list[int]] = {}
    for index in range(len(videos)):
        units.setdefault(root(index), []).append(index)
    return list(units.values())


def _undivided(videos: Sequence[LabelledVideo], name: tuple[int, str], groups: Sequence[str]) -> str:
    """Return the error message for a class that cannot be on both sides because all its videos stay together."""
    place, label = name
    is_grouped = len(groups) > 1
    holding = [one for one in videos if name in _positioned(one, is_grouped)]  # all of them in one unit
    kind = f"the {groups[place]}" if is_grouped else "the class"
    what = "a single video, too few for training and validation"
    if len(holding) > 1:
        shared = sorted(set.intersection(*(set(one.keep_together) for one in holding)))
        of = f" ({', '.join(shared)})" if shared else ""
        what = f"{len(holding)} videos, which must stay together{of} and cannot be divided"
    return (
        f"{holding[0].where}: {kind} {label!r} has {what}: add videos, leave the class out, give a validation "
        "set, or set allow_missing_labels."
    )


def shared_units(
    train: Sequence[LabelledVideo], validation: Sequence[LabelledVideo]
) -> list[tuple[LabelledVideo, LabelledVideo]]:
    """Return pairs of a training and a validation video from the same file or group, one per such validation video."""
    first: dict[Hashable, LabelledVideo] = {}
    for one in train:
        for key in one.unit_keys():
            first.setdefault(key, one)
    found = ((next((first[key] for key in one.unit_keys() if key in first), None), one) for one in validation)
    return [(there, one) for there, one in found if there is not None]


def check_splits(
    train: Sequence[LabelledVideo],
    validation: Sequence[LabelledVideo] | None,
    label_map: LabelMap,
    allow_missing_labels: bool = False,
) -> list[str]:
    """Check that both splits have videos, that every label is known, and that validation has every training class.

    Returns the names of the classes without a validation video, with `allow_missing_labels`. Raises AnnotationError
    if a check fails.
    """
    places: dict[str, dict[int, str]] = {}  # of the first video of each class, by split
    for name, videos in (("training", train), ("validation", validation)):
        if videos is not None and not videos:
            raise AnnotationError(f"The {name} split is empty: give at least one video.")
        places[name] = {}
        for one in videos or ():
            for number in label_map.numbers(one):
                places[name].setdefault(number, one.where)
    if validation is None:
        return []
    known, names = places["validation"], label_map.names
    missing = {names[number]: where for number, where in places["training"].items() if number not in known}
    if missing and not allow_missing_labels:
        shown = ", ".join(f"{label!r} ({where})" for label, where in list(missing.items())[:5])
        raise AnnotationError(
            f"{len(missing)} of the {len(places['training'])} classes of the training split have no video in the "
            f"validation split (from {validation[0].where}): {shown}{', ...' * (len(missing) > 5)}. Their accuracy "
            "could not be measured: add videos, or set allow_missing_labels."
        )
    return list(missing)


def class_weights(targets: Sequence[torch.Tensor], label_map: LabelMap) -> torch.Tensor:
    """Return class weights, float32 (num_labels,): inverse to the class frequency, and 1 on average over the videos.

    A label that never occurs has weight 1. `targets` are the results of `LabelMap.encode`. Raises ValueError for
    multi-label data.
    """
    if label_map.has_several:
        raise ValueError("Class weights require one label per video; leave them out for multi-label data.")
    stacked = torch.stack(list(targets)).reshape(len(targets), -1)
    weights = []
    for group, size in enumerate(label_map.sizes):
        counts = torch.bincount(stacked[:, group], minlength=size).float()
        occurring = int((counts > 0).sum())
        weights.append(torch.where(counts > 0, len(targets) / (occurring * counts.clamp(min=1)), torch.ones(size)))
    return torch.cat(weights)


def balanced_weights(targets: Sequence[torch.Tensor], label_map: LabelMap) -> torch.Tensor:
    """Return sampling weights, float64 (videos,), that draw all labels equally often; see `class_weights`.

    With label groups, the rarest label of a video decides.
    """
    weights = class_weights(targets, label_map).double()
    starts = torch.tensor([0, *label_map.sizes]).cumsum(0)[:-1]
    stacked = torch.stack(list(targets)).reshape(len(targets), -1)
    return weights[stacked + starts].amax(dim=1)
