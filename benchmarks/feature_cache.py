"""
An epoch of `vivit-hf finetune --freeze spatial` from stored tokens over one from videos, decoding included.

    python benchmarks/feature_cache.py --output runs             about 5 minutes on 2 cores
    python benchmarks/feature_cache.py --output runs --smoke     a minute: tiny, for the tests

The model has the size of ViT-S/14 with random weights and 4 temporal layers; the videos are written first. Exits with 1
if a target is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from measuring import Row, at_least, at_most, file_to_write, report  # noqa: E402
from moving_shapes import write_moving_shapes  # noqa: E402
from transformers import ViTConfig, ViTModel  # noqa: E402


TARGETS = {56: 1 / 10, 112: 1 / 20}  # pixels -> largest share of an epoch from videos
FRAMES, PATCH = 32, 14
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def seconds_per_epoch(folder: Path, source: Path, size: int, epochs: int, is_cached: bool) -> float:
    """The seconds of an epoch of training, without the computation of the cache before the first one."""
    output = folder / ("cached" if is_cached else "uncached")
    settings = {
        "train_dir": source / "videos" / "train",
        "model_name_or_path": source / "vit",
        "output_dir": output,
        "image_size": size,
        "num_frames": FRAMES,
        "frame_stride": 1,
        "num_temporal_layers": 4,
        "temporal_pooling": "mean",
        "freeze": "spatial",
        "cache_features": is_cached,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 8,
        "train_val_split": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    shutil.rmtree(output, ignore_errors=True)
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vivit_hf", "finetune", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if process.returncode:
        raise RuntimeError(f"{output}: {process.stderr[-3000:]}")
    return float(json.loads((output / "train_results.json").read_text())["train_runtime"]) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for videos, models and results")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few videos, no targets")
    args = parser.parse_args()

    write_moving_shapes(
        args.output / "videos", 1 if args.smoke else 8, test_clips_per_class=1, num_frames=40, height=240, width=320
    )
    torch.manual_seed(0)
    config = ViTConfig(image_size=224, patch_size=PATCH, **(TINY if args.smoke else SMALL))
    ViTModel(config).save_pretrained(args.output / "vit")
    rows = []
    for size, target in TARGETS.items():
        folder = args.output / str(size)
        videos = seconds_per_epoch(folder, args.output, size, 1, is_cached=False)
        stored = seconds_per_epoch(folder, args.output, size, 2 if args.smoke else 10, is_cached=True)
        rows.append(at_least(f"{size} pixels: an epoch from videos", videos, "s", None))
        rows.append(at_least(f"{size} pixels: an epoch from stored tokens", stored, "s", None))
        share = at_most(f"{size} pixels: stored tokens over videos", stored / videos, "", target)
        rows.append(Row(share.name, share.value, share.unit) if args.smoke else share)
    sys.exit(report(rows, args.json))


if __name__ == "__main__":
    main()
