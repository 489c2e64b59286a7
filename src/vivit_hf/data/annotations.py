"""Which videos there are and what they show: folders of classes, CSV and JSON files, the files of the big data sets.

Everything that cannot work is an `AnnotationError` that names file and line, before a model is loaded or a video is
opened.

The annotation files that are read as their authors publish them:

| data set | file | what is read of it | a video file, in any folder |
| --- | --- | --- | --- |
| Kinetics | CSV | label, youtube_id, time_start, time_end | id_000010_000020.mp4, or id.mp4 |
| Something-Something v2 | JSON list | id, template without its brackets | id.webm |
| EPIC-Kitchens-100 | CSV | video_id, start_ and stop_timestamp, noun_ and verb_class | P01_01.MP4 |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..video_sources import source_name
from .annotation_rows import (
    AnnotationError,
    ChooseSplits,
    Row,
    filled_cell,
    find_column,
    find_split_column,
    kept_splits,
    read_rows,
    split_name,
)
from .scan import find_videos
from .whole_files import as_utf8


VIDEO_COLUMNS = ("path", "video", "file", "file_name", "filename", "video_path", "file_path", "filepath", "clip")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "action", "classes")
FORMATS = ("auto", "plain", "kinetics", "ssv2", "epic")
EPIC_GROUPS = {"noun": 300, "verb": 97}  # the order of the official model's output
_COLUMNS_OF_FORMAT = {
    "kinetics": ("youtube_id", "label"),
    "ssv2": ("id", "template"),
    "epic": ("video_id", "start_timestamp", "stop_timestamp", "noun_class", "verb_class"),
}
_MAX_SHOWN = 5
_ADDRESSES = ("http://", "https://")
ONE_GROUP = ""


@dataclass(frozen=True)
class LabelledVideo:
    """One video of a data set.

    `video`: what the processor takes, a path or a dictionary, there also with "start" and "end" in seconds; or a
    function without arguments that gives it, for what is not to be held in memory.
    `labels`: names; one, or one per group in the order of the groups, or any number with several labels per video.
    `where`: the place that it was read from, as `train.csv:17`.
    `keep_together`: what it shares with videos that must be on the same side of a split, as `patient=7`.
    `split`: "train", "validation" or "test", if the annotations say so.
    `file`: the path, or something else that tells the file apart, where `video` is a function.
    """

    video: Any
    labels: tuple[str, ...]
    where: str
    keep_together: tuple[str, ...] = ()
    split: str | None = None
    file: str | None = None

    def source(self) -> Any:
        """What the processor takes."""
        return self.video() if callable(self.video) else self.video

    def unit_keys(self) -> list[Hashable]:
        """What tells the file apart, however its path is spelled, and `keep_together`. No file is opened."""
        path = self.file if callable(self.video) else self.video
        path = path.get("path") if isinstance(path, dict) else path
        if not isinstance(path, (str, os.PathLike)):
            return list(self.keep_together)
        path = os.fspath(path)
        if path.lower().startswith(_ADDRESSES):
            return [path, *self.keep_together]
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            status = None
        # Some file systems number no files.
        file = (status.st_dev, status.st_ino) if status is not None and status.st_ino else os.path.realpath(path)
        return [file, *self.keep_together]


@dataclass(frozen=True)
class Annotations:
    """The videos of a data set, and the names of the groups that their labels are of: ("",) where there is one."""

    videos: list[LabelledVideo]
    groups: tuple[str, ...] = (ONE_GROUP,)


def read_videos(
    source: str | os.PathLike,
    *,
    video_root: str | os.PathLike | None = None,
    annotation_format: str = "auto",
    video_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_separator: str | None = None,
    missing_videos: str = "error",
    split_column: str = "auto",
    group_column: str | None = None,
    choose_splits: ChooseSplits | None = None,
) -> Annotations:
    """
    The videos of a folder of class folders (or with a `metadata.csv` or `.jsonl` in it), or of an annotation file.

    Args:
        source: the folder, or a `.csv`, `.tsv`, `.json` (a list of objects) or `.jsonl` file, or a text file with one
            path per line as `Class/file.mp4`, where the folder is the class; a class number may follow.
        video_root: what paths in the file start from; by default the folder that the file is in.
        annotation_format: one of `FORMATS`; "auto" tells the data sets' own files by their columns.
        video_column, label_columns: names of columns; by default the first of `VIDEO_COLUMNS` and `LABEL_COLUMNS`
            that there is. Several label columns are groups of labels: one label of each.
        label_separator: what stands between several labels of a video in one cell. None: a cell is one label. In JSON
            a list is several labels, too.
        missing_videos: "error", or "skip" for files that are not there, as is usual with Kinetics.
        split_column: the column that says training, validation or test (see `SPLIT_NAMES`); "auto" takes the first of
            `SPLIT_COLUMNS` that there is, "none" none.
        group_column: the column of what a split must not divide, such as a patient, tape or speaker.
        choose_splits: which splits to read, given the name of the column and the number of rows of each split. By
            default all. Rows of other splits need neither a label nor a file.

    Raises:
        AnnotationError: a file or folder that is not there, holds no videos, lacks a column or a label, or names
            videos that are not there; a split column with other values.
    """
    source = Path(source)
    if annotation_format not in FORMATS:
        raise AnnotationError(f"`annotation_format` must be one of {', '.join(FORMATS)}, got {annotation_format!r}.")
    if not source.exists():
        raise AnnotationError(f"{source}: there is no such file or folder.")
    if source.is_dir():
        metadata = [source / name for name in ("metadata.csv", "metadata.jsonl") if (source / name).is_file()]
        if not metadata:
            return Annotations(_class_folders(source, split_column, group_column))
        source = metadata[0]
    rows, columns = read_rows(source)
    root = Path(source.parent if video_root is None else video_root)
    if not root.is_dir():
        raise AnnotationError(f"{root}: there is no such folder to look for the videos of {source} in.")
    kind, video_column, label_columns = _layout(source, columns, annotation_format, video_column, label_columns)
    used = (group_column, video_column, *label_columns, *_COLUMNS_OF_FORMAT.get(kind, ()))
    if group_column is not None:
        find_column(source, columns, group_column, (), "of groups")
    column = find_split_column(source, columns, split_column, used, rows)
    files = None if kind == "plain" else _FileFinder(root)
    found = []
    for row, split in _rows_to_read(rows, column, f"{as_utf8(source)}, column {column!r}", choose_splits):
        if files is None:
            one = _plain(row, video_column, label_columns, label_separator, root)
        else:
            one = _READERS[kind](row, files)
        units = () if group_column is None else (f"{group_column}={filled_cell(row, group_column)}",)
        found.append(replace(one, split=split, keep_together=(*one.keep_together, *units)))
    groups = tuple(EPIC_GROUPS) if kind == "epic" else tuple(label_columns) if len(label_columns) > 1 else (ONE_GROUP,)
    return Annotations(_present(found, source, missing_videos), groups)


def _rows_to_read(
    rows: list[Row], column: str | None, where: str, choose_splits: ChooseSplits | None
) -> list[tuple[Row, str | None]]:
    """The rows of the splits that are wanted, each with its split, which is in a column if there is one."""
    splits = [None if column is None else split_name(row.values.get(column), column, row.where) for row in rows]
    kept = kept_splits(where, splits, choose_splits)
    return [(row, split) for row, split in zip(rows, splits, strict=True) if split in kept]


def _layout(
    source: Path,
    columns: list[str],
    annotation_format: str,
    video_column: str | None,
    label_columns: Sequence[str] | None,
) -> tuple[str, str, Sequence[str]]:
    """The format of a file, and its columns of videos and labels: "" and none in the data sets' own formats."""
    kind = annotation_format
    if kind == "auto":
        kinds = [name for name, needed in _COLUMNS_OF_FORMAT.items() if set(needed) <= set(columns)]
        kind = "plain" if video_column or label_columns or not kinds else kinds[0]
    for name in _COLUMNS_OF_FORMAT.get(kind, ()):
        find_column(source, columns, name, (), f"of {kind}")
    if kind != "plain":
        return kind, "", ()
    video_column = find_column(source, columns, video_column, VIDEO_COLUMNS, "of paths")
    label_columns = label_columns or [find_column(source, columns, None, LABEL_COLUMNS, "of labels")]
    for name in label_columns:
        find_column(source, columns, name, (), "of labels")
    return kind, video_column, label_columns


def _class_folders(folder: Path, split_column: str, group_column: str | None) -> list[LabelledVideo]:
    for name, is_given in (("split_column", split_column not in ("auto", "none")), ("group_column", group_column)):
        if is_given:
            raise AnnotationError(f"{folder}: a folder of class folders has no columns: leave {name} out.")
    videos = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = find_videos(entry)
        if not files:
            raise AnnotationError(f"{entry}: the folder of this class holds no video.")
        videos += [LabelledVideo(str(path), (as_utf8(entry.name),), as_utf8(path)) for path in files]
    if not videos:
        raise AnnotationError(
            f"{folder}: there are no class folders with videos in it; expected {folder.name}/CLASS/VIDEO, or give an "
            "annotation file."
        )
    return videos


# A CSV or JSON of one's own


def _plain(
    row: Row, video_column: str, label_columns: Sequence[str], label_separator: str | None, root: Path
) -> LabelledVideo:
    labels: list[str] = []
    for name in label_columns:
        value = filled_cell(row, name)
        several = value if isinstance(value, list) else [value]
        if label_separator is not None and isinstance(value, str):
            several = value.split(label_separator)
        if len(several) > 1 and len(label_columns) > 1:
            raise AnnotationError(f"{row.where}: {name!r} is one of several groups of labels and has {len(several)}.")
        labels += [as_utf8(str(label).strip()) for label in several]
    path = str(filled_cell(row, video_column))
    video: Any = path if "://" in path else str(root / path)
    part = {name: _seconds(row, name) for name in ("start", "end") if row.values.get(name) not in (None, "")}
    return LabelledVideo({"path": video, **part} if part else video, tuple(labels), row.where)


# The big data sets


class _FileFinder:
    """Finds a video by the name of its file without ending, anywhere under a folder that is listed once."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, str] = {}
        for path in find_videos(root):
            self.paths.setdefault(path.stem, str(path))

    def __call__(self, *stems: str) -> str:
        """The path of the first that is there, else where the first would be."""
        found = [self.paths[stem] for stem in stems if stem in self.paths]
        return found[0] if found else str(self.root / stems[0])


def _kinetics(row: Row, files: _FileFinder) -> LabelledVideo:
    name = str(filled_cell(row, "youtube_id"))
    stems = [name]
    if row.values.get("time_start") not in (None, ""):
        start, end = (int(_seconds(row, column)) for column in ("time_start", "time_end"))
        stems = [f"{name}_{start:06d}_{end:06d}", name]
    label = as_utf8(str(filled_cell(row, "label")))
    return LabelledVideo(files(*stems), (label,), row.where, keep_together=(f"youtube_id={name}",))


def _ssv2(row: Row, files: _FileFinder) -> LabelledVideo:
    label = str(filled_cell(row, "template")).replace("[", "").replace("]", "")
    return LabelledVideo(files(str(filled_cell(row, "id"))), (as_utf8(label),), row.where)


def _epic(row: Row, files: _FileFinder) -> LabelledVideo:
    part = {"start": _seconds(row, "start_timestamp"), "end": _seconds(row, "stop_timestamp")}
    if part["end"] <= part["start"]:
        raise AnnotationError(f"{row.where}: the action ends at {part['end']} s and begins at {part['start']} s.")
    labels = []
    for group, size in EPIC_GROUPS.items():
        number = str(filled_cell(row, f"{group}_class"))
        if not number.isdigit() or int(number) >= size:
            raise AnnotationError(f"{row.where}: {group}_class {number!r} is not a whole number from 0 to {size - 1}.")
        labels.append(number)
    return LabelledVideo({"path": files(str(filled_cell(row, "video_id"))), **part}, tuple(labels), row.where)


_READERS: dict[str, Callable[[Row, _FileFinder], LabelledVideo]] = {"kinetics": _kinetics, "ssv2": _ssv2, "epic": _epic}


def _seconds(row: Row, name: str) -> float:
    """12.5, or hours, minutes and seconds as 00:01:02.50."""
    value = filled_cell(row, name)
    try:
        seconds = 0.0
        for part in str(value).split(":"):
            seconds = 60 * seconds + float(part)
    except ValueError:
        raise AnnotationError(f"{row.where}: {name!r} is {value!r}; expected seconds, or hh:mm:ss.") from None
    return seconds


def _present(videos: list[LabelledVideo], source: Path, missing_videos: str) -> list[LabelledVideo]:
    if missing_videos not in ("error", "skip"):
        raise AnnotationError(f"`missing_videos` must be 'error' or 'skip', got {missing_videos!r}.")
    there: dict[str, bool] = {}
    missing = []
    for one in videos:
        path = one.video["path"] if isinstance(one.video, dict) else one.video
        if path not in there:
            there[path] = path.lower().startswith(_ADDRESSES) or os.path.isfile(path)
        if not there[path]:
            reason = "; of addresses, only http:// and https:// are read" if "://" in path else ""
            missing.append(f"{one.where}: there is no file {source_name(path)}{reason}")
    if missing and (missing_videos == "error" or len(missing) == len(videos)):
        more = f"\n... and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
        raise AnnotationError(
            "\n".join(missing[:_MAX_SHOWN])
            + more
            + f"\n{len(missing)} of the {len(videos)} videos of {source} are not "
            "there. Give the folder that they are in, or leave them out on purpose (missing_videos='skip')."
        )
    return [one for one in videos if there[one.video["path"] if isinstance(one.video, dict) else one.video]]
