"""
Work on any number of videos in shards, so that a run that was killed goes on where it stopped.

Every shard is a parquet file that is written whole or not at all, on a local disk or at an address. Its rows do not
depend on the number of processes, and a shard that is there is not written again. _run.json holds the settings of the
run, so that answers of different models or settings never mix.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.labels import LabelMap
from ..data.remote_files import Location, file_names
from ..data.whole_files import as_utf8, written_whole
from ..video_sources import source_name
from .prediction import VideoPrediction


RUN_FILE = "_run.json"  # what reads folders of Parquet files skips names that begin with an underscore


class OtherRunError(ValueError):
    """The output holds the results of a run with other settings."""

    @classmethod
    def at(cls, path: Location, reason: str) -> "OtherRunError":
        return cls(
            f"{as_utf8(str(path))} holds another run ({reason}): choose another output, or --overwrite to delete its "
            "results and start anew."
        )


def shard_starts(folder: Location, num_videos: int, shard_size: int) -> dict[Location, int]:
    """Return the file of every shard and the index of its first video."""
    starts = range(0, num_videos, shard_size)
    return {folder / f"part-{number:05d}.parquet": start for number, start in enumerate(starts)}


def missing_shards(folder: Location, shards: Mapping[Location, int]) -> list[Location]:
    """Return the shards that are not written yet, in order."""
    there = file_names(folder)
    return [path for path in shards if path.name not in there]


def join_run(folder: Location, settings: dict[str, Any], overwrite: bool, state: Any) -> None:
    """
    Start the run of a folder or go on with it, together with the other processes.

    Args:
        settings, overwrite: see `check_run`.
        state: see `process_group`.

    Raises:
        OtherRunError: see `check_run`; also if the main process started another run, as on a node with other videos.
    """
    is_new = check_run(folder, settings, overwrite)
    state.wait_for_everyone()  # until all have checked, nothing is deleted or written
    if is_new and state.is_main_process:
        start_run(folder, settings)
    state.wait_for_everyone()
    check_run(folder, settings, overwrite=False)


def own_share(missing: list[Location], state: Any) -> list[Location]:
    """Return the shards that this process has to write, of those that are missing."""
    state.wait_for_everyone()  # until all have looked, no shard is written
    return missing[state.process_index :: state.num_processes]


def check_run(folder: Location, settings: dict[str, Any], overwrite: bool) -> bool:
    """
    Return whether `start_run` must prepare the folder: it is new, or holds another run that may be overwritten.

    Args:
        settings: everything that the answers depend on. "model", a name, is not compared; the fingerprint is.

    Raises:
        OtherRunError: if the folder holds another run and `overwrite` is False.
    """
    path = folder / RUN_FILE
    stored = json.loads(path.read_bytes()) if path.exists() else None
    is_other = bool(changes(stored, settings)) if stored is not None else bool(_shards(folder))
    if is_other and not overwrite:
        raise OtherRunError.at(folder, changes(stored, settings) if stored is not None else f"{RUN_FILE} is missing")
    return is_other or stored is None


def changes(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the settings that differ from those of a stored run, with both values; empty if it is the same run."""
    return ", ".join(
        f"{name} {_shown(stored.get(name))} -> {_shown(value)}"
        for name, value in settings.items()
        if name != "model" and stored.get(name) != value
    )


def start_run(folder: Location, settings: dict[str, Any]) -> None:
    """Create the folder with its _run.json, and delete the shards of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _shards(folder):
        (folder / name).unlink()
    with written_whole(folder / RUN_FILE) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_shard(
    path: Location,
    predictions: Sequence[VideoPrediction],
    names: Sequence[str],
    start: int,
    label_map: LabelMap,
    top_k: int,
) -> int:
    """
    Write the predictions of a shard, with the columns index and video and those of `answer_fields`.

    Args:
        names: the paths or addresses of all videos of the run. Addresses are written without secrets.
        start: the index of the first video of the shard.
        top_k: labels per video, and per group of labels.

    Returns:
        The number of videos that could not be read.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    schema = pyarrow.schema([("index", pyarrow.int64()), ("video", pyarrow.string()), *answer_fields()])
    rows = [
        {
            "index": start + one.index,
            "video": as_utf8(source_name(names[start + one.index])),
            **answer_row(one, label_map, top_k),
        }
        for one in predictions
    ]
    with written_whole(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), unfinished)
    return sum(one.error is not None for one in predictions)


def answer_fields() -> list[tuple[str, Any]]:
    """Return the columns of `answer_row` and their types in Arrow, which do not depend on the answers."""
    import pyarrow

    return [
        ("labels", pyarrow.list_(pyarrow.string())),
        ("scores", pyarrow.list_(pyarrow.float32())),
        ("unknown", pyarrow.bool_()),
        ("error", pyarrow.string()),
    ]


def answer_row(one: VideoPrediction, label_map: LabelMap, top_k: int) -> dict[str, Any]:
    """
    Return the answer for a video: "labels" and "scores" (best first), "unknown" and "error", each None without a value.

    Args:
        top_k: labels per video, and per group of labels.
    """
    best = label_map.best(one.probabilities, top_k, with_scores=True)
    return {
        "labels": None if best is None else [as_utf8(label) for label, _ in best],
        "scores": None if best is None else [score for _, score in best],
        "unknown": one.unknown,
        "error": None if one.error is None else as_utf8(one.error),
    }


def _shards(folder: Location) -> list[str]:
    return [name for name in file_names(folder) if name.startswith("part-") and name.endswith(".parquet")]


def _shown(value: Any) -> str:
    """Return a setting for an error message; of a digest only the beginning."""
    if not isinstance(value, str):
        return repr(value)
    short = re.sub(r"([0-9a-f]{12})[0-9a-f]{28,}", r"\1...", value)
    return repr(value) if short == value else short
