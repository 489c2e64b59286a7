"""A picture of a batch as the trainer sees it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.labels import LabelMap
from ..video_processing_vivit import ViViTVideoProcessor
from .pixels import to_uint8


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
    Draw a batch as a grid: one clip per row, its frames from left to right, label and file name above.

    Args:
        pixel_values: the input of the model, (batch, frames, channels, height, width).
        labels: the labels of the loss: class indices, or probabilities after mixup and label smoothing.
        files: the file of each clip; "a.mp4 + b.mp4" for a mixed one.
        max_clips, max_frames: draw at most this many; the frames are evenly spaced.
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
    """Return a label in words: a name per group, or the most likely names with their probabilities."""
    parts = []
    if not label.is_floating_point():
        indices = label.reshape(-1).tolist()
        return ", ".join(names[index] for names, index in zip(label_map.groups.values(), indices, strict=True))
    for names, values in zip(label_map.groups.values(), label.split(label_map.sizes), strict=True):
        best = values.topk(min(top, len(names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        parts.append(", ".join(f"{names[index]} {value:.2f}" for value, index in pairs if value > 0.005))
    return " | ".join(parts)
