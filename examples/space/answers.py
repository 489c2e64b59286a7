"""What the process of a `Worker` computes: what happens in a video, how sure that is, when, and where it looked."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certainty import how_sure
from comparison import compare
from jobs import DEMO, MOST_PIXELS, TOO_LARGE, TOP_K, Job, Limits, UserError, spoken
from similar import checking, load_index, matches_of

from vivit_hf import VideoReader, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.calibration_vivit import Calibration
from vivit_hf.data.escaping import counted
from vivit_hf.data.labels import to_probabilities
from vivit_hf.explain import explain_clip, save_explanation
from vivit_hf.inference import StreamingClassifier, VideoPrediction, describe_views, video_timeline
from vivit_hf.inference.batch_predictor import stored_averaging
from vivit_hf.inference.clips import check_takes_masks, shown_masks
from vivit_hf.inference.optimization import optimized
from vivit_hf.inference.prediction import Answers
from vivit_hf.inference.unknown import UNKNOWN, classifier_inputs
from vivit_hf.inference.view_batches import Views, decode_views
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError, VideoLimits


DEMO_NOTE = (
    f"The demo model only knows shapes that move along a diagonal. It calls nearly all other videos {UNKNOWN!r}, and "
    "its labels mean nothing for the rest of them."
)
EXACT_NOTE = "The setting that `vivit-hf tune` stored is left out: labels and pictures are those of the exact model."
MOST_WINDOWS = 300  # of a timeline, so that a long video does not keep other visitors waiting
MOST_VIEWS = 64  # of a video, for memory
BATCH = 8  # clips that the model sees at a time
SHARE = 1 / 3  # of the deadline: for the views of a video, for its timeline, and for what is left
# More than any slow-motion camera records. A short file that claims more frames is not worth reading.
MOST_FRAMES_PER_SECOND = 1000


@dataclass(frozen=True)
class Clip:
    """An uploaded file within the limits of the page."""

    path: Path
    last_frame: float  # the time of the last frame, seconds
    frames_per_second: float  # on average
    summary: str


def check_clip(path: str | None, limits: Limits) -> Clip:
    """Raise UserError with the reason if a file is missing, too large, too long or unreadable."""
    if path is None:
        raise UserError("There is no video yet: upload a file or record one.")
    file = Path(path)
    megabytes = file.stat().st_size / 1e6
    if megabytes > limits.max_megabytes:
        limit = f"{limits.max_megabytes:g}"
        raise UserError(TOO_LARGE.format(name=file.name, megabytes=f"{megabytes:.1f}", limit=limit))
    max_frames = max(1, round(limits.max_seconds * MOST_FRAMES_PER_SECOND))
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
    if seconds > limits.max_seconds:
        raise UserError(
            f"{file.name} is too long: it lasts {spoken(seconds)}, and this page accepts up to "
            f"{spoken(limits.max_seconds)}. Cut out the part that matters."
        )
    summary = f"{file.name}: {seconds:.1f} seconds, {count} frame{'s' * (count > 1)} of {width} x {height}"
    return Clip(file, float(times[-1]), count / seconds if seconds else 0.0, summary)


@dataclass(frozen=True)
class Loaded:
    """A model as it was loaded, and the time that it takes for one clip."""

    model: Any
    processor: ViViTVideoProcessor
    answers: Answers
    seconds: float


@lru_cache(maxsize=2)  # visitors can name any model, and memory is limited
def load_model(name: str) -> Loaded:
    """Load the model and processor of a folder or Hub id, without running code that comes with them."""
    folder = demo_model_path() if name == DEMO else name
    try:
        model = ViViTForVideoClassification.from_pretrained(folder).eval()
        processor = ViViTVideoProcessor.from_pretrained(
            folder, on_error="repeat_last", video_limits={"max_decoded_pixels": MOST_PIXELS}
        )
        if not model.config.num_labels:
            raise UserError(f"The model {name!r} has no classifier: choose one that was trained on labels.")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        answers = Answers.of(model, stored_averaging(model.config), BATCH)
        return Loaded(model, processor, answers, seconds_per_clip(model))
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile folder can make the libraries raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot load the model {name!r}: {reason}") from error


def seconds_per_clip(model: Any) -> float:
    config = model.config
    clip = torch.zeros(1, config.num_frames, config.num_channels, *config.frame_size, device=model.device)
    with optimized(model), torch.inference_mode():
        begin = time.perf_counter()
        model(pixel_values=clip.to(model.dtype)).logits.cpu()
        return time.perf_counter() - begin


def choose_views(loaded: Loaded, limits: Limits) -> dict[str, int]:
    """
    Return the views of a video: those that the model was calibrated on, or else clips that cover the video.

    If they would take too long, there are fewer. Uniform sampling spreads one clip over the whole video.
    """
    calibration = Calibration.of(loaded.model.config)
    usual = {"num_clips": 1 if loaded.processor.frame_sampling == "uniform" else 4, "num_crops": 1}
    wanted = usual
    if calibration is not None:
        wanted = {"num_clips": calibration.num_clips, "num_crops": calibration.num_crops}
    for views in (wanted, usual):
        count = math.prod(views.values())
        if count <= MOST_VIEWS and count * loaded.seconds <= SHARE * limits.job_seconds:
            return views
    return {"num_clips": 1, "num_crops": 1}


@dataclass(frozen=True)
class Found:
    """
    The answer for a video, and the view of it that decided: the one with the highest score of the first label.

    With groups of labels, the first group chooses the view.
    """

    prediction: VideoPrediction
    num_views: dict[str, int]
    class_index: int
    label: str
    place: int  # of the view
    score: float  # of the label for this view
    views: Views

    @property
    def pixel_values(self) -> torch.Tensor:
        """The view that decided, (1, frames, channels, height, width)."""
        assert self.views.pixel_values is not None
        return self.views.pixel_values[self.place : self.place + 1]

    @property
    def frame_mask(self) -> torch.Tensor | None:
        """Its visible frames, bool (frames,), if the processor masks the ends of short videos."""
        return None if self.views.frame_mask is None else self.views.frame_mask[self.place]

    @property
    def seconds(self) -> tuple[float, float]:
        """The times of its first and last frame."""
        assert self.views.frame_times is not None
        times = self.views.frame_times[self.place]
        seen = times if self.frame_mask is None else times[self.frame_mask.numpy()]
        return float(seen[0]), float(seen[-1])


def classify(loaded: Loaded, path: Path, num_views: dict[str, int]) -> Found:
    """Classify a video by its views, as `vivit-hf classify` does. Raises UserError if it cannot be read."""
    check_takes_masks(loaded.model, loaded.processor)
    views = decode_views(loaded.processor, str(path), **num_views)
    if views.error is not None:
        raise UserError(views.error)
    label_map = loaded.answers.label_map
    with classifier_inputs(loaded.model) as seen:
        (prediction,) = loaded.answers.of_decoded([views])
    with torch.inference_mode():
        of_views = to_probabilities(loaded.model.classifier(torch.cat(seen)).cpu(), label_map)  # (views, labels)
    assert prediction.probabilities is not None
    best = int(prediction.probabilities[: label_map.sizes[0]].argmax())
    place = int(of_views[:, best].argmax())
    return Found(prediction, num_views, best, label_map.names[best], place, float(of_views[place, best]), views)


def what(loaded: Loaded, found: Found) -> dict[str, Any]:
    """
    Return the labels of a video: "answers" in words, and "rows" of the likeliest labels of each group.

    A row has a "group", "label", "score", "is_value" (in a regression) and "is_given"; with several labels per video
    also the "threshold", and the labels that are given come first.
    """
    if found.prediction.unknown:
        return {"answers": [UNKNOWN], "rows": [], "unknown": True}
    label_map, scores = loaded.answers.label_map, found.prediction.probabilities
    assert scores is not None
    least = np.full(len(scores), -np.inf)
    if label_map.has_several:
        least = np.array(label_map.thresholds) if label_map.thresholds else np.full(len(scores), 0.5)
    rows: list[dict[str, Any]] = []
    start = 0
    for group, names in label_map.groups.items():
        places = range(start, start + len(names))
        order = sorted(places, key=lambda place: (scores[place] < least[place], -scores[place]))[:TOP_K]
        for place in order:
            row = {"group": group, "label": names[place - start], "score": float(scores[place])}
            row |= {"is_value": label_map.is_regression, "is_given": label_map.is_regression or place == order[0]}
            if label_map.has_several:
                row |= {"threshold": float(least[place]), "is_given": bool(scores[place] >= least[place])}
            rows.append(row)
        start += len(names)
    given = [f"{row['group']}: {row['label']}" if row["group"] else row["label"] for row in rows if row["is_given"]]
    return {"answers": given, "rows": rows, "unknown": found.prediction.unknown}


def sentences(loaded: Loaded, found: Found) -> list[str]:
    """Say how sure the answer is, and from which views it comes."""
    averaging = "values" if loaded.answers.label_map.is_regression else loaded.answers.averaging
    views = describe_views(loaded.processor, **found.num_views, averaging=averaging)
    return [*how_sure(loaded.answers, found.prediction, found.num_views), f"The model saw {views}."]


def timeline(loaded: Loaded, clip: Clip, limits: Limits) -> list[tuple[float, float, str, float]]:
    """
    Return start, end, label and score of the segments of a video; none with uniform sampling.

    In a long video, and with a slow model, windows are farther apart.
    """
    model, processor = loaded.model, loaded.processor
    if processor.frame_sampling == "uniform":
        return []
    most = min(MOST_WINDOWS, max(1, int(SHARE * limits.job_seconds / loaded.seconds)))
    rate = processor.frames_per_second or clip.frames_per_second / processor.frame_stride
    widest = math.ceil(clip.last_frame * rate / most)
    hop = max(StreamingClassifier(model, processor).hop, widest)
    return [(one.start, one.end, one.label, one.score) for one in video_timeline(model, processor, clip.path, hop=hop)]


def note_of(found: Found, segments: list[tuple[float, float, str, float]]) -> str:
    """Say why the timeline of a video has labels although the video as a whole has none."""
    if not found.prediction.unknown or all(label == UNKNOWN for _, _, label, _ in segments):
        return ""
    return (
        f"As a whole the video is {UNKNOWN!r}, yet parts of it show a label: it may show several things one after "
        "the other."
    )


def caption_of(loaded: Loaded, found: Found, own_label: str) -> str:
    """Describe the view that is explained."""
    clips, crops = found.num_views["num_clips"], found.num_views["num_crops"]
    when = ", from {:.1f} to {:.1f} s".format(*found.seconds)
    if clips * crops == 1:
        return f"The frames that the model saw{when}, and where it looked."
    which = f"Clip {found.place // crops + 1} of {clips}"
    if crops > 1:
        which += f", crop {found.place % crops + 1} of {crops}"
    text = f"{which}{when}: it decided, with the highest score for {found.label!r} ({found.score:.0%})."
    if found.prediction.unknown:
        text = f"{which}{when}: it has the highest score for the nearest label, {found.label!r} ({found.score:.0%})."
    if loaded.answers.label_map.is_regression:
        text = f"{which}{when}: it has the highest value ({found.score:.3g})."
    if own_label != found.label and not loaded.answers.label_map.is_grouped:
        text += f" On its own, this clip would be labelled {own_label!r}."
    return text


def classification(job: Job) -> Iterator[dict[str, Any]]:
    """Yield what happens, how sure that is, when it happens, and pictures of where the model looked."""
    clip = check_clip(job.path, job.limits)
    yield {"status": f"{clip.summary}. Loading the model ..."}
    (name,) = job.models
    loaded = load_model(name)
    model, processor = loaded.model, loaded.processor
    yield {"status": f"{clip.summary}. Classifying ..."}
    with optimized(model):  # the explanation by gradients, below, needs the plain model
        found = classify(loaded, clip.path, choose_views(loaded, job.limits))
        yield {"what": what(loaded, found), "sure": sentences(loaded, found)}
        segments = timeline(loaded, clip, job.limits)
        yield {"segments": segments, "note": note_of(found, segments)}
    target = found.class_index if job.method == "gradient" else None
    pixel_values = found.pixel_values.to(model.device, model.dtype)
    mask = None if found.frame_mask is None else shown_masks(found.frame_mask, model.config)
    explanation = explain_clip(model, processor, pixel_values, job.method, target, TOP_K, mask)
    pictures = [str(save_explanation(Path(job.folder, name), explanation)) for name in ("seen.gif", "sheet.png")]
    status = f"{clip.summary}."
    if model.config.optimization is not None:
        status += f" {EXACT_NOTE}"
    if name == DEMO:
        status += f" {DEMO_NOTE}"
    yield {"pictures": pictures, "caption": caption_of(loaded, found, explanation.labels[0][0]), "status": status}


def comparison(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the labels of two models for one video, the time that each takes, and where they agree."""
    clip = check_clip(job.path, job.limits)
    yield {"status": f"{clip.summary}. Loading the models ..."}
    both = [load_model(name) for name in job.models]
    answers, known = [], []
    for side, (name, loaded) in enumerate(zip(job.models, both, strict=True)):
        yield {"status": f"{clip.summary}. Classifying with {name} ..."}
        with optimized(loaded.model):
            begin = time.perf_counter()
            found = classify(loaded, clip.path, choose_views(loaded, job.limits))
            seconds = time.perf_counter() - begin
        shown, label_map = what(loaded, found), loaded.answers.label_map
        answers.append(shown["answers"])
        known.append([*label_map.names, *([] if found.prediction.unknown is None else [UNKNOWN])])
        sure = [f"It took {seconds:.2g} seconds for this video, loading the model aside.", *sentences(loaded, found)]
        yield {"side": side, "name": name, "what": shown, "sure": sure, "seconds": seconds}
    text = compare(job.models, answers, known)
    if any(loaded.answers.label_map.is_regression for loaded in both):
        text = "Values are not compared in words: see the numbers of both models."
    yield {"verdict": text, "status": f"{clip.summary}."}


def search(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the videos most like the upload."""
    clip = check_clip(job.path, job.limits)
    yield {"status": f"{clip.summary}. Searching ..."}
    index = load_index(job.features, job.features_model)
    matches = matches_of(job, index, clip.path)
    yield {"matches": matches, "status": f"{clip.summary}. Compared with {counted(len(index.names), 'video')}."}


TASKS: dict[str, Callable[[Job], Iterator[dict[str, Any]]]] = {
    "classify": classification,
    "compare": comparison,
    "search": search,
    "check features": checking,
}


def answer(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the parts of the answer, each as soon as it is ready. Raises UserError and the errors of the package."""
    return TASKS[job.task](job)
