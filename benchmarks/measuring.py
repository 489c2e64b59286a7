"""What the benchmarks share: figures with targets, fair timing, and the table and JSON that come out."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vivit_hf.data.whole_files import written_whole


@dataclass
class Row:
    """One measured figure; `target` and `passed` are None where there is no target."""

    name: str
    value: float
    unit: str
    target: float | None = None
    passed: bool | None = None


def at_most(name: str, value: float, unit: str, target: float | None) -> Row:
    return Row(name, round(value, 3), unit, target, None if target is None else value <= target)


def at_least(name: str, value: float, unit: str, target: float | None) -> Row:
    return Row(name, round(value, 3), unit, target, None if target is None else value >= target)


def interleaved_seconds(
    jobs: dict[str, Callable[[], Any]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every job in every round, after one round to warm up unless all have run before.

    The jobs take turns, so that whatever else the machine does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median, over the rounds, of the ratio of two jobs within a round."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def _cells(row: Row) -> tuple[str, str, str, str]:
    target = "" if row.target is None else f"{row.target:g} {row.unit}".strip()
    reached = {True: "yes", False: "NO", None: ""}[row.passed]
    return row.name, f"{row.value:g} {row.unit}".strip(), target, reached


def write_markdown(rows: Sequence[Row], skipped: Sequence[str], machine: str, path: Path) -> None:
    """The rows as a table, under a line about the machine; what was skipped, below."""
    lines = [machine, "", "| figure | value | target | reached |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    lines += [""] * bool(skipped) + [f"Skipped: {what}." for what in skipped]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def file_to_write(name: str) -> Path:
    """For `argparse`: a file whose folder is there, known before anything is measured."""
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written: it is a folder, or its folder is not there")
    return path


def _as_json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def write_rows(rows: Sequence[Row], path: Path) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(_as_json(rows), encoding="utf-8")


def report(rows: Sequence[Row], json_file: Path | None) -> int:
    """Prints the rows as a table, writes them as JSON (without a file: prints them); 1 if a target was missed."""
    table = Table("figure", "value", "target", "reached")
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if json_file is None:
        print(_as_json(rows), end="")
    else:
        write_rows(rows, json_file)
    return int(any(row.passed is False for row in rows))
