"""`vivit-hf classify`, `timeline`, `explain` and `demo`: what a model says of videos."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OnErrorOption,
    PrivateAddressesOption,
    check_on_error,
    expand,
    load,
    standard_input,
    standard_input_file,
)
from .output import as_cell, echo, echo_json, fail, one_line, output_console, say


if TYPE_CHECKING:
    from ..inference.prediction import VideoPrediction


LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "udp", "tcp", "srt")


def classify(
    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO...", help="Files, folders, patterns, http(s) addresses, or - for standard input."
        ),
    ],
    model: ModelOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for a video.")] = 5,
    num_clips: Annotated[int, typer.Option(min=1, help="Clips from each video, spread over it.")] = 4,
    num_crops: Annotated[
        int | None,
        typer.Option(
            min=1, max=3, help="Crops of each clip: 1 or 3.", show_default="3, or 1 if the processor does not crop"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that the model sees at a time.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: none besides this one.")] = 0,
    on_error: OnErrorOption = "warn",
    allow_private_addresses: PrivateAddressesOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """
    Label videos, with scores averaged over clips and crops.

    What cannot be read is named with its reason, and the others go on; with --on-error raise the first ends it. Exit
    code 0: every video has its labels; 1: at least one has not; 2: wrong usage.

    With --json one line per video, in their order: {"file", "predictions": [{"label", "score"}]} or {"file", "error"};
    predictions of a model with several groups of labels have a "group", too. "file" is what was given, without the
    secrets of an address: user name, password, query.

    Example: vivit-hf classify holiday.mp4 clips/ --model google/vivit-b-16x2-kinetics400
    """
    from ..data.labels import LabelMap
    from ..inference.prediction import predict_videos
    from ..inference.views import describe_views
    from ..video_sources import source_name

    if num_crops == 2:
        raise typer.BadParameter("there are 1 or 3 crops, got 2", param_hint="--num-crops")
    check_on_error(on_error)
    files = expand(videos)
    if not files:
        raise typer.BadParameter(f"no video in {', '.join(videos)}", param_hint="VIDEO")
    # Read here: the processes that decode have no standard input.
    sources: list[Any] = [{"bytes": standard_input(), "path": "-"} if file == "-" else file for file in files]
    classifier, processor = load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    processor.on_error = "repeat_last" if on_error == "warn" else "raise"
    if processor.frame_sampling == "uniform":
        num_clips = 1  # one clip is spread over the whole video
    if num_crops is None:
        num_crops = 3 if processor.do_center_crop else 1
    label_map = LabelMap.from_config(classifier.config)

    def predict(videos: Sequence[Any]) -> Iterator[VideoPrediction]:
        return predict_videos(
            classifier,
            processor,
            videos,
            num_clips=num_clips,
            num_crops=num_crops,
            batch_size=batch_size,
            num_workers=workers,
        )

    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for prediction in _with_progress(_predictions(predict, sources), len(files), not as_json):
        row: dict[str, Any] = {"file": source_name(files[prediction.index])}
        if prediction.error is not None or prediction.probabilities is None:
            row["error"] = prediction.error
        else:
            row["predictions"] = _best(prediction.probabilities, label_map, top_k)
        rows.append(row)
        if as_json:
            echo_json(row)
        if "error" in row and on_error == "raise":
            break
    seconds = time.perf_counter() - begin
    num_failed = sum("error" in row for row in rows)
    if not as_json:
        _print_predictions(rows)
        views = describe_views(
            processor, num_clips, num_crops, "values" if label_map.is_regression else "probabilities"
        )
        rate = f"{len(rows)} videos in {seconds:.1f} s, {len(rows) / seconds:.1f} per second"
        failed = f"; {num_failed} without labels" if num_failed else ""
        echo(f"{rate}{failed}. Each: {views}.")
    raise typer.Exit(int(num_failed > 0))


def _predictions(
    predict: Callable[[Sequence[Any]], Iterator[VideoPrediction]], sources: Sequence[Any]
) -> Iterator[VideoPrediction]:
    """Those of all videos; one whose scores are NaN or infinite has this as its `error`, and the others go on."""
    from ..inference.finite_outputs import NonFiniteError
    from ..inference.prediction import VideoPrediction

    num_done = 0
    try:
        for prediction in predict(sources):
            yield prediction
            num_done += 1
    except NonFiniteError:  # in a batch of videos: which of them is found by taking each alone
        for index in range(num_done, len(sources)):
            try:
                yield replace(next(predict([sources[index]])), index=index)
            except NonFiniteError as error:
                yield VideoPrediction(index, error=str(error))
    except ValueError as error:  # views that the processor does not give, clips that the model does not take
        raise typer.BadParameter(str(error)) from error


def _best(probabilities: Any, label_map: Any, top_k: int) -> list[dict[str, Any]]:
    rows, first = [], 0
    for group, names in label_map.groups.items():
        scores = probabilities[first : first + len(names)]
        first += len(names)
        for index in scores.argsort()[::-1][:top_k]:
            row = {"label": names[index], "score": round(float(scores[index]), 4)}
            rows.append({**row, "group": group} if label_map.is_grouped else row)
    return rows


def _print_predictions(rows: list[dict[str, Any]]) -> None:
    console = output_console()
    table = Table("file", "label", Column("score", justify="right"))
    for row in rows:
        if "error" in row:
            table.add_row(as_cell(row["file"]), as_cell("no label: ", "red") + as_cell(str(row["error"])), "")
        for place, one in enumerate(row.get("predictions", ())):
            label = f"{one['group']}: {one['label']}" if "group" in one else one["label"]
            is_last = 0 < place == len(row["predictions"]) - 1  # no line between rows that are one line each
            file = as_cell("" if place else row["file"])
            table.add_row(file, as_cell(label), f"{one['score']:.3f}", end_section=is_last)
    console.print(table)


def _with_progress(items: Iterator[Any], total: int, is_shown: bool) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    is_hidden = not (is_shown and console.is_terminal and total > 1)
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as progress:
        yield from progress.track(items, total=total)


def timeline(
    video: Annotated[
        str, typer.Argument(metavar="VIDEO", help="A file, an address (rtsp:// and others, too), or - for a pipe.")
    ],
    model: ModelOption = None,
    hop: Annotated[
        int | None,
        typer.Option(min=1, help="Sampled frames between windows.", show_default="a tubelet, or half a window"),
    ] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Leave out segments below this score.")] = 0.0,
    min_duration: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds; what is shorter goes to its neighbours.",
            show_default="three quarters of a window, a whole one across a cut",
        ),
    ] = None,
    windows: Annotated[bool, typer.Option("--windows", help="Print every window instead of segments.")] = False,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Read VIDEO once, as it comes: a camera, a pipe without an end. Always so for rtsp:// and the like.",
        ),
    ] = False,
    source_format: Annotated[
        str | None, typer.Option("--format", help="FFmpeg's name of a live source's format, such as v4l2.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Frames that come faster than they are classified: drop_oldest (counted) or wait.",
            show_default="wait for -, else drop_oldest",
        ),
    ] = None,
    on_error: OnErrorOption = "warn",
    allow_private_addresses: PrivateAddressesOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """
    Say what happens when in a long or live video.

    A window slides over the video; where one label stays the likeliest is a segment. Where the label changes near a
    cut, the cut is the boundary. Times are those of the file's own timestamps, memory does not grow with its length.
    In factorised encoders no frame is encoded twice.

    With --json one line per segment: {"start", "end", "label", "score"}, seconds, each as soon as it is known.
    Exit code 0: read to its end; 1: not (the reason is on standard error); 2: wrong usage; 130: interrupted.

    Example: vivit-hf timeline match.mp4 --model my_vivit --hop 8
    """
    from ..inference.finite_outputs import NonFiniteError
    from ..inference.segments import Segment, merge_windows, window_segments
    from ..inference.timeline import file_windows
    from ..inference.watch import live_windows
    from ..video_processing_vivit import reader_size
    from ..video_sources import VideoDecodingError, source_name

    check_on_error(on_error)
    is_live = live or video.split("://")[0].lower() in LIVE_SCHEMES
    for name, value in (("--format", source_format), ("--policy", policy)):
        if value is not None and not is_live:
            raise typer.BadParameter("that is of live sources; add --live", param_hint=name)
    if windows and (min_score or min_duration is not None):
        raise typer.BadParameter(
            "every window is printed; leave out --min-score and --min-duration", param_hint="--windows"
        )
    classifier, processor = load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    source: Any = standard_input_file() if video == "-" else video
    listed: list[Segment] = []
    try:
        if is_live:
            from ..inference.live_video import LiveVideo

            if video == "-":
                source.peek(1)  # waits in Python, which can be interrupted, and FFmpeg cannot
            source = LiveVideo(
                source,
                format=source_format,
                policy=policy or ("wait" if video == "-" else "drop_oldest"),
                size=reader_size(processor),
            )
        on_lost = "repeat_last" if on_error == "warn" else "raise"
        if is_live:
            found = live_windows(classifier, processor, source, hop=hop)
        else:
            found = file_windows(classifier, processor, source, hop=hop, on_lost=on_lost)
        segments = (
            window_segments(found, classifier.config)
            if windows
            else merge_windows(found, classifier.config, min_score=min_score, min_duration=min_duration)
        )
        for one in _read(segments, source_name(video)):
            if as_json:
                row = {"start": round(one.start, 3), "end": round(one.end, 3), "label": one.label}
                echo_json({**row, "score": round(one.score, 4)})
                sys.stdout.flush()
            elif is_live:
                echo(f"{one.start:10.2f} {one.end:10.2f}  {one.score:.3f}  {one.label}")
                sys.stdout.flush()
            else:
                listed.append(one)
    except VideoDecodingError as error:
        fail(str(error))
    except NonFiniteError as error:
        fail(f"{source_name(video)}: {error}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        fail("Interrupted.", code=130)
    finally:
        if hasattr(source, "num_dropped"):
            source.close()
            say(f"{source.num_received} frames received, {source.num_dropped} dropped.")
    if not as_json and not is_live:
        table = Table(*(Column(name, justify="right") for name in ("start", "end")), "label", "score")
        for one in listed:
            table.add_row(f"{one.start:.2f}", f"{one.end:.2f}", as_cell(one.label), f"{one.score:.3f}")
        output_console().print(table)


def _read(segments: Iterator[Any], video: str) -> Iterator[Any]:
    """The segments; what goes wrong between them is of the video, and not of what they are written to."""
    try:
        yield from segments
    except OSError as error:
        fail(f"Cannot read {video}: {error.strerror or error}.")


def explain(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A file, an http(s) address, or - for standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture or video to write: .png, .mp4 or .gif.")],
    model: ModelOption = None,
    method: Annotated[str, typer.Option(help="rollout: attention; gradient: what speaks for a label.")] = "rollout",
    label: Annotated[
        str | None, typer.Option(help="For gradient: the label to explain.", show_default="the likeliest")
    ] = None,
    start: Annotated[float | None, typer.Option(min=0, help="Seconds where the part to look at begins.")] = None,
    end: Annotated[float | None, typer.Option(min=0, help="Seconds where it ends.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 5,
    on_error: OnErrorOption = "warn",
    allow_private_addresses: PrivateAddressesOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """
    Draw what the model saw: a heat map over the frames of one clip, its labels, and the weight of each moment.

    Example: vivit-hf explain holiday.mp4 --output holiday.png --method gradient
    """
    from ..data.labels import LabelMap
    from ..explain.explanation import METHODS, explain_clip
    from ..explain.pictures import SUFFIXES, save_explanation
    from ..inference.finite_outputs import NonFiniteError
    from ..video_sources import VideoDecodingError, source_name

    check_on_error(on_error)
    if output.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"expected {', '.join(SUFFIXES)}, got {output.name!r}", param_hint="--output")
    if output.is_dir() or (os.path.exists(video) and output.exists() and os.path.samefile(video, output)):
        what = "is a folder" if output.is_dir() else "is the video itself"
        raise typer.BadParameter(f"{str(output)!r} {what}", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(output.parent)!r}", param_hint="--output")
    if method not in METHODS:
        raise typer.BadParameter(f"expected {' or '.join(METHODS)}, got {method!r}", param_hint="--method")
    if label is not None and method != "gradient":
        raise typer.BadParameter("rollout is of no label; add --method gradient", param_hint="--label")
    classifier, processor = load(model, device, dtype, method == "gradient", allow_private_addresses)
    index = None
    if label is not None:
        names = LabelMap.from_config(classifier.config).names
        if label not in names:
            known = one_line(", ".join(names[:8])) + " ..." * (len(names) > 8)
            raise typer.BadParameter(f"the model does not know {label!r}; it knows {known}", param_hint="--label")
        index = names.index(label)
    part: dict[str, Any] = {"start": start, "end": end}
    part |= {"bytes": standard_input(), "path": "-"} if video == "-" else {"path": video}
    try:
        on_lost = "repeat_last" if on_error == "warn" else "raise"
        pixel_values = processor(part, num_clips=1, num_crops=1, on_error=on_lost)["pixel_values"]
        explanation = explain_clip(classifier, processor, pixel_values, method, index, top_k)
    except VideoDecodingError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or source_name(video)}: {error.strerror or error}")
    except NonFiniteError as error:
        fail(f"{source_name(video)}: {error}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        save_explanation(output, explanation)
    except OSError as error:
        fail(f"Cannot write {output}: {error.strerror or error}.")
    for name, score in explanation.labels:
        echo(f"{score:.3f}  {name}")
    echo(f"Written: {output}")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the sample videos.")] = Path("vivit_demo"),
) -> None:
    """
    Try everything offline: writes sample videos, classifies them with the demo model, and says how to go on.
    """
    from ..inference.demo_model import demo_model_path

    samples = sorted((demo_model_path() / "samples").glob("*.mp4"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            file = output / sample.name
            if file.exists() and file.read_bytes() != sample.read_bytes():
                raise typer.BadParameter(f"{str(file)!r} is there already, and another video", param_hint="--output")
            shutil.copyfile(sample, file)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {str(output)!r}: {error.strerror}", param_hint="--output") from error
    echo(f"{output}: {len(samples)} videos. In each a shape moves along a diagonal; in all.mp4 one after another.")
    try:
        clips = [str(output / sample.name) for sample in samples if sample.name != "all.mp4"]
        classify(clips, top_k=2, num_clips=2, num_crops=1)
    except typer.Exit as ending:
        if ending.exit_code:
            raise
    folder = shlex.quote(f"./{output}" if str(output).startswith("-") else str(output))
    for line in (
        "",
        f"vivit-hf timeline {folder}/all.mp4",
        f"vivit-hf explain {folder}/up_left.mp4 --output what_it_saw.png",
    ):
        echo(line)
