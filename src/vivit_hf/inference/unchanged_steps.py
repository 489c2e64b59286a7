"""
Time steps of a stream that look like the last encoded one, and take its token.

The reference is always a step that was encoded, never one that was itself reused, so that slow changes add up until a
step is encoded again:

    steps            a a a' a'' b b     (a' is within the threshold of a, and a'' is within that of a', but not of a)
    encoded          a     a'' b
    tokens           a a a a'' b b
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.escaping import counted
from ..limits_vivit import check_value, is_number
from ..video_frames import rescale_and_normalize
from ..video_processing_vivit import ViViTVideoProcessor


# Some windows are computed in full, too, so that the user sees the error: the first one with reused steps, and the next
# one whenever there are this many reused steps for each one that was encoded for a check.
REUSED_PER_CHECKED = 10


def check_threshold(value: Any) -> float:
    """Return a threshold in grey levels as a float; ValueError unless it is a number from 0 to 255."""
    is_good = is_number(value) and 0 <= value <= 255
    check_value("unchanged_threshold", value, is_good, "a number of grey levels from 0 to 255")
    return float(value)


def step_change(before: torch.Tensor, after: torch.Tensor, patch_size: tuple[int, int], level: torch.Tensor) -> float:
    """
    Return how much a time step differs from another one: the mean absolute difference of the pixel values of a patch,
    in the patch that differs the most. In grey levels, of which black and white are 255 apart; 0 for equal steps.

    The mean over a patch is insensitive to the noise of single pixels, and the largest patch shows small changes that a
    mean over the picture would hide. Pixels left over at the border, which the model drops, do not count.

    Args:
        before, after: floats (frames, channels, height, width), as the processor returns them.
        patch_size: (height, width) of a patch.
        level: (channels, 1, 1), the difference that a grey level makes; see `level_size`.
    """
    changes = ((after - before).abs() / level).mean(dim=(0, 1))  # (height, width)
    patches = nn.functional.avg_pool2d(changes[None], patch_size)  # (1, rows, columns)
    return float(patches.max())


def level_size(processor: ViViTVideoProcessor, num_channels: int) -> torch.Tensor:
    """
    Return the difference that a grey level makes in the processor's output, float32 (channels, 1, 1).

    With do_rescale=False, that is 1 in the given frames.
    """
    settings = processor.settings
    values = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(-1, num_channels, -1, -1).contiguous()
    if settings.do_rescale or settings.do_normalize:
        values = rescale_and_normalize(values, settings)
    return (values[1] - values[0]).abs() / 255  # (channels, 1, 1)


@dataclass
class StepReuse:
    """
    How many time steps a stream encoded and reused, and the error that this made.

    `threshold`: the largest `step_change` that counts as unchanged, in grey levels. None: every step is encoded.
    `num_encoded`: time steps that were encoded for the windows of the stream.
    `num_reused`: time steps that took the token of the last encoded one.
    `num_checked_windows`: windows with reused steps that were also computed from tokens of their own.
    `num_checked_steps`: reused steps that were encoded for that.
    `largest_change`: the largest difference of a probability between the two; of an output in a regression.
    """

    threshold: float | None
    num_encoded: int = 0
    num_reused: int = 0
    num_checked_windows: int = 0
    num_checked_steps: int = 0
    largest_change: float = 0.0

    @property
    def is_check_due(self) -> bool:
        """Whether the next window with reused steps is to be computed from tokens of its own, too."""
        return bool(self.threshold) and self.num_reused >= REUSED_PER_CHECKED * self.num_checked_steps

    def __str__(self) -> str:
        total = self.num_encoded + self.num_reused
        text = f"{self.num_reused:,} of {total:,} time steps took the token of the last encoded one"
        if not self.threshold:
            return f"{text}, which has equal pixels."
        text += f", from which they differ by at most {self.threshold:g} grey levels."
        if not self.num_checked_windows:
            return text
        windows, change = counted(self.num_checked_windows, "window"), f"{self.largest_change:.2g}"
        return f"{text} In {windows} computed both ways, the largest change of a probability was {change}."
