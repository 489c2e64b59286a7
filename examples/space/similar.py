"""Search by video: the videos of stored features that are most like an upload, and pictures of what may be shown."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import DEMO, MOST_PIXELS, TOP_K, Job, UserError
from PIL import Image

from vivit_hf import VideoReader, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import (
    Features,
    embed_videos,
    hub_commit,
    model_fingerprint,
    read_features,
    search_features,
)
from vivit_hf.inference.search import NeighbourGraph, neighbour_graph, unit_vectors
from vivit_hf.initialisation.image_features import is_image_model, vivit_from_image
from vivit_hf.video_sources import VideoDecodingError, VideoLimits, part_of_video


PICTURE_HEIGHT = 96
MOMENTS = (0.1, 0.5, 0.9)  # of a video or a part of it, for its picture
AROUND = 0.5  # seconds before and after the best moment


@dataclass(frozen=True)
class Index:
    """Features, the model that made them, and the names to show for their videos."""

    features: Features
    model: Any
    processor: ViViTVideoProcessor
    graph: NeighbourGraph | None
    names: tuple[str, ...]


@lru_cache(maxsize=1)
def load_index(paths: tuple[str, ...], model: str | None) -> Index:
    """
    Load features and the model that made them.

    Args:
        model: where the model is now; None for the place in the features.

    Raises:
        UserError: if the files hold no features, or the model is missing or another one.
    """
    try:
        features = read_features(paths)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot search: {error}") from error
    if not features.files:
        raise UserError(f"Cannot search: {paths[0]} holds no features, because none of its videos could be read.")
    name = str(demo_model_path()) if model == DEMO else model or features.settings["model"]
    try:
        encoder, processor = _load_encoder(name, features.settings)
    except UserError:
        raise
    except Exception as error:  # a damaged folder can make the libraries raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot search: the model of the features, {name!r}, cannot be loaded: {reason}") from error
    vectors = unit_vectors(features.vectors.reshape(-1, features.vectors.shape[-1]))
    return Index(features, encoder, processor, neighbour_graph(vectors), shown_names(features.files))


def _load_encoder(name: str, settings: dict[str, Any]) -> tuple[Any, ViViTVideoProcessor]:
    views = settings["views"]
    if is_image_model(name):
        model, processor = vivit_from_image(name, views["num_frames"])
    else:
        model = ViViTForVideoClassification.from_pretrained(name)
        processor = ViViTVideoProcessor.from_pretrained(name)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, settings["dtype"])).eval()
    processor.frame_sampling = views["frame_sampling"]
    found = model_fingerprint(name, model.config, processor, hub_commit(name))
    if changed := [part for part, digest in settings["fingerprint"].items() if found[part] != digest]:
        raise UserError(
            f"Cannot search: {name!r} is not the model that the features come from ({settings['model']!r}): its "
            f"{' and '.join(changed)} changed. Give the right one with --features-model, or embed the videos again."
        )
    processor.on_error = views["on_error"]
    processor.video_limits = {**(processor.video_limits or {}), "max_decoded_pixels": MOST_PIXELS}
    return model, processor


def shown_names(files: Sequence[str]) -> tuple[str, ...]:
    """Return the names of files with at most one folder that tells them apart, so that no path of the server shows."""
    local = [os.path.abspath(file) for file in files if "://" not in file]
    try:
        common = os.path.commonpath([os.path.dirname(file) for file in local]) if local else ""
    except ValueError:  # on different drives
        common = ""
    names = []
    for file in files:
        is_local = "://" not in file
        parts = Path(os.path.relpath(os.path.abspath(file), common)).parts if is_local and common else (file,)
        names.append("/".join(parts[-2:]) if is_local and common else file.replace("\\", "/").rsplit("/", 1)[-1])
    return tuple(names)


def shown_path(file: str, folders: Sequence[str]) -> Path | None:
    """Return the path of a file if it lies in one of the folders, whatever links lead to it; else None."""
    if "://" in file or "\0" in file:
        return None
    path = Path(file).resolve()
    return path if path.is_file() and any(path.is_relative_to(Path(one).resolve()) for one in folders) else None


def picture_of(file: Path, start: float, end: float, time: float | None) -> str | None:
    """Return three frames of a video as a JPEG in a data address, None if they cannot be read."""
    part = {name: value for name, value in (("start", start), ("end", end)) if value == value}
    try:
        with VideoReader(str(file), limits=VideoLimits(max_decoded_pixels=MOST_PIXELS)) as reader:
            times = reader.timestamps
            first, total = part_of_video(times, {"path": str(file), **part} if part else str(file))
            places = [first + round(moment * (total - 1)) for moment in MOMENTS]
            if time is not None:
                moments = times[0] + time + np.array([-AROUND, 0, AROUND])
                places = np.clip(np.searchsorted(times, moments), first, first + total - 1).tolist()
            frames = reader.frames_at(places, on_lost="repeat_last")
    except (VideoDecodingError, OSError, ValueError):
        return None
    height, width = frames.shape[1:3]
    size = (max(1, min(2 * PICTURE_HEIGHT, round(width * PICTURE_HEIGHT / height))), PICTURE_HEIGHT)
    small = [np.asarray(Image.fromarray(frame).resize(size)) for frame in frames]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def matches_of(job: Job, index: Index, path: Path) -> list[dict[str, Any]]:
    """Return "name" and "score" of the videos most like an upload, with what there is of "part", "time", "picture"."""
    settings = index.features.settings
    views = {name: settings["views"][name] for name in ("num_clips", "num_crops")}
    is_step = settings["kind"] == "step"
    (query,) = embed_videos(index.model, index.processor, [str(path)], per_step=is_step, **views)
    if query.vectors is None:
        raise UserError(query.error or "The video cannot be read.")
    found = []
    for match in search_features(index.features, query.vectors, TOP_K, index.graph):
        file, start, end = (
            one[match.index] for one in (index.features.files, index.features.starts, index.features.ends)
        )
        row: dict[str, Any] = {"name": index.names[match.index], "score": match.score, "time": match.time}
        row["part"] = [None if value != value else float(value) for value in (start, end)]
        path = shown_path(file, job.folders)
        row["picture"] = None if path is None else picture_of(path, start, end, match.time)
        found.append(row)
    return found


def checking(job: Job) -> Iterator[dict[str, Any]]:
    """Load the features and their model; raises UserError if they do not fit each other."""
    load_index(job.features, job.features_model)
    yield {"status": "The features are ready."}
