"""
ViViT (Video Vision Transformer, Arnab et al., ICCV 2021) for Hugging Face transformers.

Importing the package registers it with the Auto classes, so that `AutoModelForVideoClassification`,
`AutoImageProcessor` and `pipeline("video-classification")` find a saved ViViT by its folder or Hub id.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForVideoClassification
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # refused elsewhere without torchvision

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

AutoConfig.register(ViViTConfig.model_type, ViViTConfig, exist_ok=True)
AutoModel.register(ViViTConfig, ViViTModel, exist_ok=True)
AutoModelForVideoClassification.register(ViViTConfig, ViViTForVideoClassification, exist_ok=True)
# Under both names: transformers takes "pil" where torchvision is missing, and "torchvision" where it is installed.
_BACKENDS = dict.fromkeys(("pil", "torchvision"), ViViTVideoProcessor)
AutoImageProcessor.register(ViViTConfig, image_processor_classes=_BACKENDS, exist_ok=True)
AutoVideoProcessor.register(ViViTConfig, ViViTVideoProcessor, exist_ok=True)

# Whatever is saved takes the code along that loads it where this package is not installed.
ViViTConfig.register_for_auto_class("AutoConfig")
ViViTModel.register_for_auto_class("AutoModel")
ViViTForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
ViViTVideoProcessor.register_for_auto_class("AutoImageProcessor")

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
