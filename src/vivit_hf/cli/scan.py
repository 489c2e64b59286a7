"""`vivit-hf scan`: find the damaged and unusual files of a data set before training on it."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..data.escaping import counted, printable
from ..data.whole_files import written_whole
from .output import as_cell, fail, output_console, say, track


if TYPE_CHECKING:
    from ..data.scan import VideoScan


def scan(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of videos, with its subfolders.")],
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write one JSON line per file; - for standard output, instead of the table."
        ),
    ] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames per clip that you train on.")] = 32,
    frame_stride: Annotated[int, typer.Option(min=1, help="Distance between these frames.")] = 2,
    fast: Annotated[bool, typer.Option("--fast", help="Only read packets; damage inside them goes unnoticed.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a file is given up.")] = 120.0,
    extension: Annotated[
        list[str] | None,
        typer.Option(help="Scan files with this extension; can be repeated.", show_default="those of videos"),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="List every file, not only unusual ones.")] = False,
) -> None:
    """
    Find the files of a data set that are damaged, short, of variable frame rate, or rotated.

    Every frame is decoded, in parallel. Exit code 0: all files can be used; 1: at least one cannot; 2: wrong usage.

    Example: vivit-hf scan kinetics/train --json train.jsonl
    """
    from ..data.scan import VIDEO_EXTENSIONS, find_videos, scan_files

    try:
        if not folder.is_dir():
            raise typer.BadParameter(f"there is no folder {str(folder)!r}", param_hint="FOLDER")
        paths = find_videos(folder, extension or VIDEO_EXTENSIONS)
        if not paths:
            endings = " ".join(extension or VIDEO_EXTENSIONS)
            raise typer.BadParameter(f"{str(folder)!r} contains no video (looked for: {endings})", param_hint="FOLDER")
        if json_file not in (None, "-"):
            if not json_file or Path(json_file).is_dir():
                raise typer.BadParameter(f"expected a file, got {json_file!r}", param_hint="--json")
            if not Path(json_file).absolute().parent.is_dir():
                raise typer.BadParameter(f"there is no folder for {json_file!r}", param_hint="--json")
        min_frames = (num_frames - 1) * frame_stride + 1
        found = scan_files(paths, min_frames=min_frames, packets_only=fast, num_workers=workers, timeout=timeout)
        scans = list(track(found, len(paths), "scanning", is_unusable=_is_unusable))
    except KeyboardInterrupt:
        say("Interrupted: nothing is written.")
        raise typer.Exit(130) from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}", param_hint="FOLDER") from error
    for one in scans:
        one.path = os.path.relpath(one.path, folder)
    scans.sort(key=lambda one: one.path)

    lines = "".join(json.dumps(asdict(one), allow_nan=False) + "\n" for one in scans)
    if json_file == "-":
        typer.echo(lines, nl=False)
    else:
        _print_scans(scans, show_all, min_frames)
        if json_file is not None:
            try:
                with written_whole(json_file) as unfinished:
                    unfinished.write_text(lines, encoding="utf-8")
            except OSError as error:
                fail(f"Cannot write {json_file}: {error.strerror}.")
    raise typer.Exit(int(any(map(_is_unusable, scans))))


def _is_unusable(one: VideoScan) -> bool:
    return one.status == "unusable"


def _findings(one: VideoScan) -> list[str]:
    """Return what is unusual about a file, the worst first."""
    findings = [] if one.status == "ok" else [f"{one.status}: {one.reason}"]
    findings += ["short"] * bool(one.is_short) + ["variable rate"] * bool(one.is_variable_rate)
    return findings + [f"rotated by {one.rotation} degrees"] * bool(one.rotation)


def _print_scans(scans: list[VideoScan], show_all: bool, min_frames: int) -> None:
    console = output_console()
    shown = scans if show_all else [one for one in scans if _findings(one)]
    if shown:
        table = Table("file", "frames", "seconds", "size", "codec", "to look at")
        for one in shown:
            cells = (
                "" if one.num_frames is None else str(one.num_frames),
                "" if one.duration is None else f"{one.duration:.2f}",
                "" if one.height is None else f"{one.width} x {one.height}",
                one.codec or "",
                "; ".join(_findings(one)),
            )
            table.add_row(*(as_cell(cell) for cell in (one.path, *cells)))
        console.print(table)

    count = {status: sum(one.status == status for one in scans) for status in ("ok", "damaged", "unusable")}
    kinds = {
        f"short (fewer than {min_frames} frames)": sum(bool(one.is_short) for one in scans),
        "of variable rate": sum(bool(one.is_variable_rate) for one in scans),
        "rotated": sum(bool(one.rotation) for one in scans),
    }
    seconds = sum(one.duration or 0 for one in scans)
    size = sum(one.num_bytes or 0 for one in scans)
    summary = [
        f"{counted(len(scans), 'file')}, {size / 1e6:,.1f} MB, {seconds / 3600:.2f} hours of video",
        ", ".join(f"{number} {status}" for status, number in count.items()),
        ", ".join(f"{number} {kind}" for kind, number in kinds.items()),
    ]
    usable = [one for one in scans if one.num_frames is not None]
    for name, values in {
        "frames": [one.num_frames or 0 for one in usable],
        "short side": [min(one.height or 0, one.width or 0) for one in usable],
    }.items():
        if values:
            summary.append(f"{name}: {min(values)} to {max(values)}, median {statistics.median(values):g}")
    console.print(printable("\n".join(summary)), highlight=False, soft_wrap=True)
