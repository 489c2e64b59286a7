"""Labelled videos of a data set on the Hub, or of any folder that `datasets` loads: whole, or as a stream."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets  # type: ignore[import-untyped]
import fsspec  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]

from ..video_sources import VideoDecodingError
from .annotation_rows import SPLIT_COLUMNS, AnnotationError, ChooseSplits, find_split_column, kept_splits, split_name
from .annotations import LABEL_COLUMNS, VIDEO_COLUMNS, LabelledVideo
from .whole_files import as_utf8


# A file of a data set that is streamed, or a file in an archive of one; nothing else that fsspec could open.
_ON_THE_HUB = re.compile(r"((zip|tar)://[^:]*::)?hf://[^:]+$")


def load_hub_dataset(name: str, config_name: str | None = None, **settings: Any) -> Any:
    """`datasets.load_dataset`. Raises AnnotationError with the cause if the data set cannot be loaded."""
    try:
        return datasets.load_dataset(name, config_name, **settings)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = ""
        if isinstance(cause, UnicodeEncodeError):
            hint = " A file name is not UTF-8: rename the file, or give the folder itself instead of a data set."
        raise AnnotationError(as_utf8(f"{name}: this data set cannot be loaded: {cause}{hint}")) from error


def label_columns_of(dataset: Any, name: str, given: Sequence[str] | None = None) -> list[str]:
    """The columns of labels: those that are given, or the first of `LABEL_COLUMNS`, or the only `ClassLabel`.

    Raises AnnotationError if a column is not there.
    """
    columns = _columns(dataset)
    if not given and not set(columns) & set(LABEL_COLUMNS):
        listing = [column for column in columns if class_names(dataset, column) is not None]
        listing = [column for column in listing if column.lower() not in SPLIT_COLUMNS]
        given = listing if len(listing) == 1 else None
    return [_column(name, columns, one, LABEL_COLUMNS, "of labels") for one in (given or (None,))]


def hub_videos(
    dataset: Any,
    name: str,
    *,
    video_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    group_column: str | None = None,
    split_column: str = "auto",
    choose_splits: ChooseSplits | None = None,
) -> list[LabelledVideo] | StreamedVideos:
    """
    The videos of one split.

    Args:
        dataset: a `datasets.Dataset`, or an `IterableDataset` for a stream. The column of videos is of type `Video`
            (which is not decoded by `datasets`), or has paths or URLs.
        name: what error messages call it.
        video_column, label_columns: by default the first of `VIDEO_COLUMNS`, and see `label_columns_of`.
        group_column, split_column, choose_splits: as for `read_videos`; not for streams.

    Raises:
        AnnotationError: if a column is not there or a label is missing; for streams with a column of splits or groups,
            and for those that are split among processes already.
    """
    if getattr(dataset, "_distributed", None) is not None:
        raise AnnotationError(
            f"{name}: the stream is split among processes already (split_dataset_by_node), and training splits it "
            "again: give the whole of it."
        )
    columns = _columns(dataset)
    video_column = _column(name, columns, video_column, ("video", *VIDEO_COLUMNS), "of videos")
    label_columns = label_columns_of(dataset, name, label_columns)
    if split_column not in ("auto", "none"):
        _column(name, columns, split_column, (), "of splits")
    splits_from = find_split_column(name, columns, split_column, (video_column, *label_columns, group_column))
    if group_column is not None:
        _column(name, columns, group_column, (), "of groups")
    features = dataset.features or {}
    if isinstance(features.get(video_column), datasets.Video):
        dataset = dataset.cast_column(video_column, datasets.Video(decode=False))
    read = partial(_labels, features=features, columns=label_columns)
    if isinstance(dataset, datasets.IterableDataset):
        if divides := [column for column in (group_column, splits_from) if column is not None]:
            raise AnnotationError(
                f"{name}: a stream cannot be divided by its column {divides[0]!r}: leave --streaming out, or set "
                f"{'split_column to none' if divides[0] == splits_from else 'no group_column'} to ignore the column."
            )
        return StreamedVideos(dataset, name, video_column, read)
    splits: Sequence[str | None] = [None] * len(dataset)
    if splits_from is not None:
        texts = enumerate(_texts(dataset, splits_from))
        splits = [split_name(value, splits_from, f"{name}[{index}]") for index, value in texts]
    kept = kept_splits(f"{name}, column {splits_from!r}", splits, choose_splits)
    units = _group_keys(dataset, name, group_column)
    files = _files(dataset, video_column)
    videos = []
    for index, row in enumerate(dataset.select_columns(label_columns)):
        if splits[index] in kept:
            where = f"{name}[{index}]"
            video = partial(_video, dataset, index, video_column)
            videos.append(LabelledVideo(video, read(row, where), where, units[index], splits[index], files[index]))
    return videos


def _group_keys(dataset: datasets.Dataset, name: str, column: str | None) -> list[tuple[str, ...]]:
    """`LabelledVideo.keep_together` of each row. Raises AnnotationError for a cell that is empty."""
    if column is None:
        return [()] * len(dataset)
    values = _texts(dataset, column)
    for index, value in enumerate(values):
        if value in (None, ""):
            raise AnnotationError(f"{name}[{index}]: {column!r} is empty.")
    return [(f"{column}={value}",) for value in values]


def _texts(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The values of a column, those of a `ClassLabel` by their names."""
    feature = dataset.features[column]
    values = dataset[column][:]
    if not isinstance(feature, datasets.ClassLabel):
        return values
    return [None if value in (None, -1) else feature.int2str(value) for value in values]


def _files(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """What tells the file of each row apart: its path, or for videos inside of the data set a digest of their bytes.

    The digest is only made where several rows have as many bytes; the others are files of their own, None.
    """
    files: list[str | None] = []
    rows_by_size: dict[int, list[int]] = {}
    arrow = dataset.select_columns([column]).with_format("arrow")
    for table in arrow.iter(batch_size=256):
        values = table.column(0).combine_chunks()
        if not pyarrow.types.is_struct(values.type):
            files += values.to_pylist()
            continue
        sizes = pyarrow.compute.binary_length(values.field("bytes")).to_pylist()
        for path, size in zip(values.field("path").to_pylist(), sizes, strict=True):
            if size is not None:
                rows_by_size.setdefault(size, []).append(len(files))
            files.append(path if size is None else None)
    for rows in rows_by_size.values():
        if len(rows) > 1:
            for row in rows:
                files[row] = hashlib.sha256(_video(dataset, row, column)["bytes"]).hexdigest()
    return files


def unlabelled_videos(
    dataset: datasets.Dataset, name: str, *, video_column: str | None = None
) -> list[tuple[str, partial]]:
    """What each video of a split is called, as `name[3]`, and a function that gives it to the processor."""
    column = _column(name, list(dataset.features), video_column, ("video", *VIDEO_COLUMNS), "of videos")
    if isinstance(dataset.features[column], datasets.Video):
        dataset = dataset.cast_column(column, datasets.Video(decode=False))
    return [(f"{name}[{index}]", partial(_video, dataset, index, column)) for index in range(len(dataset))]


class StreamedVideos:
    """An iterable of `LabelledVideo`: the whole stream, in whichever process and worker it is read."""

    def __init__(self, dataset: datasets.IterableDataset, name: str, video_column: str, read: Any):
        self.dataset, self.name, self.video_column, self._read = dataset, name, video_column, read

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[LabelledVideo]:
        # Iterated plainly, in a worker it would give that worker's shards alone.
        for index, batch in enumerate(self.dataset.iter(batch_size=1)):
            row = {column: values[0] for column, values in batch.items()}
            where = f"{self.name}[{index}]"
            video = row[self.video_column]
            address = video.get("path") if isinstance(video, dict) and video.get("bytes") is None else video
            if isinstance(address, str) and _ON_THE_HUB.match(address):
                video, where = partial(_from_the_hub, address), address
            yield LabelledVideo(video, self._read(row, where), where)


def class_names(dataset: Any, column: str) -> list[str] | None:
    """The names of a column of type `ClassLabel`, or of a list of them; None for other types."""
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _columns(dataset: Any) -> list[str]:
    return list(dataset.features or dataset.column_names or next(iter(dataset)))


def _column(name: str, columns: list[str], given: str | None, candidates: Sequence[str], what: str) -> str:
    candidates = candidates if given is None else [given]
    found = [candidate for candidate in candidates if candidate in columns]
    if not found:
        expected = f"any of {', '.join(candidates)}" if given is None else repr(given)
        raise AnnotationError(f"{name}: there is no column {expected} ({what}); there are: {', '.join(columns)}.")
    return found[0]


def _labels(row: dict[str, Any], where: str, *, features: Any, columns: Sequence[str]) -> tuple[str, ...]:
    labels = []
    for column in columns:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        feature = features.get(column)
        feature = getattr(feature, "feature", feature)
        for value in values:
            if value is None or value == "" or (isinstance(feature, datasets.ClassLabel) and value == -1):
                raise AnnotationError(f"{where}: {column!r} is empty.")
            labels.append(feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value))
    if not labels:
        raise AnnotationError(f"{where}: {', '.join(columns)} is empty.")
    return tuple(labels)


def _from_the_hub(address: str) -> dict[str, Any]:
    try:
        with fsspec.open(address, "rb") as file:
            return {"path": address, "bytes": file.read()}
    except Exception as error:  # of the network, the Hub or an archive, none of which has a common class
        reason = f"it cannot be downloaded ({type(error).__name__}: {error})"
        raise VideoDecodingError(f"Cannot read {address}: {reason}.", source=address, reason=reason) from error


def _video(dataset: datasets.Dataset, index: int, column: str) -> Any:
    return dataset[index][column]
