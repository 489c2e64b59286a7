"""Text on pictures."""

import functools
import math
from collections.abc import Callable, Sequence

from PIL import ImageDraw, ImageFont


_font = functools.cache(ImageFont.load_default)


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
    text = shorten(_without_breaks(text), lambda words: text_width(words, size) <= most)
    x, y = place
    width = text_width(text, size)
    draw.text((x - width * to_left, y), text, fill=colour, font=_font(size))
    return width


def text_width(text: str, size: int) -> int:
    """Return the width of a line in pixels, rounded up."""
    return math.ceil(_font(size).getlength(_without_breaks(text)))


def _without_breaks(text: str) -> str:
    """Return the text on one line. Control characters do no harm in a picture, so none are escaped."""
    return " ".join(text.split())


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Cut the text until it fits, with an ellipsis at the end."""
    cuts = (f"{text[:length].rstrip()}..." for length in range(len(text), 0, -1))
    return text if fits(text) else next(filter(fits, cuts), "...")
