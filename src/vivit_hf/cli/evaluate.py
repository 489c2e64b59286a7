"""`vivit-hf evaluate`: the scores of a model on labelled videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from .options import (
    BatchSizeOption,
    ClipsOption,
    CropsOption,
    DtypeOption,
    PrivateAddressesOption,
    check_crops,
    load,
    quiet_libraries,
    views_of,
)
from .output import as_cell, echo, fail, output_console


DataOption = Annotated[
    str, typer.Option("--data", help="Folder of class folders, or a CSV or JSON file.", rich_help_panel="Videos")
]
VideoRootOption = Annotated[
    str | None, typer.Option(help="Folder that paths in a file are relative to.", rich_help_panel="Videos")
]
FormatOption = Annotated[
    Literal["auto", "plain", "kinetics", "ssv2", "epic"],
    typer.Option(help="Format of the file.", rich_help_panel="Videos"),
]
VideoColumnOption = Annotated[
    str | None, typer.Option(help="Column of the videos.", show_default="video, path ...", rich_help_panel="Videos")
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(
        help="Column of the labels; several as noun,verb.", show_default="label, class ...", rich_help_panel="Videos"
    ),
]
SeparatorOption = Annotated[
    str | None, typer.Option(help="Separator between several labels of a video.", rich_help_panel="Videos")
]
SplitColumnOption = Annotated[
    str, typer.Option(help="Column of splits: auto (split, subset ...), a name, or none.", rich_help_panel="Videos")
]
SplitOption = Annotated[
    Literal["train", "validation", "test"] | None,
    typer.Option(help="The split to score, of a file with a column of splits.", rich_help_panel="Videos"),
]
MissingOption = Annotated[
    Literal["error", "skip"], typer.Option(help="What to do with missing files.", rich_help_panel="Videos")
]
AveragingOption = Annotated[
    Literal["probabilities", "logits"], typer.Option(help="What to average over the views of a video.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode.", show_default="one per core, at most 8")
]


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of a fine-tuned ViViT.")],
    data: DataOption,
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")],
    video_root: VideoRootOption = None,
    annotation_format: FormatOption = "auto",
    video_column_name: VideoColumnOption = None,
    label_column_name: LabelColumnOption = None,
    label_separator: SeparatorOption = None,
    split_column: SplitColumnOption = "auto",
    split: SplitOption = None,
    missing_videos: MissingOption = "error",
    allow_private_addresses: PrivateAddressesOption = False,
    num_clips: ClipsOption = None,
    num_crops: CropsOption = None,
    averaging: AveragingOption = "probabilities",
    batch_size: BatchSizeOption = 16,
    num_workers: WorkersOption = None,
    dtype: DtypeOption = "float32",
    use_cpu: Annotated[bool, typer.Option("--use-cpu", help="Run on the CPU even if there is a GPU.")] = False,
) -> None:
    """
    Score a model on labelled videos, with the views of the paper: 4 clips x 3 crops of every video.

    The output folder gets results.json with the scores and their views, predictions.parquet with every probability,
    and for one label per video per_class.csv and confusion_matrix.png. Names may have underscores: --num_clips.
    Started with `torchrun --nproc_per_node 8 -m vivit_hf evaluate ...`, any number of processes gives the same scores.
    Exit code 0, or 2 for wrong usage, data or models, and if no video can be read.

    Example: vivit-hf evaluate --model my_vivit --data videos/test --output-dir scores
    """
    check_crops(num_crops)
    quiet_libraries()
    from ..inference.evaluation import evaluate_videos, read_split
    from ..inference.evaluation_files import save_evaluation
    from ..inference.processes import process_group

    try:
        videos = read_split(
            data,
            split,
            video_root=video_root,
            annotation_format=annotation_format,
            video_column=video_column_name,
            label_columns=label_column_name.split(",") if label_column_name else None,
            label_separator=label_separator,
            missing_videos=missing_videos,
            split_column=split_column,
        )
        state = process_group(use_cpu)
    except (OSError, ValueError) as error:
        fail(str(error), code=2)
    classifier, processor = load(model, str(state.device), dtype, allow_private_addresses=allow_private_addresses)
    views: dict[str, Any] = {**views_of(processor, num_clips, num_crops), "averaging": averaging}
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    try:
        found = evaluate_videos(classifier, processor, videos, **views, batch_size=batch_size, num_workers=workers)
    except ValueError as error:
        fail(str(error), code=2)
    if found is not None:
        save_evaluation(found, output_dir, model=model, dtype=dtype)
        _print_evaluation(found)
    state.wait_for_everyone()
    state.destroy_process_group()


def _print_evaluation(found: Any) -> None:
    from ..inference.confusion_matrix import class_accuracies
    from ..inference.metrics import describe_chance

    if found.confusion_matrix is not None:
        table = Table("class", "videos", "accuracy", "most often taken for", title="per class, the worst first")
        rows = class_accuracies(found.confusion_matrix, found.label_map.names)
        for row in sorted(rows, key=lambda row: row.accuracy)[:20]:
            table.add_row(as_cell(row.name), str(row.videos), f"{row.accuracy:.3f}", as_cell(row.mistaken_for))
        output_console().print(table)
    for name, value in found.metrics.items():
        echo(f"{name}: {value}" if name == "samples" else f"{name}: {value:.4f}")
    near_chance = describe_chance(found.metrics)
    if near_chance is not None:
        echo(near_chance)
    echo(f"views per video: {found.protocol}")
    for one, video in zip(found.predictions, found.videos, strict=True):
        if one.error is not None:
            echo(f"left out: {video.where}: {one.error}")
