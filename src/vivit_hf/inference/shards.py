"""
Work on any number of videos in shards, so that a run that was killed goes on where it stopped.

Every shard is a parquet file that is written whole or not at all. run.json holds the settings of the run, so that
answers of different models or settings never mix.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.labels import LabelMap
from ..data.whole_files import as_utf8, written_whole
from ..video_sources import source_name
from .prediction import VideoPrediction


class OtherRunError(ValueError):
    """The output holds the results of a run with other settings."""

    @classmethod
    def at(cls, path: Path, reason: str) -> "OtherRunError":
        return cls(
            f"{as_utf8(path)} holds another run ({reason}): choose another output, or --overwrite to delete its "
            "results and start anew."
        )


def shard_starts(folder: Path, num_videos: int, shard_size: int) -> dict[Path, int]:
    """Return the file of every shard and the index of its first video."""
    starts = range(0, num_videos, shard_size)
    return {folder / f"part-{number:05d}.parquet": start for number, start in enumerate(starts)}


def check_run(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """
    Return whether `start_run` must prepare the folder: it is new, or holds another run that may be overwritten.

    Args:
        settings: everything that the answers depend on. "model", a name, is not compared; the fingerprint is.

    Raises:
        OtherRunError: if the folder holds another run and `overwrite` is False.
    """
    path = folder / "run.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    is_other = bool(changes(stored, settings)) if stored is not None else any(_shards(folder))
    if is_other and not overwrite:
        raise OtherRunError.at(folder, changes(stored, settings) if stored is not None else "run.json is missing")
    return is_other or stored is None


def changes(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the settings that differ from those of a stored run, with both values; empty if it is the same run."""
    return ", ".join(
        f"{name} {_shown(stored.get(name))} -> {_shown(value)}"
        for name, value in settings.items()
        if name != "model" and stored.get(name) != value
    )


def start_run(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder with its run.json, and delete the shards of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in _shards(folder):
        shard.unlink()
    with written_whole(folder / "run.json") as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_shard(
    path: Path,
    predictions: Sequence[VideoPrediction],
    names: Sequence[str],
    start: int,
    label_map: LabelMap,
    top_k: int,
) -> int:
    """
    Write the predictions of a shard, with the columns index, video, labels and scores (best first) and error.

    Args:
        names: the paths or addresses of all videos of the run. Addresses are written without secrets.
        start: the index of the first video of the shard.
        top_k: labels per video, and per group of labels.

    Returns:
        The number of videos that could not be read.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    schema = pyarrow.schema(
        [
            ("index", pyarrow.int64()),
            ("video", pyarrow.string()),
            ("labels", pyarrow.list_(pyarrow.string())),
            ("scores", pyarrow.list_(pyarrow.float32())),
            ("error", pyarrow.string()),
        ]
    )
    rows = [_row(one, names[start + one.index], start, label_map, top_k) for one in predictions]
    with written_whole(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), unfinished)
    return sum(one.error is not None for one in predictions)


def _shards(folder: Path) -> Iterator[Path]:
    return folder.glob("part-*.parquet")


def _row(one: VideoPrediction, name: str, start: int, label_map: LabelMap, top_k: int) -> dict[str, Any]:
    best = label_map.best(one.probabilities, top_k, with_scores=True)
    return {
        "index": start + one.index,
        "video": as_utf8(source_name(name)),
        "labels": None if best is None else [as_utf8(label) for label, _ in best],
        "scores": None if best is None else [score for _, score in best],
        "error": None if one.error is None else as_utf8(one.error),
    }


def _shown(value: Any) -> str:
    """Return a setting for an error message; of a digest only the beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) >= 40 else repr(value)
