"""Read image models, initialise ViViTs from them, and describe a model's sizes and costs."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .from_image import (
        InitialisationReport as InitialisationReport,
        config_from_vit as config_from_vit,
        initialise_from_vit as initialise_from_vit,
    )
    from .image_arrays import ImageSource as ImageSource
    from .image_sources import read_image_source as read_image_source
    from .inspection import ModelPart as ModelPart, describe_model as describe_model, inspect_parts as inspect_parts
    from .model_processor import check_processor as check_processor, processor_for as processor_for
    from .weight_files import ConversionError as ConversionError

__getattr__, __dir__, __all__ = lazy_exports(__name__)
