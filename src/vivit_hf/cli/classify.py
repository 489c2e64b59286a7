"""`vivit-hf classify`: the labels of videos."""

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..data.escaping import counted
from . import options
from .output import as_cell, echo, echo_json, output_console, track


DEFAULT_COVERAGE = 0.9


def classify(
    videos: options.Videos,
    model: options.Model = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show per video.")] = 5,
    num_clips: options.Clips = None,
    num_crops: options.Crops = None,
    batch_size: options.BatchSize = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0 decodes in this one.")] = 0,
    on_error: options.OnError = "warn",
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
    dtype: options.AnswersDtype = None,
    as_json: options.Json = False,
    sets: Annotated[
        bool, typer.Option("--sets", help="Show the labels that hold the true one with a probability of --coverage.")
    ] = False,
    coverage: Annotated[
        float | None, typer.Option(help="Probability for --sets.", show_default=f"{DEFAULT_COVERAGE}")
    ] = None,
) -> None:
    """
    Label videos, with scores averaged over clips and crops.

    A multi-label model that was calibrated shows the labels that reach their thresholds; --sets needs a model that was
    calibrated (vivit-hf evaluate --calibrate).

    A video that cannot be read is reported with the reason, and the others go on; with --on-error raise the first one
    ends the command. Exit code 0: every video has labels; 1: at least one has none; 2: wrong usage.

    With --json, print one line per video, in order: {"file", "predictions": [{"label", "score"}]} or {"file", "error"}.
    For a model with several groups of labels, predictions also have a "group"; with --sets there is also "coverage",
    and for a model that knows when a video shows none of its labels, "unknown": true or false.
    "file" is the argument without the secrets of an address: user name, password and query.

    Example: vivit-hf classify holiday.mp4 clips/ --model google/vivit-b-16x2-kinetics400
    """
    from ..data.labels import LabelMap
    from ..inference.prediction import predict_each, prediction_row
    from ..inference.views import describe_views
    from ..video_sources import source_name

    files = options.expand(videos)
    if not files:
        raise typer.BadParameter(f"no video in {', '.join(videos)}", param_hint="VIDEO")
    # Read it here: the processes that decode have no standard input.
    sources: list[Any] = [{"bytes": options.standard_input(), "path": "-"} if file == "-" else file for file in files]
    classifier, processor = options.load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    processor.on_error = "repeat_last" if on_error == "warn" else "raise"
    label_map = LabelMap.from_config(classifier.config)
    views = options.views_of(processor, num_clips, num_crops)
    averaging = options.averaging_of(classifier.config, views)
    coverage = _checked_coverage(classifier.config, views, sets, coverage)
    found = predict_each(
        classifier, processor, sources, **views, averaging=averaging, batch_size=batch_size, num_workers=workers
    )
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for prediction in track(_checked(found), len(files), "classifying", not as_json):
        row = prediction_row(source_name(files[prediction.index]), prediction, label_map, top_k)
        if coverage is not None and "error" not in row:
            row |= _label_set(prediction, classifier.config, coverage)
        rows.append(row)
        if as_json:
            echo_json(row)
        if "error" in row and on_error == "raise":
            break
    num_failed = sum("error" in row for row in rows)
    if not as_json:
        _print_predictions(rows)
        averaged = "values" if label_map.is_regression else averaging
        _print_rate(rows, time.perf_counter() - begin, describe_views(processor, **views, averaging=averaged))
    raise typer.Exit(int(num_failed > 0))


def _print_rate(rows: list[dict[str, Any]], seconds: float, views: str) -> None:
    num_failed = sum("error" in row for row in rows)
    failed = f"; {num_failed} without labels" if num_failed else ""
    rate = f"{counted(len(rows), 'video')} in {seconds:.1f} s, {len(rows) / seconds:.1f} per second"
    echo(f"{rate}{failed}. Each: {views}.")


def _label_set(prediction: Any, config: Any, coverage: float) -> dict[str, Any]:
    """Return the label set of a video in the form of `prediction_row`."""
    from ..inference.label_sets import label_set

    found = [
        {"label": label, "score": round(score, 4), **({"group": group} if group else {})}
        for group, label, score in label_set(prediction.logits, config, coverage)
    ]
    return {"predictions": found, "coverage": coverage}


def _checked_coverage(config: Any, views: dict[str, int], sets: bool, coverage: float | None) -> float | None:
    """Return the coverage of the sets to show, None without sets; exits with 2 if the model cannot give them."""
    from ..inference.label_sets import check_sets

    if not sets:
        if coverage is not None:
            raise typer.BadParameter("add --sets, whose coverage it is", param_hint="--coverage")
        return None
    try:
        check_sets(config, coverage := DEFAULT_COVERAGE if coverage is None else coverage, views)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sets") from error
    return coverage


def _checked(predictions: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from predictions
    except ValueError as error:  # the processor cannot make these views, or the model does not accept its clips
        raise typer.BadParameter(str(error)) from error


def _print_predictions(rows: list[dict[str, Any]]) -> None:
    from ..inference.unknown import UNKNOWN

    table = Table("file", "label", Column("score", justify="right"))
    for row in rows:
        if "error" in row:
            table.add_row(as_cell(row["file"]), as_cell("no label: ", "red") + as_cell(str(row["error"])), "")
        if row.get("unknown"):
            nearest = f" (otherwise {row['predictions'][0]['label']})" if row["predictions"] else ""
            table.add_row(as_cell(row["file"]), as_cell(UNKNOWN + nearest), "", end_section=True)
            continue
        if row.get("predictions") == []:
            table.add_row(as_cell(row["file"]), as_cell("no label reaches its threshold"), "", end_section=True)
        for place, one in enumerate(row.get("predictions", ())):
            label = f"{one['group']}: {one['label']}" if "group" in one else one["label"]
            is_last = 0 < place == len(row["predictions"]) - 1  # no line after videos with a single label
            file = as_cell("" if place else row["file"])
            table.add_row(file, as_cell(label), f"{one['score']:.3f}", end_section=is_last)
    output_console().print(table)
