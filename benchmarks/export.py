"""
How fast exported models are in their runtimes, compared with PyTorch and with each other, one clip at a time.

    python benchmarks/export.py --size s               ViT-S/16x2, 16 x 224 x 224: a few minutes
    python benchmarks/export.py --size b --json rows.json
    python benchmarks/export.py --smoke                tiny sizes: shows that it runs, and measures nothing

All candidates of a model take turns, and each ratio compares runs of the same round. The weights are random, which says
nothing about the outputs: this measures the speed alone. OpenVINO is left out if it is not installed.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from bench import SMOKE
from measuring import Row, at_least, at_most, file_to_write, interleaved_seconds, median_ratio, report

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.conversion import onnx_int8, onnx_models
from vivit_hf.conversion.command import DEFAULT_OPSET
from vivit_hf.inference import optimize
from vivit_hf.inference.onednn import has_bfloat16_units, has_vnni


PRESETS = {"Model 1": "vivit-b-16x2", "Model 2": "vivit-b-16x2-fe"}
SIZES: dict[str, dict[str, int]] = {
    "s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_frames": 16},
    "b": {"num_frames": 32},
}
BASELINE = "int8, scales at run time"

Job = Callable[[], Any]


class Candidates:
    """The files and runtimes that are timed for one model."""

    def __init__(self, name: str, size: str, folder: Path, is_smoke: bool):
        self.folder, self.preset = folder, PRESETS[name]
        self.sizes = SMOKE if is_smoke else SIZES[size]
        config = self.model().config
        shape = (1, config.num_frames, config.num_channels, *config.frame_size)
        self.clip = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def model(self) -> ViViTForVideoClassification:
        torch.manual_seed(0)
        config = ViViTConfig.from_preset(self.preset, **{**self.sizes, "num_labels": 400})
        return ViViTForVideoClassification(config).eval().requires_grad_(False)

    def all(self) -> Iterator[tuple[str, Job]]:
        model = self.model()
        graph, at_run_time, fixed = (self.folder / f"{name}.onnx" for name in ("f32", "dynamic", "static"))
        onnx_models.write_onnx(model, graph, DEFAULT_OPSET)
        onnx_int8.write_dynamic_int8(graph, at_run_time)
        onnx_int8.write_static_int8(graph, fixed, onnx_int8.static_scales(model, [self.clip])[0])
        names = {"float32": graph, BASELINE: at_run_time, "int8, fixed scales": fixed}
        for words, path in names.items():
            yield f"onnxruntime, {words}", self.in_onnxruntime(path)
        yield from self.in_openvino({"float32": graph, "int8, fixed scales": fixed})
        yield from self.in_pytorch()

    def in_onnxruntime(self, path: Path) -> Job:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"pixel_values": self.clip.numpy()})

    def in_openvino(self, graphs: dict[str, Path]) -> Iterator[tuple[str, Job]]:
        try:
            import openvino
        except ModuleNotFoundError:
            return
        for words, path in graphs.items():
            for precision in ("f32", "bf16"):
                options = {
                    "INFERENCE_PRECISION_HINT": precision,
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                }
                compiled = openvino.Core().compile_model(path, "CPU", options)
                yield f"OpenVINO, {words}, the rest {precision}", partial(compiled, [self.clip.numpy()])

    def in_pytorch(self) -> Iterator[tuple[str, Job]]:
        ways: dict[str, dict[str, Any]] = {"float32": {}}
        if has_bfloat16_units():
            ways["bfloat16"] = {"dtype": torch.bfloat16}
        if has_bfloat16_units() and has_vnni():
            ways["int8 and bfloat16"] = {"dtype": torch.bfloat16, "int8": True, "calibration": [self.clip]}
        for words, options in ways.items():
            model = self.model()
            optimize(model, **options)
            yield f"PyTorch, optimised, {words}", lambda model=model: model(self.clip.to(model.dtype)).logits


def measure(candidates: Candidates, name: str, rounds: int) -> Iterator[Row]:
    jobs = dict(candidates.all())
    with torch.inference_mode():
        seconds = interleaved_seconds(jobs, rounds)
    for job, times in seconds.items():
        yield at_most(f"{name}, {job}: latency", statistics.median(times) * 1000, "ms", None)
        speed = median_ratio(seconds[f"onnxruntime, {BASELINE}"], times)
        yield at_least(f"{name}, {job}: speed over {BASELINE}", speed, "x", None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=file_to_write, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for name in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            candidates = Candidates(name, args.size, Path(folder), args.smoke)
            for row in measure(candidates, name, args.rounds):
                print(f"{row.name}: {row.value:g} {row.unit}", flush=True)
                rows.append(row)
    return report(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
