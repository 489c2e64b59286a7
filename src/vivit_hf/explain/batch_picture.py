"""A picture of a batch as the trainer sees it."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..data.labels import LabelMap
from ..video_processing_vivit import ViViTVideoProcessor
from .pixels import draw_rows, to_uint8


_MOST = 8  # clips, and frames of a clip
_RED = (200, 0, 0)


def draw_batch(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    processor: ViViTVideoProcessor,
    label_map: LabelMap,
    files: Sequence[str] | None = None,
    frame_mask: torch.Tensor | None = None,
) -> Image.Image:
    """
    Draw a batch, a clip per row, with its label and file name above: at most eight clips, and eight frames of each.

    Masked frames are pale and crossed out.

    Args:
        pixel_values: the input of the model, (batch, frames, channels, height, width).
        labels: the labels of the loss: class indices, or probabilities after mixup and label smoothing.
        files: the file of each clip; "a.mp4 + b.mp4" for a mixed one.
        frame_mask: bool (batch, frames), True where a frame is visible; None if all are.
    """
    clips = to_uint8(pixel_values[:_MOST].detach().float().cpu(), processor)  # (batch, frames, height, width, 3)
    titles = [describe_label(label, label_map) for label in labels[:_MOST].cpu()]
    if files is not None:
        names = [" + ".join(map(os.path.basename, name.split(" + "))) for name in files[:_MOST]]
        titles = [f"{title} ({name})" for title, name in zip(titles, names, strict=True)]
    if frame_mask is not None:
        visible = frame_mask[:_MOST].cpu().numpy()
        clips = np.where(visible[:, :, None, None, None], clips, _crossed_out(clips))
        titles = [f"{title}, {row.sum()} of {len(row)} frames" for title, row in zip(titles, visible, strict=True)]
    return draw_rows(list(zip(titles, clips, strict=True)), _MOST)


def _crossed_out(frames: np.ndarray) -> np.ndarray:
    """Return frames, uint8 (..., height, width, 3), as pale ones with a red cross."""
    pale = 255 - (255 - frames) // 4
    height, width = frames.shape[-3:-1]
    side = np.arange(max(height, width))
    rows, columns = side * height // len(side), side * width // len(side)
    pale[..., rows, columns, :] = pale[..., rows, width - 1 - columns, :] = _RED
    return pale


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
