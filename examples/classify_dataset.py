"""
Classifies any number of videos, in shards: killed and started again, it goes on, and nothing is lost or done twice.

    python examples/classify_dataset.py --model my_vivit --videos folder_or_list --output_dir labels
    accelerate launch --num_processes 8 examples/classify_dataset.py ...     the shards are shared out

--videos is a folder, or a text file with a path or URL per line. The output folder gets part-00000.parquet and so on,
each with the columns index, video (addresses without secrets, and names that are not UTF-8 with \\udcXX for each such
byte), labels and scores (the best first) and error; a part is there whole or not at all. run.json holds what they were
made from. Another model, trained on in place or not, other settings or other videos are refused: choose another folder,
or --overwrite to delete the old answers and start anew.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from accelerate import PartialState

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data.annotation_rows import AnnotationError
from vivit_hf.data.hub_datasets import load_hub_dataset, unlabelled_videos
from vivit_hf.data.labels import LabelMap
from vivit_hf.data.scan import find_videos
from vivit_hf.data.whole_files import as_utf8, written_whole
from vivit_hf.inference.fingerprints import hub_commit, model_fingerprint
from vivit_hf.inference.prediction import VideoPrediction, predict_videos
from vivit_hf.inference.views import describe_views
from vivit_hf.video_sources import source_name


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a fine-tuned ViViT, folder or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, help="a folder, or a file with one path or URL per line")
    source.add_argument("--dataset_name", help="a data set on the Hub, or a folder of one")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--split", default="train", help="of the data set")
    parser.add_argument("--video_column_name", help="of the data set (default: video, path, ...)")
    parser.add_argument(
        "--allow_private_addresses", action="store_true", help="also download from this machine and the local network"
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--overwrite", action="store_true", help="delete the parts of another run in --output_dir")
    parser.add_argument("--shard_size", type=int, default=256, help="videos per part: what is lost at most")
    parser.add_argument("--top_k", type=int, default=5, help="labels per video (and per group of labels)")
    parser.add_argument("--num_clips", type=int, default=1)
    parser.add_argument("--num_crops", type=int, default=1, choices=[1, 3])
    parser.add_argument("--batch_size", type=int, default=16, help="clips that the model sees at a time")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--use_cpu", action="store_true", help="even if there is a GPU")
    return parser.parse_args(argv)


def list_videos(args: argparse.Namespace) -> tuple[list[str], list[Any], str]:
    """The names of the videos, what the processor takes, and a digest that tells other videos apart."""
    if args.dataset_name is not None:
        try:
            dataset = load_hub_dataset(args.dataset_name, args.dataset_config_name, split=args.split)
            pairs = unlabelled_videos(dataset, f"{args.dataset_name}/{args.split}", video_column=args.video_column_name)
        except AnnotationError as error:
            raise SystemExit(f"classify_dataset.py: {error}") from error
        names, videos = [name for name, _ in pairs], [video for _, video in pairs]
        digest = dataset._fingerprint
    else:
        source: Path = args.videos
        if source.is_dir():
            names = [str(path) for path in find_videos(source)]
        elif source.is_file():
            text = source.read_text(encoding="utf-8", errors="surrogateescape")  # names of files need not be UTF-8
            names = [line.strip() for line in text.split("\n") if line.strip()]
        else:
            raise SystemExit(f"--videos {source}: there is no such folder or file")
        videos, digest = list(names), hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
    if not names:
        raise SystemExit(f"{args.dataset_name or args.videos}: there are no videos")
    return names, videos, digest


def check_run(folder: Path, settings: dict[str, Any], overwrite: bool, state: PartialState) -> None:
    """Writes what this run is made from; another run in the folder is deleted if that is wished, or refused."""
    path = folder / "run.json"
    parts = sorted(folder.glob("part-*.parquet"))
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    compared = [name for name in settings if name != "model"]  # its fingerprint tells more than its name
    changed = [name for name in compared if stored is not None and stored.get(name) != settings[name]]
    is_other = bool(changed) or (stored is None and bool(parts))
    if is_other and not overwrite:
        listed = ", ".join(f"{name} {shown((stored or {}).get(name))} -> {shown(settings[name])}" for name in changed)
        raise SystemExit(
            f"{as_utf8(folder)} holds another run ({listed or 'run.json is missing'}): choose another --output_dir, or "
            "--overwrite to delete its answers and start anew."
        )
    state.wait_for_everyone()  # all have looked before anything is deleted or written
    if state.is_main_process and (is_other or stored is None):
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            part.unlink()
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    state.wait_for_everyone()


def shown(value: Any) -> str:
    """A setting in an error message; of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) >= 40 else repr(value)


def write_part(path: Path, rows: list[dict[str, Any]]) -> None:
    schema = pyarrow.schema(
        [
            ("index", pyarrow.int64()),
            ("video", pyarrow.string()),
            ("labels", pyarrow.list_(pyarrow.string())),
            ("scores", pyarrow.list_(pyarrow.float32())),
            ("error", pyarrow.string()),
        ]
    )
    with written_whole(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), unfinished)


def row_of(one: VideoPrediction, name: str, start: int, label_map: LabelMap, top_k: int) -> dict[str, Any]:
    best = label_map.best(one.probabilities, top_k, with_scores=True)
    return {
        "index": start + one.index,
        "video": as_utf8(source_name(name)),
        "labels": None if best is None else [as_utf8(label) for label, _ in best],
        "scores": None if best is None else [score for _, score in best],
        "error": None if one.error is None else as_utf8(one.error),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    names, videos, digest = list_videos(args)
    state = PartialState(cpu=args.use_cpu)
    if int(os.environ.get("WORLD_SIZE", "1")) != state.num_processes:
        raise SystemExit(f"{os.environ['WORLD_SIZE']} processes were started, but each is alone: add --use_cpu.")
    try:
        commit = hub_commit(args.model)
        revision = {} if commit is None else {"revision": commit}  # one for the whole run, whatever is pushed meanwhile
        config = ViViTForVideoClassification.config_class.from_pretrained(args.model, **revision)
        label_map = LabelMap.from_config(config)
        limits = {"allow_private_addresses": args.allow_private_addresses}
        processor = ViViTVideoProcessor.from_pretrained(args.model, video_limits=limits, **revision)
        fingerprint = model_fingerprint(args.model, config, processor, commit)
    except (OSError, ValueError) as error:
        raise SystemExit(f"classify_dataset.py: {error}") from error
    fixed = ("model", "shard_size", "top_k", "num_clips", "num_crops", "dtype")
    settings = {name: getattr(args, name) for name in fixed}
    settings |= {"num_videos": len(videos), "videos_digest": digest, **fingerprint}
    check_run(args.output_dir, settings, args.overwrite, state)

    starts = range(0, len(videos), args.shard_size)
    parts = {args.output_dir / f"part-{number:05d}.parquet": start for number, start in enumerate(starts)}
    waiting = [path for path in parts if not path.exists()]
    state.wait_for_everyone()  # all have looked before the first part is written
    mine = waiting[state.process_index :: state.num_processes]
    if state.is_main_process:
        print(f"{len(videos)} videos in {len(parts)} parts, {len(parts) - len(waiting)} of them finished", flush=True)
    if mine:
        model = ViViTForVideoClassification.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **revision)
        model.to(state.device).eval()
        if state.is_main_process:
            print(f"views per video: {describe_views(processor, args.num_clips, args.num_crops)}", flush=True)
    for path in mine:
        begin, start = time.monotonic(), parts[path]
        found = predict_videos(
            model,
            processor,
            videos[start : start + args.shard_size],
            num_clips=args.num_clips,
            num_crops=args.num_crops,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )
        try:
            predictions = list(found)
        except ValueError as error:  # of the settings or the model, not of a video
            raise SystemExit(f"classify_dataset.py: {error}") from error
        rows = [row_of(one, names[start + one.index], start, label_map, args.top_k) for one in predictions]
        write_part(path, rows)
        failed = sum(row["error"] is not None for row in rows)
        rate = len(rows) / (time.monotonic() - begin)
        print(f"{path.name}: {len(rows)} videos, {failed} not readable, {rate:.1f} per second", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
