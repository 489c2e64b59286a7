"""A picture of what a model in masked pretraining predicts."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import ViViTForPreTraining, patch_pixels, split_places
from ..video_processing_vivit import ViViTVideoProcessor
from .pixels import draw_rows, to_uint8


_MASK_COLOUR = 128


def draw_reconstructions(
    model: ViViTForPreTraining,
    pixel_values: torch.Tensor,
    bool_masked_pos: torch.Tensor,
    processor: ViViTVideoProcessor,
    max_frames: int = 8,
) -> Image.Image:
    """
    Draw clips, their visible parts, and the predicted pixels in place of the masked ones: three rows for each clip.

    The model predicts pixels without mean and contrast of their patch, so these are taken from the original, as in
    VideoMAE's pictures.

    Args:
        model: computes in evaluation mode, and without gradients.
        pixel_values: (batch, frames, channels, height, width).
        bool_masked_pos: the masks, bool (batch, space).
        processor: undoes its rescaling and normalisation of the pixels.
        max_frames: frames to show, evenly spaced.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(pixel_values.to(model.device), bool_masked_pos.to(model.device)).logits.float().cpu()
    finally:
        model.train(was_training)
    patches = patch_pixels(pixel_values.float().cpu(), model.config)  # (batch, time, space, pixels, channels)
    filled = fill_masked_patches(patches, logits, bool_masked_pos.cpu())
    # uint8 (batch, frames, height, width, 3)
    original, predicted = (to_uint8(assemble_patches(one, model.config), processor) for one in (patches, filled))
    hidden = bool_masked_pos.cpu()[:, None, :, None, None].expand_as(patches)
    is_hidden = assemble_patches(hidden, model.config).movedim(2, -1)[..., :1].numpy()
    masked = np.where(is_hidden, np.uint8(_MASK_COLOUR), original)
    rows = {"original": original, "masked": masked, "reconstruction": predicted}
    return draw_rows([(name, clips[i]) for i in range(len(original)) for name, clips in rows.items()], max_frames)


def fill_masked_patches(patches: torch.Tensor, logits: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
    """
    Put predictions, with mean and standard deviation of the original, in place of the masked patches.

    Args:
        patches: (batch, time, space, pixels, channels).
        logits: (batch, time, masked, pixels * channels), the output of `ViViTForPreTraining`.
        bool_masked_pos: bool (batch, space).

    Returns:
        (batch, time, space, pixels, channels).
    """
    _, masked = split_places(bool_masked_pos)
    filled = patches.clone()
    for clip, places in enumerate(masked):
        chosen = patches[clip][:, places]  # (time, masked, pixels, channels)
        predicted = logits[clip].unflatten(-1, chosen.shape[2:])
        filled[clip][:, places] = predicted * chosen.std(dim=2, keepdim=True) + chosen.mean(dim=2, keepdim=True)
    return filled


def assemble_patches(patches: torch.Tensor, config: ViViTConfig) -> torch.Tensor:
    """Undo `patch_pixels`: (batch, time, space, pixels, channels) -> (batch, frames, channels, height, width)."""
    _, rows, columns = config.grid_size
    patches = patches.unflatten(3, tuple(config.tubelet_size)).unflatten(2, (rows, columns))
    patches = patches.permute(0, 1, 4, 7, 2, 5, 3, 6)  # (batch, time, kt, channels, rows, kh, columns, kw)
    return patches.flatten(6, 7).flatten(4, 5).flatten(1, 2)  # (batch, frames, channels, height, width)
