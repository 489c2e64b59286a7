"""
ViViT (Video Vision Transformer, Arnab et al., ICCV 2021) for Hugging Face transformers.

Importing the package registers it with the Auto classes, so that `AutoModelForVideoClassification`,
`AutoImageProcessor` and `pipeline("video-classification")` find a saved ViViT by its folder or Hub id.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Return `__getattr__`, `__dir__` and `__all__` of a package that imports its exports when they are first used.

    Most modules import torch, which takes seconds; `import vivit_hf` and `vivit-hf --help` do not need it. The exports
    are those that a type checker sees: the imports `from .module import name as name` in the package's source.

    Raises OSError if the package is installed without its source, which transformers needs as well.
    """
    source = inspect.getsource(sys.modules[package])
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname: node.module for node in imports for alias in node.names if alias.asname}

    def import_export(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return import_export, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)


if TYPE_CHECKING:
    from .configuration_vivit import ViViTConfig as ViViTConfig
    from .frame_sampling import sample_frames_uniformly as sample_frames_uniformly
    from .hub.model_card import write_model_card as write_model_card
    from .inference.demo_model import demo_model_path as demo_model_path
    from .inference.finite_outputs import NonFiniteError as NonFiniteError
    from .inference.streaming import StreamingClassifier as StreamingClassifier
    from .initialisation.from_image import (
        InitialisationReport as InitialisationReport,
        config_from_vit as config_from_vit,
        initialise_from_vit as initialise_from_vit,
    )
    from .modeling_vivit import (
        ViViTForPreTraining as ViViTForPreTraining,
        ViViTForVideoClassification as ViViTForVideoClassification,
        ViViTModel as ViViTModel,
        ViViTPreTrainedModel as ViViTPreTrainedModel,
    )
    from .video_decoding import VideoReader as VideoReader
    from .video_processing_vivit import ViViTVideoProcessor as ViViTVideoProcessor
    from .video_sources import VideoDecodingError as VideoDecodingError

__getattr__, __dir__, __all__ = lazy_exports(__name__)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_vivit import ViViTConfig

    AutoConfig.register(ViViTConfig.model_type, ViViTConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForPreTraining,
        AutoModelForVideoClassification,
    )

    from .configuration_vivit import ViViTConfig
    from .modeling_vivit import ViViTForPreTraining, ViViTForVideoClassification, ViViTModel

    AutoModel.register(ViViTConfig, ViViTModel, exist_ok=True)
    AutoModelForPreTraining.register(ViViTConfig, ViViTForPreTraining, exist_ok=True)
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


def _register_with_auto_classes() -> None:
    """Register ViViT with each Auto class once it is imported; importing them here would import torch."""
    from .hub.import_hooks import call_after_import

    auto = "transformers.models.auto"
    call_after_import(
        {
            f"{auto}.configuration_auto": _register_config,
            f"{auto}.modeling_auto": _register_models,
            f"{auto}.image_processing_auto": _register_image_processor,
            f"{auto}.video_processing_auto": _register_video_processor,
            "transformers.pipelines": _register_pipeline,
        },
        prefixes=("transformers.", f"{__name__}."),
    )


_register_with_auto_classes()
