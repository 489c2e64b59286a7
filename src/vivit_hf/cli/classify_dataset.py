"""`vivit-hf classify-dataset`: the labels of any number of videos, in shards."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..data.escaping import printable
from . import options
from .output import escape_logs


HELP = """\
Classify any number of videos in shards. After an interruption, the same command continues with the next shard.

    vivit-hf classify-dataset --model my_vivit --videos folder_or_list --output_dir labels
    accelerate launch --num_processes 8 -m vivit_hf classify-dataset ...     each process takes a share of the shards
    vivit-hf classify-dataset ... --output_dir s3://bucket/labels            any address that fsspec knows

--videos is a folder, or a text file with a path or URL per line. The output folder gets part-00000.parquet and so on,
with the columns index, video, labels and scores (best first), unknown and error. Each part is written completely or not
at all. URLs are written without their secrets, and bytes of names that are not UTF-8 as \\udcXX. _run.json holds the
settings of the run. A run with another model (or the same folder with new weights), other settings or other videos is
refused: choose another folder, or pass --overwrite to delete the old results and start anew.
"""


def classify_dataset(context: typer.Context) -> None:
    """
    Label any number of videos in parquet shards, on one machine or many; --help lists the arguments.

    Example: vivit-hf classify-dataset --model my_vivit --videos clips/ --output_dir s3://bucket/labels
    """
    main(context.args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    if argv is None:
        escape_logs()  # a script runs the command alone
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(printable(f"classify-dataset: {error}")) from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vivit-hf classify-dataset", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a fine-tuned ViViT")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, help="a folder, or a file with one path or URL per line")
    source.add_argument("--dataset_name", help="Hub id or folder of a data set")
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--video_column_name", help="column of the data set (default: video, path, ...)")
    parser.add_argument(
        "--allow_private_addresses", action="store_true", help="allow downloads from this machine and the local network"
    )
    parser.add_argument("--output_dir", required=True, help="a folder, or an address such as s3://bucket/labels")
    parser.add_argument("--overwrite", action="store_true", help="delete the results of another run in --output_dir")
    parser.add_argument("--shard_size", type=int, default=256, help="videos per part; an interruption costs one part")
    parser.add_argument("--top_k", type=int, default=5, help="labels per video, and per group of labels")
    parser.add_argument("--num_clips", type=int, default=1)
    parser.add_argument("--num_crops", type=int, default=1, choices=[1, 3])
    parser.add_argument("--batch_size", type=int, default=16, help="clips per forward pass")
    parser.add_argument("--num_workers", type=int, default=options.workers_of(None), help="decoding processes")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="number format; leaves out the setting that `vivit-hf tune` stored (default: float32, or that setting)",
    )
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """
    Write the shards of this process.

    Raises:
        OSError: if the model, the videos or the output cannot be opened.
        ValueError: for settings that do not fit each other, an output that holds another run, or damaged weights.
    """
    from ..data.labels import LabelMap
    from ..data.remote_files import location_of
    from ..inference import describe_views, hub_commit, model_fingerprint
    from ..inference.batch_predictor import load_classifier
    from ..inference.prediction import predict_each
    from ..inference.processes import process_group
    from ..inference.shards import join_run, missing_shards, own_share, shard_starts, write_shard
    from ..modeling_vivit import ViViTForVideoClassification
    from ..video_processing_vivit import ViViTVideoProcessor

    folder = location_of(args.output_dir)
    names, videos, digest = list_videos(args)
    state = process_group(args.use_cpu)
    commit = hub_commit(args.model)
    revision = {} if commit is None else {"revision": commit}  # the same in the whole run, whoever pushes
    config = ViViTForVideoClassification.config_class.from_pretrained(args.model, **revision)
    label_map = LabelMap.from_config(config)
    limits = {"allow_private_addresses": args.allow_private_addresses}
    processor = ViViTVideoProcessor.from_pretrained(args.model, video_limits=limits, **revision)
    fixed = ("model", "shard_size", "top_k", "num_clips", "num_crops")
    settings = {name: getattr(args, name) for name in fixed} | {"num_videos": len(videos), "videos_digest": digest}
    settings |= {"dtype": args.dtype or "float32", "optimization": tuned_setting(args, config)}
    settings |= {"calibration": None if config.calibration is None else _digest(config.calibration)}
    settings |= {"short_video_policy": processor.short_video_policy}
    settings |= model_fingerprint(args.model, config, processor, commit)
    join_run(folder, settings, args.overwrite, state)

    shards = shard_starts(folder, len(videos), args.shard_size)
    missing = missing_shards(folder, shards)
    mine = own_share(missing, state)
    if state.is_main_process:
        print(f"{len(videos)} videos in {len(shards)} parts, {len(shards) - len(missing)} of them finished", flush=True)
    if mine:
        model, report = load_classifier(args.model, revision=commit, dtype=args.dtype, device=state.device)
        if state.is_main_process:
            print(report, flush=True)
            print(f"views per video: {describe_views(processor, args.num_clips, args.num_crops)}", flush=True)
    views = {"num_clips": args.num_clips, "num_crops": args.num_crops}
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    how = {"averaging": options.averaging_of(config, views), **views, **loading}
    for path in mine:
        begin, start = time.monotonic(), shards[path]
        part = videos[start : start + args.shard_size]
        predictions = list(predict_each(model, processor, part, **how))
        failed = write_shard(path, predictions, names, start, label_map, args.top_k)
        rate = len(part) / (time.monotonic() - begin)
        print(f"{path.name}: {len(part)} videos, {failed} not readable, {rate:.1f} per second", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


def list_videos(args: argparse.Namespace) -> tuple[list[str], list[Any], str]:
    """Return the names of the videos, the inputs of the processor, and a digest of the list."""
    from ..data import find_videos, load_hub_dataset, unlabelled_videos

    if args.dataset_name is not None:
        dataset = load_hub_dataset(args.dataset_name, args.dataset_config_name, split=args.split)
        pairs = unlabelled_videos(dataset, f"{args.dataset_name}/{args.split}", video_column=args.video_column_name)
        names = [name for name, _ in pairs]
        videos: list[Any] = [video for _, video in pairs]
        digest = dataset._fingerprint
    else:
        source: Path = args.videos
        if source.is_dir():
            names = [str(path) for path in find_videos(source)]
        elif source.is_file():
            text = source.read_text(encoding="utf-8", errors="surrogateescape")  # names of files need not be UTF-8
            names = [line.strip() for line in text.split("\n") if line.strip()]
        else:
            raise ValueError(f"--videos {source}: there is no such folder or file")
        videos = list(names)
        digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
    if not names:
        raise ValueError(f"{args.dataset_name or args.videos}: there are no videos")
    return names, videos, digest


def tuned_setting(args: argparse.Namespace, config: Any) -> str | None:
    """Return the name and a digest of the setting that `vivit-hf tune` stored; None if it is not used."""
    if args.dtype is not None or config.optimization is None:
        return None
    return f"{config.optimization['name']} {_digest(config.optimization)}"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
