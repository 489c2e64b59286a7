"""The parameters of the video processor: what each may be, and the one form in which it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from .frame_sampling import (
    CLIP_STARTS,
    SHORT_VIDEO_POLICIES,
    check_choice,
    check_positive_integer,
    check_positive_number,
)
from .video_sources import VideoLimits


_FRAME_SAMPLINGS = ("clip", "uniform")
_ERROR_POLICIES = ("raise", "skip", "repeat_last")
_RESAMPLES = {filter.name.lower(): int(filter) for filter in PIL.Image.Resampling}


def validated_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters in the one form in which they are stored, or a ValueError that names the wrong one."""
    values = dict(values)
    for name in ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize", "offset"):
        if not isinstance(values[name], (bool, np.bool_)):
            raise ValueError(f"`{name}` must be True or False, got {values[name]!r}.")
    for name in ("num_frames", "frame_stride", "num_clips"):
        values[name] = check_positive_integer(name, values[name])
    if values["frames_per_second"] is not None:
        values["frames_per_second"] = check_positive_number("frames_per_second", values["frames_per_second"])
    values["rescale_factor"] = check_positive_number("rescale_factor", values["rescale_factor"])
    for name in ("clip_start", "crop_position"):
        values[name] = check_choice(name, "centre" if values[name] == "center" else values[name], CLIP_STARTS)
    check_choice("frame_sampling", values["frame_sampling"], _FRAME_SAMPLINGS)
    check_choice("short_video_policy", values["short_video_policy"], SHORT_VIDEO_POLICIES)
    check_choice("on_error", values["on_error"], _ERROR_POLICIES)
    if values["frame_sampling"] == "uniform" and values["num_clips"] > 1:
        raise ValueError(
            f"frame_sampling='uniform' spreads one clip over the whole video, got num_clips={values['num_clips']}: "
            "use num_clips=1 or frame_sampling='clip'."
        )
    if values["num_crops"] not in (1, 3):
        raise ValueError(f"`num_crops` must be 1 or 3, got {values['num_crops']!r}.")
    if values["num_crops"] == 3 and not values["do_center_crop"]:
        raise ValueError("num_crops=3 needs do_center_crop=True and a `crop_size`.")
    values["size"] = _size("size", values["size"], "shortest_edge")
    values["crop_size"] = _size("crop_size", values["crop_size"], "square")
    resample = values["resample"]
    values["resample"] = _RESAMPLES.get(resample.lower()) if isinstance(resample, str) else int(resample)
    if values["resample"] not in _RESAMPLES.values():
        raise ValueError(f"`resample` must be one of {_RESAMPLES}, got {resample!r}.")
    for name in ("image_mean", "image_std"):
        value = values[name]
        value = [float(entry) for entry in (value if isinstance(value, (Sequence, np.ndarray)) else [value])]
        is_off = not np.all(np.isfinite(value)) or (name == "image_std" and min(value, default=0) <= 0)
        if len(value) not in (1, 3, 4) or is_off:
            raise ValueError(
                f"`{name}` must be one number or one per channel{' above 0' * (name == 'image_std')}, got {value}."
            )
        values[name] = value
    if values["num_threads"] is not None and values["num_threads"] != 0:
        values["num_threads"] = check_positive_integer("num_threads", values["num_threads"])
    if not isinstance(values["video_limits"], (dict, type(None))):
        raise ValueError(f"`video_limits` must be a dictionary or None, got {values['video_limits']!r}.")
    if unknown := set(values["video_limits"] or {}) - set(VideoLimits.__dataclass_fields__):
        raise ValueError(f"`video_limits` has {sorted(VideoLimits.__dataclass_fields__)}, got {sorted(unknown)}.")
    VideoLimits(**(values["video_limits"] or {}))  # which checks them
    return values


def without_permissions(limits: Any) -> Any:
    """`video_limits` for or from a processor file: files come from strangers, who have nothing to permit."""
    if not isinstance(limits, dict) or "allow_private_addresses" not in limits:
        return limits
    return {name: value for name, value in limits.items() if name != "allow_private_addresses"} or None


def with_added_limits(given: dict[str, Any], limits: Any) -> dict[str, Any]:
    """The given parameters; `video_limits` among them are added to these limits instead of replacing them."""
    if not isinstance(given.get("video_limits"), dict) or not isinstance(limits, dict):
        return given
    return {**given, "video_limits": {**limits, **given["video_limits"]}}


def _size(name: str, value: Any, meaning_of_int: str) -> dict[str, int]:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        edge = int(value)
        value = {"shortest_edge": edge} if meaning_of_int == "shortest_edge" else {"height": edge, "width": edge}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    keys = [{"height", "width"}] + ([{"shortest_edge"}] if meaning_of_int == "shortest_edge" else [])
    if not hasattr(value, "items") or set(value) not in keys:
        expected = " or ".join(str(sorted(key)) for key in keys)
        raise ValueError(
            f"`{name}` must be a dictionary with {expected}, an integer, or (height, width), got {value!r}."
        )
    return {key: check_positive_integer(f"{name}['{key}']", entry) for key, entry in value.items()}
