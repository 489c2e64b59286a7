"""
Scores a ViViT on labelled videos with the paper's views: 4 clips x 3 crops of every video, decoded once.

    python examples/evaluate.py --model my_vivit --data videos/test --num_clips 4 --num_crops 3 --output_dir scores
    torchrun --nproc_per_node 8 examples/evaluate.py ...     any number of processes, the same scores

--data is a folder of class folders, or a CSV or JSON file (see finetune.py), whose column of splits --split chooses
from. The output folder gets results.json with the scores and the views that they come from, predictions.parquet with
every probability, per_class.csv, and confusion_matrix.png.
"""

import argparse
import csv
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.cli.output import as_cell
from vivit_hf.data.annotations import AnnotationError, Annotations, LabelledVideo, read_videos
from vivit_hf.data.labels import LabelMap
from vivit_hf.data.whole_files import as_utf8, written_whole
from vivit_hf.inference.confusion_matrix import confusion_matrix, draw_confusion_matrix
from vivit_hf.inference.metrics import classification_metrics, describe_chance
from vivit_hf.inference.prediction import VideoPrediction, predict_videos
from vivit_hf.inference.views import AVERAGINGS, describe_views
from vivit_hf.video_sources import source_name


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a fine-tuned ViViT, folder or Hub id")
    parser.add_argument("--data", required=True, help="folder of class folders, CSV or JSON file")
    parser.add_argument("--video_root", help="folder that paths in a file start from")
    parser.add_argument("--annotation_format", default="auto", help="auto, plain, kinetics, ssv2 or epic")
    parser.add_argument("--video_column_name", help="of a file")
    parser.add_argument("--label_column_name", help="of a file; several as noun,verb")
    parser.add_argument("--label_separator", help="between several labels of a video")
    parser.add_argument(
        "--split_column", default="auto", help="of a file (default: split, subset, ...); none: ignore it"
    )
    parser.add_argument("--split", choices=["train", "validation", "test"], help="of a file with a column of splits")
    parser.add_argument("--missing_videos", default="error", choices=["error", "skip"])
    parser.add_argument(
        "--allow_private_addresses", action="store_true", help="also download from this machine and the local network"
    )
    parser.add_argument("--num_clips", type=int, default=4, help="per video")
    parser.add_argument("--num_crops", type=int, default=3, choices=[1, 3], help="per clip")
    parser.add_argument("--averaging", default="probabilities", choices=AVERAGINGS, help="of the views of a video")
    parser.add_argument("--batch_size", type=int, default=16, help="clips that the model sees at a time")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--use_cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    columns = args.label_column_name.split(",") if args.label_column_name else None
    try:
        data = read_videos(
            args.data,
            video_root=args.video_root,
            annotation_format=args.annotation_format,
            video_column=args.video_column_name,
            label_columns=columns,
            label_separator=args.label_separator,
            missing_videos=args.missing_videos,
            split_column=args.split_column,
            choose_splits=partial(choose_split, args.split),
        )
        if args.split is not None and data.videos[0].split is None:
            raise AnnotationError(f"{args.data} has no column of splits: leave --split {args.split} out.")
        config = ViViTForVideoClassification.config_class.from_pretrained(args.model)
        label_map = LabelMap.from_config(config)
        if label_map.is_regression:
            raise AnnotationError(f"{args.model} is a regression: its outputs are no labels that could be right.")
        targets = torch.stack([label_map.encode(one) for one in data.videos]).numpy()
    except (OSError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error

    state = PartialState(cpu=args.use_cpu)
    if int(os.environ.get("WORLD_SIZE", "1")) != state.num_processes:
        raise SystemExit(f"{os.environ['WORLD_SIZE']} processes were started, but each is alone: add --use_cpu.")
    model = ViViTForVideoClassification.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.to(state.device).eval()
    limits = {"allow_private_addresses": args.allow_private_addresses}
    processor = ViViTVideoProcessor.from_pretrained(args.model, video_limits=limits)

    # Every n-th video: long and short ones, and the classes of a sorted list, are spread evenly.
    mine = range(state.process_index, len(data.videos), state.num_processes)
    found = predict_videos(
        model,
        processor,
        [data.videos[index].video for index in mine],
        num_clips=args.num_clips,
        num_crops=args.num_crops,
        averaging=args.averaging,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    try:
        gathered = gather_object([(mine[one.index], one) for one in found])
    except ValueError as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    if state.is_main_process:
        predictions = [one for _, one in sorted(gathered, key=lambda pair: pair[0])]
        views = describe_views(processor, args.num_clips, args.num_crops, args.averaging)
        write_results(args, data, label_map, targets, predictions, views, state.num_processes)
    state.wait_for_everyone()
    state.destroy_process_group()


def choose_split(wanted: str | None, where: str, counts: dict[str, int]) -> list[str]:
    """The split to score: the one that is wanted, or the only one that there is."""
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    if wanted is None and len(counts) > 1:
        raise AnnotationError(f"{where}: there are {listed} rows: choose --split, or --split_column none for all.")
    if wanted is not None and wanted not in counts:
        raise AnnotationError(f"{where}: there are no {wanted} rows, only {listed}.")
    return [wanted] if wanted is not None else list(counts)


def write_results(
    args: argparse.Namespace,
    data: Annotations,
    label_map: LabelMap,
    targets: np.ndarray,
    predictions: list[VideoPrediction],
    views: str,
    num_processes: int,
) -> None:
    readable = np.array([one.error is None for one in predictions])
    if not readable.any():
        raise SystemExit(f"None of the {len(predictions)} videos can be read: {predictions[0].error}")
    logits = np.stack([one.logits for one in predictions if one.logits is not None])
    metrics = classification_metrics(logits, targets[readable], label_map)
    results: dict[str, Any] = {
        **{f"eval_{name}": value for name, value in metrics.items()},
        "eval_protocol": views,
        "eval_damaged_files": int((~readable).sum()),
        "model": args.model,
        "split": data.videos[0].split,
        "dtype": args.dtype,
        "num_processes": num_processes,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_predictions(args.output_dir / "predictions.parquet", data, label_map, predictions)

    console = Console(width=None if sys.stdout.isatty() else 120)
    if not label_map.has_several and not label_map.is_grouped:
        matrix = confusion_matrix(logits, targets[readable])
        names = [as_utf8(name) for name in label_map.names]
        rows = per_class(matrix, names)
        with (args.output_dir / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("class", "videos", "accuracy", "most often taken for"), *rows])
        title = f"top-1 {metrics['top1']:.1%}: {views}"
        draw_confusion_matrix(matrix, names, args.output_dir / "confusion_matrix.png", title)
        table = Table("class", "videos", "accuracy", "most often taken for", title="per class, the worst first")
        for row in sorted(rows, key=lambda row: row[2])[:20]:
            table.add_row(as_cell(row[0]), str(row[1]), f"{row[2]:.3f}", as_cell(row[3]))
        console.print(table)
    for name, value in metrics.items():
        console.print(f"{name}: {value}" if name == "samples" else f"{name}: {value:.4f}", highlight=False)
    near_chance = describe_chance(metrics)
    if near_chance is not None:
        console.print(near_chance, highlight=False, soft_wrap=True)
    console.print(f"views per video: {views}", highlight=False, soft_wrap=True)
    for one, video in zip(predictions, data.videos, strict=True):
        if one.error is not None:
            console.print(as_cell(f"left out: {video.where}: {one.error}"), soft_wrap=True)


def per_class(matrix: np.ndarray, names: list[str]) -> list[tuple[str, int, float, str]]:
    rows = []
    for index, name in enumerate(names):
        total, others = int(matrix[index].sum()), matrix[index].copy()
        others[index] = 0
        confused = names[int(others.argmax())] if others.any() else ""
        rows.append((name, total, float(matrix[index, index] / total) if total else float("nan"), confused))
    return rows


def write_predictions(path: Path, data: Annotations, label_map: LabelMap, predictions: list[VideoPrediction]) -> None:
    """A row per video: file, labels, the best label of each group, every probability, and the error."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {
        "video": [as_utf8(_shown(one)) for one in data.videos],
        "labels": [[as_utf8(label) for label in one.labels] for one in data.videos],
        "predicted": [
            None if one.error is not None else [as_utf8(label) for label in label_map.best(one.probabilities)]
            for one in predictions
        ],
        "probabilities": [None if one.probabilities is None else one.probabilities.tolist() for one in predictions],
        "error": [None if one.error is None else as_utf8(one.error) for one in predictions],
    }
    table = pyarrow.table(columns).replace_schema_metadata({"labels": json.dumps(label_map.names)})
    with written_whole(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)


def _shown(one: LabelledVideo) -> str:
    """The place that a video was read from, or its path or address without secrets, with the part that it is."""
    if callable(one.video):
        return one.where
    if isinstance(one.video, dict):
        return str({**one.video, "path": source_name(one.video)})
    return source_name(one.video)


if __name__ == "__main__":
    main()
