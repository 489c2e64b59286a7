"""Timelines of video files and live sources, by a sliding window and in constant memory."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..frame_sampling import TIME_TOLERANCE
from ..video_decoding import VideoReader
from ..video_processing_vivit import ViViTVideoProcessor, reader_size
from ..video_sources import VideoLimits, part_of_video
from .clips import BATCH
from .live_video import LiveVideo
from .segments import Segment, merge_windows
from .streaming import StreamingClassifier, WindowPrediction


def file_windows(
    model: Any,
    processor: ViViTVideoProcessor,
    source: Any,
    *,
    hop: int | None = None,
    unchanged_threshold: float | None = 0.0,
    on_lost: str = "repeat_last",
) -> Iterator[WindowPrediction]:
    """
    Classify a sliding window over a video file, in one pass.

    Args:
        model, processor, hop, unchanged_threshold: see `StreamingClassifier`.
        source, on_lost: see `stream_file`.

    Raises:
        TypeError, ValueError: see `StreamingClassifier`; and, during the iteration, what `stream_file` raises.
    """
    stream = StreamingClassifier(model, processor, hop=hop, unchanged_threshold=unchanged_threshold)
    return stream_file(stream, source, on_lost=on_lost)


def stream_file(
    stream: StreamingClassifier, source: Any, *, on_lost: str = "repeat_last"
) -> Iterator[WindowPrediction]:
    """
    Classify the window of a new stream over a video file, in one pass. Afterwards, `stream.reuse` has the counts.

    The last window ends with the last frame, a whole hop or less after the window before. A video that is shorter than
    a window has one window, filled by the processor's `short_video_policy`.

    Args:
        stream: a classifier to which no frame was pushed.
        source: a video as the processor accepts it; for a part of it, a dictionary with "start" and "end" in seconds.
        on_lost: "repeat_last" replaces frames lost to damage by the frame before, "raise" is an error.

    Raises, also during the iteration:
        VideoDecodingError: if the video cannot be read.
        ValueError, NonFiniteError: see `StreamingClassifier`.
    """
    processor = stream.processor

    def choose(timestamps: np.ndarray) -> np.ndarray:
        first, total = part_of_video(timestamps, source)
        rate = processor.frames_per_second
        if rate is None:
            return np.arange(first, first + total, processor.frame_stride)
        moments = np.arange(timestamps[first], timestamps[first + total - 1] + TIME_TOLERANCE, 1 / rate)
        return np.searchsorted(timestamps, moments + TIME_TOLERANCE, side="right") - 1

    with VideoReader(source, limits=VideoLimits(**(processor.video_limits or {}))) as reader:
        frames = reader.stream(choose(reader.timestamps), size=reader_size(processor), on_lost=on_lost)
        while batch := list(islice(frames, BATCH)):
            yield from stream.push_sampled([frame for _, frame in batch], [seconds for seconds, _ in batch])
        yield from stream.last_window()


def video_timeline(
    model: Any,
    processor: ViViTVideoProcessor,
    source: Any,
    *,
    hop: int | None = None,
    unchanged_threshold: float | None = 0.0,
    min_score: float = 0.0,
    min_duration: float | None = None,
) -> list[Segment]:
    """
    Return the segments of a video file; see `file_windows` and `merge_windows` for the arguments.

    Raises:
        VideoDecodingError: if the video cannot be read.
        ValueError, NonFiniteError: see `StreamingClassifier`.
    """
    windows = file_windows(model, processor, source, hop=hop, unchanged_threshold=unchanged_threshold)
    return list(merge_windows(windows, model.config, min_score=min_score, min_duration=min_duration))


def live_windows(
    model: Any,
    processor: ViViTVideoProcessor,
    live: LiveVideo,
    *,
    hop: int | None = None,
    unchanged_threshold: float | None = 0.0,
) -> Iterator[WindowPrediction]:
    """
    Classify a sliding window over a live source, each window as soon as its last frame has arrived.

    Args:
        model, processor, hop, unchanged_threshold: see `StreamingClassifier`.
        live: see `stream_live`.

    Raises:
        TypeError, ValueError: see `StreamingClassifier`; and, during the iteration, what `stream_live` raises.
    """
    return stream_live(StreamingClassifier(model, processor, hop=hop, unchanged_threshold=unchanged_threshold), live)


def stream_live(stream: StreamingClassifier, live: LiveVideo) -> Iterator[WindowPrediction]:
    """
    Classify the window of a new stream over a live source. Meanwhile, `stream.reuse` has the counts so far.

    When the source ends, the last window ends with its last frame.

    Args:
        stream: a classifier to which no frame was pushed.
        live: the source. Pass `size=reader_size(processor)` to it, so that its thread resizes the frames.

    Raises, also during the iteration:
        VideoDecodingError: if the source breaks off.
        ValueError, NonFiniteError: see `StreamingClassifier`.
    """
    for seconds, frame in live:
        yield from stream.push(frame, seconds)
    yield from stream.flush()
    yield from stream.last_window()


def watch_video(
    model: Any,
    processor: ViViTVideoProcessor,
    live: LiveVideo,
    *,
    hop: int | None = None,
    unchanged_threshold: float | None = 0.0,
    min_score: float = 0.0,
    min_duration: float | None = None,
) -> Iterator[Segment]:
    """
    Yield the segments of a live source, each once it has ended; see `live_windows` and `merge_windows`.

    ```python
    with LiveVideo("rtsp://camera/stream", size=reader_size(processor)) as camera:
        for segment in watch_video(model, processor, camera):
            print(segment.start, segment.end, segment.label)
    ```
    """
    windows = live_windows(model, processor, live, hop=hop, unchanged_threshold=unchanged_threshold)
    return merge_windows(windows, model.config, min_score=min_score, min_duration=min_duration)
