"""`vivit-hf classify`: the labels of videos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from .options import (
    BatchSizeOption,
    ClipsOption,
    CropsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OnErrorOption,
    PrivateAddressesOption,
    check_crops,
    check_on_error,
    expand,
    load,
    standard_input,
    views_of,
)
from .output import as_cell, echo, echo_json, output_console


VideosArgument = Annotated[
    list[str],
    typer.Argument(metavar="VIDEO...", help="Files, folders, patterns, http(s) addresses, or - for standard input."),
]


def classify(
    videos: VideosArgument,
    model: ModelOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show per video.")] = 5,
    num_clips: ClipsOption = None,
    num_crops: CropsOption = None,
    batch_size: BatchSizeOption = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0 decodes in this one.")] = 0,
    on_error: OnErrorOption = "warn",
    allow_private_addresses: PrivateAddressesOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """
    Label videos, with scores averaged over clips and crops.

    A video that cannot be read is reported with the reason, and the others go on; with --on-error raise the first one
    ends the command. Exit code 0: every video has labels; 1: at least one has none; 2: wrong usage.

    With --json, print one line per video, in order: {"file", "predictions": [{"label", "score"}]} or {"file", "error"}.
    For a model with several groups of labels, predictions also have a "group". "file" is the argument without the
    secrets of an address: user name, password and query.

    Example: vivit-hf classify holiday.mp4 clips/ --model google/vivit-b-16x2-kinetics400
    """
    from ..data.labels import LabelMap
    from ..inference.prediction import predict_each
    from ..inference.views import describe_views
    from ..video_sources import source_name

    check_crops(num_crops)
    check_on_error(on_error)
    files = expand(videos)
    if not files:
        raise typer.BadParameter(f"no video in {', '.join(videos)}", param_hint="VIDEO")
    # Read it here: the processes that decode have no standard input.
    sources: list[Any] = [{"bytes": standard_input(), "path": "-"} if file == "-" else file for file in files]
    classifier, processor = load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    processor.on_error = "repeat_last" if on_error == "warn" else "raise"
    label_map = LabelMap.from_config(classifier.config)
    views = views_of(processor, num_clips, num_crops)
    found = predict_each(classifier, processor, sources, **views, batch_size=batch_size, num_workers=workers)
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for prediction in _with_progress(_checked(found), len(files), not as_json):
        row: dict[str, Any] = {"file": source_name(files[prediction.index])}
        if prediction.error is not None:
            row["error"] = prediction.error
        else:
            row["predictions"] = _best(prediction.probabilities, label_map, top_k)
        rows.append(row)
        if as_json:
            echo_json(row)
        if "error" in row and on_error == "raise":
            break
    num_failed = sum("error" in row for row in rows)
    if not as_json:
        _print_predictions(rows)
        seconds = time.perf_counter() - begin
        rate = f"{len(rows)} videos in {seconds:.1f} s, {len(rows) / seconds:.1f} per second"
        failed = f"; {num_failed} without labels" if num_failed else ""
        averaged = "values" if label_map.is_regression else "probabilities"
        echo(f"{rate}{failed}. Each: {describe_views(processor, **views, averaging=averaged)}.")
    raise typer.Exit(int(num_failed > 0))


def _checked(predictions: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from predictions
    except ValueError as error:  # the processor cannot make these views, or the model does not accept its clips
        raise typer.BadParameter(str(error)) from error


def _best(probabilities: Any, label_map: Any, top_k: int) -> list[dict[str, Any]]:
    """Return the most likely labels of each group, with their scores."""
    rows, first = [], 0
    for group, names in label_map.groups.items():
        scores = probabilities[first : first + len(names)]
        first += len(names)
        for index in scores.argsort()[::-1][:top_k]:
            row = {"label": names[index], "score": round(float(scores[index]), 4)}
            rows.append({**row, "group": group} if label_map.is_grouped else row)
    return rows


def _print_predictions(rows: list[dict[str, Any]]) -> None:
    table = Table("file", "label", Column("score", justify="right"))
    for row in rows:
        if "error" in row:
            table.add_row(as_cell(row["file"]), as_cell("no label: ", "red") + as_cell(str(row["error"])), "")
        for place, one in enumerate(row.get("predictions", ())):
            label = f"{one['group']}: {one['label']}" if "group" in one else one["label"]
            is_last = 0 < place == len(row["predictions"]) - 1  # no line after videos with a single label
            file = as_cell("" if place else row["file"])
            table.add_row(file, as_cell(label), f"{one['score']:.3f}", end_section=is_last)
    output_console().print(table)


def _with_progress(items: Iterator[Any], total: int, is_shown: bool) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    is_hidden = not (is_shown and console.is_terminal and total > 1)
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as progress:
        yield from progress.track(items, total=total)
