"""The video processor of ViViT: from anything video-like to `pixel_values`.

    file, URL, bytes --decode--> \
                                  frames --sample--> clips --resize--> --crop--> views --rescale, normalise--> tensor
    list, array, tensor -------> /

Training, evaluation and serving share this one path and one stored configuration.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from .auto_class import AutoClassMixin
from .frame_conversion import FrameSize
from .frame_sampling import (
    check_choice,
    check_positive_number,
    fixed_crops,
    random_crop,
    resized_size,
    sample_clips,
    sample_clips_at_rate,
    sample_uniform_clip,
    window_around,
)
from .processing_parameters import validated_parameters, with_added_limits
from .processor_files import SERVICE_KEYS, ProcessorFilesMixin
from .video_decoding import VideoReader
from .video_frames import (
    as_batch,
    empty_floats,
    num_frames_of,
    rescale_and_normalize,
    resize_frames,
    select_frames,
)
from .video_sources import DecodingReport, VideoDecodingError, VideoLimits, is_video_source, part_of_video


logger = logging.get_logger(__name__)

_DTYPES = ("float32", "float16", "bfloat16", "float64")


class VideoFeatures(BatchFeature):
    """`BatchFeature` with what a batch of videos has besides tensors.

    `num_views`: rows of `pixel_values` per video, clips x crops; row v * num_views + clip * num_crops + crop.
    `reports`: one `DecodingReport` for each video that was read from a file, None for frames that were given.
    `kept`: the places, in the input, of the videos in the batch: all but those that on_error="skip" left out.
    `frame_ids`: int64 (rows, frames) like `pixel_values`; of one video, frames with equal numbers are equal.
    """

    num_views: int = 1
    reports: Sequence[DecodingReport | None] = ()
    kept: Sequence[int] = ()
    frame_ids: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "views": (self.num_views, self.reports, self.kept, self.frame_ids)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]
        self.num_views, self.reports, self.kept, self.frame_ids = state["views"]


class ViViTVideoProcessor(AutoClassMixin, ProcessorFilesMixin, BaseImageProcessor):
    """Turns videos into the `pixel_values` of a ViViT model.

    The defaults are the official evaluation recipe for Kinetics seen through one view: 32 frames, every second one,
    from the middle of the video, short side to 256 pixels, central crop of 224 x 224, values v / 127.5 - 1 in [-1, 1].

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
        short_video_policy: "repeat_last", "loop" or "error", when a video has too few frames for its clip.
        do_sample_frames: None samples from files, and from given frames whose number is not `num_frames`; False takes
            all frames; True always samples.
        do_resize, size: resize to {"shortest_edge": s} or {"height": h, "width": w}, pixels. An int is a short edge.
        resample: the filter, a `PIL.Image.Resampling`, its number or its name; antialiased.
        do_center_crop, crop_size: crop to {"height": h, "width": w} (an int is a square). The shortest edge
            grows where a crop that is not square needs it; a frame smaller than the crop is a ValueError otherwise.
        crop_position: "centre" or "random", the place of a single crop.
        do_convert_rgb: repeat the channel of grey frames and drop alpha, so that there are always 3 channels.
        do_rescale, rescale_factor, offset: multiply values from 0 to 255 by the factor and, with offset, subtract 1.
        do_normalize, image_mean, image_std: then (value - mean) / std per channel (a number counts for all channels).
        on_error: for files that cannot be read or lack a wanted frame: "raise", "skip" the video, or "repeat_last",
            put the last good frame in the place of a lost one (a file without any frame raises also then).
        num_threads: decoder threads per video, 0 = FFmpeg's choice. None: 1 in data loader workers, else 0.
        video_limits: fields of `VideoLimits` that are not to have their defaults, for example {"max_frames": 10000}.
            A call's are added to these. `allow_private_addresses` is never stored nor read from a file.

    Every parameter is stored by `save_pretrained` and can be given per call. A transformers `VivitImageProcessor`
    configuration is read as it is (offset, then normalised again: values down to -3) and reproduces its output.

    Torchvision is not needed. Raises ValueError for a parameter out of its range and TypeError for an unknown one.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        num_frames: int = 32,
        frame_stride: int = 2,
        frames_per_second: float | None = None,
        frame_sampling: str = "clip",
        clip_start: str = "centre",
        num_clips: int = 1,
        short_video_policy: str = "repeat_last",
        do_sample_frames: bool | None = None,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int | str = PIL.Image.Resampling.BILINEAR,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | None = None,
        crop_position: str = "centre",
        num_crops: int = 1,
        do_convert_rgb: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        offset: bool = False,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        on_error: str = "raise",
        num_threads: int | None = None,
        video_limits: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        values = {name: value for name, value in locals().items() if name in _PARAMETERS}
        _check_names(kwargs, SERVICE_KEYS)
        super().__init__(**kwargs)
        values["size"] = {"shortest_edge": 256} if size is None else size
        values["crop_size"] = {"height": 224, "width": 224} if crop_size is None else crop_size
        for name, value in validated_parameters(values).items():
            setattr(self, name, value)

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """The parameters of the constructor, which are those that are stored."""
        return _PARAMETERS

    def __call__(
        self,
        videos: Any,
        *,
        return_tensors: str | None = "pt",
        dtype: torch.dtype | str = "float32",
        device: torch.device | str | None = None,
        input_data_format: str | None = None,
        video_fps: float | None = None,
        generator: np.random.Generator | int | None = None,
        **overrides: Any,
    ) -> VideoFeatures:
        """Processes a video or a batch of videos.

        Args:
            videos: one video, or a list of them, of different kinds and sizes if need be. A video is
                - a file: path, `pathlib.Path`, http(s) URL, bytes, binary file, or {"path": ..., "bytes": ...}, there
                  also with "start" and "end" in seconds from the first frame, for a part of a long video;
                - a list of frames: PIL images, arrays or tensors (height, width, channels), grey (height, width);
                - an array or tensor (frames, height, width, channels) or (frames, channels, height, width).
                One array or tensor with 5 axes is a batch. Channels are 1, 3 or 4. Values are uint8 from 0 to 255, or
                float in [0, 1].
            return_tensors: "pt", "np", or None for a list with one numpy array per view.
            dtype: of `pixel_values`. Without rescaling and normalisation uint8 frames stay uint8.
            device: where frames are moved, as uint8, before they become floats.
            input_data_format: "channels_last" or "channels_first", for shapes that can be read both ways.
            video_fps: the rate of frames that are given, for `frames_per_second`.
            generator: numpy Generator or seed of what is random. None: seeded from torch's own generator.
            overrides: any parameter of the constructor. None stands for the stored value.

        Returns:
            `VideoFeatures` with `pixel_values` (batch * views, num_frames, channels, height, width).

        Raises:
            ValueError, TypeError: an input or a parameter that cannot be used; the message says what can.
            VideoDecodingError: a file that cannot be read, unless `on_error` says otherwise.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"`return_tensors` must be 'pt', 'np' or None, got {return_tensors!r}.")
        if return_tensors != "pt" and str(dtype).endswith("bfloat16"):
            raise ValueError(f"numpy has no {dtype}: use return_tensors='pt', or another dtype.")
        if video_fps is not None:
            video_fps = check_positive_number("video_fps", video_fps)
        call = self.settings_with(overrides)
        call.input_data_format, call.video_fps = input_data_format, video_fps
        call.generator = _generator(generator) if "random" in (call.clip_start, call.crop_position) else None

        views: list[np.ndarray] = []
        reports: list[DecodingReport | None] = []
        kept: list[int] = []
        frame_ids: list[np.ndarray] = []
        for place, video in enumerate(as_batch(videos)):
            try:
                clips, indices, report = self._clips(video, call)
            except VideoDecodingError as error:
                if call.on_error != "skip":
                    raise
                logger.warning(f"A video is left out. {error}")
                reports.append(DecodingReport(error.source or "", error=error.reason or str(error)))
                continue
            views += [view for clip in clips for view in _crops(clip, call)]
            frame_ids += _frame_ids(indices, call)
            reports.append(report)
            kept.append(place)
        if not views:
            sources = "; ".join(f"{report.source}: {report.error}" for report in reports if report is not None)
            raise VideoDecodingError(f"None of the videos can be read. {sources}")

        features = VideoFeatures({"pixel_values": _finished(views, call, return_tensors, dtype, device)})
        features.num_views, features.reports, features.kept = len(views) // len(kept), reports, kept
        if len({ids.shape for ids in frame_ids}) == 1:
            features.frame_ids = np.stack(frame_ids)
        return features

    def preprocess(self, videos: Any, **kwargs: Any) -> VideoFeatures:
        """The same as calling the processor."""
        return self(videos, **kwargs)

    def rescale_and_normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The last step alone, for uint8 batches that are made with do_rescale=False, do_normalize=False.

        They are a quarter of the size on their way from the workers; this runs on the device that they are on.

        Args:
            pixel_values: (..., channels, height, width), values from 0 to 255.

        Returns:
            float32 of the same shape.
        """
        return rescale_and_normalize(pixel_values, self)

    def settings_with(self, overrides: dict[str, Any]) -> SimpleNamespace:
        """All parameters as they are in a call with these overrides; raises what the call would raise for them."""
        _check_names(overrides)
        given = {name: value for name, value in overrides.items() if value is not None}
        values = {name: getattr(self, name) for name in _PARAMETERS}
        if "frame_stride" in given:
            values["frames_per_second"] = None
        return SimpleNamespace(**validated_parameters({**values, **with_added_limits(given, self.video_limits)}))

    def _clips(self, video: Any, call: SimpleNamespace) -> tuple[np.ndarray, np.ndarray, DecodingReport | None]:
        """The clips of one video, resized: (clips, frames, height, width, channels), uint8 or float32; the numbers of
        their frames (clips, frames); and the report of a file."""
        if not is_video_source(video):
            total = num_frames_of(video)
            is_sampled = call.do_sample_frames
            if is_sampled is None:
                is_sampled = total != call.num_frames or call.num_clips > 1
            if is_sampled and call.frames_per_second is not None and call.video_fps is None:
                raise ValueError("`frames_per_second` needs the rate of the given frames too: pass `video_fps`.")
            times = np.arange(total) / (call.video_fps or 1.0)
            indices = _choose_clips(times, call) if is_sampled else np.arange(total)[None]
            frames = select_frames(video, indices.reshape(-1), call.input_data_format, call.do_convert_rgb)
            if call.do_resize:
                frames = resize_frames(
                    frames, resized_frame_size(frames.shape[1], frames.shape[2], call), call.resample
                )
            if call.do_rescale and frames.dtype == np.float32:
                frames = frames * np.float32(255)  # `rescale_factor` is for values from 0 to 255
            return frames.reshape(indices.shape + frames.shape[1:]), indices, None

        size = reader_size(call)
        num_threads = call.num_threads
        if num_threads is None:
            num_threads = 0 if get_worker_info() is None else 1
        limits = VideoLimits(**(call.video_limits or {}))
        chosen: list[np.ndarray] = []

        def choose(timestamps: np.ndarray) -> np.ndarray:
            chosen.append(_choose_frames(timestamps, source=video, call=call))
            return chosen[-1]

        with VideoReader(video, limits=limits, num_threads=num_threads) as reader:
            clips = reader.read(
                choose,
                size=size,
                window=partial(_kept_window, call=call) if size is not None or not call.do_resize else None,
                on_lost="repeat_last" if call.on_error == "repeat_last" else "raise",
            )
        if call.do_resize and size is None:
            new_size = resized_frame_size(clips.shape[2], clips.shape[3], call)
            resized = resize_frames(clips.reshape(-1, *clips.shape[2:]), new_size, call.resample)
            clips = resized.reshape(*clips.shape[:2], *resized.shape[1:])
        return clips, chosen[-1], reader.report


_PARAMETERS = tuple(
    name
    for name, parameter in inspect.signature(ViViTVideoProcessor.__init__).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
)


def resized_frame_size(height: int, width: int, settings: Any) -> tuple[int, int]:
    """The (height, width) of a frame of `height` x `width` before the crop, for a processor or its settings."""
    if not settings.do_resize:
        return height, width
    return resized_size(height, width, settings.size, settings.crop_size if settings.do_center_crop else None)


def reader_size(settings: Any) -> FrameSize | None:
    """
    How `VideoReader` and `LiveVideo` are to scale frames while they decode them, for a processor or its settings.

    The scaler's bilinear filter is PIL's; the other filters differ: None, those frames are left to the processor, to
    which scaled ones have their size already.
    """
    if not settings.do_resize or settings.resample != PIL.Image.Resampling.BILINEAR:
        return None
    return lambda height, width: resized_frame_size(height, width, settings)


def _check_names(given: dict[str, Any], allowed: set[str] | None = None) -> None:
    for name in given:
        if name not in _PARAMETERS and name not in (allowed or set()):
            close = difflib.get_close_matches(name, _PARAMETERS, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" There are: {', '.join(_PARAMETERS)}."
            raise TypeError(f"`{name}` is not a parameter of ViViTVideoProcessor.{hint}")


def _generator(generator: np.random.Generator | int | None) -> np.random.Generator:
    if isinstance(generator, np.random.Generator):
        return generator
    # torch's seed is the one that `set_seed` sets and that differs between data loader workers.
    seed = int(torch.randint(2**63 - 1, ()).item()) if generator is None else generator
    return np.random.default_rng(seed)


def _choose_clips(timestamps: np.ndarray, call: SimpleNamespace) -> np.ndarray:
    """Frame indices (clips, num_frames) for a video whose frames are shown at `timestamps`."""
    total, policy = len(timestamps), call.short_video_policy
    if call.frame_sampling == "uniform":
        return sample_uniform_clip(total, call.num_frames, short_video_policy=policy)[None]
    shared = {"num_clips": call.num_clips, "start": call.clip_start, "generator": call.generator}
    if call.frames_per_second is not None:
        rate = call.frames_per_second
        return sample_clips_at_rate(timestamps, call.num_frames, rate, short_video_policy=policy, **shared)
    if policy != "error" and total <= (call.num_frames - 1) * call.frame_stride:
        logger.warning_once(
            f"There are videos too short for {call.num_frames} frames at stride {call.frame_stride}; "
            f"short_video_policy='{policy}' fills their clips."
        )
    return sample_clips(total, call.num_frames, call.frame_stride, short_video_policy=policy, **shared)


def _choose_frames(timestamps: np.ndarray, source: Any, call: SimpleNamespace) -> np.ndarray:
    """The frame indices of a file's clips, all of them in the part of it that the source asks for."""
    first, total = part_of_video(timestamps, source)
    if call.do_sample_frames is False:
        return first + np.arange(total)[None]
    return first + _choose_clips(timestamps[first : first + total], call)


def _kept_window(height: int, width: int, call: SimpleNamespace) -> tuple[int, int, int, int]:
    """What has to be kept of a frame for its crops: (top, left, height, width)."""
    if not call.do_center_crop or _is_random_crop(call):
        return 0, 0, height, width
    return window_around(
        fixed_crops(height, width, call.crop_size["height"], call.crop_size["width"], num_crops=call.num_crops)
    )


def _is_random_crop(call: SimpleNamespace) -> bool:
    return call.crop_position == "random" and call.num_crops == 1


def _crops(clip: np.ndarray, call: SimpleNamespace) -> list[np.ndarray]:
    """The crops of one clip, (frames, crop height, crop width, channels) each."""
    if not call.do_center_crop:
        return [clip]
    sizes = (clip.shape[1], clip.shape[2], call.crop_size["height"], call.crop_size["width"])
    if _is_random_crop(call):
        crops = [random_crop(*sizes, call.generator)]
    else:
        crops = fixed_crops(*sizes, num_crops=call.num_crops)
    return [clip[:, top : top + height, left : left + width] for top, left, height, width in crops]


def _frame_ids(indices: np.ndarray, call: SimpleNamespace) -> list[np.ndarray]:
    """For each view of a video, in the order of `_crops`, numbers that tell its frames from those of other crops."""
    if _is_random_crop(call):  # another one in each clip
        return [row * len(indices) + clip for clip, row in enumerate(indices)]
    num_crops = call.num_crops if call.do_center_crop else 1
    return [row * num_crops + crop for row in indices for crop in range(num_crops)]


def _finished(
    views: list[np.ndarray],
    call: SimpleNamespace,
    return_tensors: str | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
) -> Any:
    """Views (frames, height, width, channels) as `pixel_values` (views, frames, channels, height, width)."""
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, _DTYPES)
    shapes = {view.shape for view in views}
    if len(shapes) > 1 and return_tensors is not None:
        raise ValueError(
            "The views of a batch must have one shape, these are (frames, height, width, channels): "
            f"{sorted(shapes)}. Leave do_sample_frames, do_center_crop and do_convert_rgb on, process the videos one "
            "by one, or pass return_tensors=None."
        )
    if not call.do_rescale and len({view.dtype for view in views}) > 1:
        raise ValueError("A batch of uint8 and of float frames has no common scale with do_rescale=False.")
    groups = [views] if len(shapes) == 1 else [[view] for view in views]
    results = []
    for group in groups:
        frames, height, width, channels = group[0].shape
        shape = (len(group), frames, channels, height, width)
        planes = [view.transpose(0, 3, 1, 2) for view in group]
        if (call.do_rescale or call.do_normalize) and torch.device(device or "cpu").type == "cpu":
            batch = empty_floats(shape, device)
            for row, view in zip(batch, planes, strict=True):
                rescale_and_normalize(torch.from_numpy(view), call, out=row)
        else:
            # To another device as they are, uint8 most of the time: a quarter of the bytes.
            batch = torch.from_numpy(np.stack(planes)).to(device=device)
            if call.do_rescale or call.do_normalize:
                batch = rescale_and_normalize(batch, call)
        results.append(batch.to(getattr(torch, name)) if batch.is_floating_point() else batch)
    if return_tensors == "pt":
        return results[0]
    arrays = [batch.cpu().numpy() for batch in results]
    return arrays[0] if return_tensors == "np" else [view for array in arrays for view in array]
