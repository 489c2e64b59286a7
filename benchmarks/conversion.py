"""
Time and memory of the conversion scripts, on random weights in the exact layouts of the published files.

    python benchmarks/conversion.py [--json rows.json] [--only TEXT] [--large-scenic]

Each conversion runs as a user runs it: a process of its own, parity check included. Needs about 4 GB of free disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from measuring import Row, at_most, file_to_write, report


ROOT = Path(__file__).resolve().parent.parent
VARIANTS = (
    "spatio_temporal",
    "factorised_encoder",
    "factorised_self_attention",
    "factorised_dot_product_attention",
)
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE_SECONDS, BASE_GIGABYTES, LARGE_GIGABYTES = 20.0, 2.5, 6.0


@dataclass
class Case:
    name: str
    source: str
    script: str
    arguments: list[str]
    seconds: float | None
    gigabytes: float | None


def cases(sources: Path, large_scenic: bool) -> Iterator[Case]:
    vit = "convert_vit_checkpoint.py"
    for size, variants, seconds, gigabytes in (
        ("b16", VARIANTS, BASE_SECONDS, BASE_GIGABYTES),
        ("l16", ("factorised_encoder", "factorised_self_attention"), None, LARGE_GIGABYTES),
    ):
        for variant in variants:
            arguments = ["--source", str(sources / size), "--attention-type", variant]
            yield Case(f"ViT-{size} -> {variant}", size, vit, arguments, seconds, gigabytes)
    native = ["--source", str(sources / "native")]
    yield Case("transformers' Vivit-B", "native", "convert_transformers_vivit.py", native, None, BASE_GIGABYTES)
    releases = [("vivit-b-16x2-fe-kinetics400", BASE_GIGABYTES)]
    if large_scenic:
        releases.append(("vivit-l-16x2-fe-kinetics400", LARGE_GIGABYTES))
    for release, gigabytes in releases:
        arguments = ["--checkpoint", str(sources / release), "--model", release]
        yield Case(f"scenic {release}", release, "convert_scenic_checkpoint.py", arguments, None, gigabytes)


# Sources


def write_source(name: str, path: Path) -> None:
    """Random weights in the layout of google/vit-*-patch16-224-in21k, google/vivit-b-16x2-kinetics400, or scenic."""
    from transformers import ViTConfig, ViTModel, VivitConfig, VivitForVideoClassification

    if name.startswith("vivit-"):
        write_scenic_checkpoint(path, **(LARGE if "-l-" in name else BASE), temporal_layers=24 if "-l-" in name else 4)
    elif name == "native":
        VivitForVideoClassification(VivitConfig(num_labels=400)).save_pretrained(path)
    else:
        ViTModel(ViTConfig(**(BASE if name == "b16" else LARGE))).save_pretrained(path)


def write_scenic_checkpoint(
    path: Path,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    temporal_layers: int,
) -> None:
    """A factorised encoder for Kinetics-400 as flax writes it: nested maps, arrays in msgpack's extension type 1."""
    width, heads = hidden_size, num_attention_heads
    norm = {"scale": (width,), "bias": (width,)}
    to_heads = {"kernel": (width, heads, width // heads), "bias": (heads, width // heads)}
    block = {
        "LayerNorm_0": norm,
        "LayerNorm_1": norm,
        "MultiHeadDotProductAttention_0": {
            **dict.fromkeys(("query", "key", "value"), to_heads),
            "out": {"kernel": (heads, width // heads, width), "bias": (width,)},
        },
        "MlpBlock_0": {
            "Dense_0": {"kernel": (width, intermediate_size), "bias": (intermediate_size,)},
            "Dense_1": {"kernel": (intermediate_size, width), "bias": (width,)},
        },
    }

    def encoder(layers: int, positions: int) -> dict[str, Any]:
        blocks = {f"encoderblock_{index}": block for index in range(layers)}
        return {**blocks, "encoder_norm": norm, "posembed_input": {"pos_embedding": (1, positions, width)}}

    target = {
        "embedding": {"kernel": (2, 16, 16, 3, width), "bias": (width,)},
        "cls_SpatialTransformer": (1, 1, width),
        "cls_TemporalTransformer": (1, 1, width),
        "SpatialTransformer": encoder(num_hidden_layers, 1 + 14 * 14),
        "TemporalTransformer": encoder(temporal_layers, 1 + 16),
        "output_projection": {"kernel": (width, 400), "bias": (400,)},
    }
    with open(path, "wb") as file:
        _write_tree(file, {"optimizer": {"target": target}}, np.random.default_rng(0))


def _write_tree(file: BinaryIO, tree: Any, random: np.random.Generator) -> None:
    if isinstance(tree, dict):
        file.write(msgpack.Packer().pack_map_header(len(tree)))
        for name, value in tree.items():
            file.write(msgpack.packb(name))
            _write_tree(file, value, random)
    else:
        array = random.standard_normal(tree, dtype=np.float32) * np.float32(0.02)
        file.write(msgpack.packb(msgpack.ExtType(1, msgpack.packb([tree, "float32", array.tobytes()]))))


# Measuring


def measure(case: Case, output: Path) -> list[Row]:
    """Wall time, processor time (which other work on the machine leaves alone) and peak resident memory."""
    command = [sys.executable, str(ROOT / "conversion" / case.script), *case.arguments, "--output", str(output)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{case.name} ended with {process.returncode}:\n{printed}")
    gigabytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return [
        at_most(f"{case.name}: time", seconds, "s", case.seconds),
        at_most(f"{case.name}: processor time", usage.ru_utime + usage.ru_stime, "s", None),
        at_most(f"{case.name}: peak memory", gigabytes, "GB", case.gigabytes),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="also write the rows to this file")
    parser.add_argument("--only", metavar="TEXT", help="only the cases with this text in their name")
    parser.add_argument("--large-scenic", action="store_true", help="also the largest official model (2.4 GB)")
    args = parser.parse_args(argv)

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = [case for case in cases(folder, args.large_scenic) if not args.only or args.only in case.name]
        if not wanted:
            parser.error(f"no case has {args.only!r} in its name")
        for index, case in enumerate(wanted):
            source = folder / case.source
            if not source.exists():
                _write_in_own_process(case.source, source)
            print(f"[{index + 1}/{len(wanted)}] {case.name}", file=sys.stderr)
            output = folder / "output"
            rows += measure(case, output)
            shutil.rmtree(output)

    return report(rows, args.json)


def _write_in_own_process(name: str, path: Path) -> None:
    """`write_source`; here its memory would count for the conversions, whose peak starts from their parent's."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import conversion, pathlib; "
    code += "conversion.write_source(sys.argv[2], pathlib.Path(sys.argv[3]))"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), name, str(path)]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
