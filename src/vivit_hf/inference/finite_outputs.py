"""Refuse NaN and infinite scores, which would otherwise be drawn or printed like an answer."""

from typing import Any

import torch


class NonFiniteError(ValueError):
    """The output of a model contains NaN or infinite numbers. The message names the likely cause."""


def check_finite(output: torch.Tensor, model: Any, pixel_values: torch.Tensor | None = None) -> None:
    """
    Raise NonFiniteError if `output` (logits or relevance, any shape) contains NaN or infinite numbers.

    Args:
        model: the model that computed it. Its weights are searched for the cause.
        pixel_values: its input, which is also searched if given.
    """
    if output.isfinite().all():
        return
    broken = [
        name for name, parameter in model.named_parameters() if not parameter.is_meta and not parameter.isfinite().all()
    ]
    if broken:
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        cause = f"So do its weights ({names}): the checkpoint is damaged or its training diverged."
    elif pixel_values is not None and not pixel_values.isfinite().all():
        cause = "So do its `pixel_values`: check the frames and the scaling of the processor."
    else:
        cause = f"Its weights do not: its numbers overflow in {model.dtype}; try float32, and check the frames."
    raise NonFiniteError(f"The output of the {type(model).__name__} contains NaN or infinite numbers. {cause}")
