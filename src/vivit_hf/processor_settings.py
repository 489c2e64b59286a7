"""The settings of the video processor: names, defaults and checks, and the form in which they are stored."""

# ruff: noqa: RUF009 - the calls in the body of the dataclass make its fields

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import PIL.Image

from .frame_sampling import CLIP_STARTS, SHORT_VIDEO_POLICIES
from .limits_vivit import (
    LARGEST_SCALE,
    RATES,
    check_bool,
    check_choice,
    check_clip,
    check_limit,
    check_positive_integer,
    check_positive_number,
)
from .video_sources import VideoLimits


_RESAMPLES = {filter.name.lower(): int(filter) for filter in PIL.Image.Resampling}
_DEFAULT_LIMITS = asdict(VideoLimits())


# Checks of one field: each returns the value as it is stored, or raises a ValueError that names the field.

_rate = partial(check_positive_number, least=RATES[0], most=RATES[1])
_scale = partial(check_positive_number, most=LARGEST_SCALE)


def _count(name: str, value: Any, least: int = 1) -> int:
    count = check_positive_integer(name, value, least)
    check_limit(name, count)
    return count


def _num_crops(name: str, value: Any) -> int:
    if value not in (1, 3) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be 1 or 3, got {value!r}.")
    return int(value)


def _place(name: str, value: Any) -> str:
    return check_choice(name, "centre" if value == "center" else value, CLIP_STARTS)


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    return partial(check_choice, choices=choices)


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _resample(name: str, value: Any) -> int:
    number: Any = _RESAMPLES.get(value.lower()) if isinstance(value, str) else value
    if isinstance(value, bool) or number not in _RESAMPLES.values():
        raise ValueError(f"`{name}` must be one of {_RESAMPLES}, got {value!r}.")
    return int(number)


def _per_channel(name: str, value: Any) -> list[float]:
    entries = [*value] if isinstance(value, (list, tuple, np.ndarray)) else [value]
    are_numbers = all(isinstance(one, (int, float, np.number)) and not isinstance(one, bool) for one in entries)
    is_good = are_numbers and all(abs(one) <= LARGEST_SCALE for one in entries)  # False for NaN
    if is_good and name == "image_std":
        is_good = min(entries, default=0) > 0
    if len(entries) not in (1, 3, 4) or not is_good:
        positive = " above 0" if name == "image_std" else ""
        raise ValueError(f"`{name}` must be one number or one per channel{positive}, got {value!r}.")
    return [float(one) for one in entries]


def _size(name: str, value: Any) -> dict[str, int]:
    sides = ("height", "width")
    default, keys = (256, ("shortest_edge",)) if name == "size" else (224, sides)
    sizes = default if value is None else value
    if isinstance(sizes, (int, np.integer)) and not isinstance(sizes, bool):
        sizes = dict.fromkeys(keys, sizes)
    elif isinstance(sizes, (list, tuple)) and len(sizes) == 2:
        sizes = dict(zip(sides, sizes, strict=True))
    if not hasattr(sizes, "items") or set(sizes) not in ({*sides}, {*keys}):
        expected = " or ".join(str(list(one)) for one in dict.fromkeys((sides, keys)))
        raise ValueError(
            f"`{name}` must be a dictionary with {expected}, an integer, or (height, width), got {value!r}."
        )
    sizes = {key: check_positive_integer(f"{name}['{key}']", side) for key, side in sizes.items()}
    check_limit(name, max(sizes.values()))
    return sizes


def _video_limits(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a dictionary or None, got {value!r}.")
    if unknown := set(value) - set(_DEFAULT_LIMITS):
        raise ValueError(f"`{name}` has {sorted(_DEFAULT_LIMITS)}, got {sorted(unknown)}.")
    try:
        VideoLimits(**value)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    return dict(value)


def _setting(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """Return a dataclass field that stores `check(name, value)`."""
    return field(default=default, metadata={"check": check})


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
        clip_start: "centre" (several clips: linearly spaced from the first frame to the last) or "random".
        num_clips, num_crops: the views. num_crops is 1, or 3 for left, centre and right (portrait: top, centre,
            bottom). The paper averages the logits of 4 x 3 views.
        short_video_policy: "repeat_last", "loop" or "error", for videos with too few frames for a clip.
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

    num_frames: int = _setting(32, _count)
    frame_stride: int = _setting(2, _count)
    frames_per_second: float | None = _setting(None, _optional(_rate))
    frame_sampling: str = _setting("clip", _one_of("clip", "uniform"))
    clip_start: str = _setting("centre", _place)
    num_clips: int = _setting(1, _count)
    short_video_policy: str = _setting("repeat_last", _one_of(*SHORT_VIDEO_POLICIES))
    do_sample_frames: bool | None = _setting(None, _optional(check_bool))
    do_resize: bool = _setting(True, check_bool)
    size: dict[str, int] = _setting(None, _size)
    resample: int = _setting(PIL.Image.Resampling.BILINEAR, _resample)
    do_center_crop: bool = _setting(True, check_bool)
    crop_size: dict[str, int] = _setting(None, _size)
    crop_position: str = _setting("centre", _place)
    num_crops: int = _setting(1, _num_crops)
    do_convert_rgb: bool = _setting(True, check_bool)
    do_rescale: bool = _setting(True, check_bool)
    rescale_factor: float = _setting(1 / 255, _scale)
    offset: bool = _setting(False, check_bool)
    do_normalize: bool = _setting(True, check_bool)
    image_mean: list[float] = _setting((0.5, 0.5, 0.5), _per_channel)
    image_std: list[float] = _setting((0.5, 0.5, 0.5), _per_channel)
    on_error: str = _setting("raise", _one_of("raise", "skip", "repeat_last"))
    num_threads: int | None = _setting(None, _optional(partial(_count, least=0)))
    video_limits: dict[str, Any] | None = _setting(None, _optional(_video_limits))

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
            given["video_limits"] = merged_limits(self.video_limits, given["video_limits"])
        return replace(self, **given)


SETTING_NAMES = tuple(one.name for one in fields(ProcessorSettings))


def check_names(names: Mapping[str, Any]) -> None:
    """Raise TypeError for the first name that no setting has."""
    for name in names:
        if name not in SETTING_NAMES:
            close = difflib.get_close_matches(name, SETTING_NAMES, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Expected one of {', '.join(SETTING_NAMES)}."
            raise TypeError(f"`{name}` is not a parameter of ViViTVideoProcessor. {hint}")


def merged_limits(limits: Any, added: Any) -> Any:
    """Return `video_limits` with those of `added` in their place; whatever is not a dictionary is left to the check."""
    return {**limits, **added} if isinstance(limits, dict) and isinstance(added, dict) else added


def without_permissions(limits: Any) -> Any:
    """Return `video_limits` without those above the default: the author of a file may lower limits, not raise them."""
    if not isinstance(limits, dict):
        return limits
    kept = {
        name: limit
        for name, limit in limits.items()
        if not (name in _DEFAULT_LIMITS and isinstance(limit, (int, float)) and limit > _DEFAULT_LIMITS[name])
    }
    return kept or None
