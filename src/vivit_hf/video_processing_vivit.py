"""The video processor of ViViT: turn videos of any kind into `pixel_values`.

    file, URL, bytes --decode--> \
                                  frames --sample--> clips --resize--> --crop--> views --rescale, normalise--> tensor
    list, array, tensor -------> /

Training, evaluation and serving share this path and its stored settings.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from .configuration_vivit import DTYPES
from .frame_conversion import FrameSize
from .frame_sampling import (
    crop_window,
    fixed_crops,
    mask_missing_frames,
    random_crop,
    resized_size,
    sample_clips,
    sample_clips_at_rate,
    sample_uniform_clip,
)
from .limits_vivit import check_choice, check_positive_number
from .model_files import AutoClassMixin
from .processor_settings import SERVICE_KEYS, SETTING_NAMES, ProcessorFilesMixin, ProcessorSettings, check_names
from .video_decoding import VideoReader
from .video_frames import as_batch, empty_floats, num_frames_of, rescale_and_normalize, resize_frames, select_frames
from .video_sources import (
    DecodingReport,
    FramesChangedError,
    VideoDecodingError,
    VideoLimits,
    is_video_source,
    part_of_video,
)


logger = logging.get_logger(__name__)


class VideoFeatures(BatchFeature):
    """A `BatchFeature` that also describes the videos of its batch.

    `num_views`: rows of `pixel_values` per video, clips x crops; row v * num_views + clip * num_crops + crop.
    `reports`: for each video its `DecodingReport`, or None if its frames were given.
    `kept`: input positions of the videos in the batch; on_error="skip" leaves out unreadable ones.
    `frame_ids`: int64 (rows, frames) like `pixel_values`; equal numbers within a video mark equal frames.
    `frame_times`: float64 (rows, frames), seconds from the first frame of the video; NaN for frames in memory without
        `video_fps`.
    """

    num_views: int = 1
    reports: Sequence[DecodingReport | None] = ()
    kept: Sequence[int] = ()
    frame_ids: np.ndarray | None = None
    frame_times: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "views": {name: getattr(self, name) for name in VideoFeatures.__annotations__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]
        for name, value in state["views"].items():
            setattr(self, name, value)


@dataclass(frozen=True)
class _Clips:
    """The resized clips of one video.

    `frames` is uint8 or float32 (clips, frames, height, width, channels). `indices`, `times` and `mask` (True where
    visible) describe them, (clips, frames) each. `report` is that of the reader, None for frames in memory.
    """

    frames: np.ndarray
    indices: np.ndarray
    times: np.ndarray
    mask: np.ndarray
    report: DecodingReport | None = None


class ViViTVideoProcessor(AutoClassMixin, ProcessorFilesMixin, BaseImageProcessor):
    """Turn videos into the `pixel_values` of a ViViT model.

    The defaults are the official evaluation recipe for Kinetics with a single view: 32 frames, every second one, from
    the middle of the video, short side resized to 256 pixels, central crop of 224 x 224, values v / 127.5 - 1 in
    [-1, 1].

    Args:
        settings: fields of `ProcessorSettings`, which describes them, such as num_frames=16, size=128, crop_size=112.

    Each setting is an attribute, is stored by `save_pretrained`, and can be overridden in a call. Settings of
    transformers' `VivitImageProcessor` are followed exactly (offset and normalisation, so values down to -3).

    Torchvision is not needed. Raises ValueError for a setting out of its range and TypeError for an unknown one.
    """

    model_input_names = ["pixel_values", "frame_mask"]
    _auto_class = "AutoImageProcessor"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{name: settings.pop(name) for name in SERVICE_KEYS & settings.keys()})
        check_names(settings)
        for name, value in vars(ProcessorSettings(**settings)).items():
            setattr(self, name, value)

    @property
    def settings(self) -> ProcessorSettings:
        """The settings as the attributes are now; ValueError if they are out of range."""
        return ProcessorSettings(**{name: getattr(self, name) for name in SETTING_NAMES})

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
        """Process a video or a batch of videos.

        Args:
            videos: one video, or a list of them, which may differ in kind and size. A video is
                - a file: path, `pathlib.Path`, http(s) URL, bytes, binary file, or {"path": ..., "bytes": ...}; the
                  dictionary may have "start" and "end", seconds from the first frame, to select a part;
                - a list of frames: PIL images, arrays or tensors (height, width, channels), grey (height, width);
                - an array or tensor (frames, height, width, channels) or (frames, channels, height, width).
                One array or tensor with 5 axes is a batch. Channels are 1, 3 or 4. Values are uint8 from 0 to 255, or
                float in [0, 1].
            return_tensors: "pt", "np", or None for a list with one numpy array per view.
            dtype: of `pixel_values`. Without rescaling and normalisation uint8 frames stay uint8.
            device: where to move frames, as uint8, before they are converted to floats.
            input_data_format: "channels_last" or "channels_first", needed for ambiguous shapes only.
            video_fps: the rate of the given frames, for `frames_per_second`.
            generator: numpy Generator or seed for random clips and crops. None: seeded from torch's own generator.
            overrides: fields of `ProcessorSettings`. None stands for the stored value.

        Returns:
            `VideoFeatures` with `pixel_values` (batch * views, num_frames, channels, height, width). The policy "mask"
            adds `frame_mask`, bool (batch * views, num_frames), True where visible, as models take it; all True for
            videos long enough. With stride 2, a video of 3 frames has

                frames        0 2 2 2      the last visible frame fills the rest
                frame_mask    1 1 0 0

            A video with fewer frames than uniform sampling asks for has each of them once. Frames lost to damage stay
            visible (on_error="repeat_last").

        Raises:
            ValueError, TypeError: an input or a setting that cannot be used; the message says which can.
            VideoDecodingError: a file that cannot be read, unless `on_error` says otherwise.
        """
        if return_tensors is not None:
            check_choice("return_tensors", return_tensors, ("pt", "np"))
        if return_tensors != "pt" and str(dtype).endswith("bfloat16"):
            raise ValueError(f"numpy has no {dtype}: use return_tensors='pt', or another dtype.")
        if video_fps is not None:
            video_fps = check_positive_number("video_fps", video_fps)
        settings = self.settings.updated(overrides)
        is_random = "random" in (settings.clip_start, settings.crop_position)
        draw = _generator(generator) if is_random else None

        views: list[np.ndarray] = []
        reports: list[DecodingReport | None] = []
        kept: list[int] = []
        frame_ids: list[np.ndarray] = []
        frame_times: list[np.ndarray] = []
        frame_mask: list[np.ndarray] = []
        for place, video in enumerate(as_batch(videos)):
            try:
                if is_video_source(video):
                    clips = _clips_of_file(video, settings, draw)
                else:
                    clips = _clips_of_frames(video, settings, draw, input_data_format, video_fps)
            except VideoDecodingError as error:
                if settings.on_error != "skip":
                    raise
                logger.warning(f"Skipping a video. {error}")
                reports.append(DecodingReport(error.source or "", error=error.reason or str(error)))
                continue
            views += [view for clip in clips.frames for view in _crops(clip, settings, draw)]
            frame_ids += _frame_ids(clips.indices, settings)
            frame_times += [row for row in clips.times for _ in range(_num_crops(settings))]
            frame_mask += [row for row in clips.mask for _ in range(_num_crops(settings))]
            reports.append(clips.report)
            kept.append(place)
        if not views:
            sources = "; ".join(f"{report.source}: {report.error}" for report in reports if report is not None)
            raise VideoDecodingError(f"None of the videos can be read. {sources}")

        features = VideoFeatures({"pixel_values": _to_batch(views, settings, return_tensors, dtype, device)})
        if settings.short_video_policy == "mask":
            features["frame_mask"] = _mask_batch(frame_mask, return_tensors, device)
        features.num_views, features.reports, features.kept = len(views) // len(kept), reports, kept
        if len({ids.shape for ids in frame_ids}) == 1:
            features.frame_ids, features.frame_times = np.stack(frame_ids), np.stack(frame_times)
        return features

    def preprocess(self, videos: Any, **kwargs: Any) -> VideoFeatures:
        """Process videos, as calling the processor does."""
        return self(videos, **kwargs)

    def rescale_and_normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Rescale and normalise uint8 batches that were made with do_rescale=False, do_normalize=False.

        Such batches are a quarter of the size on their way from data loader workers to the device, where this runs.

        Args:
            pixel_values: (..., channels, height, width), values from 0 to 255.

        Returns:
            float32 of the same shape.
        """
        return rescale_and_normalize(pixel_values, self.settings)


def resized_frame_size(height: int, width: int, settings: ProcessorSettings | ViViTVideoProcessor) -> tuple[int, int]:
    """Return the (height, width) before the crop of a frame of `height` x `width`; for a processor or its settings."""
    if not settings.do_resize:
        return height, width
    return resized_size(height, width, settings.size, settings.crop_size if settings.do_center_crop else None)


def reader_size(settings: ProcessorSettings | ViViTVideoProcessor) -> FrameSize | None:
    """Return the `size` for `VideoReader` and `LiveVideo`, for a processor or its settings.

    None if the filter is not bilinear: the scaler of the decoder and PIL agree on that filter alone, so the processor
    resizes the frames itself.
    """
    if not settings.do_resize or settings.resample != PIL.Image.Resampling.BILINEAR:
        return None
    crop_size = settings.crop_size if settings.do_center_crop else None
    return partial(resized_size, size=settings.size, crop_size=crop_size)


def _generator(generator: np.random.Generator | int | None) -> np.random.Generator:
    if isinstance(generator, np.random.Generator):
        return generator
    # `set_seed` sets torch's seed, and data loader workers each have their own.
    seed = int(torch.randint(2**63 - 1, ()).item()) if generator is None else generator
    return np.random.default_rng(seed)


def _clips_of_frames(
    video: Any,
    settings: ProcessorSettings,
    generator: np.random.Generator | None,
    layout: str | None,
    frames_per_second: float | None,
) -> _Clips:
    """Return the clips of a video in memory."""
    total = num_frames_of(video)
    is_sampled = settings.do_sample_frames
    if is_sampled is None:
        is_sampled = total != settings.num_frames or settings.num_clips > 1
    if is_sampled and settings.frames_per_second is not None and frames_per_second is None:
        raise ValueError("`frames_per_second` needs the rate of the given frames too: pass `video_fps`.")
    times = np.arange(total) / (frames_per_second or 1.0)
    indices, mask = _sample(times, settings, generator) if is_sampled else _all_frames(total)
    frames = _resized(select_frames(video, indices.reshape(-1), layout, settings.do_convert_rgb), settings)
    if settings.do_rescale and frames.dtype == np.float32:
        frames = frames * np.float32(255)  # `rescale_factor` is for values from 0 to 255
    shown_at = times[indices] if frames_per_second is not None else np.full(indices.shape, np.nan)
    return _Clips(frames.reshape(indices.shape + frames.shape[1:]), indices, shown_at, mask)


def _clips_of_file(source: Any, settings: ProcessorSettings, generator: np.random.Generator | None) -> _Clips:
    """Return the clips of a file, uint8."""
    size = reader_size(settings)
    window = None
    if settings.do_center_crop and not _is_random_crop(settings) and (size is not None or not settings.do_resize):
        height, width = settings.crop_size["height"], settings.crop_size["width"]
        window = partial(crop_window, crop_height=height, crop_width=width, num_crops=settings.num_crops)
    num_threads = settings.num_threads
    if num_threads is None:
        num_threads = 0 if get_worker_info() is None else 1
    on_lost = "repeat_last" if settings.on_error == "repeat_last" else "raise"
    with VideoReader(source, limits=VideoLimits(**(settings.video_limits or {})), num_threads=num_threads) as reader:
        clips = None
        while clips is None:
            indices, mask = choose_frames(reader.timestamps, source, settings, generator)
            with contextlib.suppress(FramesChangedError):  # at most once: choose again by the new timestamps
                clips = reader.frames_at(indices, size=size, window=window, on_lost=on_lost)
        times = reader.timestamps[indices] - reader.timestamps[0]
    if size is None:
        frames = _resized(clips.reshape(-1, *clips.shape[2:]), settings)
        clips = frames.reshape(indices.shape + frames.shape[1:])
    return _Clips(clips, indices, times, mask, reader.report)


def choose_frames(
    timestamps: np.ndarray, source: Any, settings: ProcessorSettings, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return frame indices and mask, (clips, frames), of a file, within the part of it that the source asks for."""
    first, total = part_of_video(timestamps, source)
    if settings.do_sample_frames is False:
        indices, mask = _all_frames(total)
    else:
        indices, mask = _sample(timestamps[first : first + total], settings, generator)
    return first + indices, mask


def _resized(frames: np.ndarray, settings: ProcessorSettings) -> np.ndarray:
    """Return frames (frames, height, width, channels) in their size before the crop."""
    _, height, width, _ = frames.shape
    return resize_frames(frames, resized_frame_size(height, width, settings), settings.resample)


def _all_frames(total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return frame indices and mask of one clip with all frames, (1, total)."""
    return np.arange(total)[None], np.ones((1, total), dtype=bool)


def _sample(
    timestamps: np.ndarray, settings: ProcessorSettings, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return frame indices and mask, (clips, num_frames), of a video whose frames are shown at `timestamps`."""
    return mask_missing_frames(_sampled(timestamps, settings, generator))


def _sampled(timestamps: np.ndarray, settings: ProcessorSettings, generator: np.random.Generator | None) -> np.ndarray:
    """Return frame indices (clips, num_frames), NO_FRAME where the policy "mask" has none."""
    total, policy = len(timestamps), settings.short_video_policy
    num_frames, stride, rate = settings.num_frames, settings.frame_stride, settings.frames_per_second
    if settings.frame_sampling == "uniform":
        drawn: dict[str, Any] = {"start": settings.clip_start, "generator": generator}
        return sample_uniform_clip(total, num_frames, short_video_policy=policy, **drawn)[None]
    clips: dict[str, Any] = {"num_clips": settings.num_clips, "start": settings.clip_start, "generator": generator}
    if rate is not None:
        return sample_clips_at_rate(timestamps, num_frames, rate, short_video_policy=policy, **clips)
    if policy not in ("error", "mask") and total <= (num_frames - 1) * stride:
        logger.warning_once(
            f"Some videos are too short for {num_frames} frames at stride {stride}; short_video_policy='{policy}' "
            "fills their clips."
        )
    return sample_clips(total, num_frames, stride, short_video_policy=policy, **clips)


def _num_crops(settings: ProcessorSettings) -> int:
    return settings.num_crops if settings.do_center_crop else 1


def _is_random_crop(settings: ProcessorSettings) -> bool:
    return settings.crop_position == "random" and settings.num_crops == 1


def _crops(clip: np.ndarray, settings: ProcessorSettings, generator: np.random.Generator | None) -> list[np.ndarray]:
    """Return the crops of a clip, (frames, crop height, crop width, channels) each."""
    if not settings.do_center_crop:
        return [clip]
    sizes = (clip.shape[1], clip.shape[2], settings.crop_size["height"], settings.crop_size["width"])
    if _is_random_crop(settings):
        crops = [random_crop(*sizes, generator=generator)]
    else:
        crops = fixed_crops(*sizes, num_crops=settings.num_crops)
    return [clip[:, top : top + height, left : left + width] for top, left, height, width in crops]


def _frame_ids(indices: np.ndarray, settings: ProcessorSettings) -> list[np.ndarray]:
    """Return the `frame_ids` of each view of a video, in the order of `_crops`."""
    if _is_random_crop(settings):  # differs between clips
        return [row * len(indices) + clip for clip, row in enumerate(indices)]
    num_crops = _num_crops(settings)
    return [row * num_crops + crop for row in indices for crop in range(num_crops)]


def _mask_batch(rows: list[np.ndarray], return_tensors: str | None, device: torch.device | str | None) -> Any:
    """Return the masks of views as `frame_mask`, bool (views, frames), of the kind of `pixel_values`."""
    if return_tensors is None:
        return rows
    batch = np.stack(rows)
    return torch.from_numpy(batch).to(device=device) if return_tensors == "pt" else batch


def _to_batch(
    views: list[np.ndarray],
    settings: ProcessorSettings,
    return_tensors: str | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
) -> Any:
    """Return views (frames, height, width, channels) as `pixel_values` (views, frames, channels, height, width)."""
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, DTYPES)
    shapes = {view.shape for view in views}
    if len(shapes) > 1 and return_tensors is not None:
        raise ValueError(
            "The views of a batch must have one shape, these are (frames, height, width, channels): "
            f"{sorted(shapes)}. Leave do_sample_frames, do_center_crop and do_convert_rgb on, process the videos one "
            "by one, or pass return_tensors=None."
        )
    if not settings.do_rescale and len({view.dtype for view in views}) > 1:
        raise ValueError("A batch of uint8 and of float frames has no common scale with do_rescale=False.")
    groups = [views] if len(shapes) == 1 else [[view] for view in views]
    results = []
    for group in groups:
        frames, height, width, channels = group[0].shape
        shape = (len(group), frames, channels, height, width)
        planes = [view.transpose(0, 3, 1, 2) for view in group]
        if (settings.do_rescale or settings.do_normalize) and torch.device(device or "cpu").type == "cpu":
            batch = empty_floats(shape, device)
            for row, view in zip(batch, planes, strict=True):
                rescale_and_normalize(torch.from_numpy(view), settings, out=row)
        else:
            # To another device as they are, uint8 most of the time: a quarter of the bytes.
            batch = torch.from_numpy(np.stack(planes)).to(device=device)
            if settings.do_rescale or settings.do_normalize:
                batch = rescale_and_normalize(batch, settings)
        results.append(batch.to(getattr(torch, name)) if batch.is_floating_point() else batch)
    if return_tensors == "pt":
        return results[0]
    arrays = [batch.cpu().numpy() for batch in results]
    return arrays[0] if return_tensors == "np" else [view for array in arrays for view in array]
