"""
Embed any number of videos into a features file: a run that was killed goes on, and several processes share the work.

Until the run is finished, its shards are in a folder beside the file, `features.parquet.parts`. Each is written whole
or not at all, and `_run.json` holds what they depend on, so that features of different models or settings never mix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..data.remote_files import Location, remove_folder
from ..data.video_identity import known_identity
from ..data.whole_files import as_utf8
from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import source_name
from .feature_files import Features, join_features, read_settings, write_features
from .features import VideoEmbedding, embed_videos
from .shards import OtherRunError, changes, check_run, join_run, missing_shards, shard_starts


MOST_SHARD_VIDEOS = 64  # a killed process loses one shard at most
LEAST_SHARDS = 16  # so that several processes share small sets, too


@dataclass(frozen=True)
class FeatureRun:
    """
    Embed videos into a features file.

    `output`: the features file, see `location_of`.
    `videos`: paths or addresses, or dictionaries with a "path" and optionally "start" and "end" in seconds.
    `settings`: see `feature_settings`.
    """

    output: Location
    videos: Sequence[Any]
    settings: dict[str, Any]

    @property
    def parts(self) -> Location:
        return self.output.with_name(f"{self.output.name}.parts")

    @cached_property
    def shards(self) -> dict[Location, int]:
        """The file of every shard, and the index of its first video."""
        return shard_starts(self.parts, len(self.videos), self._shard_videos)

    @property
    def _shard_videos(self) -> int:
        return min(MOST_SHARD_VIDEOS, -(-len(self.videos) // LEAST_SHARDS))

    def is_finished(self, overwrite: bool) -> bool:
        """
        Return whether the output is there already.

        Raises:
            OtherRunError: if the output or the folder of its shards holds another run and `overwrite` is False.
            ValueError: if the output is a file without features.
        """
        check_run(self.parts, _run_settings(self.settings), overwrite)
        if not self.output.exists():
            return False
        found = changes(_run_settings(read_settings(self.output)), _run_settings(self.settings))
        if found and not overwrite:
            raise OtherRunError.at(self.output, found)
        return not found and not overwrite

    def start(self, overwrite: bool, state: Any) -> None:
        """Prepare the folder of the shards together with the other processes, and keep those of this run."""
        join_run(self.parts, _run_settings(self.settings), overwrite, state)

    def num_videos(self, shard: Location) -> int:
        return min(self._shard_videos, len(self.videos) - self.shards[shard])

    def missing(self) -> list[Location]:
        """Return the shards that are not written yet."""
        return missing_shards(self.parts, self.shards)

    def embed(
        self, model: Any, processor: ViViTVideoProcessor, shards: Sequence[Location], **options: Any
    ) -> Iterator[VideoEmbedding]:
        """
        Embed the videos of some shards and write each shard; yield the result for each video.

        Args:
            model, processor, options: see `embed_videos`; the views are those of the settings.
        """
        views = {name: self.settings["views"][name] for name in ("num_clips", "num_crops")}
        is_step = self.settings["kind"] == "step"
        for path in shards:
            start = self.shards[path]
            part = self.videos[start : start + self._shard_videos]
            found = []
            for one in embed_videos(model, processor, part, per_step=is_step, **views, **options):
                found.append(one)
                yield one
            write_features(path, to_features(found, part, self.settings))

    def join(self) -> dict[str, Any]:
        """Write the output from the shards, and delete them; return the settings of the output."""
        settings = join_features(list(self.shards), self.output)
        remove_folder(self.parts)
        return settings


def feature_settings(
    model: Any,
    processor: ViViTVideoProcessor,
    videos: Sequence[Any],
    *,
    name: str,
    fingerprint: dict[str, str],
    per_step: bool,
    num_clips: int,
    num_crops: int,
) -> dict[str, Any]:
    """
    Return the settings that features depend on, for `Features.settings`.

    Args:
        name: the folder or Hub id of the model.
        fingerprint: see `model_fingerprint`.

    Raises:
        ValueError: for features per step with short_video_policy="mask", as all videos must have as many steps.
    """
    config = model.config
    if per_step and processor.short_video_policy == "mask":
        raise ValueError(
            "Features per step have as many steps for every video, and the processor's short_video_policy='mask' "
            "leaves steps of short videos out: leave out --per-step (`per_step`), or use another policy."
        )
    hidden = config.hidden_size if per_step else config.representation_size or config.pooled_size
    is_uniform, rate = processor.frame_sampling == "uniform", processor.frames_per_second
    listed = [json.dumps([description(video), known_identity(video)]) for video in videos]
    return {
        "kind": "step" if per_step else "video",
        "model": as_utf8(name),
        "fingerprint": fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "hidden_size": hidden,
        "num_steps": config.grid_size[0] * num_clips if per_step else None,
        "views": {
            "num_frames": processor.num_frames,
            "frame_sampling": processor.frame_sampling,
            "frame_stride": None if is_uniform or rate is not None else processor.frame_stride,
            "frames_per_second": None if is_uniform else rate,
            "num_clips": num_clips,
            "num_crops": num_crops,
            "short_video_policy": processor.short_video_policy,
            "on_error": processor.on_error,
        },
        "num_videos": len(videos),
        "videos_digest": hashlib.sha256("\n".join(listed).encode()).hexdigest(),
        "versions": {"vivit_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "failed": [],
    }


def description(video: Any) -> dict[str, Any]:
    """Return the name of a video and the part of it: "file", and "start" and "end" in seconds or None."""
    part = video if isinstance(video, dict) else {}
    return {"file": as_utf8(source_name(video)), "start": part.get("start"), "end": part.get("end")}


def to_features(found: Sequence[VideoEmbedding], videos: Sequence[Any], settings: dict[str, Any]) -> Features:
    """Return the features of videos in one object; those that could not be read are "failed" in its settings."""
    described = [description(video) for video in videos]
    good = [one for one in found if one.error is None]
    steps = () if settings["num_steps"] is None else (settings["num_steps"],)
    shape = (len(good), *steps, settings["hidden_size"])
    vectors = np.array([one.vectors for one in good], dtype=np.float32).reshape(shape)
    times = np.array([one.times for one in good], dtype=np.float64).reshape(shape[:-1]) if steps else None
    starts, ends = (np.array([described[one.index][key] for one in good], dtype=np.float64) for key in ("start", "end"))
    failed = [{**described[one.index], "error": as_utf8(one.error)} for one in found if one.error is not None]
    names = tuple(described[one.index]["file"] for one in good)
    return Features(names, vectors, times, starts, ends, {**settings, "failed": failed})


def _run_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide whether two runs give the same features, and the name of the model."""
    kept = {name: settings[name] for name in ("model", "kind", "dtype", "num_videos", "videos_digest")}
    return {**kept, **settings["views"], **settings["fingerprint"]}
