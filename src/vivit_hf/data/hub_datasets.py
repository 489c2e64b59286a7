"""Read labelled videos from a data set on the Hub or any folder that `datasets` loads, as a whole or as a stream."""

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
from .annotation_rows import (
    SPLIT_COLUMNS,
    AnnotationError,
    ChooseSplits,
    find_column,
    find_split_column,
    kept_splits,
    split_name,
)
from .annotations import LABEL_COLUMNS, VIDEO_COLUMNS, LabelledVideo
from .whole_files import as_utf8


# Matches a file of a streamed data set, also inside an archive, and none of the other addresses that fsspec opens.
_ON_THE_HUB = re.compile(r"((zip|tar)://[^:]*::)?hf://[^:]+$")


def load_hub_dataset(name: str, config_name: str | None = None, **settings: Any) -> Any:
    """Call `datasets.load_dataset`. Raises AnnotationError with the cause if the data set cannot be loaded."""
    try:
        return datasets.load_dataset(name, config_name, **settings)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = ""
        if isinstance(cause, UnicodeEncodeError):
            hint = " A file name is not UTF-8: rename the file, or pass the folder as a folder of videos."
        raise AnnotationError(as_utf8(f"{name}: this data set cannot be loaded: {cause}{hint}")) from error


def label_columns_of(dataset: Any, name: str, given: Sequence[str] | None = None) -> list[str]:
    """Return the label columns: `given`, or else the first of `LABEL_COLUMNS`, or else the only `ClassLabel` column.

    Raises AnnotationError for a missing column.
    """
    columns = _columns(dataset)
    if not given and not set(columns) & set(LABEL_COLUMNS):
        listing = [column for column in columns if class_names(dataset, column) is not None]
        listing = [column for column in listing if column.lower() not in SPLIT_COLUMNS]
        given = listing if len(listing) == 1 else None
    return [find_column(name, columns, one, LABEL_COLUMNS, "labels") for one in (given or (None,))]


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
    """Read the videos of one split of a data set.

    Args:
        dataset: a `datasets.Dataset`, or an `IterableDataset` for a stream. Its video column has the type `Video`
            (decoded by this package, not by `datasets`) or holds paths or URLs.
        name: the name of the data set in error messages.
        video_column: by default the first of `VIDEO_COLUMNS`.
        label_columns: see `label_columns_of`.
        group_column, split_column, choose_splits: as for `read_videos`; not supported for streams.

    Raises:
        AnnotationError: if a column or label is missing; for a stream with a split or group column, or one that is
            already divided among processes.
    """
    if getattr(dataset, "_distributed", None) is not None:
        raise AnnotationError(
            f"{name}: the stream is already divided among processes (split_dataset_by_node), and training would "
            "divide it again: pass the whole stream."
        )
    columns = _columns(dataset)
    video_column = find_column(name, columns, video_column, ("video", *VIDEO_COLUMNS), "videos")
    label_columns = label_columns_of(dataset, name, label_columns)
    splits_from = find_split_column(name, columns, split_column, (video_column, *label_columns, group_column))
    if group_column is not None:
        find_column(name, columns, group_column, (), "groups")
    features = dataset.features or {}
    if isinstance(features.get(video_column), datasets.Video):
        dataset = dataset.cast_column(video_column, datasets.Video(decode=False))
    read = partial(_labels, features=features, columns=label_columns)
    if isinstance(dataset, datasets.IterableDataset):
        for column, way_out in ((group_column, "leave group_column out"), (splits_from, "set split_column to none")):
            if column is not None:
                raise AnnotationError(
                    f"{name}: a stream cannot be divided by its column {column!r}: leave --streaming out, or {way_out} "
                    "to ignore it."
                )
        return StreamedVideos(dataset, name, video_column, read)
    splits: Sequence[str | None] = [None] * len(dataset)
    if splits_from is not None:
        values = enumerate(_texts(dataset, splits_from))
        splits = [split_name(value, splits_from, f"{name}[{index}]") for index, value in values]
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
    """Return `LabelledVideo.keep_together` for each row. Raises AnnotationError for an empty cell."""
    if column is None:
        return [()] * len(dataset)
    values = _texts(dataset, column)
    for index, value in enumerate(values):
        if value in (None, ""):
            raise AnnotationError(f"{name}[{index}]: {column!r} is empty; expected a value.")
    return [(f"{column}={value}",) for value in values]


def _texts(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Return the values of a column; those of a `ClassLabel` as names."""
    feature = dataset.features[column]
    values = dataset[column][:]
    if not isinstance(feature, datasets.ClassLabel):
        return values
    return [None if value in (None, -1) else feature.int2str(value) for value in values]


def _files(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """Return an identifier of each row's file: its path, or for an embedded video the digest of its bytes.

    A digest is only computed for rows of equal size in bytes; for a video of unique size it is None.
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
    """Return, for each video of a split, a name such as `name[3]` and a function that loads it for the processor."""
    column = find_column(name, list(dataset.features), video_column, ("video", *VIDEO_COLUMNS), "videos")
    if isinstance(dataset.features[column], datasets.Video):
        dataset = dataset.cast_column(column, datasets.Video(decode=False))
    return [(f"{name}[{index}]", partial(_video, dataset, index, column)) for index in range(len(dataset))]


class StreamedVideos:
    """An iterable of `LabelledVideo` over the whole stream, in every process and data loader worker."""

    def __init__(self, dataset: datasets.IterableDataset, name: str, video_column: str, read: Any):
        self.dataset, self.name, self.video_column, self._read = dataset, name, video_column, read

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of the stream, as `IterableDataset.set_epoch` does."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[LabelledVideo]:
        # Plain iteration in a data loader worker would only yield the shards of that worker.
        for index, batch in enumerate(self.dataset.iter(batch_size=1)):
            row = {column: values[0] for column, values in batch.items()}
            where = f"{self.name}[{index}]"
            video = row[self.video_column]
            address = video.get("path") if isinstance(video, dict) and video.get("bytes") is None else video
            if isinstance(address, str) and _ON_THE_HUB.match(address):
                video, where = partial(_from_the_hub, address), address
            yield LabelledVideo(video, self._read(row, where), where)


def class_names(dataset: Any, column: str) -> list[str] | None:
    """Return the class names of a `ClassLabel` column, or of a column of `ClassLabel` lists; None for other types."""
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _columns(dataset: Any) -> list[str]:
    return list(dataset.features or dataset.column_names or next(iter(dataset)))


def _labels(row: dict[str, Any], where: str, *, features: Any, columns: Sequence[str]) -> tuple[str, ...]:
    labels = []
    for column in columns:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        feature = features.get(column)
        feature = getattr(feature, "feature", feature)
        for value in values:
            if value is None or value == "" or (isinstance(feature, datasets.ClassLabel) and value == -1):
                raise AnnotationError(f"{where}: {column!r} is empty; expected a label.")
            labels.append(feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value))
    if not labels:
        raise AnnotationError(f"{where}: {', '.join(columns)} is empty; expected at least one label.")
    return tuple(labels)


def _from_the_hub(address: str) -> dict[str, Any]:
    try:
        with fsspec.open(address, "rb") as file:
            return {"path": address, "bytes": file.read()}
    except Exception as error:  # network, Hub and archive errors share no base class
        reason = f"it cannot be downloaded ({type(error).__name__}: {error})"
        raise VideoDecodingError(f"Cannot read {address}: {reason}.", source=address, reason=reason) from error


def _video(dataset: datasets.Dataset, index: int, column: str) -> Any:
    return dataset[index][column]
