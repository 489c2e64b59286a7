"""Save and load the settings of a video processor, and read those of transformers' own Vivit processors."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, logging
from transformers.video_processing_utils import BaseVideoProcessor

from .model_files import named_json_errors
from .processor_settings import SETTING_NAMES, merged_limits, without_permissions


_Base: Any = BaseImageProcessor if TYPE_CHECKING else object  # tells type checkers where the mixin is used

logger = logging.get_logger(__name__)

# Keys that transformers adds to processor files.
SERVICE_KEYS = {
    *("auto_map", "processor_class", "_processor_class"),
    *("image_processor_type", "video_processor_type", "feature_extractor_type"),
}
_MODEL_ARGUMENTS = {"dtype", "torch_dtype", "code_revision", "device_map"}  # pipelines also pass them to processors
# Defaults of transformers' VivitImageProcessor: scale to [-1, 1], then normalise again.
_NATIVE_VIVIT_DEFAULTS = {"rescale_factor": 1 / 127.5, "offset": True, "do_normalize": True}
# Keys in the files of its VivitVideoProcessor that have no effect here.
_NATIVE_VIDEO_KEYS = {"data_format", "default_to_square", "device", "input_data_format", "return_metadata", "fps"}


class ProcessorFilesMixin(_Base):
    """`save_pretrained` and `from_pretrained` of `ViViTVideoProcessor`."""

    video_limits: Any
    num_clips: int
    num_crops: int

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as it is stored, None included."""
        values = {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}
        return {**values, "video_limits": without_permissions(self.video_limits)}

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Return a processor with the settings in a file such as preprocessor_config.json."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """
        Save the settings as preprocessor_config.json and as video_preprocessor_config.json.

        transformers looks for image processors in the first file and for video processors in the second; its pipelines
        use either. Warns if the settings give several views, because pipelines score only the first.
        """
        if self.num_clips * self.num_crops > 1:
            logger.warning(
                f"This processor gives num_clips={self.num_clips} x num_crops={self.num_crops} views of every video. "
                "Pipelines of transformers take one: pass views to calls instead, or score with `predict_videos`."
            )
        [path] = super().save_pretrained(save_directory)
        settings = self.to_dict()
        name = settings.pop("image_processor_type")
        if "AutoImageProcessor" in settings.get("auto_map", {}):
            settings["auto_map"] = {"AutoVideoProcessor": settings["auto_map"]["AutoImageProcessor"]}
        text = json.dumps({**settings, "video_processor_type": name}, indent=2, sort_keys=True) + "\n"
        second = Path(save_directory, VIDEO_PROCESSOR_NAME)
        second.write_text(text, encoding="utf-8")
        older = Path(save_directory, PROCESSOR_NAME)
        if older.is_file() and re.search(r'"(image|video)_processor"', older.read_text(encoding="utf-8")):
            older.unlink()  # transformers would read it instead
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [path, str(second)]

    @classmethod
    def get_image_processor_dict(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Return the stored settings of a folder or repository, and the `kwargs` that are not about its location.

        A preprocessor_config.json of this class comes first. Otherwise the order is "video_processor" in
        processor_config.json, video_preprocessor_config.json, "image_processor" in processor_config.json,
        preprocessor_config.json. If none of them has `num_frames`, the config.json of the model tells.
        """
        with named_json_errors(source, "processor configuration"):
            image, unused = _read_if_there(super().get_image_processor_dict, source, kwargs)
            video = None
            if "image_processor_filename" not in kwargs:
                video, unused_by_video = _read_if_there(BaseVideoProcessor.get_video_processor_dict, source, kwargs)
                unused = unused if video is None else unused_by_video
            is_ours = isinstance(image, dict) and image.get("image_processor_type") == cls.__name__
            is_damaged = not isinstance(image, (dict, NoneType))
            settings = image if is_ours or is_damaged or video is None else video
            if settings is None:
                return super().get_image_processor_dict(source, **kwargs)  # raises OSError: no such file
        if not isinstance(settings, dict):
            raise ValueError(
                f"The processor configuration of {source} must be a JSON object, got {type(settings).__name__}."
            )
        if settings.get("num_frames") is None:  # as in files of transformers' VivitImageProcessor
            with named_json_errors(source, "config.json"):
                config, _ = _read_if_there(PretrainedConfig.get_config_dict, source, kwargs)
            if isinstance(config, dict) and config.get("num_frames") is not None:
                settings["num_frames"] = config["num_frames"]
        if is_ours and isinstance(video, dict) and video.get("video_processor_type") == cls.__name__:
            names = [name for name in SETTING_NAMES if settings.get(name) != video.get(name)]
            if names:
                logger.warning(
                    f"Using preprocessor_config.json of {source}; its {VIDEO_PROCESSOR_NAME} has other values of "
                    f"{', '.join(names)}. Save the processor again to make the files agree."
                )
        return settings, unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Return a processor with these stored settings, replaced by those in `kwargs`.

        Warns of unknown keys, and of `video_limits` in the file above the defaults, and leaves them out.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        if not isinstance(image_processor_dict, dict):
            raise ValueError(
                f"The settings of a processor must be a JSON object, got {type(image_processor_dict).__name__}."
            )
        stored = _from_native_vivit(image_processor_dict)
        limits = without_permissions(stored.get("video_limits"))
        if limits != stored.get("video_limits"):
            logger.warning(
                "Ignoring `video_limits` in the file that are above the defaults: only the caller may raise them "
                "(`from_pretrained(..., video_limits=...)`)."
            )
        given = {name: kwargs.pop(name) for name in SETTING_NAMES if name in kwargs}
        given["video_limits"] = merged_limits(limits, given.get("video_limits", limits))
        stored = {**stored, **given}
        if not isinstance(stored.get("auto_map"), dict):
            stored.pop("auto_map", None)
        unknown = sorted(set(stored) - {*SETTING_NAMES} - SERVICE_KEYS)
        processor = cls(**{name: value for name, value in stored.items() if name not in unknown})
        if not return_unused_kwargs:
            unknown += sorted(set(kwargs) - _MODEL_ARGUMENTS)
        if unknown:
            logger.warning(f"Ignoring unknown parameters of {cls.__name__}: {', '.join(unknown)}.")
        return (processor, kwargs) if return_unused_kwargs else processor


def _read_if_there(read: Callable[..., Any], source: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the settings that transformers reads, or None if there is no file, and the unused `kwargs`."""
    try:
        return read(source, **kwargs)
    except OSError as error:
        if isinstance(error.__context__, json.JSONDecodeError):
            raise
        return None, kwargs


def _from_native_vivit(stored: dict[str, Any]) -> dict[str, Any]:
    """Translate stored settings of transformers' own Vivit processors into ours; return others unchanged."""
    kinds = [str(stored.get(key, "")) for key in ("image_processor_type", "video_processor_type")]
    native = [kind for kind in kinds if kind.startswith(("VivitImageProcessor", "VivitVideoProcessor"))]
    if not native:
        return stored
    logger.warning(
        f"This is a configuration of transformers' {native[0]}. It is followed exactly; if `offset` and `do_normalize` "
        "are both set, values leave the range [-1, 1] of the official models."
    )
    settings = {**_NATIVE_VIVIT_DEFAULTS, **stored}
    if native[0].startswith("VivitVideoProcessor"):
        settings["offset"] = True  # it subtracts 1 whatever its file says
        if not settings.get("do_sample_frames"):
            settings["do_sample_frames"] = None  # its pipeline samples
        if settings.get("fps") is not None:
            settings["frames_per_second"] = settings["fps"]
        if settings.get("num_frames") is None:
            settings.pop("num_frames", None)
        settings = {name: value for name, value in settings.items() if name not in _NATIVE_VIDEO_KEYS}
    return settings
