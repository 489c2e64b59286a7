"""
Features of videos on disk: Parquet files with a row per video, or per video and time step.

| column | type | |
| --- | --- | --- |
| `file` | string | the video as it was given; an address without secrets |
| `start`, `end` | float64 | the part of the file in seconds; null for a whole file |
| `step`, `time` | int32, float64 | per step only: its number, and its seconds from the first frame of the file |
| `vector` | fixed-size list of float32 | (hidden,) |

The key `vivit_hf` of the schema's metadata holds `Features.settings` as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from ..data.remote_files import Location, RemotePath, location_of
from ..data.whole_files import written_whole


METADATA_KEY = b"vivit_hf"
# Settings that may differ between the files of one set of features.
_OF_A_FILE = ("model", "num_videos", "videos_digest", "versions", "failed")


@dataclass(frozen=True)
class Features:
    """
    Features of videos, and the settings that they were computed with.

    `files`: the video of each vector, as it was given.
    `vectors`: float32 (videos, hidden), or per step (videos, steps, hidden).
    `times`: per step float64 (videos, steps), seconds from the first frame of the file to the middle frame of the step;
        None for a vector per video.
    `starts`, `ends`: float64 (videos,), the part of the file in seconds; NaN stands for the beginning or end of it.
    `settings`: "kind" ("video" or "step"), "model" (its name), "fingerprint" (digests of its "weights", "config" and
        "processor"), "dtype", "hidden_size", "num_steps" (None for a vector per video), "views" ("num_frames",
        "frame_sampling", "frame_stride", "frames_per_second", "num_clips", "num_crops", "short_video_policy",
        "on_error"), "num_videos", "videos_digest" (see `identity_of`), "versions", and "failed": {"file", "start",
        "end", "error"} of every video without features.

    Raises ValueError if the shapes do not fit each other.
    """

    files: tuple[str, ...]
    vectors: np.ndarray
    times: np.ndarray | None
    starts: np.ndarray
    ends: np.ndarray
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = (len(self.files), self.settings["hidden_size"])
        if self.settings["kind"] == "step":
            shape = (shape[0], self.settings["num_steps"], shape[1])
        if self.vectors.shape != shape or self.vectors.dtype != np.float32:
            raise ValueError(f"Expected float32 vectors of {shape}, got {self.vectors.dtype} of {self.vectors.shape}.")
        if (None if self.times is None else self.times.shape) != (shape[:2] if len(shape) == 3 else None):
            raise ValueError(f"The times do not fit vectors of {shape}: expected {shape[:-1]} per step, else None.")
        if not self.starts.shape == self.ends.shape == shape[:1]:
            raise ValueError(f"Expected {shape[0]} starts and ends, got {self.starts.shape} and {self.ends.shape}.")


def write_features(path: str | os.PathLike[str] | Location, features: Features) -> None:
    """Write features to a Parquet file, completely or not at all; `path` may be an address, see `location_of`."""
    schema = _schema(features.settings)
    repeats = features.settings["num_steps"] or 1
    columns = {
        "file": pyarrow.array(np.repeat(np.array(features.files, dtype=object), repeats), pyarrow.string()),
        "start": pyarrow.array(np.repeat(features.starts, repeats), from_pandas=True),  # NaN becomes null
        "end": pyarrow.array(np.repeat(features.ends, repeats), from_pandas=True),
    }
    if features.times is not None:
        columns["step"] = pyarrow.array(np.tile(np.arange(repeats, dtype=np.int32), len(features.files)))
        columns["time"] = pyarrow.array(features.times.reshape(-1))
    numbers = pyarrow.array(np.ascontiguousarray(features.vectors).reshape(-1))
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(numbers, features.settings["hidden_size"])
    with written_whole(location_of(path)) as unfinished:
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), unfinished, use_dictionary=["file"])


def join_features(parts: Sequence[Location], path: Location) -> dict[str, Any]:
    """Write the rows of several files of one run into one file, a part at a time; return its settings."""
    settings = _joined([(str(part), read_settings(part)) for part in parts])
    schema = _schema(settings)
    with (
        written_whole(path) as unfinished,
        pyarrow.parquet.ParquetWriter(unfinished, schema, use_dictionary=["file"]) as writer,
    ):
        for part in parts:
            with _opened(part) as file:
                writer.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata(schema.metadata))
    return settings


def read_settings(path: str | os.PathLike[str] | Location) -> dict[str, Any]:
    """Return the settings of a features file without reading its vectors. Raises ValueError if it is not one."""
    path = location_of(path)
    try:
        with _opened(path) as file:
            metadata = pyarrow.parquet.read_schema(file).metadata or {}
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is not a Parquet file: expected features of `vivit-hf embed`.") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} holds no features of `vivit-hf embed`: its metadata has no 'vivit_hf'.")
    return json.loads(metadata[METADATA_KEY])


def read_features(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Features:
    """
    Read the features in a file, or in several files of the same model and settings, in their order.

    The settings of several files have no "num_videos" and "videos_digest", and the "model" and "versions" of the first.

    Args:
        paths: a file or several, as `vivit-hf embed` writes them; addresses are those of `location_of`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file holds no features, or files of different models or settings are mixed.
    """
    files = [location_of(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not files:
        raise ValueError("There is no file of features to read: expected one or more.")
    settings = _joined([(str(path), read_settings(path)) for path in files])
    if len(files) > 1:
        settings = {name: value for name, value in settings.items() if name not in ("num_videos", "videos_digest")}
    table = pyarrow.concat_tables([_checked_table(path, settings) for path in files])
    steps, is_step = settings["num_steps"] or 1, settings["kind"] == "step"
    shape = (len(table) // steps, steps) if is_step else (len(table),)
    vectors = [chunk.flatten().to_numpy() for chunk in table["vector"].chunks]
    return Features(
        files=tuple(table["file"].to_pylist()[::steps]),
        vectors=np.concatenate([np.empty(0, np.float32), *vectors]).reshape(*shape, settings["hidden_size"]),
        times=np.array(table["time"]).reshape(shape) if is_step else None,
        starts=np.array(table["start"])[::steps],  # null becomes NaN
        ends=np.array(table["end"])[::steps],
        settings=settings,
    )


def _schema(settings: dict[str, Any]) -> Any:
    fields = [("file", pyarrow.string()), ("start", pyarrow.float64()), ("end", pyarrow.float64())]
    if settings["kind"] == "step":
        fields += [("step", pyarrow.int32()), ("time", pyarrow.float64())]
    fields.append(("vector", pyarrow.list_(pyarrow.float32(), settings["hidden_size"])))
    return pyarrow.schema(fields, metadata={METADATA_KEY: json.dumps(settings)})


def _joined(named: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the settings of all files together. Raises ValueError if these are not features of one kind."""
    first_name, first = named[0]
    for name, settings in named[1:]:
        for key in first:
            if key not in _OF_A_FILE and settings.get(key) != first[key]:
                raise ValueError(
                    f"{name} and {first_name} differ in {key} ({settings.get(key)} and {first[key]}): features of "
                    "different models or settings cannot be compared. Embed the videos of both with the same."
                )
    return {**first, "failed": [one for _, settings in named for one in settings["failed"]]}


def _opened(path: Location) -> AbstractContextManager[Any]:
    """Return a remote file opened, and a local path as it is, which Arrow reads itself."""
    return path.open("rb") if isinstance(path, RemotePath) else nullcontext(path)


def _checked_table(path: Location, settings: dict[str, Any]) -> Any:
    with _opened(path) as file:
        table = pyarrow.parquet.read_table(file)
    if settings["kind"] == "step":
        steps = settings["num_steps"]
        order = table["step"].to_numpy()
        if len(order) % steps or (order.reshape(-1, steps) != np.arange(steps)).any():
            raise ValueError(f"{path} has lost rows or their order: expected steps 0 to {steps - 1} a video.")
    return table
