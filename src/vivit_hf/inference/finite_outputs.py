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
    if broken := broken_weights(model):
        cause = f"So do its weights ({broken}): the checkpoint is damaged or its training diverged."
    elif pixel_values is not None and not pixel_values.isfinite().all():
        cause = "So do its `pixel_values`: check the frames and the scaling of the processor."
    else:
        cause = f"Its weights do not: its numbers overflow in {model.dtype}; try float32, and check the frames."
    raise NonFiniteError(f"The output of the {type(model).__name__} contains NaN or infinite numbers. {cause}")


def broken_weights(model: Any) -> str:
    """Return the first names of the parameters with NaN or infinite numbers; empty if there are none."""
    names = [name for name, one in model.named_parameters() if not one.is_meta and not one.isfinite().all()]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
