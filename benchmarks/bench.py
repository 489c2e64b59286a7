"""The models, clips and timing that the sections of run.py share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Row, interleaved_seconds
from memory import PEAK_RESET
from peers import fetch_lucidrains

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.inference.onednn import has_bfloat16_units


VARIANTS = {
    "Model 1": "vivit-b-16x2",
    "Model 2": "vivit-b-16x2-fe",
    "Model 3": "vivit-b-16x2-fsa",
    "Model 4": "vivit-b-16x2-fdpa",
}
SMOKE = {
    "num_frames": 4,
    "image_size": 32,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


class Bench:
    """The settings of a run, and the rows that it gathers."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.sizes = SMOKE if args.smoke else {}
        self.is_smoke, self.is_quick = args.smoke, args.quick
        self.rounds = args.rounds or (1 if args.smoke else 3)
        self.repeats = 10 if self.device.type == "cuda" and not args.smoke else 1  # a GPU is done in milliseconds
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.lucidrains = None if args.no_download else fetch_lucidrains(args.peers)
        if self.lucidrains is None:
            why = "--no-download leaves it out" if args.no_download else "it could not be downloaded"
            self.skipped.append(f"lucidrains' ViViT: {why}")

    def config(self, name: str, **changes: Any) -> ViViTConfig:
        return ViViTConfig.from_preset(VARIANTS[name], **{**self.sizes, "num_labels": 400, **changes})

    def model(self, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> ViViTForVideoClassification:
        torch.manual_seed(0)
        return ViViTForVideoClassification(self.config(name, **changes)).to(self.device, dtype).eval()

    def clips(self, config: ViViTConfig, dtype: torch.dtype, batch: int = 1) -> torch.Tensor:
        shape = (batch, config.num_frames, 3, *config.frame_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, dtype)

    def timed(
        self, jobs: dict[str, Callable[[], Any]], rounds: int | None = None, warm_up: bool = True
    ) -> dict[str, list[float]]:
        def synchronised(job: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> None:
                for _ in range(self.repeats):
                    job()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        jobs = {name: synchronised(job) for name, job in jobs.items()}
        seconds = interleaved_seconds(jobs, rounds or self.rounds, warm_up)
        return {name: [time / self.repeats for time in times] for name, times in seconds.items()}

    def is_wanted(self, section: str, is_named: bool) -> bool:
        """Whether a section is to run; says why not where it is worth a word."""
        if section in ("memory", "growth") and self.device.type == "cpu" and not PEAK_RESET.exists():
            self.skipped.append(f"{section}: the peak of a process is known on Linux alone")
            return False
        if is_named:
            return True
        if section == "compiled" and self.is_smoke:  # a minute by itself, and tested elsewhere
            return False
        if section == "bfloat16" and self.device.type == "cpu" and not has_bfloat16_units() and not self.is_smoke:
            self.skipped.append("bfloat16: this CPU has no units for it, and emulates it (--only bfloat16 runs it)")
            return False
        return not (self.is_quick and section in ("batches", "compiled", "growth"))

    def add(self, row: Row) -> None:
        if self.is_smoke:
            row.target = row.passed = None
        self.rows.append(row)
        print(f"{row.name}: {row.value:g} {row.unit}", flush=True)
