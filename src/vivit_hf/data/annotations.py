"""Read labelled videos from folders of classes, CSV and JSON files, and the annotation files of large data sets.

Every mistake raises an `AnnotationError` with file and line before any model is loaded or video is opened.

These annotation files are read as published:

| data set | file | columns used | video file, in any folder |
| --- | --- | --- | --- |
| Kinetics | CSV | label, youtube_id, time_start, time_end | id_000010_000020.mp4, or id.mp4 |
| Something-Something v2 | JSON list | id, template without brackets | id.webm |
| EPIC-Kitchens-100 | CSV | video_id, start_ and stop_timestamp, noun_ and verb_class | P01_01.MP4 |
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..limits_vivit import check_choice
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

    `video`: a path, or a dictionary with a "path" and optionally "start" and "end" in seconds, as the video processor
    takes them; or a function without arguments that returns one of these, to avoid holding the video in memory.
    `labels`: label names: one; or one per group, in the order of the groups; or any number in multi-label data.
    `where`: the place of the annotation, such as `train.csv:17`.
    `keep_together`: keys such as `patient=7`; videos with a common key are never divided between splits.
    `split`: "train", "validation" or "test", if annotated.
    `file`: the path or another identifier of the file, if `video` is a function.
    """

    video: Any
    labels: tuple[str, ...]
    where: str
    keep_together: tuple[str, ...] = ()
    split: str | None = None
    file: str | None = None

    def source(self) -> Any:
        """Return the video in the form that the video processor takes."""
        return self.video() if callable(self.video) else self.video

    def path(self) -> str | None:
        """Return the path or address of the file, or None for a video in memory."""
        path = self.file if callable(self.video) else self.video
        path = path.get("path") if isinstance(path, dict) else path
        return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None

    def unit_keys(self) -> list[Hashable]:
        """Return a key of the file that does not depend on the spelling of its path, and `keep_together`."""
        path = self.path()
        if path is None or path.lower().startswith(_ADDRESSES):
            return [*([] if path is None else [path]), *self.keep_together]
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            status = None
        # Some file systems have no inode numbers.
        file = (status.st_dev, status.st_ino) if status is not None and status.st_ino else os.path.realpath(path)
        return [file, *self.keep_together]


@dataclass(frozen=True)
class Annotations:
    """The videos of a data set and the names of their label groups; a single group is ("",)."""

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
    needs_labels: bool = True,
) -> Annotations:
    """Read the videos of a folder or an annotation file.

    Args:
        source: a folder of class folders; a folder with a `metadata.csv` or `metadata.jsonl`; a `.csv`, `.tsv`,
            `.json` (a list of objects) or `.jsonl` file; or a text file with one path per line such as
            `Class/file.mp4`, optionally followed by a class number. The folder in the path is the class.
        video_root: the folder that relative paths in the file start from; by default the folder of the file.
        annotation_format: one of `FORMATS`; "auto" recognises the files of the large data sets by their columns.
        video_column, label_columns: column names; by default the first existing one of `VIDEO_COLUMNS` and of
            `LABEL_COLUMNS`. Several label columns are label groups, with one label per group.
        label_separator: the separator between several labels in one cell. With None, a cell is one label. A list in
            JSON always holds several labels.
        missing_videos: "error", "skip" to leave out videos without a file, which are common in Kinetics, or "keep".
        split_column: the column of split names (see `SPLIT_NAMES`); "auto" takes the first of `SPLIT_COLUMNS`, if
            any, and "none" ignores splits.
        group_column: the column of units that a split must not divide, such as patients, tapes or speakers.
        choose_splits: a function that returns the splits to read, given the name of the column and the number of rows
            in each split. By default all are read. Rows of other splits need neither a label nor a file.
        needs_labels: False reads plain files without a column of labels, lists of paths without class folders, and
            every video of a folder and its subfolders, without a label.

    Raises:
        AnnotationError: if the source does not exist or has no videos, a column, label or video is missing, or the
            split column has unknown values.
        ValueError: if `annotation_format` or `missing_videos` is not known.
    """
    source = Path(source)
    check_choice("annotation_format", annotation_format, FORMATS)
    if not source.exists():
        raise AnnotationError(f"{source}: there is no such file or folder.")
    if source.is_dir():
        metadata = [source / name for name in ("metadata.csv", "metadata.jsonl") if (source / name).is_file()]
        if not metadata:
            if not needs_labels:
                return Annotations(_unlabelled(source))
            return Annotations(_class_folders(source, split_column, group_column))
        source = metadata[0]
    rows, columns = read_rows(source, needs_labels)
    root = Path(source.parent if video_root is None else video_root)
    if not root.is_dir():
        raise AnnotationError(f"{root}: there is no such folder, but the videos of {source} are expected in it.")
    if not needs_labels and label_columns is None:
        label_columns = ()
    kind, video_column, label_columns = _layout(source, columns, annotation_format, video_column, label_columns)
    used = (group_column, video_column, *label_columns, *_COLUMNS_OF_FORMAT.get(kind, ()))
    if group_column is not None:
        find_column(f"{source}:1", columns, group_column, (), "groups")
    column = find_split_column(f"{source}:1", columns, split_column, used, rows)
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
    """Return the rows of the chosen splits, each with its split; without a split column, all rows with None."""
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
    """Return the format of a file and its video and label columns ("" and () for the formats of large data sets)."""
    kind = annotation_format
    if kind == "auto":
        kinds = [name for name, needed in _COLUMNS_OF_FORMAT.items() if set(needed) <= set(columns)]
        kind = "plain" if video_column or label_columns or not kinds else kinds[0]
    for name in _COLUMNS_OF_FORMAT.get(kind, ()):
        find_column(f"{source}:1", columns, name, (), f"{kind} annotations")
    if kind != "plain":
        return kind, "", ()
    video_column = find_column(f"{source}:1", columns, video_column, VIDEO_COLUMNS, "paths")
    if label_columns is None:
        label_columns = [find_column(f"{source}:1", columns, None, LABEL_COLUMNS, "labels")]
    for name in label_columns:
        find_column(f"{source}:1", columns, name, (), "labels")
    return kind, video_column, label_columns


def _unlabelled(folder: Path) -> list[LabelledVideo]:
    videos = [LabelledVideo(str(path), (), as_utf8(path)) for path in find_videos(folder)]
    if not videos:
        raise AnnotationError(f"{folder}: there are no videos in this folder and its subfolders.")
    return videos


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
            raise AnnotationError(f"{entry}: this class folder holds no video: add one, or remove the folder.")
        videos += [LabelledVideo(str(path), (as_utf8(entry.name),), as_utf8(path)) for path in files]
    if not videos:
        raise AnnotationError(
            f"{folder}: there are no class folders with videos; expected {folder.name}/CLASS/VIDEO. Otherwise give "
            "an annotation file."
        )
    return videos


# Plain tables


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
            raise AnnotationError(f"{row.where}: {name!r} has {len(several)} labels; expected 1, as for every group.")
        labels += [as_utf8(str(label).strip()) for label in several]
    path = str(filled_cell(row, video_column))
    video: Any = path if "://" in path else str(root / path)
    part = {name: _seconds(row, name) for name in ("start", "end") if row.values.get(name) not in (None, "")}
    return LabelledVideo({"path": video, **part} if part else video, tuple(labels), row.where)


# Large public data sets


class _FileFinder:
    """Find videos anywhere under a folder by their file names without extension; list the folder only once."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, str] = {}
        for path in find_videos(root):
            self.paths.setdefault(path.stem, str(path))

    def __call__(self, *stems: str) -> str:
        """Return the path of the first existing file name, or the path expected for the first name."""
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
        raise AnnotationError(f"{row.where}: the action ends at {part['end']} s, but begins at {part['start']} s.")
    labels = []
    for group, size in EPIC_GROUPS.items():
        number = str(filled_cell(row, f"{group}_class"))
        if not number.isdigit() or int(number) >= size:
            raise AnnotationError(f"{row.where}: {group}_class {number!r} is not a whole number from 0 to {size - 1}.")
        labels.append(number)
    return LabelledVideo({"path": files(str(filled_cell(row, "video_id"))), **part}, tuple(labels), row.where)


_READERS: dict[str, Callable[[Row, _FileFinder], LabelledVideo]] = {"kinetics": _kinetics, "ssv2": _ssv2, "epic": _epic}


def _seconds(row: Row, name: str) -> float:
    """Parse seconds such as 12.5, or hours, minutes and seconds such as 00:01:02.50."""
    value = filled_cell(row, name)
    try:
        seconds = 0.0
        for part in str(value).split(":"):
            seconds = 60 * seconds + float(part)
    except ValueError:
        raise AnnotationError(f"{row.where}: {name!r} is {value!r}; expected seconds or hh:mm:ss.") from None
    return seconds


def _present(videos: list[LabelledVideo], source: Path, missing_videos: str) -> list[LabelledVideo]:
    """Return the videos with an existing file or an address; raise AnnotationError for the others, or skip them."""
    check_choice("missing_videos", missing_videos, ("error", "skip", "keep"))
    if missing_videos == "keep":
        return videos
    there: dict[str, bool] = {}
    missing = []
    for one in videos:
        path = str(one.path())
        if path not in there:
            there[path] = path.lower().startswith(_ADDRESSES) or os.path.isfile(path)
        if not there[path]:
            reason = "; only http:// and https:// addresses are supported" if "://" in path else ""
            missing.append(f"{one.where}: there is no file {source_name(path)}{reason}")
    if missing and (missing_videos == "error" or len(missing) == len(videos)):
        more = f"\n... and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
        raise AnnotationError(
            "\n".join(missing[:_MAX_SHOWN]) + more + f"\n{len(missing)} of the {len(videos)} videos of {source} are "
            "missing. Set video_root to their folder, or skip them with missing_videos='skip'."
        )
    return [one for one in videos if there[str(one.path())]]
