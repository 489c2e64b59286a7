"""
The paper's ablations in small, on videos whose class is only in the order of their frames (moving shapes).

    python benchmarks/finetuning.py --output runs [--seeds 3] [--jobs 2]     about 20 minutes on 2 cores
    python benchmarks/finetuning.py --output runs --smoke                    a minute: tiny, for the tests

An image ViT learns to tell shapes in single frames; from it start all variants, each fine-tuned by
`examples/finetune.py` with the same settings and several seeds. Prints the table of docs/variants.md, and exits
with 1 if a target is missed. Runs that are finished are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from measuring import Row, at_least, at_most, file_to_write, report  # noqa: E402
from moving_shapes import SHAPES, Scene, write_moving_shapes  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

from vivit_hf import ViViTConfig  # noqa: E402


SIZE = 64  # pixels
CHANCE = 0.25
EPOCHS = 4
SHOWN = (1, 2, EPOCHS)
# Name in the table -> arguments of finetune.py.
MODEL_1, MODEL_2, MODEL_3, MODEL_4 = (
    {"attention_type": name}
    for name in (
        "spatio_temporal",
        "factorised_encoder",
        "factorised_self_attention",
        "factorised_dot_product_attention",
    )
)
# A tubelet of two frames sees a little motion by itself; a 2D patch sees none.
FRAMES = {"embedding_type": "uniform_frame_sampling", "num_sampled_frames": 8}
ROWS = {
    "Model 1": MODEL_1,
    "Model 2": {**MODEL_2, "num_temporal_layers": 2},
    "Model 3": MODEL_3,
    "Model 4": MODEL_4,
    "average pool, 2D patches": {**MODEL_2, "num_temporal_layers": 0, **FRAMES},
    "Model 1, filter inflation": {**MODEL_1, "tubelet_init": "filter_inflation"},
    "Model 1, random tubelets": {**MODEL_1, "tubelet_init": "random"},
    "Model 3, temporal attention `zero`": {**MODEL_3, "temporal_attention_init": "zero"},
    "Model 3, 2D patches": {**MODEL_3, **FRAMES},
    "Model 3, 2D patches, temporal attention `zero`": {**MODEL_3, **FRAMES, "temporal_attention_init": "zero"},
}
TRAINING = {
    "num_frames": 16,
    "frame_stride": 1,
    "resize": SIZE,
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}
SMOKE = {"num_train_epochs": 1, "max_train_samples": 8, "max_eval_samples": 8}


def images(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Single frames, float32 (count, 3, SIZE, SIZE) in [-1, 1], and which shape each shows."""
    rng, names = np.random.default_rng(seed), list(SHAPES)
    frames, labels = [], []
    for _ in range(count):
        scene = Scene.draw(rng, 24, SIZE, SIZE)
        frames.append(scene.render("up_left", 1)[0])
        labels.append(names.index(scene.shape))
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(labels)


def train_image_vit(folder: Path, num_images: int, epochs: int) -> None:
    """Saves an image ViT of the sizes of `vivit-tiny` that has learnt the shapes, and says how well."""
    tiny = ViViTConfig.from_preset("vivit-tiny")
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size initializer_range".split()
    torch.manual_seed(0)
    sizes = {name: getattr(tiny, name) for name in names}
    model = ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=16, num_labels=len(SHAPES), **sizes))
    pixels, labels = images(1, num_images)
    batches = -(-num_images // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(num_images).split(64):
            loss = model(pixels[batch], labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    pixels, labels = images(2, 600)
    with torch.inference_mode():
        accuracy = (model(pixels).logits.argmax(dim=1) == labels).float().mean()
    print(f"The image ViT tells {accuracy:.0%} of new shapes (chance: {1 / len(SHAPES):.0%}).", flush=True)
    model.save_pretrained(folder)


def finetune(folder: Path, start: Path, videos: Path, arguments: dict[str, object], seed: int) -> list[float]:
    """The accuracy on held-out videos after each epoch; a run that is finished is only read."""
    state = folder / "trainer_state.json"
    if not state.exists():
        settings = {**TRAINING, **arguments, "model_name_or_path": str(start), "seed": seed, "output_dir": str(folder)}
        settings |= {"train_dir": str(videos / "train"), "validation_dir": str(videos / "test")}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2))
        command = [sys.executable, str(ROOT / "examples" / "finetune.py"), str(folder / "settings.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise RuntimeError(f"{folder}: {process.stderr[-3000:]}")
    history = json.loads(state.read_text())["log_history"]
    # The last one is that of the end, once more of the last epoch.
    return [entry["eval_top1"] for entry in history if "eval_top1" in entry][:-1]


Accuracies = dict[str, list[list[float]]]  # row -> seeds -> epochs


def table(accuracies: Accuracies) -> str:
    """Markdown: for each row the mean over the seeds, with the least and the greatest, after some epochs."""
    epochs = sorted({min(epoch, len(runs[0])) for runs in accuracies.values() for epoch in SHOWN})
    heads = [f"after epoch {epoch}" for epoch in epochs]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name, runs in accuracies.items():
        cells = []
        for epoch in epochs:
            values = [run[epoch - 1] for run in runs]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows_of(accuracies: Accuracies) -> list[Row]:
    rows = []
    for name, runs in accuracies.items():
        mean = statistics.mean(run[-1] for run in runs)
        if name in ("Model 1", "Model 2", "Model 3", "Model 4"):
            rows.append(at_least(f"{name}: accuracy", mean, "", 0.9))
        elif name.startswith("average pool"):
            rows.append(at_most(f"{name}: accuracy (chance {CHANCE})", mean, "", CHANCE + 0.1))
        else:
            rows.append(at_least(f"{name}: accuracy", mean, "", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for videos, models and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="some of the rows")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few videos, no targets")
    args = parser.parse_args()
    seeds, extra = (1, SMOKE) if args.smoke else (args.seeds, {})

    videos, start = args.output / "videos", args.output / "image_vit"
    counts = {"clips_per_class": 2, "test_clips_per_class": 2} if args.smoke else {"clips_per_class": 150}
    write_moving_shapes(videos, seed=0, **counts)
    if not (start / "config.json").exists():
        train_image_vit(start, *((64, 1) if args.smoke else (12000, 12)))
    jobs = {
        (name, seed): (args.output / name.replace(" ", "_").replace("`", "") / str(seed), {**arguments, **extra})
        for seed in range(seeds)
        for name, arguments in ROWS.items()
        if name in args.only
    }

    def run(job: tuple[str, int]) -> list[float]:
        folder, arguments = jobs[job]
        accuracies = finetune(folder, start, videos, arguments, job[1])
        print(f"{job[0]}, seed {job[1]}: {', '.join(f'{value:.3f}' for value in accuracies)}", flush=True)
        return accuracies

    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    accuracies = {name: [found[name, seed] for seed in range(seeds)] for name in args.only}
    print(f"\n{table(accuracies)}\n")
    rows = [Row(row.name, row.value, row.unit) for row in rows_of(accuracies)] if args.smoke else rows_of(accuracies)
    sys.exit(report(rows, args.json))


if __name__ == "__main__":
    main()
