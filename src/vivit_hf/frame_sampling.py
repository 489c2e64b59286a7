"""Which frames and which crops of a video a model sees: pure functions on numbers, nothing is decoded here.

A clip is `num_frames` frames, `stride` frames apart. With num_frames = 4 and stride = 3, from frame 5 of 20:

    frame    0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19
    clip                    #  .  .  #  .  .  #  .  .  #  .  .
                            |<------ num_frames * stride ------>|
                          start                                  the window that a clip takes up

    centre                     one window in the middle of the video
    num_clips = 3            [ first window ]--[ middle window ]--[ last window ]    (linearly spaced starts)
    random                     windows at starts drawn from a generator

A view is one clip seen through one crop. The paper averages the scores of 4 clips x 3 crops (section 4, "Inference"):

    landscape  +----+--------+----+        portrait  +--------+
               |left| centre |right|                 |  top   |
               +----+--------+----+                  | centre |
                                                     | bottom |
                                                     +--------+

A video that is too short for its clip is never shortened in silence: `short_video_policy` says what happens,

    "repeat_last"   0 3 6 7 7 7    the last frame stands in for those that are missing
    "loop"          0 3 6 1 4 7    the video starts again
    "error"         a ValueError

and whatever the policy, a clip has exactly `num_frames` indices.

Frame indices are numpy int64 and count from 0 in presentation order; sizes are (height, width) in pixels; times are
in seconds. Sampling follows google-research/scenic (projects/vivit) and the DMVR processors that it reads data with.
"""

from __future__ import annotations

import numpy as np

from .limits_vivit import check_choice, check_positive_integer, check_positive_number


SHORT_VIDEO_POLICIES = ("repeat_last", "loop", "error")
CLIP_STARTS = ("centre", "random")
# Times of frames are multiples of a clock tick as floats: a microsecond keeps 3 * (1 / 3) on the right side of 1.
TIME_TOLERANCE = 1e-6


def _checked_generator(generator: np.random.Generator | None) -> np.random.Generator:
    if not isinstance(generator, np.random.Generator):
        raise ValueError(
            f"A random choice needs a numpy Generator, for example np.random.default_rng(seed), got {generator!r}."
        )
    return generator


def sample_frames_uniformly(num_frames_in_video: int, num_frames: int) -> np.ndarray:
    """Uniform frame sampling, the official rule (section 3.2 of the paper; `sample_frames_uniformly` of scenic).

    The step is T / (n + 1); the indices are round-half-to-even(step, 2 * step, ... < T), at most T - 1, computed in
    float32 as the official code does. A video with no more than n frames is taken whole.

    The result can have n + 1 entries: when T / (n + 1) rounds down, the (n + 1)-th multiple stays below T. The
    official model then has one frame more than its configuration says. `sample_uniform_clip` always gives n.

    Returns int64 (n,), now and then (n + 1,), or (T,) for T <= n.
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    num_frames = check_positive_integer("num_frames", num_frames)
    if num_frames >= total:
        return np.arange(total, dtype=np.int64)
    step = total / (num_frames + 1)
    # The number of multiples is found in double precision and the multiples themselves in single precision: this is
    # how the official code comes to its n + 1 frames for some lengths, and which lengths those are.
    count = int(np.ceil((total - step) / step))
    multiples = np.float32(step) + np.arange(count, dtype=np.float32) * np.float32(step)
    return np.minimum(np.round(multiples).astype(np.int64), total - 1)


def sample_uniform_clip(
    num_frames_in_video: int, num_frames: int, *, short_video_policy: str = "repeat_last"
) -> np.ndarray:
    """Uniform frame sampling with always exactly `num_frames` indices, int64 (num_frames,).

    The first `num_frames` of `sample_frames_uniformly`; for a video with fewer frames, every frame and then what
    `short_video_policy` says.
    """
    indices = sample_frames_uniformly(num_frames_in_video, num_frames)[:num_frames]
    if len(indices) < num_frames:
        indices = np.arange(num_frames, dtype=np.int64)
    return apply_short_video_policy(indices, num_frames_in_video, short_video_policy)


def apply_short_video_policy(indices: np.ndarray, num_frames_in_video: int, policy: str) -> np.ndarray:
    """Brings frame indices that run past the end of a video back into it, by the policy (see the module).

    Takes and returns int64 of any shape. Raises ValueError for indices past the end under "error".
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    check_choice("short_video_policy", policy, SHORT_VIDEO_POLICIES)
    needed = int(indices.max()) + 1
    if needed <= total:
        return indices
    if policy == "error":
        raise ValueError(
            f"The clip needs {needed} frames and the video has {total}: lower `num_frames` or the stride, or choose "
            "short_video_policy='repeat_last' or 'loop'."
        )
    return np.minimum(indices, total - 1) if policy == "repeat_last" else indices % total


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
    """Frame indices of `num_clips` clips of `num_frames` frames, `stride` frames apart: int64 (num_clips, num_frames).

    `start="centre"` gives the window in the middle for one clip and linearly spaced windows, the first at the first
    frame and the last at the end, for several; `start="random"` draws each start from `generator`. The starts are
    those of `sample_sequence` and `sample_linspace_sequence` in DMVR, which loops short videos: with "loop", a video
    that is too short for its clip has its random start at any frame; with "repeat_last" at the first.
    """
    total = check_positive_integer("num_frames_in_video", num_frames_in_video)
    num_frames = check_positive_integer("num_frames", num_frames)
    stride = check_positive_integer("stride", stride)
    num_clips = check_positive_integer("num_clips", num_clips)
    check_choice("start", start, CLIP_STARTS)
    starts: np.ndarray
    if start == "random":
        num_starts = total - (num_frames - 1) * stride
        if num_starts < 1:  # too short, and so a loop begins anywhere, as in DMVR
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
    """Frame indices of clips whose frames are 1 / `frames_per_second` seconds apart: int64 (num_clips, num_frames).

    `timestamps` are the times in seconds at which the frames are shown, float (T,), never decreasing: the frame rate
    may vary. Each index is the frame that is on the screen at its moment; a rate above the video's repeats frames.
    `start` and `num_clips` as in `sample_clips`, with windows of num_frames / frames_per_second seconds.
    """
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0 or np.any(np.diff(times) < 0):
        raise ValueError("`timestamps` must be a list of at least one time in seconds that never decreases.")
    num_frames = check_positive_integer("num_frames", num_frames)
    rate = check_positive_number("frames_per_second", frames_per_second)
    num_clips = check_positive_integer("num_clips", num_clips)
    check_choice("start", start, CLIP_STARTS)
    check_choice("short_video_policy", short_video_policy, SHORT_VIDEO_POLICIES)
    times = times - times[0]
    # The last frame stays on the screen for as long as the others do on average.
    duration = times[-1] * len(times) / (len(times) - 1) if times[-1] > 0 else 1 / rate
    last_moment = (num_frames - 1) / rate
    if short_video_policy == "error" and last_moment >= duration + TIME_TOLERANCE:
        raise ValueError(
            f"The clip needs {last_moment:.3f} seconds and the video has {duration:.3f}: lower `num_frames`, raise "
            "`frames_per_second`, or choose short_video_policy='repeat_last' or 'loop'."
        )
    if start == "random":
        span = duration - last_moment
        if span <= 0:  # too short, and so a loop begins anywhere
            span = duration if short_video_policy == "loop" else 0.0
        starts = _checked_generator(generator).uniform(0, span, size=num_clips)
    else:
        last_start = max(0.0, duration - num_frames / rate)
        starts = np.linspace(0, last_start, num_clips) if num_clips > 1 else np.array([last_start / 2])
    moments = starts[:, None] + np.arange(num_frames) / rate
    if short_video_policy == "loop":
        moments = (moments + TIME_TOLERANCE) % duration
    return np.maximum(np.searchsorted(times, moments + TIME_TOLERANCE, side="right") - 1, 0).astype(np.int64)


def resized_size(
    height: int, width: int, size: dict[str, int], crop_size: dict[str, int] | None = None
) -> tuple[int, int]:
    """The (height, width) of a frame of `height` x `width` after a resize to `size`.

    `size` is {"shortest_edge": s}, which keeps the aspect ratio and rounds the longer edge down (as DMVR's
    `resize_smallest` does), or {"height": h, "width": w}. A shortest edge that holds the shorter side of `crop_size`
    grows where the longer one needs it: for a portrait or square video and a landscape crop.
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
            f"{width}: make the frame larger with `size`, or the crop smaller with `crop_size`."
        )


def centre_crop(height: int, width: int, crop_height: int, crop_width: int) -> tuple[int, int, int, int]:
    """The crop in the middle of a frame: (top, left, height, width). Raises ValueError if it does not fit."""
    _check_crop(height, width, crop_height, crop_width)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def three_crops(height: int, width: int, crop_height: int, crop_width: int) -> list[tuple[int, int, int, int]]:
    """Three crops along the longer edge, each (top, left, height, width).

    Left, centre and right of a frame that is at least as wide as high; top, centre and bottom of a portrait one.
    """
    top, left, _, _ = centre_crop(height, width, crop_height, crop_width)
    if width >= height:
        return [(top, offset, crop_height, crop_width) for offset in (0, left, width - crop_width)]
    return [(offset, left, crop_height, crop_width) for offset in (0, top, height - crop_height)]


def fixed_crops(
    height: int, width: int, crop_height: int, crop_width: int, *, num_crops: int
) -> list[tuple[int, int, int, int]]:
    """`centre_crop` for 1 crop, `three_crops` for 3, each (top, left, height, width)."""
    if num_crops == 3:
        return three_crops(height, width, crop_height, crop_width)
    return [centre_crop(height, width, crop_height, crop_width)]


def window_around(crops: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The smallest window (top, left, height, width) that holds all of the crops."""
    top, left = (min(crop[axis] for crop in crops) for axis in (0, 1))
    bottom, right = (max(crop[axis] + crop[axis + 2] for crop in crops) for axis in (0, 1))
    return top, left, bottom - top, right - left


def random_crop(
    height: int, width: int, crop_height: int, crop_width: int, generator: np.random.Generator | None
) -> tuple[int, int, int, int]:
    """A crop at a place drawn uniformly from `generator`: (top, left, height, width), the same for all of a clip."""
    _check_crop(height, width, crop_height, crop_width)
    generator = _checked_generator(generator)
    top = int(generator.integers(height - crop_height + 1))
    left = int(generator.integers(width - crop_width + 1))
    return top, left, crop_height, crop_width
