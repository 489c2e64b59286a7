"""The parameters of the video processor: what each may be, and the one form in which it is stored."""

from __future__ import annotations

import dataclasses
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
from .limits_vivit import LARGEST_SCALE, RATES, check_clip, check_limit
from .video_sources import VideoLimits


_FRAME_SAMPLINGS = ("clip", "uniform")
_ERROR_POLICIES = ("raise", "skip", "repeat_last")
_DEFAULT_LIMITS = dataclasses.asdict(VideoLimits())
_RESAMPLES = {filter.name.lower(): int(filter) for filter in PIL.Image.Resampling}


def validated_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters in the one form in which they are stored, or a ValueError that names the wrong one."""
    values = dict(values)
    for name in ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize", "offset"):
        if not isinstance(values[name], (bool, np.bool_)):
            raise ValueError(f"`{name}` must be True or False, got {values[name]!r}.")
    if values["do_sample_frames"] not in (None, True, False):
        raise ValueError(f"`do_sample_frames` must be True, False or None, got {values['do_sample_frames']!r}.")
    for name in ("num_frames", "frame_stride", "num_clips"):
        values[name] = check_positive_integer(name, values[name])
        check_limit(name, values[name])
    if values["frames_per_second"] is not None:
        values["frames_per_second"] = check_positive_number("frames_per_second", values["frames_per_second"], *RATES)
    factor = check_positive_number("rescale_factor", values["rescale_factor"], most=LARGEST_SCALE)
    values["rescale_factor"] = factor
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
    if values["do_center_crop"]:
        check_clip("`num_frames` and `crop_size`", values["num_frames"], *values["crop_size"].values())
    elif values["do_resize"]:
        sides = [*values["size"].values()]
        check_clip("`num_frames` and `size`", values["num_frames"], sides[0], sides[-1])
    resample = values["resample"]
    values["resample"] = _RESAMPLES.get(resample.lower()) if isinstance(resample, str) else resample
    if isinstance(resample, bool) or values["resample"] not in [*_RESAMPLES.values()]:
        raise ValueError(f"`resample` must be one of {_RESAMPLES}, got {resample!r}.")
    values["resample"] = int(values["resample"])
    for name in ("image_mean", "image_std"):
        values[name] = _per_channel(name, values[name])
    if values["num_threads"] is not None and values["num_threads"] != 0:
        values["num_threads"] = check_positive_integer("num_threads", values["num_threads"])
        check_limit("num_threads", values["num_threads"])
    limits = values["video_limits"]
    if not isinstance(limits, (dict, type(None))):
        raise ValueError(f"`video_limits` must be a dictionary or None, got {limits!r}.")
    if unknown := set(limits or {}) - set(_DEFAULT_LIMITS):
        raise ValueError(f"`video_limits` has {sorted(_DEFAULT_LIMITS)}, got {sorted(unknown)}.")
    for name, limit in (limits or {}).items():
        if name != "allow_private_addresses":
            check_positive_number(f"video_limits['{name}']", limit)
    VideoLimits(**(limits or {}))  # which checks the rest
    return values


def without_permissions(limits: Any) -> Any:
    """
    `video_limits` for or from a processor file, without those above the default: files come from strangers, who may
    lower a limit, but have nothing to permit.
    """
    if not isinstance(limits, dict):
        return limits
    kept = {
        name: limit
        for name, limit in limits.items()
        if not (name in _DEFAULT_LIMITS and isinstance(limit, (int, float)) and limit > _DEFAULT_LIMITS[name])
    }
    return kept or None


def with_added_limits(given: dict[str, Any], limits: Any) -> dict[str, Any]:
    """The given parameters; `video_limits` among them are added to these limits instead of replacing them."""
    if not isinstance(given.get("video_limits"), dict) or not isinstance(limits, dict):
        return given
    return {**given, "video_limits": {**limits, **given["video_limits"]}}


def _per_channel(name: str, value: Any) -> list[float]:
    """`image_mean` or `image_std` as a list of numbers."""
    entries = [*value] if isinstance(value, (list, tuple, np.ndarray)) else [value]
    are_numbers = all(isinstance(one, (int, float, np.number)) and not isinstance(one, bool) for one in entries)
    is_good = are_numbers and all(abs(one) <= LARGEST_SCALE for one in entries)  # NaN is not
    if is_good and name == "image_std":
        is_good = min(entries, default=0) > 0
    if len(entries) not in (1, 3, 4) or not is_good:
        raise ValueError(
            f"`{name}` must be one number or one per channel{' above 0' * (name == 'image_std')}, got {value!r}."
        )
    return [float(one) for one in entries]


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
    sizes = {key: check_positive_integer(f"{name}['{key}']", entry) for key, entry in value.items()}
    check_limit(name, max(sizes.values()))
    return sizes
