"""A picture of a batch as the trainer sees it."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.labels import LabelMap
from ..data.whole_files import as_utf8
from ..video_processing_vivit import ViViTVideoProcessor
from .pixels import to_uint8


_MARGIN, _LINE = 4, 14  # pixels
_MOST = 8  # clips, and frames of a clip


def draw_batch(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    processor: ViViTVideoProcessor,
    label_map: LabelMap,
    files: Sequence[str] | None = None,
) -> Image.Image:
    """
    Draw a batch as a grid: one clip per row, its frames from left to right, label and file name above.

    At most eight clips and eight frames of each, evenly spaced, are drawn.

    Args:
        pixel_values: the input of the model, (batch, frames, channels, height, width).
        labels: the labels of the loss: class indices, or probabilities after mixup and label smoothing.
        files: the file of each clip; "a.mp4 + b.mp4" for a mixed one.
    """
    clips = pixel_values[:_MOST].detach().float().cpu()
    shown = np.unique(np.linspace(0, clips.shape[1] - 1, min(_MOST, clips.shape[1])).round().astype(int))
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
        draw.text((_MARGIN, top + 2), as_utf8(title), fill="black", font=font)
        for place, frame in enumerate(clip):
            canvas.paste(Image.fromarray(frame), (_MARGIN + place * (width + 2), top + _LINE + _MARGIN))
    return canvas


def describe_label(label: torch.Tensor, label_map: LabelMap) -> str:
    """Return a label in words: a name per group, or the three most likely names with their probabilities."""
    if not label.is_floating_point():
        indices = label.reshape(-1).tolist()
        return ", ".join(names[index] for names, index in zip(label_map.groups.values(), indices, strict=True))
    parts = []
    for names, values in zip(label_map.groups.values(), label.split(label_map.sizes), strict=True):
        best = values.topk(min(3, len(names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        parts.append(", ".join(f"{names[index]} {value:.2f}" for value, index in pairs if value > 0.005))
    return " | ".join(parts)
