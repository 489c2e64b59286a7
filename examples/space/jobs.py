"""The jobs of the page, run in a separate process that is killed if a job takes too long.

Python cannot interrupt FFmpeg and torch, and killing a process frees everything that it held.
"""

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vivit_hf import VideoReader, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.data import LabelMap
from vivit_hf.data.labels import to_probabilities
from vivit_hf.explain import explain_clip, save_explanation
from vivit_hf.inference import (
    Segment,
    StreamingClassifier,
    average_views,
    describe_views,
    predict_views,
    video_timeline,
)
from vivit_hf.inference.clips import check_takes_masks
from vivit_hf.inference.finite_outputs import check_finite
from vivit_hf.inference.optimization import optimized
from vivit_hf.inference.unknown import UNKNOWN, UnknownRule, classifier_inputs
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError, VideoLimits


DEMO = "demo (moving shapes)"
DEMO_NOTE = (
    f"The demo model only knows shapes that move along a diagonal. It calls nearly all other videos {UNKNOWN!r}, and "
    "its labels mean nothing for the rest of them."
)
EXACT_NOTE = "The setting that `vivit-hf tune` stored is left out: labels and pictures are those of the exact model."
MOST_WINDOWS = 300  # of a timeline, so that a long video does not keep other visitors waiting
TOP_K = 5
# More than any slow-motion camera records. A short file that claims more frames is not worth reading.
MOST_FRAMES_PER_SECOND = 1000
MOST_PIXELS = 8_000_000_000  # of all frames of a file: ten minutes of 480p, or half a minute of 4K
TOO_LARGE = (
    "{name} is too large: it has {megabytes} MB, and this page accepts up to {limit} MB. Cut out the part that "
    "matters, or save it in a smaller size."
)


class UserError(Exception):
    """An error that the visitor can fix. Its text is shown on the page."""


@dataclass(frozen=True)
class Clip:
    """An uploaded file within the limits of the page."""

    path: Path
    last_frame: float  # the time of the last frame, seconds
    frames_per_second: float  # on average
    summary: str


def check_clip(path: str | None, max_seconds: float, max_megabytes: float) -> Clip:
    """Raise UserError with the reason if a file is missing, too large, too long or unreadable."""
    if path is None:
        raise UserError("There is no video yet: upload a file or record one.")
    file = Path(path)
    megabytes = file.stat().st_size / 1e6
    if megabytes > max_megabytes:
        raise UserError(TOO_LARGE.format(name=file.name, megabytes=f"{megabytes:.1f}", limit=f"{max_megabytes:g}"))
    max_frames = max(1, round(max_seconds * MOST_FRAMES_PER_SECOND))
    try:
        with VideoReader(path, limits=VideoLimits(max_frames=max_frames, max_decoded_pixels=MOST_PIXELS)) as reader:
            count, times = reader.num_frames, reader.timestamps
            height, width = reader.frames_at([0], on_lost="repeat_last").shape[1:3]
        if count * height * width > MOST_PIXELS:
            reason = f"{count} frames of {width} x {height} are more than {MOST_PIXELS:,} pixels"
            raise VideoLimitError(reason, source=str(path), reason=reason)
    except VideoLimitError as error:
        raise UserError(f"{file.name} is too long or its pictures are too large: {error.reason}.") from error
    except VideoDecodingError as error:
        raise UserError(
            f"Cannot read {file.name}: {error.reason}. It may be damaged, or contain no video. If it plays elsewhere, "
            "save it as MP4 (H.264) and upload that."
        ) from error
    # A frame is shown until the next one; the last frame as long as the others on average.
    seconds = float(times[-1]) * count / (count - 1) if count > 1 else 0.0
    if seconds > max_seconds:
        raise UserError(
            f"{file.name} is too long: it lasts {spoken(seconds)}, and this page accepts up to {spoken(max_seconds)}. "
            "Cut out the part that matters."
        )
    summary = f"{file.name}: {seconds:.1f} seconds, {count} frame{'s' * (count > 1)} of {width} x {height}"
    return Clip(file, float(times[-1]), count / seconds if seconds else 0.0, summary)


def spoken(seconds: float) -> str:
    """Return a duration in words, in seconds or minutes."""
    return f"{round(seconds, 1):g} seconds" if seconds < 120 else f"{round(seconds / 60, 1):g} minutes"


@lru_cache(maxsize=2)  # visitors can name any model, and memory is limited
def load_model(name: str) -> tuple[Any, ViViTVideoProcessor]:
    """Load the model and processor of a folder or Hub id, without running code that comes with them."""
    folder = demo_model_path() if name == DEMO else name
    try:
        model = ViViTForVideoClassification.from_pretrained(folder).eval()
        processor = ViViTVideoProcessor.from_pretrained(
            folder, on_error="repeat_last", video_limits={"max_decoded_pixels": MOST_PIXELS}
        )
    except Exception as error:  # a damaged or hostile folder can make the libraries raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot load the model {name!r}: {reason}") from error
    if not model.config.num_labels:
        raise UserError(f"The model {name!r} has no classifier: choose one that was trained on labels.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def num_clips(processor: ViViTVideoProcessor) -> int:
    """Return the number of clips whose scores are averaged. Uniform sampling spreads one clip over the whole video."""
    return 1 if processor.frame_sampling == "uniform" else 4


@dataclass
class Answer:
    """The most likely labels of a video, and the clip with the highest score of the first label."""

    labels: dict[str, float]
    label: str
    class_index: int
    pixel_values: torch.Tensor  # (1, frames, channels, height, width)
    frame_mask: torch.Tensor | None  # bool (1, frames), if the processor masks the ends of short videos
    place: int  # of the clip in the video
    score: float  # of the label for this clip


def classify(model: Any, processor: ViViTVideoProcessor, path: Path) -> Answer:
    """Classify a video by the average over its clips. With groups of labels, the first group chooses the clip."""
    features = processor(path, num_clips=num_clips(processor), num_crops=1)
    views = features["pixel_values"].to(model.device, model.dtype)  # (clips, frames, channels, height, width)
    ids = None if features.frame_ids is None else np.asarray(features.frame_ids)[None]
    mask = features.get("frame_mask")  # (clips, frames)
    check_takes_masks(model, processor)
    label_map = LabelMap.from_config(model.config)
    rule = UnknownRule.of(model)
    with torch.inference_mode(), classifier_inputs(model) as seen:
        masks = None if mask is None else mask[None]
        logits = predict_views(model, views[None], frame_ids=ids, frame_mask=masks)
        check_finite(logits, model, views)
        probabilities = to_probabilities(average_views(logits, label_map)[0].cpu(), label_map)
        of_clips = to_probabilities(logits[0].float().cpu(), label_map)  # (clips, labels)
    names = label_map.names
    first_group = len(next(iter(label_map.groups.values())))
    best = int(probabilities[:first_group].argmax())
    place = int(of_clips[:, best].argmax())
    labels = sorted(zip(names, probabilities.tolist(), strict=True), key=lambda one: -one[1])[:TOP_K]
    if rule is not None and rule.is_unknown(float(rule.scores(logits, torch.cat(seen)[None])), logits.shape[1]):
        labels = [(UNKNOWN, 1.0)]
    one = slice(place, place + 1)
    clip, clip_mask = views[one].clone(), None if mask is None else mask[one]
    return Answer(dict(labels), names[best], best, clip, clip_mask, place, float(of_clips[place, best]))


def timeline(model: Any, processor: ViViTVideoProcessor, clip: Clip) -> list[Segment]:
    """Return the segments of a video; none with uniform sampling. In a long one, windows are farther apart."""
    if processor.frame_sampling == "uniform":
        return []
    rate = processor.frames_per_second or clip.frames_per_second / processor.frame_stride
    widest = math.ceil(clip.last_frame * rate / MOST_WINDOWS)
    return video_timeline(model, processor, clip.path, hop=max(StreamingClassifier(model, processor).hop, widest))


@dataclass(frozen=True)
class Job:
    """The request of a visitor. The pictures are written to `folder`."""

    path: str | None
    model: str
    method: str
    folder: str
    max_seconds: float
    max_megabytes: float


def answer(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the parts of the answer, each as soon as it is ready. Raises UserError and the errors of the package."""
    clip = check_clip(job.path, job.max_seconds, job.max_megabytes)
    yield {"status": f"{clip.summary}. Loading the model ..."}
    network, processor = load_model(job.model)
    yield {"status": f"{clip.summary}. Classifying ..."}
    with optimized(network):  # the explanation by gradients, below, needs the plain model
        found = classify(network, processor, clip.path)
        yield {"labels": found.labels}
        yield {"segments": timeline(network, processor, clip)}
    target = found.class_index if job.method == "gradient" else None
    explanation = explain_clip(network, processor, found.pixel_values, job.method, target, TOP_K, found.frame_mask)
    pictures = [str(save_explanation(Path(job.folder, name), explanation)) for name in ("seen.gif", "sheet.png")]
    total = num_clips(processor)
    caption = "The frames that the model saw, and where it looked."
    if total > 1:
        caption = (
            f"Clip {found.place + 1} of {total}, the one with the highest score for {found.label!r} "
            f"({found.score:.0%}), and where the model looked. The labels above are an average over all clips."
        )
    own = explanation.labels[0][0]
    if own != found.label and not LabelMap.from_config(network.config).is_grouped:
        caption += f" On its own, this clip would be labelled {own!r}."
    status = f"{clip.summary}. The labels are from {describe_views(processor, total, num_crops=1)}."
    if UNKNOWN in found.labels:
        status += f" The video is unlike those that the model was trained on; its nearest label is {found.label!r}."
    if network.config.optimization is not None:
        status += f" {EXACT_NOTE}"
    if job.model == DEMO:
        status += f" {DEMO_NOTE}"
    yield {"pictures": pictures, "caption": caption, "status": status}


def _serve(connection: Any) -> None:
    """Answer jobs until the connection closes; runs in the process of a `Worker`."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            for part in answer(job):
                connection.send(part)
            connection.send({"end": True})
        except (UserError, VideoDecodingError, ValueError) as error:
            connection.send({"error": str(error)})
        except Exception as error:
            logging.exception("A video could not be classified.")
            text = f"Unexpected error: {type(error).__name__}. See the log of the server."
            connection.send({"error": text})


class Worker:
    """A process that answers jobs one by one. It is killed, and replaced, if a job takes longer than `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        """Yield the parts of `answer`, then a part with "end" or "error"."""
        with self._lock:
            is_done = False
            try:
                self._start()
                self._connection.send(job)
                deadline = time.monotonic() + self.seconds
                while not is_done:
                    if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                        yield {
                            "error": f"This took longer than {spoken(self.seconds)} and was stopped: try a shorter or "
                            "smaller video, or another model."
                        }
                        return
                    part = self._connection.recv()
                    is_done = "end" in part or "error" in part
                    yield part
            except (EOFError, OSError):
                yield {"error": "The process that read the video has died. It may have run out of memory."}
            finally:
                if not is_done:  # also if the visitor has left before the end
                    self.stop()

    def _start(self) -> None:
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
