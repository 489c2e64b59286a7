"""Turn named arrays of any source into a model: every array is mapped, unused for a stated reason, or an error."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .weight_files import ConversionError


# Name in the model -> (name in the source, tensor)
Mapped = dict[str, tuple[str, torch.Tensor]]


@dataclass
class ImageSource:
    """An image model that was read, and what happened to the arrays of its file."""

    vit: PreTrainedModel
    kind: str
    origins: dict[str, str]  # name in the model -> name of the array it comes from
    unused: dict[str, str] = field(default_factory=dict)  # name of an array -> reason
    processor_settings: dict[str, Any] | None = None  # as in transformers' preprocessor_config.json
    notes: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)  # names of arrays that were multiplied into others


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Return the replacement for the first pattern that matches the whole name, or None."""
    return next(
        (re.sub(f"^{pattern}$", new, name) for pattern, new in names.items() if re.fullmatch(pattern, name)), None
    )


def reason_for(name: str, reasons: Mapping[str, str]) -> str | None:
    """Return the reason for the first pattern that matches the whole name, or None."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def refuse(source: Any, names: Iterable[str], reasons: Mapping[str, str]) -> None:
    """Raise a ConversionError for the first name that matches a pattern."""
    for name in names:
        if reason := reason_for(name, reasons):
            raise ConversionError(f"{source} has {reason}, which a ViViT cannot use: {name}.")


def raise_problems(source: Any, problems: list[str]) -> None:
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(
            f"{source} does not fit a plain ViT in {len(problems)} places: {'; '.join(problems[:8])}{rest}."
        )


def square_image_size(
    source: Any, num_positions: int, patch: tuple[int, ...], prefixes: tuple[int, ...] = (1,)
) -> tuple[int, ...]:
    """Return (height, width) in pixels for positions of a square grid behind one of these numbers of prefix tokens."""
    for prefix in prefixes:
        side = round((num_positions - prefix) ** 0.5)
        if side * side == num_positions - prefix:
            return side * patch[0], side * patch[1]
    raise ConversionError(
        f"{source} has {num_positions} position embeddings, which is not a class token and a square grid."
    )


def int_or_pair(size: tuple[int, ...]) -> int | list[int]:
    """Return a size as configurations of transformers store it: a number if all sides are equal, else their list."""
    return size[0] if len(set(size)) == 1 else list(size)
