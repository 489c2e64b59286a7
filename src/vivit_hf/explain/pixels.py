"""From the model's input back to pictures, and frames in rows."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.whole_files import as_utf8
from ..video_processing_vivit import ViViTVideoProcessor


_MARGIN, _LINE, _GAP, _LEAST_WIDTH = 4, 14, 2, 320  # pixels


def to_uint8(clips: torch.Tensor, processor: ViViTVideoProcessor) -> np.ndarray:
    """
    Undo the rescaling and normalisation of a processor.

    Args:
        clips: floats (batch, frames, channels, height, width), on the CPU.

    Returns:
        uint8 RGB (batch, frames, height, width, 3); the leading dimensions may differ.
    """
    values = clips
    if processor.do_normalize:
        mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if processor.do_rescale:
        values = (values + float(processor.offset)) / processor.rescale_factor
    values = values.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
    return (values if values.shape[-1] >= 3 else values.expand(*values.shape[:-1], 3))[..., :3].numpy()


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return at most `most` indices from 0 to `count` - 1, int64."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def draw_rows(rows: Sequence[tuple[str, np.ndarray]], max_frames: int) -> Image.Image:
    """
    Draw clips of one size, each as a row of frames from left to right with a title above.

    Args:
        rows: titles and clips, uint8 (frames, height, width, 3).
        max_frames: frames of a clip to show, evenly spaced.
    """
    count, height, width = rows[0][1].shape[:3]
    shown = evenly_spaced(count, max_frames)
    row_height = _LINE + height + _GAP
    size = max(_LEAST_WIDTH, len(shown) * (width + _GAP) + 2 * _MARGIN), len(rows) * row_height + 2 * _MARGIN
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, (title, frames) in enumerate(rows):
        top = _MARGIN + row * row_height
        draw.text((_MARGIN, top), as_utf8(title), fill="black", font=font)
        for place, frame in enumerate(frames[shown]):
            canvas.paste(Image.fromarray(frame), (_MARGIN + place * (width + _GAP), top + _LINE))
    return canvas
