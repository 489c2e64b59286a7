"""Weights and settings of other implementations."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .image_sources import ImageSource as ImageSource
    from .image_sources import read_image_source as read_image_source
    from .weight_files import ConversionError as ConversionError

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "image_sources": "ImageSource read_image_source",
        "weight_files": "ConversionError",
    },
)
