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

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dataset_scan import find_videos


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
ONE_GROUP = ""


class AnnotationError(ValueError):
    """A data set that cannot be trained on; the message names the file, the line and the way out."""


@dataclass(frozen=True)
class LabelledVideo:
    """One video of a data set.

    `video`: what the processor takes, a path or a dictionary, there also with "start" and "end" in seconds; or a
    function without arguments that gives it, for what is not to be held in memory.
    `labels`: names; one, or one per group in the order of the groups, or any number with several labels per video.
    `where`: the place that it was read from, as `train.csv:17`.
    """

    video: Any
    labels: tuple[str, ...]
    where: str

    def source(self) -> Any:
        """What the processor takes."""
        return self.video() if callable(self.video) else self.video


@dataclass(frozen=True)
class Annotations:
    """The videos of a data set, and the names of the groups that their labels are of: ("",) where there is one."""

    videos: list[LabelledVideo]
    groups: tuple[str, ...] = (ONE_GROUP,)


@dataclass(frozen=True)
class _Row:
    values: dict[str, Any]
    where: str


def read_videos(
    source: str | os.PathLike,
    *,
    video_root: str | os.PathLike | None = None,
    annotation_format: str = "auto",
    video_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_separator: str | None = None,
    missing_videos: str = "error",
) -> Annotations:
    """
    The videos of a folder of class folders (or with a `metadata.csv` or `.jsonl` in it), or of an annotation file.

    Args:
        source: the folder, or a `.csv`, `.tsv`, `.json` (a list of objects) or `.jsonl` file.
        video_root: what paths in the file start from; by default the folder that the file is in.
        annotation_format: one of `FORMATS`; "auto" tells the data sets' own files by their columns.
        video_column, label_columns: names of columns; by default the first of `VIDEO_COLUMNS` and `LABEL_COLUMNS`
            that there is. Several label columns are groups of labels: one label of each.
        label_separator: what stands between several labels of a video in one cell. None: a cell is one label. In JSON
            a list is several labels, too.
        missing_videos: "error", or "skip" for files that are not there, as is usual with Kinetics.

    Raises:
        AnnotationError: a file or folder that is not there, holds no videos, lacks a column or a label, or names
            videos that are not there.
    """
    source = Path(source)
    if annotation_format not in FORMATS:
        raise AnnotationError(f"`annotation_format` must be one of {', '.join(FORMATS)}, got {annotation_format!r}.")
    if not source.exists():
        raise AnnotationError(f"{source}: there is no such file or folder.")
    if source.is_dir():
        metadata = [source / name for name in ("metadata.csv", "metadata.jsonl") if (source / name).is_file()]
        if not metadata:
            return Annotations(_class_folders(source))
        source = metadata[0]
    rows, columns = _read_rows(source)
    kind = annotation_format
    if kind == "auto":
        kinds = [name for name, needed in _COLUMNS_OF_FORMAT.items() if set(needed) <= set(columns)]
        kind = "plain" if video_column or label_columns or not kinds else kinds[0]
    root = Path(source.parent if video_root is None else video_root)
    if not root.is_dir():
        raise AnnotationError(f"{root}: there is no such folder to look for the videos of {source} in.")

    groups: tuple[str, ...] = (ONE_GROUP,)
    if kind == "plain":
        video_column = _column(source, columns, video_column, VIDEO_COLUMNS, "of paths")
        chosen = label_columns or [_column(source, columns, None, LABEL_COLUMNS, "of labels")]
        for name in chosen:
            _column(source, columns, name, (), "of labels")
        groups = tuple(chosen) if len(chosen) > 1 else groups
        found = [_plain(row, video_column, chosen, label_separator, root) for row in rows]
    else:
        for name in _COLUMNS_OF_FORMAT[kind]:
            _column(source, columns, name, (), f"of {kind}")
        files = _FileFinder(root)
        read = {"kinetics": _kinetics, "ssv2": _ssv2, "epic": _epic}[kind]
        groups = tuple(EPIC_GROUPS) if kind == "epic" else groups
        found = [read(row, files) for row in rows]
    return Annotations(_present(found, source, missing_videos), groups)


def _class_folders(folder: Path) -> list[LabelledVideo]:
    videos = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files = find_videos(entry)
            if not files:
                raise AnnotationError(f"{entry}: the folder of this class holds no video.")
            videos += [LabelledVideo(str(path), (entry.name,), str(path)) for path in files]
    if not videos:
        raise AnnotationError(
            f"{folder}: there are no class folders with videos in it; expected {folder.name}/CLASS/VIDEO, or give an "
            "annotation file."
        )
    return videos


# Rows


def _read_rows(path: Path) -> tuple[list[_Row], list[str]]:
    """The rows of a file with the lines they are on, and the names of the columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AnnotationError(f"{path}:{line}: this is not UTF-8 text ({error.reason}).") from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        rows = list(_json_rows(path, text))
    elif suffix in (".jsonl", ".ndjson"):
        lines = enumerate(text.splitlines(), 1)
        rows = [_Row(_object(path, number, line), f"{path}:{number}") for number, line in lines if line.strip()]
    elif suffix in (".csv", ".tsv", ".txt"):
        rows = list(_csv_rows(path, text))
    else:
        raise AnnotationError(f"{path}: annotations are read from .csv, .tsv, .json and .jsonl files, or a folder.")
    if not rows:
        raise AnnotationError(f"{path}: there are no videos in this file.")
    return rows, list(dict.fromkeys(name for row in rows for name in row.values))


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}:{line}: this is not JSON ({error.msg}).") from None
    return _checked_object(value, f"{path}:{line}")


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AnnotationError(f"{where}: expected an object with a path and a label, got {value!r:.80}.")
    return value


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    """The objects of a JSON list, one by one, so that each knows its line."""
    decoder, place, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal place
        while place < len(text) and text[place] in characters:
            place += 1

    skip(" \t\r\n")
    if not text.startswith("[", place):
        raise AnnotationError(f"{path}:1: expected a JSON list of objects.")
    place += 1
    counted = 0
    while True:
        skip(" \t\r\n,")
        line, counted = line + text.count("\n", counted, place), place
        if text.startswith("]", place):
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise AnnotationError(f"{path}:{error.lineno}: this is not JSON ({error.msg}).") from None
        yield _Row(_checked_object(value, f"{path}:{line}"), f"{path}:{line}")


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    header = text.split("\n", 1)[0]
    delimiter = max("\t,;", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise AnnotationError(
                    f"{path}:{reader.line_num}: {len(cells)} cells, but the header has {len(names)} columns: "
                    f"{', '.join(names)}."
                )
            yield _Row(dict(zip(names, cells, strict=True)), f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise AnnotationError(f"{path}:{reader.line_num}: this is not CSV ({error}).") from None


def _column(path: Path, columns: list[str], given: str | None, candidates: Iterable[str], what: str) -> str:
    candidates = [given] if given is not None else list(candidates)
    found = [name for name in candidates if name in columns]
    if not found:
        expected = f"{candidates[0]!r}" if given is not None else f"any of {', '.join(candidates)}"
        raise AnnotationError(f"{path}:1: there is no column {expected} ({what}); there are: {', '.join(columns)}.")
    return found[0]


def _cell(row: _Row, name: str) -> Any:
    value = row.values.get(name)
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or value == []:
        raise AnnotationError(f"{row.where}: {name!r} is empty.")
    return value


def _plain(
    row: _Row, video_column: str, label_columns: Sequence[str], label_separator: str | None, root: Path
) -> LabelledVideo:
    labels: list[str] = []
    for name in label_columns:
        value = _cell(row, name)
        several = value if isinstance(value, list) else [value]
        if label_separator is not None and isinstance(value, str):
            several = value.split(label_separator)
        if len(several) > 1 and len(label_columns) > 1:
            raise AnnotationError(f"{row.where}: {name!r} is one of several groups of labels and has {len(several)}.")
        labels += [str(label).strip() for label in several]
    path = str(_cell(row, video_column))
    video: Any = path if path.lower().startswith(("http://", "https://")) else str(root / path)
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


def _kinetics(row: _Row, files: _FileFinder) -> LabelledVideo:
    name = str(_cell(row, "youtube_id"))
    stems = [name]
    if row.values.get("time_start") not in (None, ""):
        start, end = (int(_seconds(row, column)) for column in ("time_start", "time_end"))
        stems = [f"{name}_{start:06d}_{end:06d}", name]
    return LabelledVideo(files(*stems), (str(_cell(row, "label")),), row.where)


def _ssv2(row: _Row, files: _FileFinder) -> LabelledVideo:
    label = str(_cell(row, "template")).replace("[", "").replace("]", "")
    return LabelledVideo(files(str(_cell(row, "id"))), (label,), row.where)


def _epic(row: _Row, files: _FileFinder) -> LabelledVideo:
    part = {"start": _seconds(row, "start_timestamp"), "end": _seconds(row, "stop_timestamp")}
    if part["end"] <= part["start"]:
        raise AnnotationError(f"{row.where}: the action ends at {part['end']} s and begins at {part['start']} s.")
    labels = []
    for group, size in EPIC_GROUPS.items():
        number = str(_cell(row, f"{group}_class"))
        if not number.isdigit() or int(number) >= size:
            raise AnnotationError(f"{row.where}: {group}_class {number!r} is not a whole number from 0 to {size - 1}.")
        labels.append(number)
    return LabelledVideo({"path": files(str(_cell(row, "video_id"))), **part}, tuple(labels), row.where)


def _seconds(row: _Row, name: str) -> float:
    """12.5, or hours, minutes and seconds as 00:01:02.50."""
    value = _cell(row, name)
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
            there[path] = path.lower().startswith(("http://", "https://")) or os.path.isfile(path)
        if not there[path]:
            missing.append(f"{one.where}: there is no file {path}")
    if missing and (missing_videos == "error" or len(missing) == len(videos)):
        more = f"\n... and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
        raise AnnotationError(
            "\n".join(missing[:_MAX_SHOWN])
            + more
            + f"\n{len(missing)} of the {len(videos)} videos of {source} are not "
            "there. Give the folder that they are in, or leave them out on purpose (missing_videos='skip')."
        )
    return [one for one in videos if there[one.video["path"] if isinstance(one.video, dict) else one.video]]
