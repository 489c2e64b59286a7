"""
Registration with transformers' Auto classes, put off until they are imported.

Importing them takes seconds, because they import torch; `import vivit_hf` and the command line's `--help` need neither.
"""

import importlib.abc
import importlib.machinery
import itertools
import sys
from collections.abc import Sequence
from types import ModuleType


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

    from .pipeline import ViViTVideoClassificationPipeline

    SUPPORTED_TASKS["video-classification"]["impl"] = ViViTVideoClassificationPipeline


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """
    Find modules of transformers and of this package as the other finders do, and register ViViT after their import.

    Not in the midst of it: the modules of transformers import each other in circles, and importing ours between them
    would find some of them half executed.
    """

    def __init__(self) -> None:
        self._waiting = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_models,
            "transformers.models.auto.image_processing_auto": _register_image_processor,
            "transformers.models.auto.video_processing_auto": _register_video_processor,
            "transformers.pipelines": _register_pipeline,
        }
        self._num_executing = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(("transformers.", f"{__package__}.")):
            return None
        # Only those behind this one: after a reload of the package there are two of it, which would ask each other.
        others = list(itertools.dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                self._num_executing += 1
                try:
                    execute(module)
                finally:
                    self._num_executing -= 1
                self.register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        """Register ViViT with the Auto classes that are imported by now."""
        while self._num_executing == 0 and (loaded := sorted(self._waiting.keys() & sys.modules.keys())):
            self._waiting.pop(loaded[0])()
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def register_with_auto_classes() -> None:
    """Register ViViT with each Auto class: now if it is imported already, else as soon as it is."""
    finder = _RegisteringFinder()
    sys.meta_path.insert(0, finder)
    finder.register()
