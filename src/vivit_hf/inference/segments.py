"""
Merge the predictions of a sliding window into segments of one label, each as soon as its end is known.

Between the starts of two successive windows lies a cell. The probabilities of a cell are the mean over the windows that
overlap it:

    windows    [ 0       ]
                  [ 1       ]
                     [ 2       ]
    cells      |0 |01|012 |12 |2 |

A cell is unknown if most of these windows are. One strange moment, such as a cut, makes all windows that contain it
unknown, and with them the cells of a window's length. So "none of these" has to last longer to be a segment: the
cells of a shorter time keep their labels.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..data.labels import LabelMap, to_probabilities
from .streaming import WindowPrediction
from .unknown import UNKNOWN


# A window cannot resolve what is much shorter than itself: shorter segments go to their neighbours, and a cut this near
# to the boundary between two labels is the boundary. In windows.
RESOLUTION = 0.75
SHORTEST_UNKNOWN = 1 + RESOLUTION  # windows: a strange moment takes one


@dataclass
class Segment:
    """A part of a video with one most likely label: start and end in seconds, and its mean probability."""

    start: float
    end: float
    label: str
    score: float


def window_segments(windows: Iterable[WindowPrediction], config: Any) -> Iterator[Segment]:
    """
    Turn every window into a segment with its most likely label (of the first group, with `label_groups`).

    A window that is unknown has the label "none of these" and the score 1.
    """
    label_map = LabelMap.from_config(config)
    names = next(iter(label_map.groups.values()))
    for window in windows:
        # Training clips have no cuts, so a window across one is strange even if both of its sides are known.
        if window.unknown and window.cut is None:
            yield Segment(window.start, window.end, UNKNOWN, 1.0)
            continue
        scores = to_probabilities(window.logits, label_map)[: len(names)]
        index = int(scores.argmax())
        yield Segment(window.start, window.end, names[index], float(scores[index]))


def merge_windows(
    windows: Iterable[WindowPrediction], config: Any, *, min_score: float = 0.0, min_duration: float | None = None
) -> Iterator[Segment]:
    """
    Merge windows into segments, in order.

    A segment lasts as long as one label is the most likely. Windows that overlap two actions may predict a third one,
    so a segment shorter than `min_duration` is divided between its neighbours. A cut near the boundary between two
    labels becomes the boundary. Where most windows are unknown for at least `min_duration`, or in the whole video, the
    label is "none of these", and the score is the share of windows that are. Windows across a cut do not count there,
    unless all of them are.

    Args:
        windows: the predictions for a sliding window, in order.
        config: the model's configuration, for its labels. With `label_groups`, the first group is used.
        min_score: leave out segments whose mean probability is lower.
        min_duration: seconds; 0 keeps every segment. None means three quarters of a window, a whole window for a
            segment that contains a cut, and 1.75 windows for "none of these".

    Iterating over `windows` may raise errors; they are passed on.
    """
    label_map = LabelMap.from_config(config)
    names = next(iter(label_map.groups.values()))
    runs = _runs(_labelled(_cells(windows, label_map, len(names)), names, min_duration))
    return (segment for segment in _without_short(runs, min_duration) if segment.score >= min_score)


class _Cell(NamedTuple):
    """The time from the start of one window to the start of the next, or to the end."""

    start: float
    end: float
    window: float  # the length of a window, seconds
    probabilities: np.ndarray  # mean over the windows that overlap the cell
    unknown: float  # the share of these windows that are unknown
    cuts: tuple[float, ...]  # from two windows before the cell to one after it


@dataclass
class _Run(Segment):
    """Successive cells with the same label. `window` and `cuts` are those of its first cell."""

    window: float
    cuts: tuple[float, ...]

    @property
    def duration(self) -> float:
        return self.end - self.start

    def shortest(self, min_duration: float | None) -> float:
        """The least duration of a segment of its own, seconds."""
        if min_duration is not None:
            return min_duration
        # Windows that overlap a cut may agree on a label that fits neither side.
        return self.window * (1 if any(self.start < cut < self.end for cut in self.cuts) else RESOLUTION)


def _without_short(runs: Iterable[_Run], min_duration: float | None) -> Iterator[Segment]:
    """Divide runs that are too short between their neighbours, and join neighbours of the same label."""
    kept: Segment | None = None  # the last run that is long enough
    short: list[_Run] = []  # the runs since
    for run in runs:
        if run.duration < run.shortest(min_duration):
            short.append(run)
            continue
        begin = short[0].start if short else run.start
        short.clear()
        if kept is None:
            kept = Segment(begin, run.end, run.label, run.score)
        elif kept.label == run.label:
            lengths = kept.end - kept.start, run.duration
            kept.score = (kept.score * lengths[0] + run.score * lengths[1]) / sum(lengths)
            kept.end = run.end
        else:
            kept.end = _boundary(kept, run, (begin + run.start) / 2, min_duration)
            yield kept
            kept = Segment(kept.end, run.end, run.label, run.score)
    if kept is not None:
        kept.end = short[-1].end if short else kept.end
        yield kept
    elif short:
        yield _most_of(short)


def _boundary(kept: Segment, run: _Run, middle: float, min_duration: float | None) -> float:
    """Return where `kept` ends and `run` begins: at the nearest cut, or else in the middle of what lies between."""
    shortest = run.shortest(min_duration)
    near = [
        cut
        for cut in run.cuts
        if abs(cut - middle) <= RESOLUTION * run.window
        and kept.start < cut < run.end
        and kept.start + shortest <= cut <= run.end - shortest
    ]
    return min(near, key=lambda cut: abs(cut - middle), default=middle)


def _most_of(runs: Sequence[_Run]) -> Segment:
    """Return one segment for runs that are all too short, with the label that has the most probability in all."""
    start, end = runs[0].start, runs[-1].end
    totals: dict[str, float] = defaultdict(float)
    for run in runs:
        totals[run.label] += run.score * run.duration
    label = max(totals, key=totals.__getitem__)
    return Segment(start, end, label, totals[label] / max(end - start, 1e-9))


def _labelled(
    cells: Iterable[_Cell], names: Sequence[str], min_duration: float | None
) -> Iterator[tuple[_Cell, str, float]]:
    """Yield each cell with its label and score. What is unknown too short keeps its labels, unless nothing is known."""

    def best(cell: _Cell) -> tuple[_Cell, str, float]:
        index = int(cell.probabilities.argmax())
        return cell, names[index], float(cell.probabilities[index])

    def unknown(cell: _Cell) -> tuple[_Cell, str, float]:
        return cell, UNKNOWN, cell.unknown

    held: list[_Cell] = []  # unknown ones, until they have lasted
    has_lasted = is_settled = False  # whether the last cells are unknown for long; whether any cell has its label
    for cell in cells:
        if cell.unknown <= 0.5:
            yield from map(best, [*held, cell])
            held.clear()
            has_lasted, is_settled = False, True
            continue
        held.append(cell)
        shortest = SHORTEST_UNKNOWN * cell.window if min_duration is None else min_duration
        has_lasted = has_lasted or cell.end - held[0].start >= shortest
        if has_lasted:
            yield from map(unknown, held)
            held.clear()
            is_settled = True
    yield from map(best if is_settled else unknown, held)


def _runs(cells: Iterable[tuple[_Cell, str, float]]) -> Iterator[_Run]:
    run: _Run | None = None
    for cell, label, score in cells:
        if run is None or run.label != label:
            if run is not None:
                yield run
            run = _Run(cell.start, cell.end, label, score, cell.window, cell.cuts)
            continue
        run.score += (score - run.score) * (cell.end - cell.start) / max(cell.end - run.start, 1e-9)  # mean over time
        run.end = cell.end
    if run is not None:
        yield run


def _cells(windows: Iterable[WindowPrediction], label_map: LabelMap, num_labels: int) -> Iterator[_Cell]:
    overlapping: deque[tuple[WindowPrediction, np.ndarray]] = deque()
    cuts: tuple[float, ...] = ()

    def cell(start: float, end: float) -> _Cell:
        last = overlapping[-1][0]
        mean = np.mean([probabilities for _, probabilities in overlapping], axis=0)
        # Training clips have no cuts, so a window across one is strange even if both of its sides are known.
        voters = [one for one, _ in overlapping if one.cut is None] or [one for one, _ in overlapping]
        share = sum(bool(one.unknown) for one in voters) / len(voters)
        return _Cell(start, end, last.end - last.start, mean, share, cuts)

    for window in windows:
        oldest = window.start - 2 * (window.end - window.start)
        cuts = tuple(sorted({cut for cut in (*cuts, window.cut) if cut is not None and cut >= oldest}))
        if overlapping:
            # All windows that overlap the time before this one's start have started by now.
            yield cell(overlapping[-1][0].start, window.start)
            while overlapping and overlapping[0][0].end <= window.start:
                overlapping.popleft()
        overlapping.append((window, to_probabilities(window.logits, label_map)[:num_labels].numpy()))
    if overlapping:
        begin, last = overlapping[-1][0].start, overlapping[-1][0].end
        for end in sorted({one.end for one, _ in overlapping}):
            if end > begin or begin == last:  # the window of a video with one frame has no duration
                yield cell(begin, end)
                begin = end
            while overlapping and overlapping[0][0].end <= end:
                overlapping.popleft()
