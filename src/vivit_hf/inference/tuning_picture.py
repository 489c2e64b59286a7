"""The picture of `vivit-hf tune`: speed against agreement, and the margins of the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.whole_files import written_whole
from .tuning_candidates import EXACT, PLAIN
from .tuning_results import TunedRow, TuningResults


# Paul Tol's bright scheme, told apart by the colour-blind.
_KINDS = {
    "plain and exact": ("#444444", "o"),
    "bfloat16": ("#4477aa", "s"),
    "int8": ("#ee6677", "h"),
    "merging": ("#228833", "D"),
    "int8 and merging": ("#aa3377", "p"),
}

# What a point's number takes of the width and the height of the diagram.
_NUMBER_WIDTH, _NUMBER_HEIGHT = 0.03, 0.04


def draw_trade_off(results: TuningResults, path: Path, min_agreement: float, chosen: str | None, title: str) -> None:
    """
    Save a picture of the settings, numbered as in the list beside them. Needs matplotlib.

    Args:
        min_agreement: is drawn as a line.
        chosen: the name of the setting to point out, if any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    curve, certainty = figure.subplots(1, 2, width_ratios=(2.6, 1))
    _draw_curve(curve, results, min_agreement, chosen)
    _draw_margins(certainty, results)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # a name, and no formula
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _kind(row: TunedRow) -> str:
    if row.name in (PLAIN, EXACT):
        return "plain and exact"
    if row.name.startswith("int8"):
        return "int8" if row.name == "int8" else "int8 and merging"
    return "merging" if row.name.startswith("merging") else "bfloat16"


def _draw_curve(axes: Any, results: TuningResults, min_agreement: float, chosen: str | None) -> None:
    rows = [row for row in results.rows if row.error is None]
    best = _frontier(rows)
    axes.plot([row.speed for row in best], [row.agreement for row in best], color="#bbbbbb", linewidth=1.5, zorder=1)
    axes.axhline(min_agreement, color="#444444", linestyle="--", linewidth=1, zorder=1)
    axes.annotate(
        f"--min-agreement {min_agreement:g}",
        (1, min_agreement),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
    )
    for number, row in enumerate(results.rows, start=1):
        if row.error is not None:
            continue
        colour, marker = _KINDS[_kind(row)]
        is_chosen = row.name == chosen
        label = f"{number}  {row.name}" + ("  (chosen)" if is_chosen else "")
        edge = {"edgecolors": "black", "linewidths": 2} if is_chosen else {"edgecolors": "white", "linewidths": 0.5}
        axes.scatter(row.speed, row.agreement, s=80, color=colour, marker=marker, label=label, zorder=2, **edge)
    axes.margins(0.08, 0.2)
    _number_points(axes, results)
    axes.grid(alpha=0.3)
    axes.set(xlabel="speed over the plain model (clips per second, without decoding)")
    axes.set(ylabel="clips with the plain model's answer", title="What speed costs")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5)


def _number_points(axes: Any, results: TuningResults) -> None:
    """Write each point's number over it, and higher where the numbers of points beside it would be covered."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    numbered = [(number, row) for number, row in enumerate(results.rows, start=1) if row.error is None]
    for number, row in sorted(numbered, key=lambda point: point[1].speed):
        x, y = (row.speed - left) / (right - left), (row.agreement - low) / (high - low)
        near = [height for other, height in taken if abs(x - other) < _NUMBER_WIDTH]
        above = 0
        while any(abs(y + above * _NUMBER_HEIGHT - height) < 0.9 * _NUMBER_HEIGHT for height in near):
            above += 1
        taken.append((x, y + above * _NUMBER_HEIGHT))
        axes.annotate(
            str(number),
            (row.speed, row.agreement),
            xytext=(0, 7 + 11 * above),
            textcoords="offset points",
            color=_KINDS[_kind(row)][0],
            fontsize=8.5,
            ha="center",
        )


def _frontier(rows: list[TunedRow]) -> list[TunedRow]:
    """Return the rows that no other one exceeds in both speed and agreement, the slowest first."""
    found: list[TunedRow] = []
    for row in sorted(rows, key=lambda row: -row.speed):
        if not found or row.agreement > found[-1].agreement:
            found.append(row)
    return found[::-1]


def _draw_margins(axes: Any, results: TuningResults) -> None:
    axes.hist(results.margins.numpy(), bins=20, range=(0, 1), color="#4477aa")
    axes.axvline(float(results.margins.median()), color="#ee6677", linewidth=1.5, label="median")
    axes.set(xlabel="margin of the answer", ylabel="clips", title="The plain model")
    axes.legend(frameon=False, fontsize=8)
