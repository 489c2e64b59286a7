"""Frames in memory: convert lists of images, arrays and tensors to one layout; resize, rescale and normalise them.

The layout is (frames, height, width, channels), uint8 from 0 to 255 or float32 in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from .limits_vivit import check_choice
from .processor_settings import ProcessorSettings
from .video_sources import is_video_source


_CHANNELS = (1, 3, 4)
_LAYOUTS = ("channels_last", "channels_first")


def is_frame(value: Any) -> bool:
    """Return whether `value` is a single frame: a PIL image, or an array or tensor with 2 or 3 axes."""
    return isinstance(value, PIL.Image.Image) or (
        isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3)
    )


def as_batch(videos: Any) -> Any:
    """Return one video or many as a sequence of videos; ValueError or TypeError for anything else."""
    if is_video_source(videos):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim in (4, 5):
            return [videos] if videos.ndim == 4 else videos
        raise ValueError(
            f"An array with {videos.ndim} axes {tuple(videos.shape)} is not a video: 4 axes are (frames, height, "
            "width, channels) or (frames, channels, height, width), 5 are a batch of videos. Add a first axis to a "
            "single image."
        )
    if not isinstance(videos, Sequence):
        raise TypeError(f"Expected a video or a list of videos, got {type(videos)}.")
    if len(videos) == 0:
        raise ValueError("Expected at least one video or frame, got an empty list.")
    return [videos] if is_frame(videos[0]) else videos


def num_frames_of(video: Any) -> int:
    """Return the number of frames of a list of frames, or of an array or tensor with 4 axes.

    Raises ValueError for other shapes and for a video without frames, TypeError for other types.
    """
    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim != 4:
            raise ValueError(
                "A video in a batch must have 4 axes, (frames, height, width, channels) or (frames, channels, height, "
                f"width), got {tuple(video.shape)}."
            )
    elif not isinstance(video, Sequence):
        raise TypeError(
            "A video must be a path, bytes, a binary file, a list of frames, or an array with 4 axes, got "
            f"{type(video)}."
        )
    if len(video) == 0:
        raise ValueError("Expected at least one frame, got a video without frames.")
    return len(video)


def select_frames(video: Any, indices: np.ndarray, layout: str | None, do_convert_rgb: bool) -> np.ndarray:
    """Return the frames at `indices` of a video in memory, (len(indices), height, width, channels), uint8 or float32.

    Reads only these frames. Raises ValueError for an ambiguous layout, values out of range, or frames of different
    sizes, and TypeError for anything that is not a frame.
    """
    if layout is not None:
        check_choice("input_data_format", layout, _LAYOUTS)
    if isinstance(video, (np.ndarray, torch.Tensor)):
        frames = _checked_values(
            _to_numpy(video[torch.from_numpy(indices)] if torch.is_tensor(video) else video[indices])
        )
        frames = _channels_last(frames, layout)
    else:
        images = {int(index): _image(video[index], layout) for index in np.unique(indices)}
        if do_convert_rgb:
            images = {index: _as_rgb(image) for index, image in images.items()}
        shapes = {image.shape for image in images.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"The frames of a video must have one size, got (height, width, channels) {sorted(shapes)}."
            )
        frames = _checked_values(np.stack([images[int(index)] for index in indices]))
    return _as_rgb(frames) if do_convert_rgb else frames


def _as_rgb(frames: np.ndarray) -> np.ndarray:
    """Return (..., 3) for (..., 1, 3 or 4): repeat grey, drop alpha."""
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames[..., :3]


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _image(frame: Any, layout: str | None) -> np.ndarray:
    """Return one frame of a list as (height, width, channels)."""
    if isinstance(frame, PIL.Image.Image):
        # PIL would clip images of more than 8 bits at 255, so they are treated as arrays.
        is_kept = frame.mode in ("L", "RGB", "RGBA", "F") or frame.mode.startswith("I")
        array = np.asarray(frame if is_kept else frame.convert("RGB"))
        return array[..., None] if array.ndim == 2 else array
    if not is_frame(frame):
        shape = f" of shape {tuple(frame.shape)}" if hasattr(frame, "shape") else ""
        raise TypeError(
            "A frame must be a PIL image, or an array or tensor (height, width, channels), (channels, height, width) "
            f"or (height, width), got {type(frame)}{shape}."
        )
    array = _to_numpy(frame)
    return array[..., None] if array.ndim == 2 else _channels_last(array, layout)


def _channels_last(array: np.ndarray, layout: str | None) -> np.ndarray:
    """Return (..., height, width, channels), from the same or from (..., channels, height, width)."""
    if layout is None:
        is_last, is_first = array.shape[-1] in _CHANNELS, array.shape[-3] in _CHANNELS
        if is_last == is_first:
            problem = "can be read both ways" if is_last else "has no axis of 1, 3 or 4 channels first or last"
            raise ValueError(
                f"The shape {array.shape} {problem}: frames are (height, width, channels) or (channels, height, "
                "width). Set input_data_format='channels_last' or 'channels_first'."
            )
        layout = "channels_last" if is_last else "channels_first"
    if layout == "channels_first":
        array = np.moveaxis(array, -3, -1)
    if array.shape[-1] not in _CHANNELS:
        raise ValueError(f"Frames must have 1, 3 or 4 channels, got {array.shape[-1]} ({layout}).")
    return array


def _checked_values(array: np.ndarray) -> np.ndarray:
    """Return integers as uint8 and floats as float32; ValueError for values out of range, TypeError for other types."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind in "iu":
        top = 255
    elif array.dtype.kind == "f":
        top = 1
    else:
        raise TypeError(f"Frames must be uint8 from 0 to 255 or float in [0, 1], got {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"Frames of {array.dtype} must be in [0, {top}], got values from {low:g} to {high:g}. Pass values from 0 "
            "to 255 as uint8, and scale floats to [0, 1]: from [0, 255] by x / 255, from [-1, 1] by (x + 1) / 2."
        )
    return array.astype(np.uint8 if top == 255 else np.float32)


def resize_frames(frames: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resize (frames, height, width, channels) to `size` (height, width) with PIL's antialiased filter `resample`."""
    if frames.shape[1:3] == size:
        return frames
    result = np.empty((len(frames), *size, frames.shape[-1]), dtype=frames.dtype)
    target = size[::-1]  # PIL's sizes are (width, height)
    for row, frame in enumerate(frames):
        if frames.dtype == np.uint8 and frames.shape[-1] == 3:
            result[row] = PIL.Image.fromarray(np.ascontiguousarray(frame)).resize(target, resample)
            continue
        # By channel, because PIL has no float colours, and weighs colours by alpha.
        for channel in range(frames.shape[-1]):
            plane = PIL.Image.fromarray(np.ascontiguousarray(frame[..., channel]))
            result[row, ..., channel] = plane.resize(target, resample)
    return result


def empty_floats(shape: Sequence[int], device: torch.device | str | None) -> torch.Tensor:
    """Return an uninitialised float32 tensor; on a CPU from numpy, which asks for large pages and so fills faster."""
    if torch.device(device or "cpu").type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


def rescale_and_normalize(
    values: torch.Tensor, settings: ProcessorSettings, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rescale and normalise values from 0 to 255, (..., channels, height, width).

    Writes to float32 `out` of the same shape, or a new tensor, and returns it.
    """
    mean, std = (
        torch.tensor(entry, dtype=torch.float64, device=values.device)[:, None, None]
        for entry in (settings.image_mean, settings.image_std)
    )
    if settings.do_normalize and max(len(mean), len(std)) not in (1, values.shape[-3]):
        raise ValueError(
            f"`image_mean` and `image_std` are for {max(len(mean), len(std))} channels, the frames have "
            f"{values.shape[-3]}: give one number each, or leave do_convert_rgb on."
        )
    scale, shift = torch.ones_like(std), torch.zeros_like(mean)
    if settings.do_rescale:
        scale = scale * settings.rescale_factor
    if settings.do_normalize:
        scale, shift = scale / std, -mean / std
    follows_transformers = settings.do_rescale and settings.offset
    scale, shift, mean, std = scale.float(), shift.float(), mean.float(), std.float()

    if out is None:
        out = empty_floats(values.shape, values.device)
    # Frame by frame on a CPU, so that a frame stays in the cache between the operations.
    is_split = values.device.type == "cpu" and values.ndim > 3
    pairs = zip(values.flatten(0, -4), out.flatten(0, -4), strict=True) if is_split else [(values, out)]
    for source, target in pairs:
        if not follows_transformers:
            target.copy_(source).mul_(scale).add_(shift)
            continue
        # The steps of VivitImageProcessor, in its order and precision.
        target.copy_(source.float().double() * settings.rescale_factor).sub_(1)
        if settings.do_normalize:
            target.sub_(mean).div_(std)
    return out
