"""Labelled features: match annotations with a features file, and decide which videos must stay together."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.annotations import ONE_GROUP, AnnotationError, LabelledVideo, read_videos
from ..data.labels import LabelMap, shared_units, units_of
from ..data.whole_files import as_utf8
from ..inference.feature_files import Features
from ..video_sources import source_name


_DECIMALS = 3  # of seconds, by which parts of a file are told apart

Key = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class LabelledFeatures:
    """
    The videos that have both features and a label.

    `vectors`: float32 (videos, steps, hidden); one step if the features are one vector per video.
    `labels`: class indices, int64 (videos,).
    `names`: the names of the classes, sorted.
    `groups`: int64 (videos,); videos with equal numbers stay together, such as the parts of a file.
    `held_out`: bool (videos,), True for those that the annotations hold out; None without a column of splits.
    `held_out_split`: their split, "validation" or "test".
    `without_features`: labelled videos without features, with the reason if they could not be read.
    `without_label`: videos with features and no label.

    Raises ValueError if there is nothing to learn or to hold out.
    """

    vectors: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    groups: np.ndarray
    held_out: np.ndarray | None
    held_out_split: str | None
    without_features: tuple[str, ...]
    without_label: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(np.unique(self.groups)) == 1:
            raise ValueError(
                f"All {len(self.labels)} videos belong to one group, so none of them can be held out: group by another "
                "column, or add videos of other groups."
            )
        if not np.isfinite(self.vectors).all():
            raise ValueError("The features hold NaN or infinity: embed the videos again.")
        if (self.vectors == self.vectors[:1]).all():
            raise ValueError(f"The features of all {len(self.labels)} videos are equal, so they tell no classes apart.")
        if self.held_out is not None and not self.held_out.any():
            raise ValueError(f"No {self.held_out_split} video has features, so there is nothing to score.")
        for name, is_train in zip(self.names, self._is_in_training(), strict=True):
            if not is_train:
                raise ValueError(f"The class {name!r} has no training video: add one, or leave the class out.")

    def _is_in_training(self) -> list[bool]:
        train = self.labels if self.held_out is None else self.labels[~self.held_out]
        return [bool((train == index).any()) for index in range(len(self.names))]


def read_labels(path: str | os.PathLike[str], **settings: Any) -> list[LabelledVideo]:
    """
    Read one label per video. The video files need not exist.

    With a column of splits, these are the rows of the training split, and of the validation split or, without one, of
    the test split.

    Args:
        path: a folder of class folders, or a CSV or JSON file, see `read_videos`.
        settings: for `read_videos`.

    Raises:
        AnnotationError: if the labels cannot be read, or videos have several labels.
    """
    found = read_videos(path, missing_videos="keep", choose_splits=_choose_splits, **settings)
    if found.groups != (ONE_GROUP,):
        raise AnnotationError(
            f"{os.fspath(path)} has the label groups {', '.join(found.groups)}, but a probe has one: choose one column."
        )
    for one in found.videos:
        if len(one.labels) != 1:
            raise AnnotationError(
                f"{one.where}: this video has {len(one.labels)} labels ({', '.join(one.labels)}), but a probe takes "
                "one per video. Fine-tune with several labels per video instead."
            )
    return found.videos


def _choose_splits(where: str, counts: dict[str, int]) -> Collection[str]:
    held_out = next((split for split in ("validation", "test") if split in counts), None)
    if len(counts) == 1:
        return list(counts)
    if "train" not in counts or held_out is None:
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        raise AnnotationError(f"{where}: there are {listed} rows and none to train on: set split_column to none.")
    return ["train", held_out]


def match_labels(features: Features, videos: Sequence[LabelledVideo]) -> LabelledFeatures:
    """
    Match labelled videos with features by file, start and end.

    Paths are compared as absolute paths, so those in both files may start from different folders; addresses are
    compared without secrets.

    Raises:
        ValueError: if no video has both, a video has two labels, or see `LabelledFeatures`.
    """
    places = _places(features)
    labelled = _labelled(videos)
    matched = [(places[key], one) for key, one in labelled.items() if key in places]
    if not matched:
        raise ValueError(
            f"No labelled video has features: the labels begin with {_shown(next(iter(labelled)))}, the features with "
            f"{_shown(next(iter(places), None))}. Paths of the features start from the folder in which "
            "they were computed; run the probe there, or say with video_root where those of the labels start."
        )
    indices, kept = [index for index, _ in matched], [one for _, one in matched]
    label_map = LabelMap.of(kept)
    groups = np.empty(len(kept), dtype=np.int64)
    for number, unit in enumerate(units_of(kept)):
        groups[unit] = number
    held_out_split = next((one.split for one in videos if one.split not in (None, "train")), None)
    if len({one.split for one in videos}) == 1:  # nothing but test videos, say
        held_out_split = None
    if held_out_split is not None:
        _check_disjoint(kept)
    vectors = features.vectors[indices]
    reasons = {_key(one["file"], one["start"], one["end"]): one["error"] for one in features.settings["failed"]}
    return LabelledFeatures(
        vectors=vectors if vectors.ndim == 3 else vectors[:, None],  # (videos, steps, hidden)
        labels=np.array([int(label_map.encode(one)) for one in kept]),
        names=tuple(label_map.names),
        groups=groups,
        held_out=None if held_out_split is None else np.array([one.split == held_out_split for one in kept]),
        held_out_split=held_out_split,
        without_features=tuple(
            _shown(key) + (f" ({reasons[key]})" if key in reasons else "") for key in labelled if key not in places
        ),
        without_label=tuple(_shown(key) for key in places if key not in labelled),
    )


def _places(features: Features) -> dict[Key, int]:
    """Return the index of every video in the features. Raises ValueError if one occurs twice."""
    places: dict[Key, int] = {}
    for index, (file, start, end) in enumerate(zip(features.files, features.starts, features.ends, strict=True)):
        key = _key(file, start, end)
        if key in places:
            raise ValueError(f"The features hold {_shown(key)} twice: give every video and every file of them once.")
        places[key] = index
    return places


def _labelled(videos: Sequence[LabelledVideo]) -> dict[Key, LabelledVideo]:
    """Return the labelled videos by key, each once. Raises AnnotationError for one with two different labels."""
    labelled: dict[Key, LabelledVideo] = {}
    for one in videos:
        video = one.video if isinstance(one.video, dict) else {"path": one.video}
        key = _key(video["path"], video.get("start"), video.get("end"))
        first = labelled.setdefault(key, one)
        if first.labels != one.labels or first.split != one.split:
            raise AnnotationError(
                f"{one.where}: {_shown(key)} has the label {one.labels[0]!r} here and {first.labels[0]!r} in "
                f"{first.where}, or is in two splits; expected one label per video."
            )
    return labelled


def _check_disjoint(videos: Sequence[LabelledVideo]) -> None:
    """Raise AnnotationError if a file or group is on both sides of the annotated split."""
    train = [one for one in videos if one.split == "train"]
    held_out = [one for one in videos if one.split != "train"]
    shared = shared_units(train, held_out)
    if shared:
        first, second = shared[0]
        same = sorted(set(first.keep_together) & set(second.keep_together)) or ["the same file"]
        raise AnnotationError(
            f"{len(shared)} of the {len(held_out)} {held_out[0].split} videos share a file or a group with training "
            f"videos ({second.where} and {first.where}: {', '.join(same)}): the score would be too high. Correct the "
            "splits, or set split_column to none to cross-validate instead."
        )


def _key(file: str, start: float | None, end: float | None) -> Key:
    path = source_name(file) if "://" in file else as_utf8(os.path.realpath(file))
    return path, _seconds(start), _seconds(end)


def _seconds(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(float(value), _DECIMALS)


def _shown(key: Key | None) -> str:
    if key is None:
        return "none"
    path, start, end = key
    if start is None and end is None:
        return path
    return f"{path} from {start or 0:g} s to {'the end' if end is None else f'{end:g} s'}"
