"""
What keeping the tokens of a window is worth: steps of a stream against the whole model on every window.

    python benchmarks/streaming.py            a B/16x2 factorised encoder, hops of 2, 8 and 3 frames; about two minutes
    python benchmarks/streaming.py --smoke    a tiny one, to see that it runs

The jobs take turns, ratios are taken within a round. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys

import psutil
import torch
from measuring import Row, at_least, at_most, file_to_write, interleaved_seconds, median_ratio, report

from vivit_hf import StreamingClassifier, ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor


STEPS = 8  # hops that a job takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    torch.manual_seed(0)
    rows: list[Row] = []
    for hop in (2, 8, 3):
        rows += measure(hop, args)
    rows.append(measure_memory(args.smoke))
    sys.exit(report(rows, args.json))


def build(is_smoke: bool) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    config = ViViTConfig.from_preset("vivit-tiny" if is_smoke else "vivit-b-16x2-fe", num_labels=400)
    side = config.frame_size[0]
    processor = ViViTVideoProcessor(
        num_frames=config.num_frames, frame_stride=1, size={"shortest_edge": side}, crop_size=side
    )
    return ViViTForVideoClassification(config).eval(), processor


def measure(hop: int, args: argparse.Namespace) -> list[Row]:
    model, processor = build(args.smoke)
    side, steps = model.config.frame_size[0], 1 if hop > 2 else STEPS
    stream = StreamingClassifier(model, processor, hop=hop)
    frames = torch.randint(0, 256, (hop * steps, side, side, 3), dtype=torch.uint8)
    stream.push(torch.randint(0, 256, (model.config.num_frames + hop, side, side, 3), dtype=torch.uint8))
    clip = torch.randn(1, model.config.num_frames, 3, side, side)

    def step() -> None:
        for start in range(0, len(frames), hop):
            if len(stream.push(frames[start : start + hop])) != 1:
                raise RuntimeError("a hop gives one window")

    @torch.inference_mode()
    def whole() -> None:
        model(clip)

    seconds = interleaved_seconds({"stream": step, "whole": whole}, args.rounds)
    ratio = steps * median_ratio(seconds["whole"], seconds["stream"])
    cost = f"{stream.tubelets_per_window} of {model.config.grid_size[0]} tubelets"
    target = 8.0 if hop == 2 and not args.smoke else None
    return [at_least(f"hop {hop} ({cost}): steps per second over the whole model's", ratio, "x", target)]


def measure_memory(is_smoke: bool) -> Row:
    """A tiny model, since what is kept is frames and tokens of one window, whatever the model."""
    model, processor = build(True)
    stream = StreamingClassifier(model, processor)
    frames = torch.randint(0, 256, (50, 64, 64, 3), dtype=torch.uint8)
    process, held = psutil.Process(), []
    for _ in range(10 if is_smoke else 200):
        stream.push(frames)
        held.append(process.memory_info().rss / 1e6)
    half = len(held) // 2
    grown = max(held[half:]) - max(held[:half])
    return at_most(
        f"growth of memory in the second half of {stream.num_frames_seen:,} frames",
        grown,
        "MB",
        None if is_smoke else 5.0,
    )


if __name__ == "__main__":
    main()
