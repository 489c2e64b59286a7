"""Pictures of what the model saw: heat maps over the frames, with the model's answer and the weight of each moment."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.labels import LabelMap
from ..data.whole_files import written_whole
from ..frame_sampling import sample_frames_uniformly
from ..inference.evaluation import to_probabilities
from ..inference.finite_outputs import check_finite
from ..video_processing_vivit import ViViTVideoProcessor
from .charts import to_uint8
from .relevance import Relevance, attention_rollout, backbone_for, evaluating, gradient_relevance


METHODS = ("rollout", "gradient")
SUFFIXES = (".png", ".gif", ".mp4")

# From violet over red to light yellow, ever lighter, so that it also reads in grey and to the colour-blind.
_RAMP = np.array([(104, 24, 140), (163, 41, 135), (214, 62, 108), (245, 107, 72), (254, 166, 60), (255, 232, 120)])
# How much of a frame the hottest colour covers: enough to be told from the frame, which must still be seen.
_MOST_COVERED = 0.75
# How much of the frame's own colours is taken away beneath the heat, which would be lost among them.
_FADED = 0.65
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# The share of the tokens that get the hottest colour.
_HOTTEST = 0.03
# A map whose peak is below this many times the mean is nearly even, and not to look as if it had found something.
_LEAST_PEAK = 2.0

_INK, _GREY, _PALE, _BACKGROUND = (28, 28, 34), (116, 116, 126), (226, 226, 232), (255, 255, 255)
_ACCENT, _ACCENT_PALE = (122, 31, 129), (206, 178, 209)
_MARGIN, _GAP = 20, 6  # pixels
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 20, 15, 12  # pixels
_CELL, _WIDEST_CELL, _LEAST_WIDTH = 132, 224, 684  # widths of a frame in the grid and of the grid, pixels
_VIDEO_SIDE = 320  # the shorter side of a frame in a video is at least that, pixels


@dataclass
class Explanation:
    """
    One clip, what the model says of it, and where it looked.

    `frames`: uint8 (time * tubelet time, height, width, 3), RGB: what the model saw, and so without the frames between
    sampled ones and without the pixels at the ends that fill no whole patch.
    `relevance`: of a batch of one, on the CPU.
    `labels`: the likeliest labels with their probabilities (the values themselves in a regression), best first; empty
    for a model without a classifier.
    `method`: "rollout" or "gradient".
    `target`: the label that `relevance` speaks for; None for rollout, which is of no class.
    """

    frames: np.ndarray
    relevance: Relevance
    labels: list[tuple[str, float]]
    method: str
    target: str | None = None


def explain_clip(
    model: Any,
    processor: ViViTVideoProcessor,
    pixel_values: torch.Tensor,
    method: str = "rollout",
    class_index: int | None = None,
    top_k: int = 5,
) -> Explanation:
    """
    What `save_explanation` draws: the frames of one clip, the model's answer, and where it looked.

    Args:
        model: a `ViViTForVideoClassification`; for rollout also a `ViViTModel`, which has no labels.
        processor: the one that made `pixel_values`, to undo its scaling of colours.
        pixel_values: one clip, ([1,] frames, channels, height, width).
        method: "rollout" (see `attention_rollout`) or "gradient" (see `gradient_relevance`).
        class_index: for "gradient" the class to explain, by default the one with the highest score.
        top_k: labels to name.

    Raises:
        TypeError, ValueError: as those functions, and for an unknown method, several clips, a `class_index` with
            rollout or a `top_k` below 1.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    if method == "rollout" and class_index is not None:
        raise ValueError(f"Rollout is of no class: leave out class_index={class_index!r}, or use method='gradient'.")
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    if isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 4:
        pixel_values = pixel_values[None]
    backbone = backbone_for(model, pixel_values)
    if len(pixel_values) != 1:
        raise ValueError(f"`explain_clip` takes one clip, got {len(pixel_values)}; call it with pixel_values[i].")
    names: list[str] = []
    labels: list[tuple[str, float]] = []
    best = 0
    if model is not backbone and model.config.num_labels:
        label_map = LabelMap.from_config(model.config)
        names = label_map.names
        with torch.no_grad(), evaluating(model):
            logits = model(pixel_values.to(model.device), return_dict=True).logits[0].float().cpu()
        check_finite(logits, model, pixel_values)
        scores = to_probabilities(logits, label_map)
        top = scores.topk(min(top_k, len(names)))
        labels = [(names[index], score) for index, score in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        best = int(top.indices[0])
    target = None
    if method == "rollout":
        relevance = attention_rollout(model, pixel_values)
    else:
        class_index = best if class_index is None else class_index
        relevance = gradient_relevance(model, pixel_values, class_index)
        target = names[class_index]
    relevance = Relevance(relevance.space.cpu(), relevance.time.cpu())
    return Explanation(_seen_frames(backbone.config, processor, pixel_values), relevance, labels, method, target)


def _seen_frames(config: Any, processor: ViViTVideoProcessor, pixel_values: torch.Tensor) -> np.ndarray:
    """The frames and pixels that are in a token: uint8 (time * tubelet time, height, width, 3)."""
    clip = pixel_values[0].detach().float().cpu()
    if config.embedding_type == "uniform_frame_sampling":
        clip = clip[sample_frames_uniformly(len(clip), config.num_sampled_frames).tolist()]
    time, rows, columns = (size * patch for size, patch in zip(config.grid_size, config.tubelet_size, strict=True))
    return to_uint8(clip[:time, :, :rows, :columns], processor)


def draw_overlay(frames: np.ndarray, space_map: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    A heat map over the faded frames of a clip. Tokens that count no more than the mean have no heat; from there to the
    hottest three in a hundred, but at least to twice the mean, its colour covers ever more of the frame.

    Args:
        frames: uint8 (frames, height, width, 3), RGB.
        space_map: floats, not negative, (time, height, width) in tokens, as `Relevance.space` has it for one clip;
            each step covers frames / time of the frames.

    Returns:
        uint8 of the shape of `frames`.

    Raises:
        ValueError: if the frames or the map are of another kind, or the steps do not divide the frames.
    """
    heat = _heat(_checked_map(frames, space_map))
    size = frames.shape[1:3]
    grown = torch.nn.functional.interpolate(torch.from_numpy(heat)[:, None], size, mode="bilinear")[:, 0].numpy()
    grown = grown.repeat(len(frames) // len(heat), axis=0)  # (time, height, width) -> (frames, height, width)
    faded = frames + _FADED * ((frames @ _LUMA)[..., None] - frames)
    # The covered share rises faster than the colour, or else what is only warm would hardly show.
    covered = _MOST_COVERED * (grown**0.75)[..., None]
    return np.rint(faded * (1 - covered) + _colours(grown) * covered).astype(np.uint8)


def _checked_map(frames: np.ndarray, space_map: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"`frames` must be uint8 (frames, height, width, 3), got {got}.")
    values = np.asarray(space_map.detach().cpu() if isinstance(space_map, torch.Tensor) else space_map, np.float32)
    if values.ndim != 3 or not values.size or len(frames) == 0 or len(frames) % len(values):
        raise ValueError(
            f"`space_map` must be (time, height, width) with a time that divides the {len(frames)} frames, got "
            f"{tuple(values.shape)}."
        )
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"`space_map` must be finite and not negative, got {values.min()} to {values.max()}.")
    return values


def _peak(values: np.ndarray) -> float:
    """What gets the hottest colour, in multiples of the mean. Few odd tokens must not make all others look cold."""
    return max(_LEAST_PEAK, float(np.quantile(values, 1 - _HOTTEST)) / max(float(values.mean()), 1e-30))


def _heat(values: np.ndarray) -> np.ndarray:
    """From 0, not above the mean, to 1, the peak."""
    ratio = values / max(float(values.mean()), 1e-30)
    return np.clip((ratio - 1) / (_peak(values) - 1), 0, 1).astype(np.float32)


def _colours(heat: np.ndarray) -> np.ndarray:
    """(...) from 0 to 1 -> RGB (..., 3) from 0 to 255."""
    steps = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(heat, steps, channel) for channel in _RAMP.T], axis=-1)


def draw_explanation(explanation: Explanation, max_steps: int = 8) -> Image.Image:
    """
    A sheet with frames of the clip, above as they are and below with the heat map, the weight of every moment, and the
    likeliest labels.

    Args:
        max_steps: time steps to show a frame of; if there are more, some at equal distances.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
    frames, space = explanation.frames, explanation.relevance.space[0].numpy()
    steps, per_step = len(space), len(frames) // len(space)
    shown = np.unique(np.linspace(0, steps - 1, min(max_steps, steps)).round().astype(int))
    cell = min(_WIDEST_CELL, max(_CELL, (_LEAST_WIDTH + _GAP) // len(shown) - _GAP))
    cell_height = max(1, round(frames.shape[1] * cell / frames.shape[2]))
    cells = _resized(frames, cell_height, cell)
    heated = draw_overlay(cells, space)
    inner = max(len(shown) * (cell + _GAP) - _GAP, _LEAST_WIDTH)
    bars_height, row = 64, 26
    grid_top = _MARGIN + 66
    bars_top = grid_top + 2 * (cell_height + _GAP) + 46
    labels_top = bars_top + bars_height + 64
    height = labels_top + row * len(explanation.labels) if explanation.labels else labels_top - 36
    canvas = Image.new("RGB", (inner + 2 * _MARGIN, height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    _write_answer(draw, (_MARGIN, _MARGIN - 4), explanation, _TITLE_SIZE, inner)
    _write(draw, (_MARGIN, _MARGIN + 26), f"Heat: {_meaning(explanation)}", _TEXT_SIZE, _GREY, inner - 300)
    _draw_scale(draw, _MARGIN + inner, _MARGIN + 28, _peak(space))
    for place, step in enumerate(shown):
        left, frame = _MARGIN + place * (cell + _GAP), step * per_step + per_step // 2
        canvas.paste(Image.fromarray(cells[frame]), (left, grid_top))
        canvas.paste(Image.fromarray(heated[frame]), (left, grid_top + cell_height + _GAP))
        below = grid_top + 2 * (cell_height + _GAP)
        _write(draw, (left, below), f"frame {frame}", _SMALL_SIZE, _GREY, cell)

    _write(draw, (_MARGIN, bars_top - 22), "How much each moment counts (line: all alike)", _TEXT_SIZE, _INK, inner)
    box = (_MARGIN, bars_top + 6, _MARGIN + inner, bars_top + 6 + bars_height)
    _draw_moments(draw, box, explanation.relevance.time[0].numpy(), set(shown.tolist()))
    _write(draw, (_MARGIN, box[3] + 4), "frame 0", _SMALL_SIZE, _GREY, inner // 3)
    _write(draw, (box[2], box[3] + 4), f"frame {len(frames) - 1}", _SMALL_SIZE, _GREY, inner // 3, to_left=True)
    if explanation.labels:
        _write(draw, (_MARGIN, labels_top - 26), "What the model says", _TEXT_SIZE, _INK, inner)
        _draw_labels(draw, (_MARGIN, labels_top, _MARGIN + inner), explanation, row)
    return canvas


def save_explanation(path: str | os.PathLike, explanation: Explanation, fps: float = 8.0) -> Path:
    """
    Saves a sheet (.png, see `draw_explanation`), or the clip with the heat map over it (.gif, .mp4), beneath it the
    likeliest label and the weight of every moment. The file is written whole or not at all.

    Args:
        path: where to; the suffix says what.
        fps: frames per second of .gif (which knows hundredths of a second) and .mp4 (H.264, yuv420p).

    Returns:
        `path`.

    Raises:
        ValueError: for another suffix, or a rate that is not above 0.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: a picture can have the suffix {', '.join(SUFFIXES)}, not {path.suffix!r}.")
    if not fps > 0:
        raise ValueError(f"`fps` must be above 0, got {fps}.")
    with written_whole(path) as unfinished:
        if suffix == ".png":
            draw_explanation(explanation).save(unfinished, format="PNG")
        elif suffix == ".gif":
            first, *others = (Image.fromarray(frame) for frame in _captioned_frames(explanation))
            duration = round(1000 / fps)
            first.save(unfinished, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
        else:
            _write_mp4(unfinished, _captioned_frames(explanation), fps)
    return path


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                rate = Fraction(fps).limit_denominator(1000)
                stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _captioned_frames(explanation: Explanation) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 (height, width, 3), both even."""
    frames, space = explanation.frames, explanation.relevance.space[0].numpy()
    weights, per_step = explanation.relevance.time[0].numpy(), len(frames) // len(space)
    scale = max(1.0, _VIDEO_SIDE / min(frames.shape[1:3]))
    height, width = (max(2, 2 * round(side * scale / 2)) for side in frames.shape[1:3])
    panel, margin = 104, 12
    heated = draw_overlay(_resized(frames, height, width), space)
    for index, frame in enumerate(heated):
        canvas = Image.new("RGB", (width, height + panel), _BACKGROUND)
        canvas.paste(Image.fromarray(frame), (0, 0))
        draw = ImageDraw.Draw(canvas)
        _write_answer(draw, (margin, height + 6), explanation, _TEXT_SIZE + 2, width - 2 * margin)
        _write(draw, (margin, height + 30), _meaning(explanation), _SMALL_SIZE + 1, _GREY, width - 2 * margin)
        box = (margin, height + 54, width - margin, height + panel - 10)
        _draw_moments(draw, box, weights, {index // per_step})
        yield np.asarray(canvas)


def _meaning(explanation: Explanation) -> str:
    """Of the heat."""
    return "attention rollout" if explanation.target is None else f"what speaks for “{explanation.target}”"


def _write_answer(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], explanation: Explanation, size: int, most: int
) -> None:
    """The likeliest label and its score, which stays in sight if the label is long."""
    label, score = explanation.labels[0] if explanation.labels else ("Where the model looked", None)
    number = "" if score is None else f"{score:.2f}"
    gap = size // 2
    length = _write(draw, place, label, size, _INK, most - _width(number, size) - gap)
    _write(draw, (place[0] + length + gap, place[1]), number, size, _ACCENT, most)


def _draw_scale(draw: ImageDraw.ImageDraw, right: int, top: int, peak: float) -> None:
    """The colours of the heat and what they mean, ending at the pixel `right`."""
    words, width, height = f"{peak:.1f} x the mean or more", 110, 12
    right -= _width(words, _SMALL_SIZE)
    _write(draw, (right, top - 2), words, _SMALL_SIZE, _GREY, 10_000)
    right -= 6
    for x, colour in enumerate(_colours(np.linspace(0, 1, width)).round().astype(int).tolist()):
        draw.line([(right - width + x, top), (right - width + x, top + height)], tuple(colour))
    _write(draw, (right - width - 6, top - 2), "1", _SMALL_SIZE, _GREY, 100, to_left=True)


def _draw_moments(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], weights: np.ndarray, marked: set[int]
) -> None:
    """A bar for every time step; the `marked` ones stand out. The line is where equal weights would be."""
    left, top, right, bottom = box
    most = max(float(weights.max()), 2 / len(weights))
    edges = np.linspace(left, right, len(weights) + 1).round().astype(int).tolist()
    space = 2 if (right - left) / len(weights) > 6 else 0
    for step, weight in enumerate(weights):
        colour = _ACCENT if step in marked else _ACCENT_PALE
        height = max(1, round(float(weight) / most * (bottom - top)))
        draw.rectangle((edges[step], bottom - height, max(edges[step], edges[step + 1] - 1 - space), bottom), colour)
    even = bottom - round((bottom - top) / len(weights) / most)
    draw.line([(left, even), (right - 1, even)], _GREY)


def _draw_labels(draw: ImageDraw.ImageDraw, box: tuple[int, int, int], explanation: Explanation, row: int) -> None:
    """A bar for every label, full at 1 (in a regression at the greatest value)."""
    left, top, right = box
    names = round((right - left) * 0.4)
    longest = max(_width(label, _TEXT_SIZE) for label, _ in explanation.labels)
    start = left + min(names, longest) + 12
    end = right - 70
    most = max(1.0, *(abs(score) for _, score in explanation.labels))
    for index, (label, score) in enumerate(explanation.labels):
        y = top + index * row
        is_target = label == explanation.target if explanation.target is not None else index == 0
        _write(draw, (left, y), label, _TEXT_SIZE, _INK if is_target else _GREY, start - 12 - left)
        draw.rectangle((start, y + 2, end, y + row - 8), _PALE)
        length = round(max(0.0, score) / most * (end - start))
        if length:
            draw.rectangle((start, y + 2, start + length, y + row - 8), _ACCENT if is_target else _ACCENT_PALE)
        _write(draw, (right, y), f"{score:.3f}", _TEXT_SIZE, _INK if is_target else _GREY, 70, to_left=True)


def _resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (frames, height, width, 3) in another size."""
    resample = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), resample)) for frame in frames])


@functools.cache
def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow up to 10.0, or one without FreeType, has one small font
        return ImageFont.load_default()


def _write(
    draw: ImageDraw.ImageDraw,
    place: Sequence[int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    most: int,
    to_left: bool = False,
) -> int:
    """
    One line at most `most` pixels wide, with an ellipsis if need be; `place` is its upper left (right) corner.

    Returns its width in pixels.
    """
    text = _shortened(_printable(text), lambda words: _width(words, size) <= most)
    x, y = place
    width = _width(text, size)
    draw.text((x - width * to_left, y), text, fill=colour, font=_font(size))
    return width


def _printable(text: str) -> str:
    """On one line, and without what a font that is no FreeType font cannot even measure."""
    text = " ".join(text.split())
    if isinstance(_font(_TEXT_SIZE), ImageFont.FreeTypeFont):
        return text
    return text.replace("“", '"').replace("”", '"').encode("latin-1", "replace").decode("latin-1")


def _width(text: str, size: int) -> int:
    """In pixels, rounded up."""
    return math.ceil(_font(size).getlength(_printable(text)))


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    if fits(text):
        return text
    length = len(text)
    while length and not fits(text[:length].rstrip() + "..."):
        length -= 1
    return text[:length].rstrip() + "..."


__all__ = ["METHODS", "SUFFIXES", "Explanation", "draw_explanation", "draw_overlay", "explain_clip", "save_explanation"]
