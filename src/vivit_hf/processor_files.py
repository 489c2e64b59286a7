"""The files of a video processor: what is written, and what is read, transformers' own Vivit processors included."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, logging
from transformers.video_processing_utils import BaseVideoProcessor

from .model_files import named_json_errors
from .processing_parameters import with_added_limits, without_permissions


_Base: Any = BaseImageProcessor if TYPE_CHECKING else object  # a mixin, but of what a type checker should know

logger = logging.get_logger(__name__)

# What transformers writes into processor files besides the parameters.
SERVICE_KEYS = {
    *("auto_map", "processor_class", "_processor_class"),
    *("image_processor_type", "video_processor_type", "feature_extractor_type"),
}
_MODEL_ARGUMENTS = {"dtype", "torch_dtype", "code_revision", "device_map"}  # pipelines pass them to processors, too
# transformers' VivitImageProcessor where its files leave a parameter out: [-1, 1], and then normalised once more.
_NATIVE_VIVIT_DEFAULTS = {"rescale_factor": 1 / 127.5, "offset": True, "do_normalize": True}
# What the files of its VivitVideoProcessor have besides, which changes nothing here.
_NATIVE_VIDEO_KEYS = {"data_format", "default_to_square", "device", "input_data_format", "return_metadata", "fps"}


class ProcessorFilesMixin(_Base):
    """`save_pretrained` and `from_pretrained` of `ViViTVideoProcessor`."""

    video_limits: Any
    num_clips: int
    num_crops: int

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """What is stored."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Every parameter, None included, as it is stored."""
        values = {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}
        return {**values, "video_limits": without_permissions(self.video_limits)}

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """`from_dict` for a file such as preprocessor_config.json."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """
        Save the settings as preprocessor_config.json and as video_preprocessor_config.json.

        transformers looks for an image processor in the first file and for a video processor in the second; its
        pipelines take either. Warns of stored views, of which those pipelines score the first alone.
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
            older.unlink()  # it would be read instead
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [path, str(second)]

    @classmethod
    def get_image_processor_dict(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        The stored settings of a folder or repository, and the `kwargs` that do not say where they are.

        A preprocessor_config.json of this class is followed. Else it is the first of: "video_processor" in
        processor_config.json, video_preprocessor_config.json, "image_processor" in processor_config.json,
        preprocessor_config.json.
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
                return super().get_image_processor_dict(source, **kwargs)  # says what is missing
        if not isinstance(settings, dict):
            raise ValueError(
                f"The processor configuration of {source} must be a JSON object, got {type(settings).__name__}."
            )
        if is_ours and isinstance(video, dict) and video.get("video_processor_type") == cls.__name__:
            names = [name for name in cls.parameter_names() if settings.get(name) != video.get(name)]
            if names:
                logger.warning(
                    f"The preprocessor_config.json of {source} is followed; its {VIDEO_PROCESSOR_NAME} has other "
                    f"values of {', '.join(names)}. Save the processor again to make them alike."
                )
        return settings, unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        A processor from its settings as they are stored, with `kwargs` in their place; warns of keys it does not know.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        if not isinstance(image_processor_dict, dict):
            raise ValueError(f"A processor's settings are a JSON object, got {type(image_processor_dict).__name__}.")
        limits = without_permissions(image_processor_dict.get("video_limits"))
        if limits != image_processor_dict.get("video_limits"):
            logger.warning(
                "`video_limits` of the file that are above the defaults are left out: only the caller may raise them "
                "(`from_pretrained(..., video_limits=...)`)."
            )
        stored = {**_from_native_vivit(image_processor_dict), "video_limits": limits}
        if not isinstance(stored.get("auto_map"), dict):
            stored.pop("auto_map", None)
        names = set(cls.parameter_names())
        stored |= with_added_limits({name: kwargs.pop(name) for name in names & set(kwargs)}, limits)
        unknown = sorted(set(stored) - names - SERVICE_KEYS)
        if not return_unused_kwargs:
            unknown += sorted(set(kwargs) - _MODEL_ARGUMENTS)
        if unknown:
            logger.warning(f"Not a parameter of {cls.__name__}, and left out: {', '.join(unknown)}.")
        processor = cls(**{name: value for name, value in stored.items() if name not in unknown})
        return (processor, kwargs) if return_unused_kwargs else processor


def _read_if_there(read: Callable[..., Any], source: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What transformers reads of a processor, None if there is no file of it, and the `kwargs` that it leaves."""
    try:
        return read(source, **kwargs)
    except OSError as error:
        if isinstance(error.__context__, json.JSONDecodeError):
            raise
        return None, kwargs


def _from_native_vivit(stored: dict[str, Any]) -> dict[str, Any]:
    """Our parameters for the stored ones of transformers' own Vivit processors; those of others as they are."""
    kinds = [str(stored.get(key, "")) for key in ("image_processor_type", "video_processor_type")]
    native = [kind for kind in kinds if kind.startswith(("VivitImageProcessor", "VivitVideoProcessor"))]
    if not native:
        return stored
    logger.warning(
        f"This is a configuration of transformers' {native[0]}. It is followed as it stands; with `offset` and "
        "`do_normalize` both set, values are not in the [-1, 1] of the official models."
    )
    settings = {**_NATIVE_VIVIT_DEFAULTS, **stored}
    if native[0].startswith("VivitVideoProcessor"):
        settings["offset"] = True  # it subtracts 1 whatever its file says
        if not settings.get("do_sample_frames"):
            settings["do_sample_frames"] = None  # it leaves that to its pipeline, which samples
        if settings.get("fps") is not None:
            settings["frames_per_second"] = settings["fps"]
        if settings.get("num_frames") is None:
            settings.pop("num_frames", None)
        settings = {name: value for name, value in settings.items() if name not in _NATIVE_VIDEO_KEYS}
    return settings
