"""From the model's input back to pictures."""

import numpy as np
import torch

from ..video_processing_vivit import ViViTVideoProcessor


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
