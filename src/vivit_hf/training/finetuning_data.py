"""The data of a fine-tuning run: the videos, their labels, and the split into training and validation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotation_rows import SPLIT_NAMES, AnnotationError, ChooseSplits
from ..data.annotations import EPIC_GROUPS, ONE_GROUP, LabelledVideo, read_videos
from ..data.hub_datasets import StreamedVideos, class_names, hub_videos, label_columns_of, load_hub_dataset
from ..data.labels import LabelMap, check_splits, shared_units, split_videos
from .finetuning_arguments import DataArguments, Say


Videos = list[LabelledVideo] | StreamedVideos


@dataclass(frozen=True)
class Splits:
    """The videos of a run and their labels.

    `train` is None if only a model is evaluated, on separate validation videos. `validation` is None without any.
    """

    train: Videos | None
    validation: Videos | None
    label_map: LabelMap


def load_splits(data: DataArguments, seed: int, say: Say, own_labels: LabelMap | None = None) -> Splits:
    """Read and check the data of a run. No video is opened.

    Args:
        data: where the videos are, and how they are split.
        seed: seed of the split.
        say: prints one text.
        own_labels: the labels of a model that is only evaluated. Training data are then read only if the validation
            videos are split off from them.

    Raises:
        AnnotationError: for data that cannot be trained on or evaluated.
    """
    is_evaluation = own_labels is not None
    _check_sources(data, is_evaluation)
    names: list[Sequence[str]] | None = None
    if data.dataset_name is not None:
        train, validation, groups, names = _from_hub(data, seed, say, is_evaluation)
    else:
        train, validation, groups = _from_files(data, say, is_evaluation)
    known = own_labels or _known_labels(data, groups, names)
    if not (isinstance(train, StreamedVideos) or isinstance(validation, StreamedVideos)):
        return _listed_splits(train, validation, known, groups, data, seed, say)
    if known is None:
        raise AnnotationError(
            "A stream does not list its labels: give --labels_file, because its label column is not a ClassLabel."
        )
    shown = "" if train is None else "A stream to train on, "
    say(f"{shown}{'none' if validation is None else 'one'} for validation, {len(known.names)} classes")
    return Splits(train, validation, known)


def _check_sources(data: DataArguments, is_evaluation: bool) -> None:
    """Raise AnnotationError unless there is exactly one source of training data, or of validation data to evaluate."""
    given = [f"--{name}" for name in ("train_dir", "train_file", "dataset_name") if getattr(data, name) is not None]
    is_enough = is_evaluation and (data.validation_dir or data.validation_file)
    if len(given) > 1 or not (given or is_enough):
        only = "; for --do_eval, --validation_dir or --validation_file is enough" if is_evaluation else ""
        listed = ", ".join(given) or "none of them"
        raise AnnotationError(f"Give one of --train_dir, --train_file or --dataset_name{only}; got {listed}.")


def _listed_splits(
    train: list[LabelledVideo] | None,
    validation: list[LabelledVideo] | None,
    known: LabelMap | None,
    groups: Sequence[str],
    data: DataArguments,
    seed: int,
    say: Say,
) -> Splits:
    """Split off validation videos if there are none, check both sides, and shorten them to the given maximum."""
    if train is not None and not train:
        raise AnnotationError("The training split is empty.")
    label_map = known or LabelMap.of(train or (), groups, data.problem_type == "multi_label_classification")
    allow_missing = data.allow_missing_labels or known is not None
    shown = ""
    if train is None:
        check_splits(validation or (), None, label_map)
    else:
        if validation is not None:
            _check_overlap(train, validation, data, say)
        elif data.train_val_split:
            settings: dict[str, Any] = {"groups": groups, "allow_missing_labels": allow_missing}
            train, validation = split_videos(train, data.train_val_split, seed, **settings)
        if missing := check_splits(train, validation, label_map, allow_missing):
            say(f"{len(missing)} of the training classes have no validation video: {', '.join(missing[:5])}")
        train = _some(train, data.max_train_samples, seed, label_map, say)
        shown = f"{len(train)} videos to train on, "
    if validation is not None:
        validation = _some(validation, data.max_eval_samples, seed, label_map, say)
    count = "none" if validation is None else len(validation)
    say(f"{shown}{count} for validation, {len(label_map.names)} classes")
    return Splits(train, validation, label_map)


def _known_labels(data: DataArguments, groups: Sequence[str], names: list[Sequence[str]] | None) -> LabelMap | None:
    """Return the labels of --labels_file, ClassLabel columns or EPIC-Kitchens; None if only the videos tell them."""
    has_several = data.problem_type == "multi_label_classification"
    if data.labels_file is not None:
        label_map = LabelMap.from_file(data.labels_file, has_several)
        if set(label_map.groups) != set(groups):
            raise AnnotationError(
                f"{data.labels_file} has the groups {list(label_map.groups)}, the data {list(groups)}."
            )
        return LabelMap({group: label_map.groups[group] for group in groups}, has_several)
    if tuple(groups) == tuple(EPIC_GROUPS) and data.train_file is not None and not data.label_column_name:
        return LabelMap({group: tuple(map(str, range(size))) for group, size in EPIC_GROUPS.items()})
    if names is None:
        return None
    listed = {group: tuple(one) for group, one in zip(groups, names, strict=True)}
    return LabelMap(listed, has_several).checked(str(data.dataset_name))


def _check_overlap(train: list[LabelledVideo], validation: list[LabelledVideo], data: DataArguments, say: Say) -> None:
    """Warn of files in both sets; with --group_column, raise AnnotationError for groups in both."""
    shared = shared_units(train, validation)
    if not shared:
        return
    first, second = shared[0]
    same = sorted(set(first.keep_together) & set(second.keep_together)) or ["the same file"]
    text = (
        f"{len(shared)} of the {len(validation)} validation videos share a file or a group with training videos "
        f"({second.where} and {first.where}: {', '.join(same)})"
    )
    if data.group_column is not None:
        raise AnnotationError(f"{text}: leave --group_column out to accept this split as it is.")
    say(f"Warning: {text}.")


def _some(
    videos: list[LabelledVideo], count: int | None, seed: int, label_map: LabelMap, say: Say
) -> list[LabelledVideo]:
    """Return `count` of the videos in their order, with every class if possible, each at about its share."""
    if count is None or count >= len(videos):
        return videos
    order = np.random.default_rng(seed).permutation(len(videos)).tolist()
    totals = Counter(one.labels for one in videos)
    numbers = [label_map.numbers(one) for one in videos]
    seen: set[int] = set()
    taken: Counter[tuple[str, ...]] = Counter()
    ranks: dict[int, tuple[bool, float]] = {}
    for index in order:
        labels = videos[index].labels
        ranks[index] = (seen.issuperset(numbers[index]), taken[labels] / totals[labels])
        seen.update(numbers[index])
        taken[labels] += 1
    chosen = sorted(order, key=ranks.__getitem__)[:count]
    left = {number for index in chosen for number in numbers[index]}
    if len(left) < len(seen):
        say(f"{count} of {len(videos)} videos leave out {len(seen) - len(left)} of the {len(seen)} classes.")
    return [videos[index] for index in sorted(chosen)]


# Splits that a column names


def _training_splits(has_validation: bool, say: Say) -> ChooseSplits:
    """Choose the training rows of a file with a split column, and without validation data its validation rows."""

    def choose(where: str, counts: dict[str, int]) -> list[str]:
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        used = ["train"]
        if "train" not in counts:
            raise AnnotationError(f"{where}: there are no training rows ({listed}); --split_column none uses all rows.")
        if not has_validation:
            used += [split for split in ("validation", "test") if split in counts][:1]
        left_out = [split for split in counts if split not in used]
        text = f"{where}: {listed}"
        if "test" in used:
            text += "; the test rows serve as validation, since there are no others"
        if left_out:
            text += f"; the {' and '.join(left_out)} rows are left out"
        say(text + ".")
        return used

    return choose


def _validation_splits(where: str, counts: dict[str, int]) -> Sequence[str]:
    """Choose the rows of a validation file with a split column."""
    if used := [split for split in ("validation", "test") if split in counts][:1]:
        return used
    raise AnnotationError(
        f"{where}: there are only training rows, and this file is for validation. --split_column none uses them."
    )


def _divided(videos: list[LabelledVideo]) -> tuple[list[LabelledVideo], list[LabelledVideo] | None]:
    """Return the training videos, and the validation videos or None, as their annotations say."""
    train = [one for one in videos if one.split in (None, "train")]
    return train, [one for one in videos if one.split not in (None, "train")] or None


# Files and folders


def _from_files(
    data: DataArguments, say: Say, is_evaluation: bool
) -> tuple[list[LabelledVideo] | None, list[LabelledVideo] | None, Sequence[str]]:
    """Return training videos, validation videos and the names of the label groups."""
    settings: dict[str, Any] = {
        "video_root": data.video_root,
        "annotation_format": data.annotation_format,
        "video_column": data.video_column_name,
        "label_columns": _label_columns(data),
        "label_separator": data.label_separator,
        "missing_videos": data.missing_videos,
        "group_column": data.group_column,
        "split_column": data.split_column,
    }
    source = data.validation_dir or data.validation_file
    train, held_out, groups = None, None, None
    if source is None or not is_evaluation:
        if data.train_dir is not None:
            _check_class_folders(Path(data.train_dir))
        choose = _training_splits(source is not None, say)
        found = read_videos(data.train_dir or data.train_file or "", **settings, choose_splits=choose)
        groups = found.groups
        train, held_out = _divided(found.videos)
        if source is None:
            return train, held_out, groups
    if Path(source).is_dir():
        settings |= {"group_column": None, "split_column": "auto"}
    validation = read_videos(source, **settings, choose_splits=_validation_splits)
    if groups is not None and validation.groups != groups:
        raise AnnotationError(f"{source} has the groups {validation.groups}, the training data {groups}.")
    return train, validation.videos, validation.groups


def _label_columns(data: DataArguments) -> list[str] | None:
    return data.label_column_name.split(",") if data.label_column_name else None


def _check_class_folders(folder: Path) -> None:
    """Raise AnnotationError for a folder of split folders."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in names if not name.startswith(".")}
    if len(splits) > 1 and all(splits.values()) and "train" in splits.values():
        raise AnnotationError(
            f"{folder}: its folders are splits ({', '.join(splits)}), not classes: give one as --train_dir and "
            "another as --validation_dir."
        )


# Data sets of the Hub


def _from_hub(
    data: DataArguments, seed: int, say: Say, is_evaluation: bool
) -> tuple[Any, Any, Sequence[str], list[Sequence[str]] | None]:
    """Return training and validation videos, the names of the label groups, and the labels if columns list them."""
    name = str(data.dataset_name)
    splits = load_hub_dataset(name, data.dataset_config_name, streaming=data.streaming)
    held_out = _held_out_split(data, list(splits), is_evaluation, say)
    used = [held_out] if is_evaluation and held_out else [data.train_split_name, *([held_out] if held_out else [])]
    columns = label_columns_of(splits[used[0]], name, _label_columns(data))
    names = [class_names(splits[used[0]], column) for column in columns]
    videos: dict[str | None, Any] = {
        split: hub_videos(
            _limited(splits[split], split != held_out, data, seed),
            f"{name}/{split}",
            video_column=data.video_column_name,
            label_columns=columns,
            group_column=data.group_column,
            split_column=data.split_column,
            choose_splits=_validation_splits if split == held_out else _training_splits(held_out is not None, say),
        )
        for split in used
    }
    train, validation = videos.get(data.train_split_name), videos.get(held_out)
    if isinstance(train, list) and validation is None:
        train, validation = _divided(train)
    known: list[Sequence[str]] = [listed for listed in names if listed is not None]
    groups = tuple(columns) if len(columns) > 1 else (ONE_GROUP,)
    return train, validation, groups, known if len(known) == len(names) else None


def _held_out_split(data: DataArguments, splits: list[str], is_evaluation: bool, say: Say) -> str | None:
    """Return the name of the split for validation, or None if there is none; check that the named splits exist."""
    usual = [name for name, split in SPLIT_NAMES.items() if split == "validation"]
    candidates = [data.validation_split_name] if data.validation_split_name else [*usual, "test"]
    found = next((name for name in candidates if name in splits), None)
    wanted = [data.validation_split_name] if data.validation_split_name else []
    if not (is_evaluation and found):
        wanted.insert(0, data.train_split_name)
    for name in wanted:
        if name not in splits:
            raise AnnotationError(f"{data.dataset_name} has no split {name!r}; there are: {', '.join(splits)}.")
    if len(splits) > 1:
        used = f"{found} is for validation" if found else "none of them is for validation"
        others = "the others" if is_evaluation and found else f"others than {data.train_split_name}"
        say(f"{data.dataset_name} has the splits {', '.join(splits)}: {used}, {others} are left out.")
    return found


def _limited(dataset: Any, is_training: bool, data: DataArguments, seed: int) -> Any:
    """Shuffle a training stream and shorten a stream to the given maximum; other data sets stay as they are."""
    from datasets import IterableDataset  # type: ignore[import-untyped]

    if not isinstance(dataset, IterableDataset):
        return dataset
    limit = data.max_train_samples if is_training else data.max_eval_samples
    if limit is not None:
        dataset = dataset.take(limit)
    return dataset.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size) if is_training else dataset
