"""
Cut detection: find the frame at which the picture changes to another scene.

The change from one frame to the next is the mean absolute difference of their pixels, divided by the standard deviation
of the pixels of the frame with more contrast. Two unrelated pictures differ by about 1.1. Motion within one take stays
below 0.3, or is about as strong in the frames before and after. So a cut is a change above half of the contrast that is
also three times the median change of its window: a flicker, a fade and noise are not cuts.
"""

from collections.abc import Sequence
from statistics import median

import torch


MIN_CHANGE = 0.5
MIN_CHANGE_OVER_MEDIAN = 3.0


def frame_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """
    Return how much a frame differs from the one before it; 0 for equal frames.

    Args:
        before, after: floats of the same shape and scale, such as (channels, height, width).
    """
    contrast = torch.maximum(before.std(), after.std()).clamp(min=1e-6)
    return float((after - before).abs().mean() / contrast)


def find_cut(changes: Sequence[float]) -> int | None:
    """
    Return the index of the change that is a cut, the strongest one if there are several, or None.

    Args:
        changes: `frame_change` of the successive frames of a window, so that `changes[0]` leads to its second frame.
    """
    if not changes:
        return None
    strongest = max(changes)
    is_cut = strongest > max(MIN_CHANGE, MIN_CHANGE_OVER_MEDIAN * median(changes))
    return list(changes).index(strongest) if is_cut else None
