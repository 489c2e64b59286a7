"""Pictures and videos of an explanation: a sheet (.png), or the clip with the heat map over it (.gif, .mp4)."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from ..data.whole_files import written_whole
from ..limits_vivit import check_positive_integer
from .explanation import Explanation
from .heat import colours, draw_overlay, peak
from .pixels import evenly_spaced
from .text import text_width, write_text


SUFFIXES = (".png", ".gif", ".mp4")

_INK, _GREY, _PALE, _BACKGROUND = (28, 28, 34), (116, 116, 126), (226, 226, 232), (255, 255, 255)
_ACCENT, _ACCENT_PALE = (122, 31, 129), (206, 178, 209)
_MARGIN, _GAP = 20, 6  # pixels
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 20, 15, 12  # pixels
_CELL, _WIDEST_CELL, _LEAST_WIDTH = 132, 224, 684  # widths of a frame in the grid and of the grid, pixels
_VIDEO_SIDE = 320  # the shorter side of a frame in a video is at least that, pixels


def draw_explanation(explanation: Explanation, max_steps: int = 8) -> Image.Image:
    """
    Draw a sheet: frames of the clip, the same frames with the heat map, the weight of each time step, and the labels.

    Args:
        max_steps: time steps to show a frame of, evenly spaced if the clip has more.
    """
    check_positive_integer("max_steps", max_steps)
    frames, space = explanation.frames, explanation.relevance.space[0].numpy()
    steps, per_step, numbers = len(space), len(frames) // len(space), _numbers(explanation)
    shown = evenly_spaced(steps, max_steps)
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
    write_text(draw, (_MARGIN, _MARGIN + 26), f"Heat: {_meaning(explanation)}", _TEXT_SIZE, _GREY, inner - 300)
    _draw_scale(draw, _MARGIN + inner, _MARGIN + 28, peak(space))
    for place, step in enumerate(shown):
        left, frame = _MARGIN + place * (cell + _GAP), step * per_step + per_step // 2
        canvas.paste(Image.fromarray(cells[frame]), (left, grid_top))
        canvas.paste(Image.fromarray(heated[frame]), (left, grid_top + cell_height + _GAP))
        below = grid_top + 2 * (cell_height + _GAP)
        write_text(draw, (left, below), f"frame {numbers[frame]}", _SMALL_SIZE, _GREY, cell)

    write_text(draw, (_MARGIN, bars_top - 22), "How much each moment counts (line: all alike)", _TEXT_SIZE, _INK, inner)
    box = (_MARGIN, bars_top + 6, _MARGIN + inner, bars_top + 6 + bars_height)
    _draw_moments(draw, box, explanation.relevance.time[0].numpy(), set(shown.tolist()))
    write_text(draw, (_MARGIN, box[3] + 4), f"frame {numbers[0]}", _SMALL_SIZE, _GREY, inner // 3)
    write_text(draw, (box[2], box[3] + 4), f"frame {numbers[-1]}", _SMALL_SIZE, _GREY, inner // 3, to_left=True)
    if explanation.labels:
        write_text(draw, (_MARGIN, labels_top - 26), "What the model says", _TEXT_SIZE, _INK, inner)
        _draw_labels(draw, (_MARGIN, labels_top, _MARGIN + inner), explanation, row)
    return canvas


def save_explanation(path: str | os.PathLike, explanation: Explanation, fps: float = 8.0) -> Path:
    """
    Save a sheet (.png, see `draw_explanation`), or the clip with the heat map over it (.gif, .mp4).

    Below the clip are the most likely label and the weight of each time step. After an error `path` is unchanged.

    Args:
        path: where to write; the suffix chooses the format.
        fps: frames per second of .gif (rounded to hundredths of a second) and .mp4 (H.264, yuv420p).

    Returns:
        `path`.

    Raises:
        ValueError: if the suffix is another one, or `fps` is not above 0.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected the suffix {', '.join(SUFFIXES)}, got {path.suffix!r}.")
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
    """Yield the frames of a video, each once, uint8 (height, width, 3), with even sides."""
    frames, space = explanation.frames, explanation.relevance.space[0].numpy()
    weights, per_step = explanation.relevance.time[0].numpy(), len(frames) // len(space)
    scale = max(1.0, _VIDEO_SIDE / min(frames.shape[1:3]))
    height, width = (max(2, 2 * round(side * scale / 2)) for side in frames.shape[1:3])
    panel, margin = 104, 12
    heated = draw_overlay(_resized(frames, height, width), space)
    numbers = _numbers(explanation)
    for index, frame in enumerate(heated):
        if index and numbers[index] == numbers[index - 1]:  # in the place of a masked one
            continue
        canvas = Image.new("RGB", (width, height + panel), _BACKGROUND)
        canvas.paste(Image.fromarray(frame), (0, 0))
        draw = ImageDraw.Draw(canvas)
        _write_answer(draw, (margin, height + 6), explanation, _TEXT_SIZE + 2, width - 2 * margin)
        write_text(draw, (margin, height + 30), _meaning(explanation), _SMALL_SIZE + 1, _GREY, width - 2 * margin)
        box = (margin, height + 54, width - margin, height + panel - 10)
        _draw_moments(draw, box, weights, {index // per_step})
        yield np.asarray(canvas)


def _numbers(explanation: Explanation) -> np.ndarray:
    numbers = explanation.frame_numbers
    return np.arange(len(explanation.frames)) if numbers is None else numbers


def _resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames, uint8 (frames, height, width, 3)."""
    resample = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), resample)) for frame in frames])


def _meaning(explanation: Explanation) -> str:
    """Return what the heat shows."""
    return "attention rollout" if explanation.target is None else f"what speaks for “{explanation.target}”"


def _write_answer(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], explanation: Explanation, size: int, most: int
) -> None:
    """Write the most likely label and its score; a long label is cut so that the score stays visible."""
    label, score = explanation.labels[0] if explanation.labels else ("Where the model looked", None)
    number = "" if score is None else f"{score:.2f}"
    gap = size // 2
    length = write_text(draw, place, label, size, _INK, most - text_width(number, size) - gap)
    write_text(draw, (place[0] + length + gap, place[1]), number, size, _ACCENT, most)


def _draw_scale(draw: ImageDraw.ImageDraw, right: int, top: int, peak: float) -> None:
    """Draw the scale of the heat, ending at the pixel `right`."""
    words, width, height = f"{peak:.1f} x the mean or more", 110, 12
    right -= text_width(words, _SMALL_SIZE)
    write_text(draw, (right, top - 2), words, _SMALL_SIZE, _GREY, 10_000)
    right -= 6
    for x, colour in enumerate(colours(np.linspace(0, 1, width)).round().astype(int).tolist()):
        draw.line([(right - width + x, top), (right - width + x, top + height)], tuple(colour))
    write_text(draw, (right - width - 6, top - 2), "1", _SMALL_SIZE, _GREY, 100, to_left=True)


def _draw_moments(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], weights: np.ndarray, marked: set[int]
) -> None:
    """Draw a bar for every time step, the `marked` ones darker, and a line at the height of equal weights."""
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
    """Draw a bar for every label, full at 1 (in a regression at the greatest value)."""
    left, top, right = box
    names = round((right - left) * 0.4)
    longest = max(text_width(label, _TEXT_SIZE) for label, _ in explanation.labels)
    start = left + min(names, longest) + 12
    end = right - 70
    most = max(1.0, *(abs(score) for _, score in explanation.labels))
    for index, (label, score) in enumerate(explanation.labels):
        y = top + index * row
        is_target = label == explanation.target if explanation.target is not None else index == 0
        write_text(draw, (left, y), label, _TEXT_SIZE, _INK if is_target else _GREY, start - 12 - left)
        draw.rectangle((start, y + 2, end, y + row - 8), _PALE)
        length = round(max(0.0, score) / most * (end - start))
        if length:
            draw.rectangle((start, y + 2, start + length, y + row - 8), _ACCENT if is_target else _ACCENT_PALE)
        write_text(draw, (right, y), f"{score:.3f}", _TEXT_SIZE, _INK if is_target else _GREY, 70, to_left=True)
