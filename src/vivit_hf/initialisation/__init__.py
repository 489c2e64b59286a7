"""Initialise a ViViT from an image ViT, and describe a model's sizes and costs."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .from_image import (
        InitialisationReport as InitialisationReport,
        config_from_vit as config_from_vit,
        initialise_from_vit as initialise_from_vit,
    )
    from .inspection import ModelPart as ModelPart, describe_model as describe_model, inspect_parts as inspect_parts
    from .model_processor import check_processor as check_processor, processor_for as processor_for

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "from_image": "InitialisationReport config_from_vit initialise_from_vit",
        "inspection": "ModelPart describe_model inspect_parts",
        "model_processor": "check_processor processor_for",
    },
)
