"""
How fast the models are: against the machine's own matrix products, and against the peers, all in one run.

    python benchmarks/run.py --quick            every figure that has a target, 25 minutes on 2 cores
    python benchmarks/run.py                    all of it, with batches, frames and resolutions
    python benchmarks/run.py --device cuda      the same on a GPU
    python benchmarks/run.py --smoke            tiny sizes, a minute: shows that it runs, and measures nothing

The jobs of a section take turns, figures are medians over the rounds, and ratios are taken within a round. A model's
share of the limit is its counted multiply-adds over its time, divided by the rate of the machine's matrix product (a
linear layer of the model's own shape, in the same dtype and run). On a GPU that share is its model FLOPs utilisation.

Writes rows.json, table.md and figures.png into --output. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import VARIANTS, Bench
from cheaper import measure_cheaper
from figures import draw_figures
from measuring import (
    at_least,
    at_most,
    file_to_write,
    interleaved_seconds,
    median_ratio,
    report,
    write_markdown,
    write_rows,
)
from memory import peak_megabytes
from peers import PlainViViT, lucidrains_vivit, transformers_vivit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vivit_hf import ViViTConfig, ViViTForVideoClassification, demo_model_path
from vivit_hf.inference import optimize
from vivit_hf.inference.onednn import has_bfloat16_units
from vivit_hf.inference.tensor_memory import peak_of_tensors


# At batch 1. Of the plain model only the speed over peers in float32 has a target.
PLAIN_SPEED_TARGETS = {("float32", "Model 1"): 1.12, ("float32", "Model 2"): 0.97}
SPEED_TARGETS = {("float32", "Model 1"): 1.35, ("bfloat16", "Model 1"): 1.55, ("float32", "Model 2"): 1.1}
SHARE_TARGETS = {
    "float32": dict.fromkeys(VARIANTS, 0.85),
    "bfloat16": {"Model 1": 0.71, "Model 2": 0.85, "Model 3": 0.87, "Model 4": 0.88},
}
MEMORY_TARGETS = {"Model 1": 450, "Model 2": 300, "Model 3": 300, "Model 4": 300}  # MB at batch 1, float32


def multiply_adds(config: ViViTConfig, is_optimised: bool = False) -> float:
    """Count those of one clip on the model as it runs, attention included, without computing anything."""
    config = ViViTConfig.from_dict({**config.to_dict()})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = ViViTForVideoClassification(config).eval()
        clips = torch.empty(1, config.num_frames, 3, *config.frame_size)
    if is_optimised:
        optimize(model)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(clips)
    return counter.get_total_flops() / 2


def limit_job(bench: Bench, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """The matrix product of an MLP of Model 1, there and back, and its multiply-adds."""
    config = bench.config("Model 1")
    time, height, width = config.grid_size
    tokens, hidden, inner = time * height * width, config.hidden_size, config.intermediate_size
    x, y = (torch.randn(tokens, size, device=bench.device, dtype=dtype) for size in (hidden, inner))
    up, down = (torch.randn(shape, device=bench.device, dtype=dtype) for shape in ((inner, hidden), (hidden, inner)))

    def job() -> None:
        for _ in range(4):
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(y, down)

    return job, 8.0 * tokens * hidden * inner


@torch.inference_mode()
def measure_inference(bench: Bench, dtype: torch.dtype, batch: int = 1) -> None:
    """
    Measure every variant, plain and optimised: latency, share of the limit, and speed over the peers.

    What is compared runs side by side, the limit included: the rate of a shared machine changes within minutes.
    """
    word = str(dtype).removeprefix("torch.")
    limit, limit_count = limit_job(bench, dtype)
    prefix, rates = f"{word}, batch {batch}: ", []
    for name in VARIANTS:
        model, faster = bench.model(name, dtype), bench.model(name, dtype)
        print(optimize(faster), flush=True)
        clip = bench.clips(model.config, dtype, batch)
        jobs: dict[str, Callable[[], Any]] = {"limit": limit}
        jobs["plain"] = lambda model=model, clip=clip: model(clip).logits
        jobs["optimised"] = lambda faster=faster, clip=clip: faster(clip).logits
        if name == "Model 1":
            native = transformers_vivit(model).to(bench.device, dtype)
            jobs["transformers' Vivit"] = lambda native=native, clip=clip: native(clip).logits
        elif name in ("Model 2", "Model 3") and bench.lucidrains is not None:
            peer = lucidrains_vivit(bench.lucidrains, model.config).to(bench.device, dtype)
            video = clip.transpose(1, 2).contiguous()
            jobs["lucidrains'"] = lambda peer=peer, video=video: peer(video)
        copy = PlainViViT(model)
        jobs["the plain copy"] = lambda copy=copy, clip=clip: copy(clip)
        seconds = bench.timed(jobs)

        rates += [limit_count / time for time in seconds["limit"]]
        for line in ("plain", "optimised"):
            count = batch * multiply_adds(model.config, line == "optimised") / limit_count
            add_line(bench, word, batch, name, line, seconds, count)
        ratio = median_ratio(seconds["plain"], seconds["optimised"])
        bench.add(at_least(f"{prefix}{name} optimised, speed over plain", ratio, "x", None))
    bench.add(at_least(f"{prefix}matrix product (the limit)", statistics.median(rates) / 1e9, "GMAC/s", None))


def add_line(
    bench: Bench, word: str, batch: int, name: str, line: str, seconds: dict[str, list[float]], count: float
) -> None:
    """Add the figures of one variant, plain or optimised; `count` are its multiply-adds over those of the limit."""
    what = f"{word}, batch {batch}: {name} {line}"
    is_optimised = line == "optimised"
    time = statistics.median(seconds[line])
    spread = (max(seconds[line]) - min(seconds[line])) / time
    bench.add(at_most(f"{what}, latency", time * 1000, "ms", None))
    bench.add(at_most(f"{what}, spread of the latency", spread, "", None))
    if batch > 1:
        bench.add(at_least(f"{what}, throughput", batch / time, "clips/s", None))
    share_target = SHARE_TARGETS[word][name] if is_optimised and batch == 1 else None
    share = count * median_ratio(seconds["limit"], seconds[line])
    bench.add(at_least(f"{what}, share of the limit", share, "", share_target))
    speed_targets = SPEED_TARGETS if is_optimised else PLAIN_SPEED_TARGETS
    for other in [one for one in seconds if one not in ("limit", "plain", "optimised")]:
        is_peer = batch == 1 and other != "the plain copy"
        target = speed_targets.get((word, name)) if is_peer else None
        bench.add(at_least(f"{what}, speed over {other}", median_ratio(seconds[other], seconds[line]), "x", target))


def training_step(model: torch.nn.Module, clips: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = model(pixel_values=clips, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure_training(bench: Bench) -> None:
    """A step of Model 1 and of transformers', and what checkpointing costs and saves."""
    ours = bench.model("Model 1").train()
    native = transformers_vivit(ours).to(bench.device).train()
    clips, labels = bench.clips(ours.config, torch.float32), torch.tensor([0], device=bench.device)
    step = training_step(ours, clips, labels)

    def set_checkpointing(is_on: bool) -> None:
        for module in ours.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = is_on

    def plain() -> None:
        set_checkpointing(False)
        step()

    def checkpointed() -> None:
        set_checkpointing(True)
        step()

    # The two names of it in older and newer transformers.
    enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    names = ["transformers", "Model 1", "Model 1, checkpointing"]
    jobs = dict(zip(names, (training_step(native, clips, labels), plain, checkpointed), strict=True))
    for parameter in (*ours.parameters(), *native.parameters()):
        parameter.grad = torch.zeros_like(parameter)  # there from now on, so that gradients do not count below
    memory = {name: peak_of_tensors(bench.device, job) for name, job in jobs.items()}
    seconds = bench.timed(jobs, rounds=min(bench.rounds, 2), warm_up=False)
    prefix = "float32, training step: "
    for name in names:
        bench.add(at_most(f"{prefix}{name}, time", statistics.median(seconds[name]), "s", None))
        bench.add(at_most(f"{prefix}{name}, peak of tensors", memory[name], "MB", None))
    ratio = median_ratio(seconds["transformers"], seconds["Model 1"])
    bench.add(at_least(f"{prefix}Model 1, speed over transformers'", ratio, "x", 1.1))
    ratio = memory["Model 1"] / max(memory["transformers"], 1)
    bench.add(at_most(f"{prefix}Model 1, memory over transformers'", ratio, "x", 1.0))
    saved = 1 - memory["Model 1, checkpointing"] / max(memory["Model 1"], 1)
    bench.add(at_least(f"{prefix}memory that checkpointing saves", saved, "", 0.6))
    slower = median_ratio(seconds["Model 1, checkpointing"], seconds["Model 1"]) - 1
    bench.add(at_most(f"{prefix}time that checkpointing adds", slower, "", 0.35))


def print_growth(name: str, sizes: dict[str, Any], device: str, rounds: int) -> None:
    """In a process of its own, whose memory nothing else has touched: memory and seconds of an inference as JSON."""
    settings = argparse.Namespace(device=device, smoke=False, quick=False, rounds=rounds, no_download=True, peers=None)
    bench = Bench(settings)
    bench.sizes = sizes
    model = bench.model(name)
    clip = bench.clips(model.config, torch.float32)
    with torch.inference_mode():
        grown = peak_megabytes(bench.device, lambda: model(clip))
        seconds = bench.timed({"model": lambda: model(clip)}, warm_up=False)["model"] if rounds else [0.0]
    print(json.dumps({"megabytes": grown, "seconds": statistics.median(seconds)}))


def _growth(bench: Bench, name: str, rounds: int, **changes: Any) -> dict[str, float]:
    sizes = {**bench.sizes, **changes}
    code = f"import run; run.print_growth({name!r}, {sizes!r}, {str(bench.device)!r}, {rounds})"
    return json.loads(_in_a_process(code))


def _in_a_process(code: str) -> str:
    """What the code prints, in a fresh process that finds these files."""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    return process.stdout.strip().splitlines()[-1]


def measure_memory(bench: Bench) -> None:
    for name, target in MEMORY_TARGETS.items():
        grown = _growth(bench, name, rounds=0)["megabytes"]
        bench.add(at_most(f"float32, batch 1: {name}, growth of memory", grown, "MB", target))


def measure_start(bench: Bench, folder: Path) -> None:
    """Measure imports against transformers' own model, loading against reading bytes, and the first answer."""
    auto_classes = "AutoModelForVideoClassification, AutoImageProcessor, AutoModel, AutoConfig"
    imports = {
        "ours": "from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor; "
        f"from transformers import {auto_classes}",
        "transformers'": f"from transformers import VivitForVideoClassification, VivitImageProcessor, {auto_classes}",
        "base class": "from transformers import PreTrainedModel",
    }
    jobs = {name: lambda code=code: _in_a_process(f"{code}; print()\nprint(0)") for name, code in imports.items()}
    sample = demo_model_path() / "samples" / "up_left.mp4"
    command = [sys.executable, "-m", "vivit_hf", "classify", str(sample), "--json"]
    jobs["answer"] = lambda: subprocess.run(command, check=True, capture_output=True)
    seconds = interleaved_seconds(jobs, 1 if bench.is_smoke else 5)
    ratio = median_ratio(seconds["ours"], seconds["transformers'"])
    bench.add(at_most("import of the model and processor over transformers' own", ratio, "x", 1.1))
    # Importing PreTrainedModel is what no answer of any transformers model can do without.
    ratio = median_ratio(seconds["answer"], seconds["base class"])
    bench.add(at_most("vivit-hf classify: first answer over import of PreTrainedModel", ratio, "x", 1.25))
    bench.add(
        at_most("vivit-hf classify: first answer of the demo model", statistics.median(seconds["answer"]), "s", 4)
    )

    saved = folder / "model"
    bench.model("Model 2").cpu().save_pretrained(saved)
    rounds = 1 if bench.is_smoke else 5
    ratio = float(_in_a_process(f"import run; run.print_loading({str(saved)!r}, {rounds})"))
    bench.add(at_most("from_pretrained over reading the bytes", ratio, "x", 1.3))


def print_loading(folder: str, rounds: int) -> None:
    """In a process of its own, as a user loads a model: seconds of `from_pretrained` over those of reading the file."""

    def read() -> None:
        for path in Path(folder).glob("*.safetensors"):
            path.read_bytes()

    jobs = {"read": read, "load": lambda: ViViTForVideoClassification.from_pretrained(folder)}
    seconds = interleaved_seconds(jobs, rounds)
    print(median_ratio(seconds["load"], seconds["read"]))


def measure_growth(bench: Bench) -> None:
    """Time and memory with frames and with resolution, beside what multiply-adds and tokens say."""
    base_frames, base_size = (4, 32) if bench.is_smoke else (32, 224)
    frames = (2, 4) if bench.is_smoke else (8, 16, 32, 64, 128)
    sizes = (32,) if bench.is_smoke else (160, 224, 288)
    settings = [(base_frames, base_size)]  # first: all others are compared with it
    settings += [(count, base_size) for count in frames if count != base_frames]
    settings += [(base_frames, size) for size in sizes if size != base_size]
    for name in VARIANTS:
        base: dict[str, float] = {}
        for num_frames, size in settings:
            changes = {"num_frames": num_frames, "image_size": size}
            found = _growth(bench, name, rounds=1, **changes)
            found["multiply-adds"] = multiply_adds(bench.config(name, **changes))
            base = base or found
            what = f"float32, {name}, {num_frames} frames of {size}: "
            over = f"over that of {base_frames} of {base_size}"
            for figure, quantity in (("time", "seconds"), ("multiply-adds", "multiply-adds")):
                bench.add(at_most(f"{what}{figure} {over}", found[quantity] / base[quantity], "x", None))
            bench.add(at_most(f"{what}growth of memory", found["megabytes"], "MB", None))


@contextlib.contextmanager
def _flash_only() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


@torch.inference_mode()
def measure_compiled(bench: Bench) -> None:
    """Every variant as it is, compiled, and on a GPU with the flash kernel alone and with CUDA graphs."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    limit, limit_count = limit_job(bench, dtype)
    ways: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"mode": "default"}}
    if bench.device.type == "cuda":
        ways |= {"flash attention": {}, "compiled, CUDA graphs": {"mode": "reduce-overhead"}}
    else:
        bench.skipped.append("flash attention by itself and CUDA graphs: they need --device cuda")
    for name in VARIANTS:
        model = bench.model(name, dtype)
        clip = bench.clips(model.config, dtype)
        jobs: dict[str, Callable[[], Any]] = {"limit": limit}
        for way, options in ways.items():
            run = torch.compile(model, **options) if options else model
            context = _flash_only if way == "flash attention" else contextlib.nullcontext

            def job(run: Any = run, context: Any = context, clip: torch.Tensor = clip) -> None:
                with context():
                    run(clip)

            jobs[way] = job
        seconds = bench.timed(jobs)
        prefix = f"{str(dtype).removeprefix('torch.')}, batch 1: {name}, "
        for way in ways:
            bench.add(at_most(f"{prefix}{way}: latency", statistics.median(seconds[way]) * 1000, "ms", None))
            share = multiply_adds(model.config) * median_ratio(seconds["limit"], seconds[way]) / limit_count
            bench.add(at_least(f"{prefix}{way}: share of the limit", share, "", None))
            bench.add(
                at_least(f"{prefix}{way}: speed over eager", median_ratio(seconds["eager"], seconds[way]), "x", None)
            )
        torch.compiler.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the figures that have a target")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="rounds of every section (3, with --smoke 1)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to measure, instead of all")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder that peers are downloaded into")
    parser.add_argument("--no-download", action="store_true", help="leave out peers that have to be downloaded")
    parser.add_argument("--output", type=Path, default=Path("bench_output"), help="folder for table, figures and rows")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file instead")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.json = args.json or args.output / "rows.json"
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or SECTIONS:
            if bench.is_wanted(name, bool(args.only)):
                SECTIONS[name](bench, Path(folder))
                write_rows(bench.rows, args.json)  # what is measured stays, whatever becomes of the next section
    write_markdown(bench.rows, bench.skipped, describe(bench), args.output / "table.md")
    draw_figures(bench.rows, args.output / "figures.png")
    for what in bench.skipped:
        print(f"skipped: {what}")
    print(f"Written: {args.output}/table.md, figures.png, {args.json}")
    sys.exit(report(bench.rows, args.json))


def describe(bench: Bench) -> str:
    """The machine and the libraries, in a line."""
    if bench.device.type == "cuda":
        machine = torch.cuda.get_device_name(bench.device)
    else:
        machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        machine += ", bfloat16 units" if has_bfloat16_units() else ", no bfloat16 units"
    sizes = "tiny sizes, which measure nothing" if bench.is_smoke else "B/16x2, 32 x 224 x 224, 400 classes"
    return f"{sizes}; {machine}; torch {torch.__version__}, Python {platform.python_version()}; {bench.rounds} rounds"


SECTIONS: dict[str, Callable[[Bench, Path], None]] = {
    "start": measure_start,
    "float32": lambda bench, _: measure_inference(bench, torch.float32),
    "bfloat16": lambda bench, _: measure_inference(bench, torch.bfloat16),
    "cheaper": lambda bench, _: measure_cheaper(bench, VARIANTS),
    "memory": lambda bench, _: measure_memory(bench),
    "training": lambda bench, _: measure_training(bench),
    "batches": lambda bench, _: measure_inference(bench, torch.float32, batch=4),
    "compiled": lambda bench, _: measure_compiled(bench),
    "growth": lambda bench, _: measure_growth(bench),
}


if __name__ == "__main__":
    main()
