"""The data of `finetune.py`: which videos there are, their labels, and the split into training and validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivit_hf.annotations import EPIC_GROUPS, FORMATS, ONE_GROUP, AnnotationError, LabelledVideo, read_videos
from vivit_hf.hub_datasets import StreamedVideos, class_names, hub_videos
from vivit_hf.labels import LabelMap, check_splits, split_videos


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
    dataset_name: str | None = field(default=None, metadata={"help": "a data set on the Hub, or a folder of one"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_split_name: str = field(default="train", metadata={"help": "its split for training"})
    validation_split_name: str | None = field(
        default=None, metadata={"help": "its split for validation (default: validation or test, if there is one)"}
    )
    streaming: bool = field(default=False, metadata={"help": "do not download the data set first; needs --max_steps"})
    shuffle_buffer_size: int = field(default=100, metadata={"help": "videos among which a stream is shuffled"})
    video_column_name: str | None = field(default=None, metadata={"help": "default: path, video, file, ..."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "default: label, class, ...; several as noun,verb are groups of labels"}
    )
    label_separator: str | None = field(default=None, metadata={"help": "between several labels of a video"})
    labels_file: str | None = field(default=None, metadata={"help": "all labels in the order of the model's output"})
    problem_type: str = field(default="single_label_classification", metadata={"help": "or multi_label_classification"})
    allow_missing_labels: bool = field(default=False, metadata={"help": "classes need no validation video"})
    train_val_split: float | None = field(
        default=0.15, metadata={"help": "share of the training data, where there are none for validation; 0: none"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only so many videos"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only so many videos"})
    frame_stride: int | None = field(default=None, metadata={"help": "between the frames of a clip (default: 2)"})
    frames_per_second: float | None = field(default=None, metadata={"help": "instead of a stride"})
    resize: int | None = field(default=None, metadata={"help": "short side before the crop (default: 256 for 224)"})
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
        train, validation, groups, names = _from_hub(data, seed)
    else:
        train, validation, groups = _from_files(data)
        names = None

    label_map = None
    if data.labels_file is not None:
        label_map = LabelMap.from_file(data.labels_file, has_several)
        if set(label_map.groups) != set(groups):
            raise AnnotationError(
                f"{data.labels_file} has the groups {list(label_map.groups)}, the data {list(groups)}."
            )
        label_map = LabelMap({group: label_map.groups[group] for group in groups}, has_several)
    elif groups == tuple(EPIC_GROUPS) and data.train_file is not None and not data.label_column_name:
        label_map = LabelMap({group: tuple(map(str, range(size))) for group, size in EPIC_GROUPS.items()})
    elif names is not None:
        label_map = LabelMap({ONE_GROUP: tuple(names)}, has_several)
        if len(names) < 2:
            raise AnnotationError(f"{data.dataset_name} has {len(names)} class; at least 2 are needed.")
    has_known_labels = label_map is not None

    if isinstance(train, StreamedVideos):
        if label_map is None:
            raise AnnotationError(
                "A stream does not tell its labels beforehand: give --labels_file (its label column is no ClassLabel)."
            )
        return Splits(train, validation, label_map)
    if not train:
        raise AnnotationError("The training split is empty.")
    label_map = label_map or LabelMap.of(train, groups, has_several)
    if validation is None and data.train_val_split:
        train, validation = split_videos(train, data.train_val_split, seed)
    missing = check_splits(train, validation, label_map, data.allow_missing_labels or has_known_labels)
    if missing:
        say(f"{len(missing)} of the classes in the training data have no validation video: {', '.join(missing[:5])}")
    train = _some(train, data.max_train_samples, seed)
    validation = None if validation is None else _some(validation, data.max_eval_samples, seed)
    count = "none" if validation is None else len(validation)
    say(f"{len(train)} videos to train on, {count} for validation, {len(label_map.names)} classes")
    return Splits(train, validation, label_map)


def _some(videos: list[LabelledVideo], count: int | None, seed: int) -> list[LabelledVideo]:
    if count is None or count >= len(videos):
        return videos
    if count < 1:
        raise AnnotationError(f"--max_train_samples and --max_eval_samples must be at least 1, got {count}.")
    chosen = np.random.default_rng(seed).permutation(len(videos))[:count]
    return [videos[index] for index in sorted(chosen)]


def _label_columns(data: DataArguments) -> list[str] | None:
    return data.label_column_name.split(",") if data.label_column_name else None


def _from_files(data: DataArguments) -> tuple[list[LabelledVideo], list[LabelledVideo] | None, Sequence[str]]:
    settings = {
        "video_root": data.video_root,
        "annotation_format": data.annotation_format,
        "video_column": data.video_column_name,
        "label_columns": _label_columns(data),
        "label_separator": data.label_separator,
        "missing_videos": data.missing_videos,
    }
    train = read_videos(data.train_dir or data.train_file, **settings)
    source = data.validation_dir or data.validation_file
    if source is None:
        return train.videos, None, train.groups
    validation = read_videos(source, **settings)
    if validation.groups != train.groups:
        raise AnnotationError(f"{source} has the groups {validation.groups}, the training data {train.groups}.")
    return train.videos, validation.videos, train.groups


def _from_hub(data: DataArguments, seed: int) -> tuple[Any, Any, Sequence[str], list[str] | None]:
    from datasets import IterableDataset, load_dataset

    splits = load_dataset(data.dataset_name, data.dataset_config_name, streaming=data.streaming)
    known = ", ".join(splits)
    candidates = [data.validation_split_name] if data.validation_split_name else ["validation", "valid", "val", "test"]
    found = [name for name in candidates if name in splits]
    if data.train_split_name not in splits or (data.validation_split_name and not found):
        wanted = data.train_split_name if data.train_split_name not in splits else data.validation_split_name
        raise AnnotationError(f"{data.dataset_name} has no split {wanted!r}; there are: {known}.")
    columns = _label_columns(data)
    videos, names = {}, None
    for name in (data.train_split_name, *found[:1]):
        dataset = splits[name]
        if isinstance(dataset, IterableDataset):
            limit = data.max_train_samples if name == data.train_split_name else data.max_eval_samples
            if limit is not None:
                dataset = dataset.take(limit)
            if name == data.train_split_name:
                dataset = dataset.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)
        label = f"{data.dataset_name}/{name}"
        videos[name] = hub_videos(dataset, label, video_column=data.video_column_name, label_columns=columns)
        if names is None and (columns is None or len(columns) == 1):
            names = class_names(dataset, columns[0] if columns else "label")
    groups = tuple(columns) if columns and len(columns) > 1 else (ONE_GROUP,)
    return videos[data.train_split_name], videos[found[0]] if found else None, groups, names
