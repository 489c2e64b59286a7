"""Read the rows of annotation files (CSV, JSON, JSON lines, lists of paths) with line numbers, and their splits."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from .scan import VIDEO_EXTENSIONS
from .whole_files import as_utf8


SPLIT_COLUMNS = ("split", "subset", "partition")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ChooseSplits = Callable[[str, dict[str, int]], Collection[str]]
_VIDEO_ENDINGS = tuple(f".{extension}" for extension in VIDEO_EXTENSIONS)


class AnnotationError(ValueError):
    """Raised for a data set that cannot be used; the message names the file and the line, and says how to fix it."""


@dataclass(frozen=True)
class Row:
    """One row of an annotation file; `where` is its place for error messages, such as `train.csv:17`."""

    values: dict[str, Any]
    where: str


def read_rows(path: Path, needs_labels: bool = True) -> tuple[list[Row], list[str]]:
    """Return the rows of a file and its column names. Raises AnnotationError for a file that cannot be parsed.

    A list of paths has the folders as labels, if they are needed.
    """
    text, suffix, name = read_text(path), path.suffix.lower(), as_utf8(path)
    if suffix == ".json":
        rows = list(_json_rows(name, text))
    elif suffix in (".jsonl", ".ndjson"):
        rows = list(_json_lines(name, text))
    elif suffix in (".csv", ".tsv", ".txt"):
        is_list = _listed_path(next((line for line in text.split("\n") if line.strip()), ""))
        rows = list(_list_rows(name, text, needs_labels) if is_list else _csv_rows(name, text))
    else:
        raise AnnotationError(
            f"{path}: expected a folder or a .csv, .tsv, .txt, .json, .jsonl or .ndjson file of annotations."
        )
    if not rows:
        raise AnnotationError(f"{path}: there are no videos in this file; expected at least one row.")
    return rows, list(dict.fromkeys(name for row in rows for name in row.values))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises AnnotationError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AnnotationError(f"{path}:{line}: this is not UTF-8 text ({error.reason}).") from None


@contextmanager
def json_errors(path: str | Path, line: int = 1) -> Iterator[None]:
    """Turn errors of the JSON parser into AnnotationErrors; `line` is the first line of the text that is parsed."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}:{max(line, error.lineno)}: this is not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, deeply nested lists
        raise AnnotationError(f"{path}:{line}: this JSON cannot be read ({error}).") from None


def _json_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise AnnotationError(f"{where}: expected an object with a path and a label, got {value!r:.80}.")
    return Row(value, where)


def _json_lines(path: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with json_errors(path, number):
                value = json.loads(line)
            yield _json_row(value, f"{path}:{number}")


def _json_rows(path: str, text: str) -> Iterator[Row]:
    """Parse a JSON list object by object, to keep the line number of each."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    place = len(text) - len(text.lstrip(" \t\r\n"))
    if not text.startswith("[", place):
        raise AnnotationError(f"{path}:1: expected a JSON list of objects.")
    place, line, counted = place + 1, 1, 0
    while True:
        place = blank.match(text, place).end()  # type: ignore[union-attr]  # it matches an empty string, too
        line, counted = line + text.count("\n", counted, place), place
        if text.startswith("]", place):
            return
        with json_errors(path, line):
            value, place = decoder.raw_decode(text, place)
        yield _json_row(value, f"{path}:{line}")


def _csv_rows(path: str, text: str) -> Iterator[Row]:
    header = text.split("\n", 1)[0]
    delimiter = max("\t,;", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise AnnotationError(f"{path}:1: several columns are named {twice[0]!r}: rename all but one.")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise AnnotationError(
                    f"{path}:{reader.line_num}: the row has {len(cells)} cells, but the header has {len(names)} "
                    f"columns: {', '.join(names)}."
                )
            yield Row(dict(zip(names, cells, strict=True)), f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise AnnotationError(f"{path}:{reader.line_num}: this is not CSV ({error}).") from None


def _listed_path(line: str) -> tuple[str, str] | None:
    """Parse a line such as `Class/file.mp4 3` into path and class number ("" if absent); None for any other line."""
    line = line.strip()
    if line.lower().endswith(_VIDEO_ENDINGS):
        return line, ""
    found = re.fullmatch(r"(.*\S)\s+(\d+)", line)
    return (found[1], found[2]) if found and found[1].lower().endswith(_VIDEO_ENDINGS) else None


def _list_rows(path: str, text: str, needs_labels: bool) -> Iterator[Row]:
    """Read paths with the folder as the class. Class numbers, if present, must match the folders one to one."""
    by_folder: dict[str, tuple[str, int]] = {}
    by_number: dict[str, tuple[str, int]] = {}
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        listed = _listed_path(content)
        if listed and not needs_labels:
            yield Row({"path": listed[0]}, f"{path}:{line}")
            continue
        folder = PurePath(listed[0]).parent.name if listed else ""
        if listed is None or not folder:
            raise AnnotationError(f"{path}:{line}: expected a path like Class/file.mp4, got {content.strip()!r:.80}.")
        number = listed[1]
        for seen, key, value in ((by_folder, folder, number), (by_number, number, folder)):
            there, first = seen.setdefault(key, (value, line))
            if there != value and key:
                raise AnnotationError(
                    f"{path}:{line}: the folder {folder!r} with class number {number or '(none)'} contradicts line "
                    f"{first}, so the folders are not the classes: write a CSV with the columns path and label instead."
                )
        yield Row({"path": listed[0], "label": folder}, f"{path}:{line}")


def find_column(where: str, columns: Sequence[str], given: str | None, candidates: Sequence[str], content: str) -> str:
    """Return the column `given`, or by default the first of `candidates` that exists. Raises AnnotationError."""
    candidates = candidates if given is None else [given]
    found = [name for name in candidates if name in columns]
    if not found:
        expected = "named " + (" or ".join(candidates) if given is None else repr(given))
        raise AnnotationError(
            f"{where}: there is no column of {content} {expected}; the columns are: {', '.join(columns)}."
        )
    return found[0]


def filled_cell(row: Row, name: str) -> Any:
    """Return the value of a cell, stripped. Raises AnnotationError if it is empty."""
    value = row.values.get(name)
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or value == []:
        raise AnnotationError(f"{row.where}: {name!r} is empty; expected a value.")
    return value


# Splits


def find_split_column(
    where: str, columns: Sequence[str], given: str, taken: Collection[str | None], rows: Sequence[Row] = ()
) -> str | None:
    """Return the split column: `given`, or with "auto" the first free column of `SPLIT_COLUMNS`, or None.

    Raises AnnotationError for a missing column, and with "auto" for a column of another name that holds only split
    names in `rows`.
    """
    if given == "none":
        return None
    if given != "auto":
        return find_column(where, columns, given, (), "splits")
    free = [name for name in columns if name not in taken]
    if named := [name for name in free if name.lower() in SPLIT_COLUMNS]:
        return named[0]
    for name in free:
        values = {str(row.values.get(name)).strip().lower() for row in rows}
        if len(values) > 1 and values <= SPLIT_NAMES.keys():
            raise AnnotationError(
                f"{where}: the column {name!r} holds split names ({', '.join(sorted(values))}): set "
                f"split_column to {name} to split by it, or to none to ignore it."
            )
    return None


def split_name(value: Any, name: str, where: str) -> str:
    """Return "train", "validation" or "test". Raises AnnotationError for a value outside `SPLIT_NAMES`."""
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise AnnotationError(
            f"{where}: {value!r} in the column {name!r} is not a split; expected one of {', '.join(SPLIT_NAMES)}. "
            "Correct it, or set split_column to another column, or to none to ignore this one."
        )
    return split


def kept_splits(where: str, splits: Iterable[str | None], choose_splits: ChooseSplits | None) -> Collection[str | None]:
    """Return the splits to read, chosen from those of the rows; None stands for rows without a split."""
    counts = Counter(split for split in splits if split is not None)
    if not counts:
        return (None,)
    return tuple(counts) if choose_splits is None else tuple(choose_splits(where, dict(counts)))
