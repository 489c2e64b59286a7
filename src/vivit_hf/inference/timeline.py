"""What happens when in a long video: a sliding window, merged into segments of one label, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..data.labels import LabelMap
from ..frame_sampling import TIME_TOLERANCE
from ..video_decoding import VideoReader
from ..video_processing_vivit import ViViTVideoProcessor, reader_size
from ..video_sources import VideoLimits, part_of_video
from .evaluation import to_probabilities
from .live_video import LiveVideo
from .streaming import BATCH, StreamingClassifier, WindowPrediction


@dataclass
class Segment:
    """A part of a video in which one label is the likeliest; seconds, and the mean of its probability there."""

    start: float
    end: float
    label: str
    score: float


def stream_windows(
    model: Any, processor: ViViTVideoProcessor, source: Any, *, hop: int | None = None, on_lost: str = "repeat_last"
) -> Iterator[WindowPrediction]:
    """
    What the model says of every window of a video, in one pass.

    Args:
        model, processor, hop: as for `StreamingClassifier`.
        source: a file as the processor takes it, with "start" and "end" if it is a part, or a `LiveVideo`, whose
            frames are classified as they come.
        on_lost: for frames of a file that damage has taken: "repeat_last" for the last frame before, or "raise".

    The last window ends with the last frame, a whole hop or less after the one before. A video that is shorter than a
    window has one, filled as the processor's `short_video_policy` says.

    Raises, also in the midst of it: VideoDecodingError for what cannot be read, ValueError and NonFiniteError as
    `StreamingClassifier`.
    """
    stream = StreamingClassifier(model, processor, hop=hop)
    if isinstance(source, LiveVideo):
        for seconds, frame in source:
            yield from stream.push(frame, seconds)
        yield from stream.flush()
        yield from stream.last_window()
        return

    def choose(timestamps: np.ndarray) -> np.ndarray:
        first, total = part_of_video(timestamps, source)
        rate = processor.frames_per_second
        if rate is None:
            return np.arange(first, first + total, processor.frame_stride)
        moments = np.arange(timestamps[first], timestamps[first + total - 1] + TIME_TOLERANCE, 1 / rate)
        return np.searchsorted(timestamps, moments + TIME_TOLERANCE, side="right") - 1

    with VideoReader(source, limits=VideoLimits(**(processor.video_limits or {}))) as reader:
        frames = reader.stream(choose, size=reader_size(processor), on_lost=on_lost)
        while batch := list(islice(frames, BATCH)):
            yield from stream.push_sampled([frame for _, frame in batch], [seconds for seconds, _ in batch])
        yield from stream.last_window()


def merge_windows(
    windows: Iterable[WindowPrediction], config: Any, *, min_score: float = 0.0, min_duration: float | None = None
) -> Iterator[Segment]:
    """
    Windows in their order become segments, each once it is known where it ends.

    Between the beginnings of two windows, the probabilities are the mean over the windows that look there; a segment
    lasts while one label is the likeliest. A window cannot tell what is much shorter than itself, and where two actions
    meet it may see a third: a segment shorter than `min_duration` is divided among its neighbours. Where one label
    takes over from another within three quarters of a window of a cut, that cut is the boundary.

    Args:
        windows: as `stream_windows` gives them.
        config: of the model, for its labels. With `label_groups` it is the first group that counts.
        min_score: segments with less than this mean probability are left out.
        min_duration: seconds, 0 to keep every segment. None: three quarters of a window, across a cut a whole one.

    Raises what iterating over `windows` raises.
    """
    label_map = LabelMap.from_config(config)
    names = next(iter(label_map.groups.values()))
    kept: Segment | None = None  # the last that is long enough
    passed: dict[str, Segment] = {}  # those since, by their label, `score` still a sum over seconds
    for one in _runs(_cells(windows, label_map, len(names)), names):
        start, end, shortest = one.start, one.end, min_duration
        if shortest is None:
            # Windows that look at two pictures at once may agree on what is in neither.
            shortest = one.window * (1 if any(start < cut < end for cut in one.cuts) else 0.75)
        if end - start < shortest:
            sum_of = passed.setdefault(one.label, Segment(start, start, one.label, 0.0))
            sum_of.end, sum_of.score = end, sum_of.score + one.score * (end - start)
            continue
        begin = min((segment.start for segment in passed.values()), default=start)
        passed.clear()
        if kept is None:
            kept = Segment(begin, end, one.label, one.score)
        elif kept.label == one.label:
            lengths = kept.end - kept.start, end - start
            kept.score = (kept.score * lengths[0] + one.score * lengths[1]) / sum(lengths)
            kept.end = end
        else:
            middle = (begin + start) / 2
            near = [
                cut
                for cut in one.cuts
                if abs(cut - middle) <= 0.75 * one.window
                and kept.start < cut < end
                and kept.start + shortest <= cut <= end - shortest
            ]
            kept.end = min(near, key=lambda cut: abs(cut - middle), default=middle)
            yield from _good([kept], min_score)
            kept = Segment(kept.end, end, one.label, one.score)
    if kept is not None:
        kept.end = max((segment.end for segment in passed.values()), default=kept.end)
        yield from _good([kept], min_score)
    elif passed:  # nothing in it lasts: what there is most of
        best = max(passed.values(), key=lambda segment: segment.score)
        start, end = min(one.start for one in passed.values()), max(one.end for one in passed.values())
        yield from _good([Segment(start, end, best.label, best.score / max(end - start, 1e-9))], min_score)


def _good(segments: Iterable[Segment], min_score: float) -> Iterator[Segment]:
    return (segment for segment in segments if segment.score >= min_score)


class _Cell(NamedTuple):
    """From one window's beginning to the next one's, or to the end."""

    start: float
    end: float
    window: float  # seconds that a window has there
    probabilities: np.ndarray  # mean over the windows that look there
    cuts: tuple[float, ...]  # from two windows before it to one after it


@dataclass
class _Run(Segment):
    """A segment as the windows show it; `window` and `cuts` are those of its beginning."""

    window: float
    cuts: tuple[float, ...]


def _runs(cells: Iterable[_Cell], names: Sequence[str]) -> Iterator[_Run]:
    run: _Run | None = None
    for cell in cells:
        best = int(cell.probabilities.argmax())
        score = float(cell.probabilities[best])
        if run is None or run.label != names[best]:
            if run is not None:
                yield run
            run = _Run(cell.start, cell.end, names[best], score, cell.window, cell.cuts)
            continue
        run.score += (score - run.score) * (cell.end - cell.start) / max(cell.end - run.start, 1e-9)  # mean over time
        run.end = cell.end
    if run is not None:
        yield run


def _cells(windows: Iterable[WindowPrediction], label_map: LabelMap, num_labels: int) -> Iterator[_Cell]:
    looking: deque[tuple[float, float, np.ndarray]] = deque()
    cuts: tuple[float, ...] = ()

    def cell(start: float, end: float) -> _Cell:
        seconds = looking[-1][1] - looking[-1][0]
        return _Cell(start, end, seconds, np.mean([probabilities for _, _, probabilities in looking], axis=0), cuts)

    for window in windows:
        oldest = window.start - 2 * (window.end - window.start)
        cuts = tuple(sorted({cut for cut in (*cuts, window.cut) if cut is not None and cut >= oldest}))
        probabilities = to_probabilities(window.logits, label_map)[:num_labels].numpy()
        if looking:
            # All windows that look at what lies before this one's beginning have begun by now.
            yield cell(looking[-1][0], window.start)
            while looking and looking[0][1] <= window.start:
                looking.popleft()
        looking.append((window.start, window.end, probabilities))
    if looking:
        begin, last = looking[-1][:2]
        for end in sorted({end for _, end, _ in looking}):
            if end > begin or begin == last:  # a video of one frame has a window that takes no time
                yield cell(begin, end)
                begin = end
            while looking and looking[0][1] <= end:
                looking.popleft()


def video_timeline(
    model: Any,
    processor: ViViTVideoProcessor,
    source: Any,
    *,
    hop: int | None = None,
    min_score: float = 0.0,
    min_duration: float | None = None,
) -> list[Segment]:
    """
    The segments of a video: `stream_windows`, merged by `merge_windows`, whose arguments these are.

    Raises VideoDecodingError for what cannot be read, and what `StreamingClassifier` raises.
    """
    windows = stream_windows(model, processor, source, hop=hop)
    return list(merge_windows(windows, model.config, min_score=min_score, min_duration=min_duration))
