"""
ViViT (Video Vision Transformer, Arnab et al., ICCV 2021) for Hugging Face transformers.

Importing the package registers it with the Auto classes, so that `AutoModelForVideoClassification`,
`AutoImageProcessor` and `pipeline("video-classification")` find a saved ViViT by its folder or Hub id.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .hub.import_hooks import call_after_import


if TYPE_CHECKING:
    from .configuration_vivit import ViViTConfig
    from .frame_sampling import sample_frames_uniformly
    from .hub.model_card import write_model_card
    from .inference.demo_model import demo_model_path
    from .inference.finite_outputs import NonFiniteError
    from .inference.streaming import StreamingClassifier
    from .initialisation.from_image import InitialisationReport, config_from_vit, initialise_from_vit
    from .modeling_vivit import ViViTForVideoClassification, ViViTModel, ViViTPreTrainedModel
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
    "InitialisationReport": "initialisation.from_image",
    "NonFiniteError": "inference.finite_outputs",
    "StreamingClassifier": "inference.streaming",
    "ViViTConfig": "configuration_vivit",
    "ViViTForVideoClassification": "modeling_vivit",
    "ViViTModel": "modeling_vivit",
    "ViViTPreTrainedModel": "modeling_vivit",
    "ViViTVideoProcessor": "video_processing_vivit",
    "VideoDecodingError": "video_sources",
    "VideoReader": "video_decoding",
    "config_from_vit": "initialisation.from_image",
    "demo_model_path": "inference.demo_model",
    "initialise_from_vit": "initialisation.from_image",
    "sample_frames_uniformly": "frame_sampling",
    "write_model_card": "hub.model_card",
}


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_vivit import ViViTConfig

    AutoConfig.register(ViViTConfig.model_type, ViViTConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForVideoClassification

    from .configuration_vivit import ViViTConfig
    from .modeling_vivit import ViViTForVideoClassification, ViViTModel

    AutoModel.register(ViViTConfig, ViViTModel, exist_ok=True)
    AutoModelForVideoClassification.register(ViViTConfig, ViViTForVideoClassification, exist_ok=True)


def _register_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_vivit import ViViTConfig
    from .video_processing_vivit import ViViTVideoProcessor

    # Under both names: transformers takes "pil" where torchvision is missing, and "torchvision" where it is installed.
    backends = dict.fromkeys(("pil", "torchvision"), ViViTVideoProcessor)
    AutoImageProcessor.register(ViViTConfig, image_processor_classes=backends, exist_ok=True)


def _register_video_processor() -> None:
    # `from transformers import AutoVideoProcessor` is refused without torchvision.
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    from .configuration_vivit import ViViTConfig
    from .video_processing_vivit import ViViTVideoProcessor

    AutoVideoProcessor.register(ViViTConfig, ViViTVideoProcessor, exist_ok=True)


def _register_pipeline() -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    from .inference.pipeline import ViViTVideoClassificationPipeline

    SUPPORTED_TASKS["video-classification"]["impl"] = ViViTVideoClassificationPipeline


# Importing the Auto classes imports torch, which takes seconds; `import vivit_hf` and `vivit-hf --help` need neither.
call_after_import(
    {
        "transformers.models.auto.configuration_auto": _register_config,
        "transformers.models.auto.modeling_auto": _register_models,
        "transformers.models.auto.image_processing_auto": _register_image_processor,
        "transformers.models.auto.video_processing_auto": _register_video_processor,
        "transformers.pipelines": _register_pipeline,
    },
    prefixes=("transformers.", f"{__name__}."),
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
