"""Convert weights of image ViTs, google-research/scenic and transformers, and export models to ONNX."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .image_arrays import ImageSource as ImageSource
    from .image_sources import read_image_source as read_image_source
    from .scenic_checkpoint import read_scenic_checkpoint as read_scenic_checkpoint
    from .scenic_weights import (
        config_from_scenic as config_from_scenic,
        state_dict_from_scenic as state_dict_from_scenic,
    )
    from .weight_files import ConversionError as ConversionError

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "image_arrays": "ImageSource",
        "image_sources": "read_image_source",
        "scenic_checkpoint": "read_scenic_checkpoint",
        "scenic_weights": "config_from_scenic state_dict_from_scenic",
        "weight_files": "ConversionError",
    },
)
