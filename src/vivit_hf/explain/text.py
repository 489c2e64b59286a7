"""Text on pictures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import ImageDraw, ImageFont


@functools.cache
def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow up to 10.0, or without FreeType, has one small font
        return ImageFont.load_default()


def write_text(
    draw: ImageDraw.ImageDraw,
    place: Sequence[int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    most: int,
    to_left: bool = False,
) -> int:
    """
    Write a line that is at most `most` pixels wide and ends in an ellipsis if it is cut. Return its width in pixels.

    Args:
        place: (x, y) of its upper left corner, with `to_left` of its upper right corner.
    """
    text = shorten(_printable(text), lambda words: text_width(words, size) <= most)
    x, y = place
    width = text_width(text, size)
    draw.text((x - width * to_left, y), text, fill=colour, font=_font(size))
    return width


def _printable(text: str) -> str:
    """Return the text on one line, without the characters that only FreeType fonts can measure."""
    text = " ".join(text.split())
    if isinstance(_font(15), ImageFont.FreeTypeFont):
        return text
    return text.replace("“", '"').replace("”", '"').encode("latin-1", "replace").decode("latin-1")


def text_width(text: str, size: int) -> int:
    """Return the width of a line in pixels, rounded up."""
    return math.ceil(_font(size).getlength(_printable(text)))


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Cut the text until it fits, with an ellipsis at the end."""
    if fits(text):
        return text
    length = len(text)
    while length and not fits(text[:length].rstrip() + "..."):
        length -= 1
    return text[:length].rstrip() + "..."
