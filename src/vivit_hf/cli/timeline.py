"""`vivit-hf timeline`: what happens when in a video file."""

from typing import Annotated, Any

import typer
from rich.table import Column, Table

from . import options
from .output import as_cell, echo_json, output_console, read_from
from .watch import is_live


def timeline(
    video: options.Video,
    model: options.Model = None,
    hop: options.Hop = None,
    unchanged_threshold: options.UnchangedThreshold = 0.0,
    min_score: options.MinScore = 0.0,
    min_duration: options.MinDuration = None,
    windows: options.Windows = False,
    on_error: options.OnError = "warn",
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
    dtype: options.AnswersDtype = None,
    as_json: options.Json = False,
    live: Annotated[bool, typer.Option("--live", hidden=True)] = False,
    source_format: Annotated[str | None, typer.Option("--format", hidden=True)] = None,
    policy: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """
    Say what happens when in a video file. For cameras, streams and endless pipes, see watch.

    A window slides over the video; a segment lasts as long as one label stays the most likely. Where the label changes
    near a cut, the cut is the boundary. Times are the file's own timestamps, and memory does not grow with its length.
    In factorised encoders, no frame is encoded twice, and no picture that stands still.

    With --json, print one line per segment, as soon as it ends: {"start", "end", "label", "score"}, in seconds.
    Exit code 0: read to its end; 1: not (the reason is on standard error); 2: wrong usage; 130: interrupted.

    Example: vivit-hf timeline match.mp4 --model my_vivit --hop 8
    """
    from ..inference.timeline import stream_file

    live_only = {"--live": live, "--format": source_format, "--policy": policy, "VIDEO": is_live(video)}
    for name, value in live_only.items():
        if value:
            raise typer.BadParameter("timeline reads files; use `vivit-hf watch` for live sources", param_hint=name)
    options.check_windows(windows, min_score, min_duration)
    classifier, processor = options.load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    source: Any = options.standard_input_file() if video == "-" else video
    on_lost = "repeat_last" if on_error == "warn" else "raise"
    stream = options.stream_of(video, classifier, processor, hop, unchanged_threshold)
    found = stream_file(stream, source, on_lost=on_lost)
    table = Table(*(Column(name, justify="right") for name in ("start", "end")), "label", "score")
    for one in read_from(video, options.segments_of(found, classifier.config, windows, min_score, min_duration)):
        if as_json:
            echo_json(options.as_row(one))
        else:
            table.add_row(f"{one.start:.2f}", f"{one.end:.2f}", as_cell(one.label), f"{one.score:.3f}")
    if not as_json:
        output_console().print(table)
    options.say_reuse(stream.reuse)
