"""`vivit-hf tune`: the fastest setting of a model that still gives the same answers on one's own videos."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..data.escaping import counted, one_line
from . import options
from .evaluate import LabelColumn, Separator, VideoColumn
from .output import as_cell, can_draw, echo, fail, output_console, quiet_libraries, say, track


Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        "-l",
        help="Folder of class folders, or a CSV or JSON file with paths from --videos: only these videos are used.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder for the measurements and a copy of the model.", show_default="the model's own"
    ),
]
MergeTokens = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Tokens to merge per layer; can be repeated.", show_default="three that suit the model"),
]
MinAgreement = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the clips that must have the same answer as in the plain model.")
]
Choose = Annotated[str | None, typer.Option(help="The setting to store.", show_default="the fastest that agrees")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and draw, and store nothing in the model.")]
MaxClips = Annotated[int, typer.Option(min=1, help="Clips to hold in memory, of videos spread evenly over all.")]
Clips = Annotated[int, typer.Option(min=1, help="Clips per video, spread over it. Each counts by itself.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the measurements of other weights or videos.")]


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a ViViT.")],
    videos: Annotated[str, typer.Option("--videos", metavar="FOLDER", help="Videos that are like your own.")],
    labels: Labels = None,
    output: Output = None,
    merge_tokens: MergeTokens = None,
    min_agreement: MinAgreement = 0.99,
    choose: Choose = None,
    dry_run: DryRun = False,
    max_clips: MaxClips = 300,
    num_clips: Clips = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that the model sees at a time.")] = 8,
    workers: options.Workers = None,
    overwrite: Overwrite = False,
    video_column_name: VideoColumn = None,
    label_column_name: LabelColumn = None,
    label_separator: Separator = None,
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
) -> None:
    """
    Measure what makes a model faster, and what it costs, on your own videos; store the best setting in the model.

    Plain, optimised, bfloat16, int8, merged tokens and int8 with merged tokens take turns on the same clips. The table
    compares their answers with those of the plain model in float32. The chosen setting goes into config.json. The
    commands that answer and `optimize(model)` take it up, but not after a change of the weights.

    The folder `tuning` beside the weights, or in --output, keeps every measurement and the picture trade_off.png. A
    killed run goes on there when the same command is started again, and nothing is measured twice. Use videos that the
    model was not trained on. Exit code 0, or 2 for wrong usage, models or videos.

    Example: vivit-hf tune my_vivit --videos clips/ --labels labels.csv
    """
    quiet_libraries()
    from ..inference.tuning_results import check_place, tuning_results

    try:
        place = check_place(model, output, dry_run)
        classifier, processor = options.load(model, device, "float32", True, allow_private_addresses, True)
        processor.on_error = "repeat_last"
        columns = (video_column_name, label_column_name, label_separator)
        found, targets = _videos(classifier, videos, labels, columns, max(1, max_clips // num_clips))
        run = _run(place / "tuning", model, classifier, processor, found, merge_tokens or [], num_clips, batch_size)
        if choose is not None and choose not in run.candidates:
            raise ValueError(f"--choose {choose!r} is not known. There are: {', '.join(run.candidates)}.")
        run.start(overwrite)
        _measure(run, options.workers_of(workers))
        results = tuning_results(run, targets)
        chosen = results.choose(min_agreement, choose)
    except (OSError, ValueError) as error:
        fail(str(error), code=2)
    _print_results(run, results, min_agreement, classifier.config)
    _draw(run, results, min_agreement, chosen)
    if dry_run:
        echo(f"--dry-run: nothing is stored. It would be {chosen.name}.")
    else:
        _store(run, results, chosen, model, output)


def _videos(
    classifier: Any, videos: str, labels: str | None, columns: tuple[str | None, ...], most: int
) -> tuple[list[Any], list[Any] | None]:
    """Return at most so many videos, and their labels in the form of `LabelMap.encode` if there are any."""
    from ..data.annotations import read_videos
    from ..data.labels import LabelMap
    from ..inference.tuning import evenly_spread

    label_map = LabelMap.from_config(classifier.config)
    if label_map.is_regression or not (label_map.has_several or max(label_map.sizes) > 1):
        raise ValueError("The model gives a single number, so that there are no answers to agree on.")
    if labels is None:
        files = sorted(options.expand([videos]))
        if not files:
            raise ValueError(f"--videos {videos}: there are no videos.")
        return evenly_spread(files, most), None
    video_column, label_columns, separator = columns
    rows = read_videos(
        labels,
        video_root=videos,
        video_column=video_column,
        label_columns=label_columns.split(",") if label_columns else None,
        label_separator=separator,
        missing_videos="keep",
    ).videos
    kept = evenly_spread(sorted(rows, key=lambda one: str(one.video)), most)
    return [one.video for one in kept], [label_map.encode(one) for one in kept]


def _run(
    folder: Path,
    name: str,
    classifier: Any,
    processor: Any,
    videos: list[Any],
    rates: list[int],
    num_clips: int,
    batch_size: int,
) -> Any:
    from ..inference.tuning import TuningRun
    from ..inference.tuning_candidates import list_candidates

    candidates, notes = list_candidates(classifier.config, classifier.device, rates)
    for note in notes:
        say(f"Left out: {note}")
    settings = {"num_clips": num_clips, "batch_size": batch_size}
    return TuningRun(folder, name, classifier, processor, videos, candidates, **settings)


def _measure(run: Any, num_workers: int) -> None:
    """Measure what is missing, with progress bars."""
    if run.is_finished():
        say(f"All is measured already: {run.folder}")
        return
    for _ in track(run.decode(num_workers), len(run.videos), "decoding", is_unusable=lambda one: one.error is not None):
        pass
    clips = counted(len(run.clips), "clip")
    say(f"{clips} of {counted(len(run.videos), 'video')} held in memory ({run.num_bytes / 1e6:,.0f} MB).")
    total = len(run.candidates) + 1
    for _ in track(run.prepare(), total, "preparing"):
        pass
    say(f"Measuring {total} settings in {run.num_rounds} turns.")
    for _ in track(run.measure(), total * run.num_rounds, "measuring"):
        pass


def _print_results(run: Any, results: Any, min_agreement: float, config: Any) -> None:
    from ..data.labels import LabelMap
    from ..inference.tuning_results import least_agreement, needed_clips
    from ..video_sources import source_name

    label_map = LabelMap.from_config(config)
    score = "mAP" if label_map.has_several else "accuracy"
    has_labels = results.rows[0].accuracy is not None
    names = ("clips/s", "speed", "MB", "agreement", "largest change", "mean change", *([score] if has_labels else []))
    table = Table("setting", *(Column(name, justify="right") for name in names))
    for row in results.rows:
        if row.error is not None:
            table.add_row(as_cell(row.name), as_cell(row.error, "red"))
            continue
        cells = [f"{row.clips_per_second:.2f}", f"{row.speed:.2f}", f"{row.megabytes:,.0f}", f"{row.agreement:.3f}"]
        cells += [f"{row.largest_change:.4f}", f"{row.mean_change:.5f}"]
        table.add_row(as_cell(row.name), *cells, *([f"{row.accuracy:.3f}"] if has_labels else []))
    output_console().print(table)
    number, shown = len(results.margins), results.margin_quantiles.items()
    echo(f"speed: over the plain model. agreement and changes of a probability: on {counted(number, 'clip')}.")
    below = ", ".join(f"{share:.0%} below {margin:.2f}" for share, margin in shown)
    what = (
        "distances of the closest label from its threshold"
        if label_map.has_several
        else "margins between the best answers"
    )
    echo(f"{what}, plain model: {below}.")
    if min_agreement < 1 and least_agreement(number) < min_agreement:
        echo(
            f"Few clips: even if all agree, the agreement is only known to exceed {least_agreement(number):.3f} (with "
            f"95 % confidence). {needed_clips(min_agreement)} clips would show {min_agreement:g}."
        )
    for index, error in run.found_clips["errors"].items():
        echo(f"left out: {source_name(run.videos[int(index)])}: {error}")


def _draw(run: Any, results: Any, min_agreement: float, chosen: Any) -> None:
    from ..inference.tuning_picture import draw_trade_off
    from ..inference.tuning_results import save_results

    save_results(results, run.folder / "results.json", chosen=chosen.name, min_agreement=min_agreement)
    if not can_draw():
        return
    title = f"{one_line(Path(run.name).name)}: {counted(len(results.margins), 'clip')}, {run.settings['device']}"
    draw_trade_off(results, run.folder / "trade_off.png", min_agreement, chosen.name, title)
    echo(f"Written: {run.folder / 'trade_off.png'}")


def _store(run: Any, results: Any, chosen: Any, model: str, output: Path | None) -> None:
    """Store the chosen setting in the model, or in a copy of it."""
    from ..configuration_vivit import ViViTConfig
    from ..inference.stored_fields import write_field
    from ..inference.tuning_results import setting_to_store, store_copy
    from ..video_processing_vivit import ViViTVideoProcessor

    setting = setting_to_store(run, results, chosen)
    if output is None:
        place = Path(model)
        write_field(place, "optimization", setting)
    else:
        where = options.find_model(model)
        config, processor = (one.from_pretrained(model, **where) for one in (ViViTConfig, ViViTVideoProcessor))
        place = output
        store_copy(place, run.model, processor, config.dtype, setting)
    if setting is None:
        echo(f"{place}: the exact model is chosen, which needs no setting; an earlier one is removed.")
    else:
        price = f"{chosen.speed:.2f} times as fast, agreement {chosen.agreement:.3f}"
        echo(f"{place}: {chosen.name} is stored ({price}). `vivit-hf classify` and `optimize(model)` take it up.")
