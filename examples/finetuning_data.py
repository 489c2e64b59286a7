"""The data of `finetune.py`: which videos there are, their labels, and the split into training and validation."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vivit_hf.data.annotation_rows import SPLIT_NAMES, AnnotationError, ChooseSplits
from vivit_hf.data.annotations import EPIC_GROUPS, FORMATS, ONE_GROUP, LabelledVideo, read_videos
from vivit_hf.data.hub_datasets import StreamedVideos, class_names, hub_videos, label_columns_of, load_hub_dataset
from vivit_hf.data.labels import LabelMap, check_splits, shared_units, split_videos


@dataclass
class DataArguments:
    """Where the videos are, and how clips are taken from them."""

    train_dir: str | None = field(default=None, metadata={"help": "folder with one folder of videos per class"})
    validation_dir: str | None = field(default=None, metadata={"help": "the same, for validation"})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or JSON lines of paths and labels"})
    validation_file: str | None = field(default=None, metadata={"help": "the same, for validation"})
    video_root: str | None = field(default=None, metadata={"help": "folder that paths in files start from"})
    annotation_format: str = field(default="auto", metadata={"help": f"of the files: {', '.join(FORMATS)}"})
    missing_videos: str = field(default="error", metadata={"help": "error, or skip for files that are not there"})
    allow_private_addresses: bool = field(
        default=False, metadata={"help": "videos may be downloaded from this machine and the local network"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "a data set on the Hub, or a folder of one"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_split_name: str = field(default="train", metadata={"help": "its split for training"})
    validation_split_name: str | None = field(
        default=None, metadata={"help": "its split for validation (default: validation or test, if there is one)"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "do not download the data set first; needs --max_steps; every process reads the whole stream"
        },
    )
    shuffle_buffer_size: int = field(default=100, metadata={"help": "videos among which a stream is shuffled"})
    video_column_name: str | None = field(default=None, metadata={"help": "default: path, video, file, ..."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "default: label, class, ...; several as noun,verb are groups of labels"}
    )
    label_separator: str | None = field(default=None, metadata={"help": "between several labels of a video"})
    split_column: str = field(
        default="auto",
        metadata={
            "help": "column that says train, validation or test (default: split, subset or partition, if there is "
            "one; none: use all rows). Test rows serve as validation if there are no others, else they are left out"
        },
    )
    group_column: str | None = field(
        default=None, metadata={"help": "column of what the split keeps together: a patient, a tape, a speaker"}
    )
    labels_file: str | None = field(default=None, metadata={"help": "all labels in the order of the model's output"})
    problem_type: str = field(default="single_label_classification", metadata={"help": "or multi_label_classification"})
    allow_missing_labels: bool = field(default=False, metadata={"help": "classes need no validation video"})
    train_val_split: float | None = field(
        default=0.15,
        metadata={
            "help": "share of the training data, where there are none for validation; 0: none. Parts of one file, and "
            "videos of one --group_column value, stay together"
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only so many videos, of all classes"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only so many videos, of all classes"})
    frame_stride: int | None = field(
        default=None, metadata={"help": "between the frames of a clip (default: that of a ViViT, the recipe's, or 2)"}
    )
    frames_per_second: float | None = field(default=None, metadata={"help": "instead of a stride"})
    resize: int | None = field(default=None, metadata={"help": "short side before the crop, in pixels"})
    resize_ratio: float | None = field(
        default=None,
        metadata={"help": "the same as a multiple of the crop (default: the start's or the recipe's, or 256 / 224)"},
    )
    num_clips: int = field(default=1, metadata={"help": "views of the final evaluation; the paper has 4"})
    num_crops: int = field(default=1, metadata={"help": "1 or 3; the paper has 3"})


@dataclass
class Splits:
    """Lists, or streams; `validation` is None where there is none."""

    train: list[LabelledVideo] | StreamedVideos
    validation: list[LabelledVideo] | StreamedVideos | None
    label_map: LabelMap


def load_splits(data: DataArguments, seed: int, say: Callable[[str], None]) -> Splits:
    """Reads and checks the data. Raises AnnotationError for what cannot be trained on."""
    sources = [name for name in ("train_dir", "train_file", "dataset_name") if getattr(data, name) is not None]
    if len(sources) != 1:
        given = ", ".join(f"--{name}" for name in sources) or "none of them"
        raise AnnotationError(f"The training data are --train_dir, --train_file or --dataset_name; got {given}.")
    if data.problem_type not in ("single_label_classification", "multi_label_classification"):
        raise AnnotationError(f"--problem_type {data.problem_type}: there are single_ and multi_label_classification.")
    has_several = data.problem_type == "multi_label_classification"
    if data.dataset_name is not None:
        train, validation, groups, names = _from_hub(data, seed, say)
    else:
        train, validation, groups = _from_files(data, say)
        names = None
    known = _known_labels(data, groups, names, has_several)

    if isinstance(train, StreamedVideos):
        if known is None:
            raise AnnotationError(
                "A stream does not tell its labels beforehand: give --labels_file (its label column is no ClassLabel)."
            )
        count = "none" if validation is None else "one"
        say(f"A stream to train on, {count} for validation, {len(known.names)} classes")
        return Splits(train, validation, known)
    if not train:
        raise AnnotationError("The training split is empty.")
    label_map = known or LabelMap.of(train, groups, has_several)
    allow_missing = data.allow_missing_labels or known is not None
    if validation is None and data.train_val_split:
        train, validation = split_videos(
            train, data.train_val_split, seed, groups=groups, allow_missing_labels=allow_missing
        )
    elif validation is not None:
        _check_overlap(train, validation, data, say)
    missing = check_splits(train, validation, label_map, allow_missing)
    if missing:
        say(f"{len(missing)} of the classes in the training data have no validation video: {', '.join(missing[:5])}")
    train = _some(train, data.max_train_samples, seed, label_map, say)
    validation = None if validation is None else _some(validation, data.max_eval_samples, seed, label_map, say)
    count = "none" if validation is None else len(validation)
    say(f"{len(train)} videos to train on, {count} for validation, {len(label_map.names)} classes")
    return Splits(train, validation, label_map)


def _known_labels(
    data: DataArguments, groups: Sequence[str], names: list[Sequence[str]] | None, has_several: bool
) -> LabelMap | None:
    """The labels that --labels_file, the ClassLabel columns or EPIC-Kitchens list; None where the videos tell them."""
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
    for group, listed in zip(groups, names, strict=True):
        if len(listed) < 2:
            of = f" of {group!r}" if group else ""
            raise AnnotationError(f"{data.dataset_name} has {len(listed)} class{of}; at least 2 are needed.")
    return LabelMap({group: tuple(listed) for group, listed in zip(groups, names, strict=True)}, has_several)


def _check_overlap(
    train: list[LabelledVideo], validation: list[LabelledVideo], data: DataArguments, say: Callable[[str], None]
) -> None:
    """A given validation set may share files with the training set, which is said; with --group_column no group."""
    shared = shared_units(train, validation)
    if not shared:
        return
    first, second = shared[0]
    same = sorted(set(first.keep_together) & set(second.keep_together)) or ["the same file"]
    text = (
        f"{len(shared)} of the {len(validation)} validation videos belong to files or groups that are trained on "
        f"({second.where} and {first.where}: {', '.join(same)})"
    )
    if data.group_column is not None:
        raise AnnotationError(f"{text}: leave --group_column out to accept this split as it is.")
    say(f"Warning: {text}.")


def _some(
    videos: list[LabelledVideo], count: int | None, seed: int, label_map: LabelMap, say: Callable[[str], None]
) -> list[LabelledVideo]:
    """`count` of the videos, in their order: of every class if there are enough, and of each about its share."""
    if count is None or count >= len(videos):
        return videos
    _checked_limit(count)
    order = np.random.default_rng(seed).permutation(len(videos)).tolist()
    totals = Counter(one.labels for one in videos)
    seen: set[int] = set()
    taken: Counter[tuple[str, ...]] = Counter()
    ranks: dict[int, tuple[bool, float]] = {}
    for index in order:
        one = videos[index]
        numbers = label_map.numbers(one)
        ranks[index] = (seen.issuperset(numbers), taken[one.labels] / totals[one.labels])
        seen.update(numbers)
        taken[one.labels] += 1
    chosen = sorted(order, key=ranks.__getitem__)[:count]
    left = {number for index in chosen for number in label_map.numbers(videos[index])}
    if len(left) < len(seen):
        say(f"{count} of {len(videos)} videos leave out {len(seen) - len(left)} of the {len(seen)} classes.")
    return [videos[index] for index in sorted(chosen)]


def _training_splits(has_validation: bool, say: Callable[[str], None]) -> ChooseSplits:
    """What is read of a file with a column of splits: training, and validation, or test where there is none."""

    def choose(where: str, counts: dict[str, int]) -> list[str]:
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        if "train" not in counts:
            raise AnnotationError(
                f"{where}: there are no training rows ({listed}). --split_column none uses all rows whatever it says."
            )
        used = ["train"]
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


def _validation_splits(where: str, counts: dict[str, int]) -> list[str]:
    """What is read of a file for validation that has a column of splits."""
    used = [split for split in ("validation", "test") if split in counts][:1]
    if not used:
        raise AnnotationError(
            f"{where}: there are only training rows, and this file is for validation. --split_column none uses them."
        )
    return used


def _checked_limit(count: int) -> int:
    if count < 1:
        raise AnnotationError(f"--max_train_samples and --max_eval_samples must be at least 1, got {count}.")
    return count


def _label_columns(data: DataArguments) -> list[str] | None:
    return data.label_column_name.split(",") if data.label_column_name else None


def _divided(
    videos: list[LabelledVideo],
) -> tuple[list[LabelledVideo], list[LabelledVideo] | None]:
    """By what their annotations say: training videos, and the others, or None."""
    train = [one for one in videos if one.split in (None, "train")]
    return train, [one for one in videos if one.split not in (None, "train")] or None


def _from_files(
    data: DataArguments, say: Callable[[str], None]
) -> tuple[list[LabelledVideo], list[LabelledVideo] | None, Sequence[str]]:
    settings: dict[str, Any] = {
        "video_root": data.video_root,
        "annotation_format": data.annotation_format,
        "video_column": data.video_column_name,
        "label_columns": _label_columns(data),
        "label_separator": data.label_separator,
        "missing_videos": data.missing_videos,
        "group_column": data.group_column,
    }
    if data.train_dir is not None:
        _check_class_folders(Path(data.train_dir))
    source = data.validation_dir or data.validation_file
    split_column = data.split_column
    choose = _training_splits(source is not None, say)
    found = read_videos(data.train_dir or data.train_file, **settings, split_column=split_column, choose_splits=choose)
    train, held_out = _divided(found.videos)
    if source is None:
        return train, held_out, found.groups
    if Path(source).is_dir():
        settings["group_column"], split_column = None, "auto"
    validation = read_videos(source, **settings, split_column=split_column, choose_splits=_validation_splits)
    if validation.groups != found.groups:
        raise AnnotationError(f"{source} has the groups {validation.groups}, the training data {found.groups}.")
    return train, validation.videos, found.groups


def _check_class_folders(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in names if not name.startswith(".")}
    if len(splits) > 1 and all(splits.values()) and "train" in splits.values():
        raise AnnotationError(
            f"{folder}: its folders are splits ({', '.join(splits)}) and not classes: give one as --train_dir and "
            "another as --validation_dir."
        )


def _from_hub(
    data: DataArguments, seed: int, say: Callable[[str], None]
) -> tuple[Any, Any, Sequence[str], list[Sequence[str]] | None]:
    from datasets import IterableDataset

    splits = load_hub_dataset(data.dataset_name, data.dataset_config_name, streaming=data.streaming)
    known = ", ".join(splits)
    usual = [name for name, split in SPLIT_NAMES.items() if split == "validation"]
    candidates = [data.validation_split_name] if data.validation_split_name else [*usual, "test"]
    found = [name for name in candidates if name in splits][:1]
    if data.train_split_name not in splits or (data.validation_split_name and not found):
        wanted = data.train_split_name if data.train_split_name not in splits else data.validation_split_name
        raise AnnotationError(f"{data.dataset_name} has no split {wanted!r}; there are: {known}.")
    if len(splits) > 1:
        used = f"{found[0]} is for validation" if found else "none of them is for validation"
        say(f"{data.dataset_name} has the splits {known}: {used}, others than {data.train_split_name} are left out.")
    columns = label_columns_of(splits[data.train_split_name], data.dataset_name, _label_columns(data))
    videos, names = {}, [class_names(splits[data.train_split_name], column) for column in columns]
    for name in (data.train_split_name, *found):
        dataset = splits[name]
        if isinstance(dataset, IterableDataset):
            limit = data.max_train_samples if name == data.train_split_name else data.max_eval_samples
            if limit is not None:
                dataset = dataset.take(_checked_limit(limit))
            if name == data.train_split_name:
                dataset = dataset.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)
        videos[name] = hub_videos(
            dataset,
            f"{data.dataset_name}/{name}",
            video_column=data.video_column_name,
            label_columns=columns,
            group_column=data.group_column,
            split_column=data.split_column,
            choose_splits=_training_splits(bool(found), say) if name == data.train_split_name else _validation_splits,
        )
    groups = tuple(columns) if len(columns) > 1 else (ONE_GROUP,)
    train, validation = videos[data.train_split_name], videos[found[0]] if found else None
    if validation is None and not isinstance(train, StreamedVideos):
        train, validation = _divided(train)
    return train, validation, groups, None if None in names else names
