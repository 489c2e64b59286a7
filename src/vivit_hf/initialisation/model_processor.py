"""
Make the video processor of a model, for conversion, fine-tuning and others, and describe one in words.

The short side of a frame is resized to a multiple of the crop, and the crop has the size of the model, so that videos
of any shape become clips that the model accepts.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_vivit import ViViTConfig
from ..frame_sampling import fixed_crops
from ..limits_vivit import check_positive_integer, check_positive_number
from ..processor_settings import ProcessorSettings
from ..video_processing_vivit import ViViTVideoProcessor, resized_frame_size


OFFICIAL_RESIZE_RATIO = 256 / 224  # short side over crop in the official recipes

# Settings to keep from the processor of an image model.
_PIXEL_SETTINGS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample", "offset")
# Frame sizes (height, width) for `check_processor`: landscape, portrait, square, tiny, and extremely wide or high.
_FRAME_SIZES = ((1080, 1920), (1920, 1080), (480, 480), (6, 8), (8, 6), (90, 1600), (1600, 90))


def processor_for(
    config: ViViTConfig,
    source: ViViTVideoProcessor | Mapping[str, Any] | None = None,
    *,
    resize: int | None = None,
    resize_ratio: float | None = None,
    frame_stride: int | None = None,
    frames_per_second: float | None = None,
    frame_sampling: str | None = None,
    short_video_policy: str | None = None,
) -> ViViTVideoProcessor:
    """
    Return a processor that turns videos of any shape into clips of the model's size.

    Args:
        config: the configuration of the video model, which sets the number of frames and the size of the crop.
        source: other settings, from a `ViViTVideoProcessor`, or from the `preprocessor_config.json` of an image model,
            which gives mean, standard deviation, rescaling and resampling. None is the official recipe: every second
            frame, values in [-1, 1].
        resize: the short side before the crop, in pixels.
        resize_ratio: the same as a multiple of the short side of the crop. The default is the ratio of `source` if it
            resizes and crops, otherwise the official 256 / 224.
        frame_stride, frames_per_second: replace those of `source`; at most one of the two.
        frame_sampling: "clip", frames at that distance, or "uniform", frames spread over the whole video; replaces that
            of `source`.
        short_video_policy: "repeat_last", "loop", "mask" or "error"; replaces that of `source`.

    Raises:
        ValueError: for a short side below that of the crop, settings that exclude each other, a stride or rate with
            uniform sampling, or a model that does not take three channels.
    """
    if resize is not None and resize_ratio is not None:
        raise ValueError(f"Give resize={resize} (pixels) or resize_ratio={resize_ratio} (of the crop), not both.")
    if frame_stride is not None and frames_per_second is not None:
        raise ValueError(
            f"Give frame_stride={frame_stride} or frames_per_second={frames_per_second:g}, not both: each is the "
            "distance between the frames of a clip."
        )
    if isinstance(source, ViViTVideoProcessor):
        kept = source.settings
        stored: Mapping[str, Any] = vars(kept)
    else:
        stored = source or {}
        kept = ProcessorSettings(**{name: stored[name] for name in _PIXEL_SETTINGS if stored.get(name) is not None})
    sampling = {"frame_stride": frame_stride, "frames_per_second": frames_per_second, "frame_sampling": frame_sampling}
    sampling["short_video_policy"] = short_video_policy
    if frame_sampling == "uniform":
        sampling["num_clips"] = 1  # it spreads one clip over the whole video
    settings = vars(kept.updated(sampling))
    height, width = config.frame_size
    if resize is None:
        ratio = resize_ratio_of(stored) if resize_ratio is None else check_positive_number("resize_ratio", resize_ratio)
        resize = round(min(height, width) * (ratio or OFFICIAL_RESIZE_RATIO))
    if check_positive_integer("resize", resize) < min(height, width):
        raise ValueError(
            f"resize={resize} makes frames smaller than the model's crop of {height} x {width} (height x width); "
            f"expected {min(height, width)} or more."
        )
    clips = {
        "num_frames": config.num_frames,
        "do_sample_frames": None,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    processor = ViViTVideoProcessor(**{**settings, **clips})
    check_processor(processor, config)
    return processor


def resize_ratio_of(settings: Mapping[str, Any]) -> float | None:
    """Return the short side after resizing over that of the crop, at least 1; None for settings without both."""
    short_side, crop = _short_side(settings.get("size")), _short_side(settings.get("crop_size"))
    if not settings.get("do_resize", True) or not settings.get("do_center_crop") or not short_side or not crop:
        return None
    return max(1.0, short_side / crop)


def _short_side(size: Any) -> int | None:
    """Return the short side of a size as image processors store it: a number, (height, width), or a dictionary."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    sides = [size] if isinstance(size, int) else list(size or ())
    return min(sides) if sides and all(isinstance(side, int) and side > 0 for side in sides) else None


def check_processor(processor: ViViTVideoProcessor, config: ViViTConfig) -> None:
    """Raise ValueError unless videos of every shape become clips that the model accepts. Decodes nothing."""
    if config.num_channels != 3:
        raise ValueError(f"Videos have 3 channels, but the model expects {config.num_channels}.")
    wanted = (config.num_frames, *config.frame_size)
    for frame in _FRAME_SIZES:
        height, width = resized_frame_size(*frame, processor)
        if processor.do_center_crop:
            crop = (processor.crop_size["height"], processor.crop_size["width"])
            _, _, height, width = fixed_crops(height, width, *crop, num_crops=1)[0]
        if (processor.num_frames, height, width) != wanted:
            raise ValueError(
                f"The processor makes clips of {(processor.num_frames, height, width)} (frames, height, width) from "
                f"videos of {frame[0]} x {frame[1]} pixels, but the model expects {wanted}: set `num_frames`, `size` "
                "and `crop_size` of the processor, and do_center_crop=True."
            )


def describe_frames(processor: ViViTVideoProcessor) -> str:
    """Describe the frames of a clip on one line: their number, their distance, and how they are resized and cropped."""
    rate = f"stride {processor.frame_stride}"
    if processor.frames_per_second is not None:
        rate = f"{processor.frames_per_second:g} per second"
    if processor.frame_sampling == "uniform":
        rate = "spread over the video"
    parts = [f"{processor.num_frames} frames, {rate}"]
    if processor.do_resize:
        edge = processor.size.get("shortest_edge")
        sides = f"short side {edge}" if edge else f"{processor.size['height']} x {processor.size['width']}"
        parts.append(f"resized to {sides}")
    if processor.do_center_crop:
        parts.append(f"cropped to {processor.crop_size['height']} x {processor.crop_size['width']}")
    return ", ".join(parts)


def describe_processor(processor: ViViTVideoProcessor) -> str:
    """Describe the frames of a clip and the values of their pixels."""
    low, high = value_range(processor)
    return f"{describe_frames(processor)}, values in [{low:.3g}, {high:.3g}]"


def value_range(processor: ViViTVideoProcessor) -> tuple[float, float]:
    """Return the smallest and largest pixel value that the processor gives for black and white, over all channels."""
    channels = max(3, len(processor.image_mean))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, channels, 1, 1)
    values = processor.rescale_and_normalize(extremes)
    return values.min().item(), values.max().item()
