"""Watch a live source: classify a sliding window over its frames as they arrive, and report segments once they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..video_processing_vivit import ViViTVideoProcessor
from .live_video import LiveVideo
from .segments import Segment, merge_windows
from .streaming import StreamingClassifier, WindowPrediction


def live_windows(
    model: Any, processor: ViViTVideoProcessor, live: LiveVideo, *, hop: int | None = None
) -> Iterator[WindowPrediction]:
    """
    Classify a sliding window over a live source, each window as soon as its last frame has arrived.

    When the source ends, the last window ends with its last frame.

    Args:
        model, processor, hop: see `StreamingClassifier`.
        live: the source. Pass `size=reader_size(processor)` to it, so that its thread resizes the frames.

    Raises, also during the iteration:
        VideoDecodingError: if the source breaks off.
        ValueError, NonFiniteError: see `StreamingClassifier`.
    """
    stream = StreamingClassifier(model, processor, hop=hop)
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
    windows = live_windows(model, processor, live, hop=hop)
    return merge_windows(windows, model.config, min_score=min_score, min_duration=min_duration)
