"""
What unchanged time steps are worth: the timeline of a screen recording, with and without their tokens taken again.

    python benchmarks/screen_recording.py               ten minutes of video, a B/16x2 factorised encoder
    python benchmarks/screen_recording.py --small       the same with the widths of ViT-S, a quarter of the time
    python benchmarks/screen_recording.py --minutes 1   a shorter recording
    python benchmarks/screen_recording.py --smoke       one minute of video and a tiny model, to see that it runs

The recording is written first: 320 x 240 pixels, 10 frames a second, H.264. In every 20 seconds, a window moves over a
page of text for 2 seconds; then everything stands still. It is encoded twice: as screen recorders do, in real time, and
with x264's defaults, whose B-frames make still pictures flicker by a few grey levels. Each time is that of the command
`vivit-hf timeline` from the first frame on, without loading the model. Exits with 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measuring import Row, at_least, at_most, file_to_write, report
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor, inference
from vivit_hf.cli.app import app


RATE, HEIGHT, WIDTH = 10, 240, 320  # frames per second, pixels
PERIOD, MOVING = 20, 2  # seconds
ENCODINGS: dict[str, dict[str, str]] = {"real-time": {"preset": "ultrafast"}, "default": {}}  # of x264
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
# What is compared with encoding every step: the encoding of the recording and the threshold.
CASES = (("real-time", 0.0), ("default", 0.0), ("default", 1.0))


class TimedClassifier(inference.StreamingClassifier):
    """
    A classifier that the command takes for its own: it adds up the seconds from decoded frames to windows
    (normalisation, comparison, and the model), and keeps the logits.
    """

    latest: TimedClassifier
    every_step = False  # encodes every step, which the command has no option for

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, **({"unchanged_threshold": None} if self.every_step else {})})
        TimedClassifier.latest = self
        self.seconds, self.logits, self.start = 0.0, list[torch.Tensor](), time.perf_counter()

    def push_sampled(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        windows = super().push_sampled(*arguments)
        self.seconds += time.perf_counter() - start
        self.logits += [window.logits for window in windows]
        return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of the widths of ViT-S")
    parser.add_argument("--minutes", type=int, default=10, help="length of the recording; default: 10")
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=[*ENCODINGS], help="default: both")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    parser.add_argument("--smoke", action="store_true", help="a minute of video and a tiny model")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    args = parser.parse_args()
    if args.minutes < 1:
        parser.error(f"--minutes must be at least 1, got {args.minutes}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.mp4" for name in args.encodings}
        for name, path in paths.items():
            write_recording(path, 1 if args.smoke else args.minutes, ENCODINGS[name])
        save_model(Path(folder), args.smoke, args.small)
        rows = measure(Path(folder), paths, args.dtype, has_target=not args.smoke)
    sys.exit(report(rows, args.json))


def write_recording(path: Path, minutes: int, options: dict[str, str]) -> None:
    """Write the recording of a screen: a page of text a period, over which a window moves at first."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(minutes * 60 * RATE):
            second, part = divmod(number / RATE, PERIOD)[::-1]
            if number % (PERIOD * RATE) == 0:
                page = draw_page(rng, int(part))
            picture = page.copy()
            place = int(100 * min(second, MOVING) / MOVING)
            ImageDraw.Draw(picture).rectangle((40 + place, 60, 140 + place, 130), fill="navy", outline="black", width=3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


def draw_page(rng: np.random.Generator, number: int) -> Image.Image:
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, WIDTH, 18), fill="steelblue")
    draw.text((8, 4), f"Page {number + 1}", fill="white")
    for top in range(28, HEIGHT - 12, 14):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz   "), int(rng.integers(20, 48)))
        draw.text((12, top), "".join(letters), fill="black")
    return page


def save_model(folder: Path, is_smoke: bool, is_small: bool) -> None:
    widths = SMALL if is_small else {}
    config = ViViTConfig.from_preset("vivit-tiny" if is_smoke else "vivit-b-16x2-fe", num_labels=400, **widths)
    ViViTForVideoClassification(config).save_pretrained(folder)
    side = config.frame_size[0]
    processor = ViViTVideoProcessor(num_frames=config.num_frames, size={"shortest_edge": side}, crop_size=side)
    processor.save_pretrained(folder)


def measure(folder: Path, paths: dict[str, Path], dtype: str, has_target: bool) -> list[Row]:
    inference.StreamingClassifier = TimedClassifier  # type: ignore[misc]
    rows: list[Row] = []

    def run(encoding: str, threshold: float | None) -> TimedClassifier:
        """Run the command on a recording; None encodes every step."""
        TimedClassifier.every_step = threshold is None
        options = ["--model", folder, "--dtype", dtype, "--json", "--unchanged-threshold", threshold or 0.0]
        result = CliRunner().invoke(app, [str(one) for one in ("timeline", paths[encoding], *options)])
        stream, end = TimedClassifier.latest, time.perf_counter()
        if result.exit_code != 0:
            sys.exit(f"vivit-hf timeline failed: {result.stderr}")
        name = f"{encoding}, threshold {threshold}"
        rows.append(Row(f"{name}: decoding", round(end - stream.start - stream.seconds, 2), "s"))
        rows.append(Row(f"{name}: model, normalisation and comparison", round(stream.seconds, 2), "s"))
        return stream

    first = next(iter(paths))
    plain = run(first, None)
    for encoding, threshold in CASES:
        if encoding not in paths:
            continue
        stream = run(encoding, threshold)
        target = 5.0 if has_target and encoding == "real-time" else None
        name, ratio = f"{encoding}, threshold {threshold}", plain.seconds / stream.seconds
        rows.append(at_least(f"{name}: speed of the model's part over encoding every step", ratio, "x", target))
        rows.append(Row(f"{name}: steps encoded of {plain.reuse.num_encoded:,}", stream.reuse.num_encoded, ""))
        if threshold:
            rows.append(Row(f"{name}: windows computed both ways", stream.reuse.num_checked_windows, ""))
            rows.append(Row(f"{name}: largest change of a probability", stream.reuse.largest_change, ""))
        elif encoding == first:
            change = float((torch.stack(plain.logits) - torch.stack(stream.logits)).abs().max())
            rows.append(at_most(f"{name}: largest difference of a logit", change, "", 1e-4))
    return rows


if __name__ == "__main__":
    main()
