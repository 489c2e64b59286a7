"""Labelled videos of a data set on the Hub, or of any folder that `datasets` loads: whole, or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets  # type: ignore[import-untyped]

from .annotations import LABEL_COLUMNS, VIDEO_COLUMNS, AnnotationError, LabelledVideo


def hub_videos(
    dataset: Any, name: str, *, video_column: str | None = None, label_columns: Sequence[str] | None = None
) -> list[LabelledVideo] | StreamedVideos:
    """
    The videos of one split.

    Args:
        dataset: a `datasets.Dataset`, or an `IterableDataset` for a stream. The column of videos is of type `Video`
            (which is not decoded by `datasets`), or has paths or URLs.
        name: what error messages call it.
        video_column, label_columns: by default the first that there is of `VIDEO_COLUMNS` and `LABEL_COLUMNS`.

    Raises:
        AnnotationError: if a column is not there, a label is missing, or a stream is split among processes already.
    """
    if getattr(dataset, "_distributed", None) is not None:
        raise AnnotationError(
            f"{name}: the stream is split among processes already (split_dataset_by_node), and training splits it "
            "again: give the whole of it."
        )
    columns = list(dataset.features or dataset.column_names or next(iter(dataset)))
    video_column = _column(name, columns, video_column, ("video", *VIDEO_COLUMNS), "of videos")
    label_columns = [
        _column(name, columns, given, LABEL_COLUMNS, "of labels")
        for given in label_columns or [None]  # type: ignore
    ]
    features = dataset.features or {}
    if isinstance(features.get(video_column), datasets.Video):
        dataset = dataset.cast_column(video_column, datasets.Video(decode=False))
    read = partial(_labels, features=features, columns=label_columns)
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedVideos(dataset, name, video_column, read)
    rows = dataset.select_columns(label_columns)
    return [
        LabelledVideo(partial(_video, dataset, index, video_column), read(row, where := f"{name}[{index}]"), where)
        for index, row in enumerate(rows)
    ]


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
            yield LabelledVideo(row[self.video_column], self._read(row, where), where)


def class_names(dataset: Any, column: str) -> list[str] | None:
    """The names of a column of type `ClassLabel`, or of a list of them; None for other types."""
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


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


def _video(dataset: datasets.Dataset, index: int, column: str) -> Any:
    return dataset[index][column]
