"""Choose the frames and crops of a video: pure functions on numbers that decode nothing.

A clip is `num_frames` frames, `stride` frames apart. With num_frames = 4 and stride = 3, from frame 5 of 20:

    frame    0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19
    clip                    #  .  .  #  .  .  #  .  .  #  .  .
                            |<------ num_frames * stride ------>|
                          start                               window

    centre                     one window in the middle of the video
    num_clips = 3            [ first window ]--[ middle window ]--[ last window ]    (linearly spaced starts)
    random                     windows at starts drawn from a generator
    uniform                    frames spread over the whole video; if random, each is drawn around its place

A view is one clip through one crop. The paper averages the scores of 4 clips x 3 crops (section 4, "Inference"):

    landscape  +----+--------+----+        portrait  +--------+
               |left| centre |right|                 |  top   |
               +----+--------+----+                  | centre |
                                                     | bottom |
                                                     +--------+

A clip always has `num_frames` indices. If a video is too short for it, `short_video_policy` decides:

    "repeat_last"   0 3 6 7 7 7    repeat the last frame
    "loop"          0 3 6 1 4 7    start the video again
    "mask"          0 3 6 . . .    leave the rest of the clip empty: NO_FRAME, which `mask_missing_frames` fills
    "error"         raise ShortVideoError

Frame indices are numpy int64 and count from 0 in presentation order; sizes are (height, width) in pixels; times are
in seconds. Sampling follows google-research/scenic (projects/vivit) and DMVR, the library that reads its videos.
"""

import numpy as np

from .limits_vivit import check_choice, check_positive_integer, check_positive_number
from .presets_vivit import SHORT_VIDEO_POLICIES


NO_FRAME = -1  # the index of a place in a clip without a frame, with the policy "mask"
CLIP_STARTS = ("centre", "random")
# Frame times are multiples of a clock tick, rounded to floats; a microsecond keeps 3 * (1 / 3) from falling below 1.
TIME_TOLERANCE = 1e-6


class ShortVideoError(ValueError):
    """A video is too short for a clip, and `short_video_policy` is "error"."""


def _checked_generator(generator: np.random.Generator | None) -> np.random.Generator:
    if not isinstance(generator, np.random.Generator):
        raise ValueError(
            f"`generator` must be a numpy Generator, for example np.random.default_rng(seed), got {generator!r}."
        )
    return generator


def sample_frames_uniformly(num_frames_in_video: int, num_frames: int) -> np.ndarray:
    """Return the frame indices of uniform frame sampling (section 3.2; `sample_frames_uniformly` of scenic).

    For n of T frames the step is T / (n + 1). The indices are round-half-to-even(step, 2 * step, ... < T), at most
    T - 1, computed in float32 as in the official code. All frames of a video with n or fewer are returned.

    For some lengths T / (n + 1) rounds down, so that multiple n + 1 stays below T and there are n + 1 indices. The
    official model then has one frame more than its configuration says. `sample_uniform_clip` always returns n.

    Returns int64 (n,), for some lengths (n + 1,), or (T,) for T <= n.
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    num_frames = check_positive_integer("num_frames", num_frames)
    if num_frames >= total:
        return np.arange(total, dtype=np.int64)
    step = total / (num_frames + 1)
    # The official code counts the multiples in double precision and computes them in single precision, which decides
    # for which lengths there are n + 1.
    count = int(np.ceil((total - step) / step))
    multiples = np.float32(step) + np.arange(count, dtype=np.float32) * np.float32(step)
    return np.minimum(np.round(multiples).astype(np.int64), total - 1)


def sample_uniform_clip(
    num_frames_in_video: int,
    num_frames: int,
    *,
    start: str = "centre",
    short_video_policy: str = "repeat_last",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Return exactly `num_frames` indices spread over a video, int64 (num_frames,).

    They are the first `num_frames` of `sample_frames_uniformly`. With `start="random"`, each is drawn from the frames
    around its place, as in TSN (Wang et al., 2016). `short_video_policy` fills up shorter videos.
    """
    check_choice("start", start, CLIP_STARTS)
    indices = sample_frames_uniformly(num_frames_in_video, num_frames)[:num_frames]
    if len(indices) < num_frames:
        indices = np.arange(num_frames, dtype=np.int64)
    elif start == "random" and num_frames < num_frames_in_video:
        step = num_frames_in_video / (num_frames + 1)
        places = np.arange(1, num_frames + 1) + _checked_generator(generator).uniform(-0.5, 0.5, num_frames)
        indices = np.minimum(np.round(places * step).astype(np.int64), num_frames_in_video - 1)
    return apply_short_video_policy(indices, num_frames_in_video, short_video_policy)


def apply_short_video_policy(indices: np.ndarray, num_frames_in_video: int, policy: str) -> np.ndarray:
    """Replace indices past the end of a video as the policy says (see the module); "mask" puts NO_FRAME there.

    Takes and returns int64 of any shape. Raises ShortVideoError for indices past the end if the policy is "error".
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    check_choice("short_video_policy", policy, SHORT_VIDEO_POLICIES)
    needed = int(indices.max()) + 1
    if needed <= total:
        return indices
    if policy == "error":
        raise ShortVideoError(
            f"The clip needs {needed} frames and the video has {total}: lower `num_frames` or the stride, or use "
            "short_video_policy='repeat_last', 'loop' or 'mask'."
        )
    if policy == "mask":
        return np.where(indices < total, indices, NO_FRAME)
    return np.minimum(indices, total - 1) if policy == "repeat_last" else indices % total


def mask_missing_frames(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices with the last frame before in each place without a frame, and a mask of the other places.

        indices    0 3 6 . . .
        shown      0 3 6 6 6 6
        mask       1 1 1 0 0 0    bool, True where visible: the `frame_mask` of a ViViT model

    Takes int64 (clips, frames); a clip begins with a frame.
    """
    mask = indices != NO_FRAME
    shown = np.maximum.accumulate(np.where(mask, np.arange(indices.shape[1]), 0), axis=1)
    return np.take_along_axis(indices, shown, axis=1), mask


def sample_clips(
    num_frames_in_video: int,
    num_frames: int,
    stride: int = 1,
    *,
    num_clips: int = 1,
    start: str = "centre",
    short_video_policy: str = "repeat_last",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the frame indices of clips with frames `stride` apart, int64 (num_clips, num_frames).

    `start="centre"` puts one clip in the middle, and spaces several linearly from the first frame to the last window.
    `start="random"` draws each start from `generator`. Both follow `sample_sequence` and `sample_linspace_sequence` of
    DMVR: in a video too short for a clip, a random start is any frame with "loop", otherwise the first.
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    num_frames = check_positive_integer("num_frames", num_frames)
    stride = check_positive_integer("stride", stride)
    num_clips = check_positive_integer("num_clips", num_clips)
    check_choice("start", start, CLIP_STARTS)
    starts: np.ndarray
    if start == "random":
        num_starts = total - (num_frames - 1) * stride
        if num_starts < 1:  # too short
            num_starts = total if short_video_policy == "loop" else 1
        starts = _checked_generator(generator).integers(num_starts, size=num_clips)
    else:
        last_start = max(0, total - num_frames * stride)
        starts = np.linspace(0, last_start, num_clips) if num_clips > 1 else np.array([last_start // 2])
    indices = starts.astype(np.int64)[:, None] + np.arange(num_frames, dtype=np.int64) * stride
    return apply_short_video_policy(indices, total, short_video_policy)


def sample_clips_at_rate(
    timestamps: np.ndarray,
    num_frames: int,
    frames_per_second: float,
    *,
    num_clips: int = 1,
    start: str = "centre",
    short_video_policy: str = "repeat_last",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the frame indices of clips at a rate, whatever the rate of the video, int64 (num_clips, num_frames).

        time (s)        0.0       0.2       0.4       0.6       0.8       1.0
        frames shown    0    1    2                                  3    4        (the frame rate may vary)
        5 per second    ^         ^         ^         ^         ^         ^
        indices         0         2         2         2         2         4

    `timestamps`, float (T,), are the times in seconds at which the frames are shown, in order. A rate above that of
    the video repeats frames. `start` and `num_clips` are those of `sample_clips`, with windows of
    num_frames / frames_per_second seconds. The last frame is shown for the average duration of the others; the policy
    "mask" leaves the moments after that empty.
    """
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0 or np.any(np.diff(times) < 0):
        raise ValueError("`timestamps` must be at least one time in seconds, in order.")
    num_frames = check_positive_integer("num_frames", num_frames)
    rate = check_positive_number("frames_per_second", frames_per_second)
    num_clips = check_positive_integer("num_clips", num_clips)
    check_choice("start", start, CLIP_STARTS)
    check_choice("short_video_policy", short_video_policy, SHORT_VIDEO_POLICIES)
    times = times - times[0]
    # Show the last frame for the average duration of the others.
    duration = times[-1] * len(times) / (len(times) - 1) if times[-1] > 0 else 1 / rate
    last_moment = (num_frames - 1) / rate
    is_short = last_moment + TIME_TOLERANCE >= duration
    if short_video_policy == "error" and is_short:
        raise ShortVideoError(
            f"The clip needs {last_moment:.3f} seconds and the video has {duration:.3f}: lower `num_frames`, raise "
            "`frames_per_second`, or use short_video_policy='repeat_last', 'loop' or 'mask'."
        )
    if start == "random":
        span = duration - last_moment
        if span <= 0:  # too short
            span = duration if short_video_policy == "loop" else 0.0
        starts = _checked_generator(generator).uniform(0, span, size=num_clips)
    else:
        last_start = max(0.0, duration - num_frames / rate)
        starts = np.linspace(0, last_start, num_clips) if num_clips > 1 else np.array([last_start / 2])
    moments = starts[:, None] + np.arange(num_frames) / rate
    if short_video_policy == "loop":
        moments = (moments + TIME_TOLERANCE) % duration
    indices = np.maximum(np.searchsorted(times, moments + TIME_TOLERANCE, side="right") - 1, 0).astype(np.int64)
    if short_video_policy == "mask" and is_short:  # every clip starts at 0
        indices[:, 1:][moments[:, 1:] + TIME_TOLERANCE >= duration] = NO_FRAME
    return indices


def resized_size(
    height: int, width: int, size: dict[str, int], crop_size: dict[str, int] | None = None
) -> tuple[int, int]:
    """Return the (height, width) of a frame of `height` x `width` after a resize to `size`.

    `size` is {"height": h, "width": w}, or {"shortest_edge": s}, which keeps the aspect ratio and rounds the longer
    edge down (as `resize_smallest` of DMVR). If the shortest edge covers the shorter side of `crop_size`, it grows
    until the frame holds the crop: a portrait or square video may need this for a landscape crop.
    """
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    edge, is_landscape = size["shortest_edge"], height <= width
    if crop_size is not None and edge >= min(crop_size.values()):
        crop_height, crop_width = crop_size["height"], crop_size["width"]
        if is_landscape:
            edge = max(edge, crop_height, -(-crop_width * height // width))
        else:
            edge = max(edge, crop_width, -(-crop_height * width // height))
    return (edge, max(edge, width * edge // height)) if is_landscape else (height * edge // width, edge)


def _check_crop(height: int, width: int, crop_height: int, crop_width: int) -> None:
    check_positive_integer("crop height", crop_height)
    check_positive_integer("crop width", crop_width)
    if crop_height > height or crop_width > width:
        raise ValueError(
            f"A crop of {crop_height} x {crop_width} (height x width) does not fit into a frame of {height} x "
            f"{width}: enlarge the frame with `size`, or reduce the crop with `crop_size`."
        )


def centre_crop(height: int, width: int, crop_height: int, crop_width: int) -> tuple[int, int, int, int]:
    """Return the crop in the middle of a frame, (top, left, height, width); ValueError if it does not fit."""
    _check_crop(height, width, crop_height, crop_width)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def fixed_crops(
    height: int, width: int, crop_height: int, crop_width: int, *, num_crops: int
) -> list[tuple[int, int, int, int]]:
    """Return the centre crop, or three crops along the longer edge, each (top, left, height, width).

    Three are left, centre and right; for portrait frames top, centre and bottom.
    """
    top, left, _, _ = centre = centre_crop(height, width, crop_height, crop_width)
    if num_crops == 1:
        return [centre]
    if width >= height:
        return [(top, offset, crop_height, crop_width) for offset in (0, left, width - crop_width)]
    return [(offset, left, crop_height, crop_width) for offset in (0, top, height - crop_height)]


def crop_window(
    height: int, width: int, crop_height: int, crop_width: int, *, num_crops: int
) -> tuple[int, int, int, int]:
    """Return the part of a frame that `fixed_crops` cover, (top, left, height, width)."""
    crops = fixed_crops(height, width, crop_height, crop_width, num_crops=num_crops)
    top, left = (min(crop[axis] for crop in crops) for axis in (0, 1))
    bottom, right = (max(crop[axis] + crop[axis + 2] for crop in crops) for axis in (0, 1))
    return top, left, bottom - top, right - left


def random_crop(
    height: int, width: int, crop_height: int, crop_width: int, generator: np.random.Generator | None
) -> tuple[int, int, int, int]:
    """Return a crop at a place drawn uniformly from `generator`, (top, left, height, width)."""
    _check_crop(height, width, crop_height, crop_width)
    generator = _checked_generator(generator)
    top = int(generator.integers(height - crop_height + 1))
    left = int(generator.integers(width - crop_width + 1))
    return top, left, crop_height, crop_width
