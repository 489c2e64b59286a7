"""`vivit-hf embed`: the features of videos, in a file."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ..data.escaping import counted
from . import options
from .output import as_cell, echo, echo_json, fail, output_console, say, track


IMAGE_FRAMES = 16
ANNOTATIONS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")


Videos = Annotated[
    list[str],
    typer.Argument(
        metavar="VIDEO...",
        help="Files, folders, patterns, http(s) addresses; csv, json or text files of paths. Columns start and end "
        "select parts.",
    ),
]
Output = Annotated[
    str,
    typer.Option(metavar="FILE", help="The file to write, such as features.parquet or s3://bucket/features.parquet."),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or Hub id of a ViViT or an image model.",
        show_default="the demo model in the package",
    ),
]
PerStep = Annotated[
    bool, typer.Option("--per-step", help="A vector and a time for each time step, instead of one per video.")
]
Frames = Annotated[
    int | None, typer.Option(min=1, help="Frames per clip for an image model.", show_default=str(IMAGE_FRAMES))
]
Sampling = Annotated[
    Literal["clip", "uniform"] | None,
    typer.Option(
        help="Frames at a fixed distance, or spread over the whole video.",
        show_default="the model's; uniform for an image model",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the features of another run.")]


def embed(
    videos: Videos,
    output: Output,
    model: Encoder = None,
    per_step: PerStep = False,
    num_frames: Frames = None,
    num_clips: options.Clips = None,
    num_crops: options.Crops = None,
    frame_sampling: Sampling = None,
    batch_size: options.BatchSize = 16,
    workers: options.Workers = None,
    on_error: options.OnError = "warn",
    overwrite: Overwrite = False,
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """
    Compute the features of videos once, for `search` and for training on them.

    The file has a vector per video, averaged over clips and crops, or with --per-step one per time step. A killed run
    goes on where it stopped when the same command is started again. `accelerate launch -m vivit_hf embed ...` shares
    the work among processes, with the same result. A video that cannot be read is named, and the others go on.
    Exit code 0: every video has features; 1: at least one has none; 2: wrong usage.

    With --json, print one line per video: {"file"}, with "start" and "end" of a part, and "error" if it has none.

    Example: vivit-hf embed clips/ --model facebook/dinov2-small --per-step --output features.parquet
    """
    place = _place(output)
    sources = find_sources(videos)
    from ..inference.demo_model import demo_model_path
    from ..inference.feature_runs import FeatureRun, feature_settings
    from ..inference.fingerprints import hub_commit, model_fingerprint
    from ..inference.views import describe_views

    state = _processes(device)
    process_device = str(state.device) if state.num_processes > 1 else device
    limits = {"allow_private_addresses": allow_private_addresses}
    encoder, processor = options.load(
        model,
        process_device,
        dtype,
        needs_labels=False,
        image_frames=num_frames or IMAGE_FRAMES,
        exact_for=options.EXACT_FEATURES,
        **limits,
    )
    name = os.path.abspath(model or demo_model_path()) if model is None or os.path.isdir(model) else model
    if num_frames not in (None, processor.num_frames):
        fail(f"--num-frames {num_frames} is for image models: {name} takes {processor.num_frames} frames.", code=2)
    processor.frame_sampling = frame_sampling or processor.frame_sampling
    fingerprint = model_fingerprint(name, encoder.config, processor, hub_commit(name))
    processor.on_error = "repeat_last" if on_error == "warn" else "raise"
    views = options.views_of(processor, num_clips, num_crops)
    described: dict[str, Any] = {"name": name, "fingerprint": fingerprint, "per_step": per_step, **views}
    try:
        processor.settings.updated(views)
        run = FeatureRun(place, sources, feature_settings(encoder, processor, sources, **described))
        loading = {"batch_size": batch_size, "num_workers": options.workers_of(workers)}
        found = _run(run, state, overwrite, encoder, processor, on_error == "raise", not as_json, loading)
    except (OSError, ValueError) as error:
        fail(str(error), code=2)
    if found is None:
        return
    if as_json:
        _print_json(sources, found)
    else:
        _print_summary(place, found, describe_views(processor, **views, averaging="vectors"))
    raise typer.Exit(int(bool(found["failed"])))


def _place(output: str) -> Any:
    """Return the `Location` of the output."""
    from ..data.remote_files import location_of

    try:
        place = location_of(output)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--output") from error
    if isinstance(place, Path) and (place.is_dir() or not place.absolute().parent.is_dir()):
        raise typer.BadParameter(f"expected a file in an existing folder, got {output!r}", param_hint="--output")
    return place


def find_sources(videos: list[str]) -> list[Any]:
    """Return the videos as the processor takes them, each once; those of annotation files may be parts of a file."""
    from ..data.annotations import AnnotationError, read_videos

    found: list[Any] = []
    for video in videos:
        if video == "-":
            raise typer.BadParameter("standard input cannot be read again after an interruption", param_hint="VIDEO")
        if not video.lower().endswith(ANNOTATIONS):
            found += options.expand([video])
            continue
        try:
            rows = read_videos(video, needs_labels=False, missing_videos="keep").videos
        except AnnotationError as error:
            raise typer.BadParameter(str(error), param_hint="VIDEO") from error
        found += [row.video for row in rows]
    if not found:
        raise typer.BadParameter(f"no video in {', '.join(videos)}", param_hint="VIDEO")
    return list({str(video): video for video in found}.values())


def _processes(device: str | None) -> Any:
    import torch

    from ..inference.processes import process_group

    try:
        return process_group(use_cpu=device == "cpu" or (device is None and not torch.cuda.is_available()))
    except ValueError as error:
        fail(str(error), code=2)


def _run(
    run: Any,
    state: Any,
    overwrite: bool,
    model: Any,
    processor: Any,
    stops_at_error: bool,
    shows_progress: bool,
    loading: dict[str, int],
) -> dict[str, Any] | None:
    """Embed this process's share of what is missing. The main process returns the settings of the file."""
    from ..inference.feature_files import read_settings
    from ..inference.shards import own_share

    is_finished = run.is_finished(overwrite)
    state.wait_for_everyone()  # until all have checked, nothing is deleted or written
    if is_finished:
        return _end(state, read_settings(run.output))
    run.start(overwrite, state)
    missing = run.missing()
    mine = own_share(missing, state)
    if state.is_main_process and len(missing) < len(run.shards):
        say(f"{len(run.shards) - len(missing)} of {len(run.shards)} shards are there already.")
    total = sum(run.num_videos(shard) for shard in mine)
    found = run.embed(model, processor, mine, **loading)
    for one in track(found, total, "embedding", shows_progress and state.is_main_process):
        if one.error is not None and stops_at_error:
            fail(one.error)
    state.wait_for_everyone()
    return _end(state, run.join() if state.is_main_process else None)


def _end(state: Any, settings: dict[str, Any] | None) -> dict[str, Any] | None:
    state.wait_for_everyone()
    is_main = state.is_main_process
    state.destroy_process_group()
    return settings if is_main else None


def _print_json(sources: list[Any], settings: dict[str, Any]) -> None:
    from ..inference.feature_runs import description

    reasons = {(one["file"], one["start"], one["end"]): one["error"] for one in settings["failed"]}
    for source in sources:
        row = {**description(source)}
        error = reasons.get(tuple(row.values()))
        row = {name: value for name, value in row.items() if value is not None}
        echo_json(row if error is None else {**row, "error": error})


def _print_summary(output: Any, settings: dict[str, Any], views: str) -> None:
    failed = settings["failed"]
    if failed:
        table = Table("file", "no features")
        for one in failed:
            table.add_row(as_cell(one["file"]), as_cell(one["error"], "red"))
        output_console().print(table)
    count, steps = settings["num_videos"] - len(failed), settings["num_steps"]
    of_a_video = f"{steps} vectors" if steps else "a vector"
    without = f"; {len(failed)} without features" if failed else ""
    result = f"{counted(count, 'video')} with {of_a_video} of {settings['hidden_size']} numbers{without}"
    echo(f"{output}: {result}. Each: {views}.")
