"""Pictures: a batch as the trainer sees it, and a confusion matrix."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.labels import LabelMap
from ..video_processing_vivit import ViViTVideoProcessor


_MARGIN, _LINE = 4, 14  # pixels


def draw_batch(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    processor: ViViTVideoProcessor,
    label_map: LabelMap,
    files: Sequence[str] | None = None,
    max_clips: int = 8,
    max_frames: int = 8,
) -> Image.Image:
    """
    A batch as a grid, one clip per row and its frames from left to right, with label and file name above each.

    Args:
        pixel_values: (batch, frames, channels, height, width), as the model gets them.
        labels: as the model gets them: numbers, or probabilities as mixup and label smoothing make them.
        files: what each clip is from.
    """
    clips = pixel_values[:max_clips].detach().float().cpu()
    shown = np.unique(np.linspace(0, clips.shape[1] - 1, min(max_frames, clips.shape[1])).round().astype(int))
    images = to_uint8(clips[:, shown], processor)  # (batch, frames, height, width, 3)
    height, width = images.shape[2:4]
    row_height = height + _LINE + 2 * _MARGIN
    canvas = Image.new("RGB", (max(320, len(shown) * (width + 2) + 2 * _MARGIN), len(images) * row_height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, (clip, label) in enumerate(zip(images, labels.cpu(), strict=False)):
        top = row * row_height
        title = describe_label(label, label_map)
        if files is not None:
            title += f" ({' + '.join(os.path.basename(name) for name in files[row].split(' + '))})"
        # A file name need not be valid Unicode.
        title = title.encode("utf-8", "backslashreplace").decode()
        draw.text((_MARGIN, top + 2), title, fill="black", font=font)
        for place, frame in enumerate(clip):
            canvas.paste(Image.fromarray(frame), (_MARGIN + place * (width + 2), top + _LINE + _MARGIN))
    return canvas


def describe_label(label: torch.Tensor, label_map: LabelMap, top: int = 3) -> str:
    """One label in words: a name per group, or the likeliest names with their probabilities."""
    parts = []
    if not label.is_floating_point():
        indices = label.reshape(-1).tolist()
        return ", ".join(names[index] for names, index in zip(label_map.groups.values(), indices, strict=True))
    for names, values in zip(label_map.groups.values(), label.split(label_map.sizes), strict=True):
        best = values.topk(min(top, len(names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        parts.append(", ".join(f"{names[index]} {value:.2f}" for value, index in pairs if value > 0.005))
    return " | ".join(parts)


def to_uint8(clips: torch.Tensor, processor: ViViTVideoProcessor) -> np.ndarray:
    """Undoes rescaling and normalisation: (batch, frames, channels, height, width) -> uint8, channels last, RGB."""
    values = clips
    if processor.do_normalize:
        mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if processor.do_rescale:
        values = (values + float(processor.offset)) / processor.rescale_factor
    values = values.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
    return (values if values.shape[-1] >= 3 else values.expand(*values.shape[:-1], 3))[..., :3].numpy()


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | os.PathLike, title: str = "") -> Path:
    """Saves a picture of a confusion matrix (classes, classes), each row as shares of its videos. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(names)
    side = min(40.0, max(4.0, 0.28 * size + 2.5))
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the videos of a class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(textwrap.fill(title, round(12 * side)), fontsize=9)
    if size <= 100:
        axes.set_xticks(range(size), names, rotation=90, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    if size <= 20:
        for row, column in np.ndindex(size, size):
            if matrix[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(matrix[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    path = Path(path)
    figure.savefig(path)
    return path
