"""What `timeline` and `watch` share: options, and how segments are printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer


HopOption = Annotated[
    int | None,
    typer.Option(min=1, help="Sampled frames between windows.", show_default="a tubelet, or half a window"),
]
MinScoreOption = Annotated[float, typer.Option(min=0, max=1, help="Leave out segments with a lower score.")]
MinDurationOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Seconds; shorter segments go to their neighbours.",
        show_default="three quarters of a window, a whole one across a cut",
    ),
]
WindowsOption = Annotated[bool, typer.Option("--windows", help="Print every window instead of segments.")]


def check_windows(windows: bool, min_score: float, min_duration: float | None) -> None:
    if windows and (min_score or min_duration is not None):
        raise typer.BadParameter(
            "every window is printed; leave out --min-score and --min-duration", param_hint="--windows"
        )


def segments_of(
    found: Iterator[Any], config: Any, windows: bool, min_score: float, min_duration: float | None
) -> Iterator[Any]:
    """Return the windows as segments, or merged into segments."""
    from ..inference.segments import merge_windows, window_segments

    if windows:
        return window_segments(found, config)
    return merge_windows(found, config, min_score=min_score, min_duration=min_duration)


def as_row(segment: Any) -> dict[str, Any]:
    """Return a segment for JSON."""
    times = {"start": round(segment.start, 3), "end": round(segment.end, 3)}
    return {**times, "label": segment.label, "score": round(segment.score, 4)}
