"""The figures of a run as a picture: shares of the limit, speed over the peers, growth with frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import Row


COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")  # Paul Tol's bright scheme, told apart by the colour-blind
VARIANTS = ("Model 1", "Model 2", "Model 3", "Model 4")


def draw_figures(rows: Sequence[Row], path: Path) -> None:
    """Draws the panels that the rows have figures for; no file where there are none."""
    panels = [panel for panel in (_shares, _speeds, _times, _memory) if panel(rows, None)]
    if not panels:
        return
    # One below the other, so that the text can be read in a page of 700 pixels.
    heights = [0.24 * len(_speed_rows(rows)) + 1 if panel is _speeds else 3.2 for panel in panels]
    figure = Figure(figsize=(7.4, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights})
    for panel, ax in zip(panels, np.atleast_1d(axes), strict=True):
        panel(rows, ax)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _matching(rows: Sequence[Row], pattern: str) -> list[tuple[re.Match[str], Row]]:
    return [(match, row) for row in rows if (match := re.fullmatch(pattern, row.name))]


def _shares(rows: Sequence[Row], ax: Axes | None) -> bool:
    found = _matching(rows, r"(\w+), batch 1: (Model \d) optimised, share of the limit")
    if ax is not None:
        dtypes = list(dict.fromkeys(match[1] for match, _ in found))
        for number, dtype in enumerate(dtypes):
            of = {match[2]: row for match, row in found if match[1] == dtype}
            places = [VARIANTS.index(name) + (number - (len(dtypes) - 1) / 2) * 0.8 / len(dtypes) for name in of]
            values = [row.value for row in of.values()]
            bars = ax.bar(places, values, 0.75 / len(dtypes), color=COLOURS[number], label=dtype)
            ax.bar_label(bars, fmt="%.2f", fontsize=10)
            target = next((row.target for row in of.values() if row.target), None)
            if target:
                ax.axhline(target, color=COLOURS[number], linestyle="--", linewidth=1)
        ax.set(title="Share of the matrix product's rate", xticks=range(4), xticklabels=VARIANTS, ylim=(0, 1.45))
        ax.legend(frameon=False, ncols=2, loc="upper left", title="dashed: target", fontsize=10, title_fontsize=10)
    return bool(found)


def _speed_rows(rows: Sequence[Row]) -> list[tuple[re.Match[str], Row]]:
    return _matching(rows, r"(\w+), batch 1: (Model \d) optimised, speed over (.+)")


def _speeds(rows: Sequence[Row], ax: Axes | None) -> bool:
    found = _speed_rows(rows)
    if ax is not None:
        labels = [f"{match[2]}, {match[1]}, over {match[3]}" for match, _ in found]
        values = [row.value for _, row in found]
        colours = [COLOURS[VARIANTS.index(match[2])] for match, _ in found]
        bars = ax.barh(labels, values, color=colours)
        ax.bar_label(bars, fmt="%.2f", fontsize=10, label_type="center")  # clear of the targets
        for place, (_, row) in enumerate(found):
            if row.target is not None:
                ax.plot([row.target] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        ax.axvline(1, color="grey", linewidth=0.8)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=10)
        ax.set(title="Speed over the peers (black: target)")
    return bool(found)


def _growth(rows: Sequence[Row], name: str, what: str) -> dict[int, float]:
    """A figure of a variant by the number of frames, at the size that most settings have."""
    found = _matching(rows, rf"float32, {name}, (\d+) frames of (\d+): {what}.*")
    sizes = [match[2] for match, _ in found]
    most = max(set(sizes), key=sizes.count) if sizes else ""
    return {
        int(match[1]): row.value for match, row in sorted(found, key=lambda pair: int(pair[0][1])) if match[2] == most
    }


def _times(rows: Sequence[Row], ax: Axes | None) -> bool:
    if ax is not None:
        for name, colour in zip(VARIANTS, COLOURS, strict=True):
            times, counts = _growth(rows, name, "time over"), _growth(rows, name, "multiply-adds over")
            ax.plot(list(times), list(times.values()), "o-", color=colour, label=name)
            ax.plot(list(counts), list(counts.values()), "--", color=colour, linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="frames", title="Time (solid) and multiply-adds (dashed)")
        ax.set(xticks=list(times), xticklabels=list(times), ylabel="relative")
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8)
    return bool(_growth(rows, VARIANTS[0], "time over"))


def _memory(rows: Sequence[Row], ax: Axes | None) -> bool:
    if ax is not None:
        for name, colour in zip(VARIANTS, COLOURS, strict=True):
            memory = _growth(rows, name, "growth of memory")
            ax.plot(list(memory), list(memory.values()), "o-", color=colour, label=name)
        ax.set(xlabel="frames", ylabel="MB over the loaded model", title="Memory of inference, batch 1", ylim=(0, None))
        ax.set(xticks=list(memory))
        ax.legend(frameon=False, fontsize=8)
    return bool(_growth(rows, VARIANTS[0], "growth of memory"))
