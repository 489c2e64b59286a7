"""The settings of the video processor: names, defaults, checks and files, also those of transformers' own Vivit."""

# ruff: noqa: RUF009 - the calls in the body of the dataclass make its fields

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from transformers import PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, logging
from transformers.video_processing_utils import BaseVideoProcessor

from .frame_sampling import CLIP_STARTS
from .limits_vivit import (
    LARGEST_SCALE,
    RATES,
    check_bool,
    check_choice,
    check_clip,
    check_count,
    check_limit,
    check_positive_integer,
    check_positive_number,
    check_scale,
    check_value,
    is_number,
    setting,
)
from .model_files import named_json_errors
from .presets_vivit import SHORT_VIDEO_POLICIES
from .video_sources import VideoLimits


_Base: Any = BaseImageProcessor if TYPE_CHECKING else object  # tells type checkers where the mixin is used

logger = logging.get_logger(__name__)

_RESAMPLES = {filter.name.lower(): int(filter) for filter in PIL.Image.Resampling}
_DEFAULT_LIMITS = asdict(VideoLimits())
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


# Checks of one setting: each returns the value as it is stored, or raises a ValueError that names the setting.


def _num_crops(name: str, value: Any) -> int:
    check_value(name, value, value in (1, 3) and not isinstance(value, bool), "1 or 3")
    return int(value)


def _resample(name: str, value: Any) -> int:
    number: Any = _RESAMPLES.get(value.lower()) if isinstance(value, str) else value
    is_good = number in _RESAMPLES.values() and not isinstance(value, bool)
    check_value(name, value, is_good, f"a filter of {_RESAMPLES}")
    return int(number)


def _per_channel(name: str, value: Any) -> list[float]:
    entries = [*value] if isinstance(value, (list, tuple, np.ndarray)) else [value]
    is_good = len(entries) in (1, 3, 4) and all(is_number(one) and abs(one) <= LARGEST_SCALE for one in entries)
    positive = " above 0" if name == "image_std" else ""
    is_good = is_good and not (positive and min(entries) <= 0)
    check_value(name, value, is_good, f"one number{positive} or one per channel")
    return [float(one) for one in entries]


def _size(name: str, value: Any) -> dict[str, int]:
    sides = ("height", "width")
    keys, default = (("shortest_edge",), 256) if name == "size" else (sides, 224)
    sizes = default if value is None else value
    if isinstance(sizes, (int, np.integer)) and not isinstance(sizes, bool):
        sizes = dict.fromkeys(keys, sizes)
    elif isinstance(sizes, (list, tuple)) and len(sizes) == 2:
        sizes = dict(zip(sides, sizes, strict=True))
    is_good = hasattr(sizes, "items") and set(sizes) in ({*sides}, {*keys})
    expected = " or ".join(str(list(one)) for one in dict.fromkeys((sides, keys)))
    check_value(name, value, is_good, f"a dictionary with {expected}, an integer, or (height, width)")
    sizes = {key: check_positive_integer(f"{name}['{key}']", side) for key, side in sizes.items()}
    check_limit(name, max(sizes.values()))
    return sizes


def _video_limits(name: str, value: Any) -> dict[str, Any]:
    is_good = isinstance(value, dict) and value.keys() <= _DEFAULT_LIMITS.keys()
    check_value(name, value, is_good, f"a dictionary with some of {sorted(_DEFAULT_LIMITS)}, or None")
    try:
        VideoLimits(**value)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    return dict(value)


@dataclass(frozen=True)
class ProcessorSettings:
    """Settings of a `ViViTVideoProcessor`, in the form in which they are stored.

    Args:
        num_frames: frames per clip.
        frame_stride: distance between two frames of a clip, in frames of the video.
        frames_per_second: distance between two frames of a clip as a rate, whatever the rate of the video; it takes
            the place of `frame_stride`. None: off.
        frame_sampling: "clip", frames at a fixed distance, or "uniform", frames spread over the whole video (section
            3.2 of the paper).
        clip_start: "centre" (several clips: linearly spaced from the first frame to the last) or "random". Uniform
            frames have their exact places, or are drawn around them.
        num_clips, num_crops: the views. num_crops is 1, or 3 for left, centre and right (portrait: top, centre,
            bottom). The paper averages the logits of 4 x 3 views.
        short_video_policy: "repeat_last", "loop", "mask" or "error", for videos with too few frames for a clip. "mask"
            gives a `frame_mask` with every batch (see `ViViTVideoProcessor.__call__`).
        do_sample_frames: None samples from files, and from frames in memory if there are not exactly `num_frames`;
            False takes all frames; True always samples.
        do_resize, size: resize to {"shortest_edge": s} or {"height": h, "width": w}, pixels. An int is a short edge;
            None is 256.
        resample: the filter, a `PIL.Image.Resampling`, its number or its name; antialiased.
        do_center_crop, crop_size: crop to {"height": h, "width": w}; an int is a square, None is 224. The shortest
            edge grows if a crop that is not square needs it; otherwise a frame smaller than the crop is a ValueError.
        crop_position: "centre" or "random", the place of a single crop.
        do_convert_rgb: repeat the channel of grey frames and drop alpha, so that there are always 3 channels.
        do_rescale, rescale_factor, offset: multiply values from 0 to 255 by the factor and, with offset, subtract 1.
        do_normalize, image_mean, image_std: then (value - mean) / std per channel (a number counts for all channels).
        on_error: for files that cannot be read or have lost a wanted frame: "raise", "skip" the video, or
            "repeat_last" to replace lost frames by the last good one (a file without any frame still raises).
        num_threads: decoder threads per video, 0 for FFmpeg's choice. None: 1 in data loader workers, else 0.
        video_limits: fields of `VideoLimits` to change, for example {"max_frames": 10000}. Those of a call are added.
            Limits above the defaults, and `allow_private_addresses`, are never stored nor read from a file.

    Raises ValueError for a value out of its range and for settings that exclude each other.
    """

    num_frames: int = setting(32, check_count)
    frame_stride: int = setting(2, check_count)
    frames_per_second: float | None = setting(None, check_positive_number, least=RATES[0], most=RATES[1])
    frame_sampling: str = setting("clip", check_choice, choices=("clip", "uniform"))
    clip_start: str = setting("centre", check_choice, choices=CLIP_STARTS, aliases={"center": "centre"})
    num_clips: int = setting(1, check_count)
    short_video_policy: str = setting("repeat_last", check_choice, choices=SHORT_VIDEO_POLICIES)
    do_sample_frames: bool | None = setting(None, check_bool)
    do_resize: bool = setting(True, check_bool)
    size: dict[str, int] = setting(256, _size)
    resample: int = setting(PIL.Image.Resampling.BILINEAR, _resample)
    do_center_crop: bool = setting(True, check_bool)
    crop_size: dict[str, int] = setting(224, _size)
    crop_position: str = setting("centre", check_choice, choices=CLIP_STARTS, aliases={"center": "centre"})
    num_crops: int = setting(1, _num_crops)
    do_convert_rgb: bool = setting(True, check_bool)
    do_rescale: bool = setting(True, check_bool)
    rescale_factor: float = setting(1 / 255, check_scale)
    offset: bool = setting(False, check_bool)
    do_normalize: bool = setting(True, check_bool)
    image_mean: list[float] = setting((0.5, 0.5, 0.5), _per_channel)
    image_std: list[float] = setting((0.5, 0.5, 0.5), _per_channel)
    on_error: str = setting("raise", check_choice, choices=("raise", "skip", "repeat_last"))
    num_threads: int | None = setting(None, check_count, least=0)
    video_limits: dict[str, Any] | None = setting(None, _video_limits)

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, one.metadata["check"](one.name, getattr(self, one.name)))
        if self.frame_sampling == "uniform" and self.num_clips > 1:
            raise ValueError(
                f"frame_sampling='uniform' spreads one clip over the whole video, got num_clips={self.num_clips}: use "
                "num_clips=1 or frame_sampling='clip'."
            )
        if self.num_crops == 3 and not self.do_center_crop:
            raise ValueError(
                "num_crops=3 needs a processor that crops, and this one has do_center_crop=False: use num_crops=1 "
                "(`--num-crops 1`), or set do_center_crop=True and `crop_size`."
            )
        if self.do_center_crop:
            check_clip("`num_frames` and `crop_size`", self.num_frames, *self.crop_size.values())
        elif self.do_resize:
            sides = [*self.size.values()]
            check_clip("`num_frames` and `size`", self.num_frames, sides[0], sides[-1])

    def updated(self, values: Mapping[str, Any]) -> ProcessorSettings:
        """Return these settings with other values. None keeps a value, `video_limits` are added, and a `frame_stride`
        turns `frames_per_second` off.

        Raises TypeError for unknown names, and ValueError as the constructor or for a stride or rate with uniform
        sampling.
        """
        check_names(values)
        given = {name: value for name, value in values.items() if value is not None}
        distances = [name for name in ("frame_stride", "frames_per_second") if name in given]
        if distances and given.get("frame_sampling", self.frame_sampling) == "uniform":
            raise ValueError(
                f"`{distances[0]}={given[distances[0]]!r}` has no effect with frame_sampling='uniform', which spreads "
                "the frames over the whole video: leave it out, or use frame_sampling='clip'."
            )
        if "frame_stride" in given:
            given.setdefault("frames_per_second", None)
        if "video_limits" in given:
            given["video_limits"] = _merged_limits(self.video_limits, given["video_limits"])
        return replace(self, **given)


SETTING_NAMES = tuple(one.name for one in fields(ProcessorSettings))


def check_names(names: Mapping[str, Any]) -> None:
    """Raise TypeError for the first name that no setting has."""
    for name in names:
        if name not in SETTING_NAMES:
            close = difflib.get_close_matches(name, SETTING_NAMES, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Expected one of {', '.join(SETTING_NAMES)}."
            raise TypeError(f"`{name}` is not a parameter of ViViTVideoProcessor. {hint}")


# Files


def _merged_limits(limits: Any, added: Any) -> Any:
    """Return `video_limits` with those of `added` in their place; whatever is not a dictionary is left to the check."""
    return {**limits, **added} if isinstance(limits, dict) and isinstance(added, dict) else added


def _without_permissions(limits: Any) -> Any:
    """Return `video_limits` without those above the default: the author of a file may lower limits, not raise them."""
    if not isinstance(limits, dict):
        return limits
    kept = {
        name: limit
        for name, limit in limits.items()
        if not (name in _DEFAULT_LIMITS and isinstance(limit, (int, float)) and limit > _DEFAULT_LIMITS[name])
    }
    return kept or None


class ProcessorFilesMixin(_Base):
    """`save_pretrained` and `from_pretrained` of `ViViTVideoProcessor`."""

    video_limits: Any
    num_clips: int
    num_crops: int

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as it is stored, None included."""
        values = {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}
        return {**values, "video_limits": _without_permissions(self.video_limits)}

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Return a processor with the settings in a file such as preprocessor_config.json."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """
        Save the settings as preprocessor_config.json and as video_preprocessor_config.json.

        transformers looks for image processors in the first file and for video processors in the second; its pipelines
        use either. Warns if the settings give several views, as pipelines score the first alone without this package.
        """
        if self.num_clips * self.num_crops > 1:
            logger.warning(
                f"This processor gives num_clips={self.num_clips} x num_crops={self.num_crops} views of every video. "
                "Where vivit_hf is not installed, pipelines score the first alone: pass views to calls instead, or "
                "score with `predict_videos`."
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
        limits = _without_permissions(stored.get("video_limits"))
        if limits != stored.get("video_limits"):
            logger.warning(
                "Ignoring `video_limits` in the file that are above the defaults: only the caller may raise them "
                "(`from_pretrained(..., video_limits=...)`)."
            )
        given = {name: kwargs.pop(name) for name in SETTING_NAMES if name in kwargs}
        given["video_limits"] = _merged_limits(limits, given.get("video_limits", limits))
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
