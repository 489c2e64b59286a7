"""`vivit-hf evaluate`: the scores of a model on labelled videos."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from . import options
from .output import as_cell, can_draw, echo, fail, output_console, quiet_libraries


def _about_videos(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel="Videos", **settings)


Data = Annotated[str, _about_videos("Folder of class folders, or a CSV or JSON file.")]
VideoRoot = Annotated[str | None, _about_videos("Folder that paths in a file are relative to.")]
Format = Annotated[Literal["auto", "plain", "kinetics", "ssv2", "epic"], _about_videos("Format of the file.")]
VideoColumn = Annotated[str | None, _about_videos("Column of the videos.", show_default="video, path ...")]
LabelColumn = Annotated[
    str | None, _about_videos("Column of the labels; several as noun,verb.", show_default="label, class ...")
]
Separator = Annotated[str | None, _about_videos("Separator between several labels of a video.")]
SplitColumn = Annotated[str, _about_videos("Column of splits: auto (split, subset ...), a name, or none.")]
Split = Annotated[
    Literal["train", "validation", "test"] | None,
    _about_videos("The split to score, of a file with a column of splits."),
]
Missing = Annotated[Literal["error", "skip"], _about_videos("What to do with missing files.")]
Averaging = Annotated[
    Literal["probabilities", "logits"], typer.Option(help="What to average over the views of a video.")
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Fit a temperature to these videos, which the model must not have been trained on, and store it in the "
        "model's config.json.",
    ),
]


def _about_unknown(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel="The answer 'none of these', with --calibrate", **settings)


Unknown = Annotated[
    Literal["auto", "energy", "neighbours"] | None,
    _about_unknown(
        "Let the model answer 'none of these' by its energy, by the nearest training videos, or the better."
    ),
]
KnownData = Annotated[
    str | None, _about_unknown("Training videos, a folder of class folders or a file, for neighbours and auto.")
]
UnknownData = Annotated[
    str | None, _about_unknown("Videos that show none of the labels, a folder or a file, to choose and measure by.")
]
FalseAlarms = Annotated[
    float, _about_unknown("Share of videos of the labels that may be called 'none of these'.", min=0.001, max=0.5)
]
GroupColumn = Annotated[
    str | None, _about_videos("Column of videos that belong together, such as those of a patient, for --calibrate.")
]


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of a fine-tuned ViViT.")],
    data: Data,
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")],
    video_root: VideoRoot = None,
    annotation_format: Format = "auto",
    video_column_name: VideoColumn = None,
    label_column_name: LabelColumn = None,
    label_separator: Separator = None,
    split_column: SplitColumn = "auto",
    split: Split = None,
    group_column: GroupColumn = None,
    missing_videos: Missing = "error",
    allow_private_addresses: options.PrivateAddresses = False,
    num_clips: options.Clips = None,
    num_crops: options.Crops = None,
    averaging: Averaging = "probabilities",
    calibrate: Calibrate = False,
    unknown: Unknown = None,
    known_data: KnownData = None,
    unknown_data: UnknownData = None,
    false_alarms: FalseAlarms = 0.05,
    batch_size: options.BatchSize = 16,
    num_workers: options.Workers = None,
    dtype: options.AnswersDtype = None,
    use_cpu: Annotated[bool, typer.Option("--use-cpu", help="Run on the CPU even if there is a GPU.")] = False,
) -> None:
    """
    Score a model on labelled videos, with the views of the paper: 4 clips x 3 crops of every video.

    The output folder gets results.json with the scores and their views, predictions.parquet with every probability,
    and for one label per video per_class.csv and confusion_matrix.png. Names may have underscores: --num_clips.
    Started with `torchrun --nproc_per_node 8 -m vivit_hf evaluate ...`, any number of processes gives the same scores.
    With --calibrate, and for a model that was calibrated, there is also reliability.png: how often answers are right by
    their probability.
    Exit code 0, or 2 for wrong usage, data or models, and if no video can be read.

    Example: vivit-hf evaluate --model my_vivit --data videos/test --output-dir scores
    """
    quiet_libraries()
    from ..inference.evaluation import evaluate_videos, read_split
    from ..inference.processes import process_group

    reading: dict[str, Any] = {"video_root": video_root, "annotation_format": annotation_format}
    reading |= {"video_column": video_column_name, "label_separator": label_separator}
    reading |= {"label_columns": label_column_name.split(",") if label_column_name else None}
    reading |= {"missing_videos": missing_videos}
    try:
        videos = read_split(data, split, split_column=split_column, group_column=group_column, **reading)
        _check_calibration(calibrate, model, videos)
        others = _other_videos(calibrate, unknown, known_data, unknown_data, reading)
        state = process_group(use_cpu)
    except (OSError, ValueError) as error:
        fail(str(error), code=2)
    classifier, processor = options.load(model, str(state.device), dtype, True, allow_private_addresses, True)
    setting = options.speed_up(classifier, is_exact=dtype is not None)
    settings: dict[str, Any] = {"batch_size": batch_size, "num_workers": options.workers_of(num_workers)}
    settings |= {**options.views_of(processor, num_clips, num_crops), "averaging": averaging}
    try:
        found = evaluate_videos(classifier, processor, videos, with_outputs=unknown is not None, **settings)
        choice = _choose(found, classifier, processor, others, unknown, false_alarms, settings)
        report = _calibrate(found, model, settings) if calibrate and found is not None else None
    except ValueError as error:
        fail(str(error), code=2)
    if found is not None:
        about = {"dtype": str(classifier.dtype).removeprefix("torch."), "optimization": setting}
        _print_results(found, report, choice, _write(found, output_dir, report, choice, model=model, **about))
    state.wait_for_everyone()
    state.destroy_process_group()


def _write(found: Any, output_dir: Path, report: Any, choice: Any, **about: Any) -> dict[str, Any]:
    """Write the files of the evaluation; return the contents of results.json."""
    from ..inference.evaluation_files import draw_evaluation, save_evaluation

    results = save_evaluation(found, output_dir, report, choice, **about)
    if can_draw():
        draw_evaluation(found, output_dir, report)
    return results


def _other_videos(
    calibrate: bool, unknown: str | None, known_data: str | None, unknown_data: str | None, reading: dict[str, Any]
) -> dict[str, Any]:
    """Return the known and the unknown videos; ValueError for options that do not go together."""
    from ..data.annotations import read_videos
    from ..inference.unknown_choice import choose_known

    if unknown is not None and not calibrate:
        raise ValueError("--unknown goes with --calibrate.")
    if unknown is None and (known_data or unknown_data):
        raise ValueError("--known-data and --unknown-data go with --unknown auto, energy or neighbours.")
    if unknown in ("auto", "neighbours") and known_data is None:
        raise ValueError(f"--unknown {unknown} needs training videos: give --known-data.")
    others: dict[str, Any] = {}
    if known_data is not None:
        others["known"] = choose_known(read_videos(known_data, split_column="none", **reading).videos)
    if unknown_data is not None:
        found = read_videos(unknown_data, needs_labels=False, missing_videos=reading["missing_videos"])
        others["unknown"] = found.videos
    return others


def _choose(
    found: Any,
    classifier: Any,
    processor: Any,
    others: dict[str, Any],
    unknown: str | None,
    false_alarms: float,
    settings: dict[str, Any],
) -> Any:
    """Return the rule for unknown videos, None without one and in other processes than the main one."""
    from ..data.labels import LabelMap
    from ..inference.evaluation import predict_together
    from ..inference.unknown_choice import choose_rule

    if unknown is None:
        return None
    label_map = LabelMap.from_config(classifier.config)
    labels = [next(iter(label_map.numbers(one)), -1) for one in others.get("known", ())]
    outputs = {
        name: predict_together(classifier, processor, [one.video for one in videos], with_outputs=True, **settings)
        for name, videos in others.items()
    }
    return None if found is None else choose_rule(found, unknown, false_alarms, known_labels=labels, **outputs)


def _check_calibration(calibrate: bool, model: str, videos: Any) -> None:
    """Raise ValueError before anything is computed if the result could not be fitted or stored."""
    if not calibrate:
        return
    from ..data.labels import units_of
    from ..inference.calibration import check_enough
    from ..inference.calibration_files import check_folder

    check_folder(model)
    check_enough(len(videos), len(units_of(videos)))


def _calibrate(found: Any, model: str, settings: dict[str, Any]) -> Any:
    from ..inference.calibration import calibrate
    from ..inference.calibration_files import stored_fingerprint

    views = {name: settings[name] for name in ("num_clips", "num_crops", "averaging")}
    return calibrate(found, **views, weights=stored_fingerprint(model))


def _print_evaluation(found: Any) -> None:
    from ..inference.metrics import class_accuracies, describe_chance

    if found.confusion_matrix is not None:
        table = Table("class", "videos", "accuracy", "most often taken for", title="per class, the worst first")
        rows = class_accuracies(found.confusion_matrix, found.label_map.names)
        for row in sorted(rows, key=lambda row: row.accuracy)[:20]:
            table.add_row(as_cell(row.name), str(row.videos), f"{row.accuracy:.3f}", as_cell(row.mistaken_for))
        output_console().print(table)
    for name, value in found.metrics.items():
        echo(f"{name}: {value}" if name == "samples" else f"{name}: {value:.4f}")
    if (near_chance := describe_chance(found.metrics)) is not None:
        echo(near_chance)
    echo(f"views per video: {found.protocol}")
    for one, video in zip(found.predictions, found.videos, strict=True):
        if one.error is not None:
            echo(f"left out: {video.where}: {one.error}")


def _print_results(found: Any, report: Any, choice: Any, results: dict[str, Any]) -> None:
    """Print an evaluation; store and print a new calibration, or print the error of the stored one."""
    from ..inference.calibration_files import store_calibration

    _print_evaluation(found)
    if report is not None:
        rule, known = (None, None) if choice is None else (choice.rule, choice.known)
        store_calibration(results["model"], replace(report.calibration, unknown=rule), known)
        stored = Path(results["model"], "config.json")
        for line in (*report.lines, *(choice.lines if choice is not None else ()), f"stored in {stored}"):
            echo(line)
    for name, errors in results.get("calibration_error", {}).items():
        echo(f"calibration error, {name}: " + ", ".join(f"{error:.4f} {of}" for of, error in errors.items()))
    if "unknown" in results and report is None:
        echo(f"called 'none of these': {results['unknown']['called']:.4f} of these videos")
