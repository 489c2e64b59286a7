"""
ViViT (Video Vision Transformer, Arnab et al., ICCV 2021) for Hugging Face transformers.

Importing the package registers it with the Auto classes, so that `AutoModelForVideoClassification`,
`AutoImageProcessor` and `pipeline("video-classification")` find a saved ViViT by its folder or Hub id.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register_with_auto_classes


if TYPE_CHECKING:
    from .configuration_vivit import ViViTConfig
    from .finite_outputs import NonFiniteError
    from .frame_sampling import sample_frames_uniformly
    from .image_initialisation import InitialisationReport, config_from_vit, initialise_from_vit
    from .inference import demo_model_path
    from .model_card import write_model_card
    from .modeling_vivit import ViViTForVideoClassification, ViViTModel, ViViTPreTrainedModel
    from .streaming import StreamingClassifier
    from .video_decoding import VideoReader
    from .video_processing_vivit import ViViTVideoProcessor
    from .video_sources import VideoDecodingError


__version__ = "0.1.0"

__all__ = [
    "InitialisationReport",
    "NonFiniteError",
    "StreamingClassifier",
    "ViViTConfig",
    "ViViTForVideoClassification",
    "ViViTModel",
    "ViViTPreTrainedModel",
    "ViViTVideoProcessor",
    "VideoDecodingError",
    "VideoReader",
    "config_from_vit",
    "demo_model_path",
    "initialise_from_vit",
    "sample_frames_uniformly",
    "write_model_card",
]

# Imported when they are first asked for: most of them import torch, which takes seconds.
_MODULES = {
    "InitialisationReport": "image_initialisation",
    "NonFiniteError": "finite_outputs",
    "StreamingClassifier": "streaming",
    "ViViTConfig": "configuration_vivit",
    "ViViTForVideoClassification": "modeling_vivit",
    "ViViTModel": "modeling_vivit",
    "ViViTPreTrainedModel": "modeling_vivit",
    "ViViTVideoProcessor": "video_processing_vivit",
    "VideoDecodingError": "video_sources",
    "VideoReader": "video_decoding",
    "config_from_vit": "image_initialisation",
    "demo_model_path": "inference",
    "initialise_from_vit": "image_initialisation",
    "sample_frames_uniformly": "frame_sampling",
    "write_model_card": "model_card",
}

register_with_auto_classes()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
