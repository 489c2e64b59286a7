"""
The views of a video: clips spread over it in time, and crops of each clip (4 x 3 in the paper).

A video's views are averaged as class probabilities ("probabilities", the softmax of each view) or before the softmax
("logits", as in section 4 of the paper). The score depends on the views and on the way they are averaged, so report
`describe_views` with every score.
"""

import numpy as np
import torch

from ..data.escaping import counted
from ..data.labels import LabelMap
from ..initialisation.model_processor import describe_frames
from ..limits_vivit import check_choice
from ..video_processing_vivit import ViViTVideoProcessor
from .clips import BATCH, predict_clips, unique_frame_ids


AVERAGINGS = ("probabilities", "logits")


def predict_views(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    max_clips: int = BATCH,
    frame_ids: np.ndarray | None = None,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return the logits of every view of a batch of videos, float (batch, views, num_labels).

    Args:
        pixel_values: floats (batch, views, frames, channels, height, width).
        max_clips: clips that the model sees at a time.
        frame_ids: int64 (batch, views, frames), see `predict_clips`. Views of the same video share their tubelets.
        frame_mask: bool (batch, views, frames), see `predict_clips`.
    """
    ids = None if frame_ids is None else unique_frame_ids(frame_ids)
    mask = None if frame_mask is None else frame_mask.flatten(0, 1)
    return predict_clips(model, pixel_values.flatten(0, 1), ids, max_clips, mask).unflatten(0, pixel_values.shape[:2])


def average_views(logits: torch.Tensor, label_map: LabelMap, averaging: str = "probabilities") -> torch.Tensor:
    """
    Average the views of each video into one row of logits.

    Their softmax (sigmoid with several labels per video) is the averaged score. In a regression, the views are averaged
    directly.

    Args:
        logits: (batch, views, num_labels).
        averaging: "probabilities" or "logits".

    Returns:
        float32 or wider, (batch, num_labels).
    """
    check_choice("averaging", averaging, AVERAGINGS)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if averaging == "logits" or logits.shape[1] == 1 or label_map.is_regression:
        return logits.mean(dim=1)
    if label_map.has_several:  # log(p / (1 - p)) of the mean p
        log_count = np.log(logits.shape[1])
        yes, no = (torch.nn.functional.logsigmoid(sign * logits).logsumexp(dim=1) - log_count for sign in (1, -1))
        return yes - no
    parts = logits.split(label_map.sizes, dim=-1)
    return torch.cat([part.log_softmax(dim=-1).logsumexp(dim=1) - np.log(part.shape[1]) for part in parts], dim=-1)


def describe_views(
    processor: ViViTVideoProcessor, num_clips: int, num_crops: int, averaging: str = "probabilities"
) -> str:
    """Describe the views that a score comes from, on one line: clips, crops, frame rate, sizes and averaging."""
    views = f"{counted(num_clips, 'clip')} x {counted(num_crops, 'crop')} of {describe_frames(processor)}"
    return f"{views}, {averaging} averaged" if num_clips * num_crops > 1 else views
