"""
The cost of a step of `examples/finetune.py` over the same step written by hand, in CPU seconds.

    python benchmarks/training_step.py            a ViT-S on 8 clips of 8 frames of 56 x 56; about five minutes
    python benchmarks/training_step.py --smoke    a tiny model, to see that it runs

Both train on clips that are in memory, so decoding and augmentation do not count. Model, optimiser, batches and
clipping of gradients are the same; what is left is the trainer. The two take turns, ratios are taken within a round.
Exits with 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from measuring import Row, at_most, file_to_write, median_ratio, report
from torch.utils.data import Dataset
from transformers import TrainerCallback

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.training.finetuning import make_trainer
from vivit_hf.training.finetuning_data import Splits
from vivit_hf.training.finetuning_parser import parse_arguments
from vivit_hf.training.parameters import parameter_groups


TARGET = 1.15
BATCH, FRAMES, SIDE = 8, 8, 56
WARM_UP = 2  # steps that do not count
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
SMOKE_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NAMES = tuple("abcdefgh")


class ClipsInMemory(Dataset):
    """The items of `VideoClips` in training, without decoding and augmentation."""

    def __init__(self, num_clips: int):
        generator = torch.Generator().manual_seed(0)
        self.clips = torch.randn(num_clips, FRAMES, 3, SIDE, SIDE, generator=generator)
        self.targets = [torch.tensor(index % len(NAMES)) for index in range(num_clips)]

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        common = {"index": index, "epoch": 0, "file": f"{index}.mp4", "damaged_files": []}
        return {"pixel_values": self.clips[index], "labels": self.targets[index], **common}


class CpuClock(TrainerCallback):
    """CPU seconds of this process between the first step that counts and the last."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end = time.process_time()
        if state.global_step == WARM_UP:
            self.start = self.end


def under_the_script(model: ViViTForVideoClassification, data: ClipsInMemory, steps: int, folder: str) -> float:
    """CPU seconds of `steps` steps of the trainer that finetune.py makes."""
    argv = f"--output_dir {folder} --use_cpu --max_steps {steps + WARM_UP} --per_device_train_batch_size {BATCH}"
    argv += " --dataloader_num_workers 0 --eval_strategy no --save_strategy no --report_to none --disable_tqdm true"
    arguments = parse_arguments(argv.split())
    videos = [LabelledVideo(f"{index}.mp4", (NAMES[index % len(NAMES)],), "memory") for index in range(len(data))]
    splits = Splits(videos, None, LabelMap({"": NAMES}))
    processor = ViViTVideoProcessor(num_frames=FRAMES, size={"shortest_edge": SIDE}, crop_size=SIDE)
    trainer, _ = make_trainer(arguments, splits, model, processor, print)
    trainer.train_dataset, clock = data, CpuClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.end - clock.start


def by_hand(model: ViViTForVideoClassification, data: ClipsInMemory, steps: int) -> float:
    """CPU seconds of `steps` steps with the optimiser and the learning rate that finetune.py has by default."""
    order = np.random.default_rng(0).permutation(
        np.tile(np.arange(len(data)), 1 + (steps + WARM_UP) * BATCH // len(data))
    )
    groups = parameter_groups(model, 5e-5, 0.0)
    optimizer, parameters = torch.optim.AdamW(groups, fused=True), list(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + WARM_UP))
    model.train()
    start = 0.0
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            start = time.process_time()
        items = [data[index] for index in order[step * BATCH :][:BATCH]]
        clips, labels = (torch.stack([item[name] for item in items]) for name in ("pixel_values", "labels"))
        model(clips, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - start


def measure(steps: int, rounds: int, is_smoke: bool) -> Row:
    sizes = SMOKE_SIZES if is_smoke else SIZES
    config = ViViTConfig(
        attention_type="factorised_encoder",
        num_frames=FRAMES,
        image_size=SIDE,
        tubelet_size=(2, 14, 14),
        id2label=dict(enumerate(NAMES)),
        problem_type="single_label_classification",
        **sizes,
    )
    torch.manual_seed(0)
    model, data = ViViTForVideoClassification(config), ClipsInMemory(4 * BATCH)
    ours, theirs = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(under_the_script(copy.deepcopy(model), data, steps, folder))
        theirs.append(by_hand(copy.deepcopy(model), data, steps))
    print(f"CPU seconds per step: finetune.py {min(ours) / steps:.3f}, by hand {min(theirs) / steps:.3f}")
    ratio = median_ratio(ours, theirs)
    return at_most("a step under finetune.py over the same step by hand, CPU", ratio, "x", None if is_smoke else TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="that count, in each round")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    args = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(1)  # threads that wait for each other would be counted as work
    sys.exit(report([measure(args.steps, args.rounds, args.smoke)], args.json))


if __name__ == "__main__":
    main()
