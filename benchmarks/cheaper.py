"""The section "cheaper" of run.py: inference whose outputs differ, against the exact optimised model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from bench import Bench
from measuring import at_least, at_most, median_ratio
from peers import transformers_vivit

from vivit_hf.inference import decreasing_schedule, optimize
from vivit_hf.inference.onednn import has_bfloat16_units, has_vnni


# Over the exact model, optimised, in the same dtype.
TARGETS = {
    ("bfloat16", "Model 1", "int8"): 1.2,
    **{("bfloat16", f"Model {number}", "int8"): 1.5 for number in (2, 3, 4)},
    ("bfloat16", "Model 1", "merging 300"): 2.2,
    ("float32", "Model 1", "merging 300"): 2.2,
    ("bfloat16", "Model 1", "int8, merging 300"): 2.5,
}
PEERS = {"transformers' Vivit": torch.bfloat16, "transformers' Vivit in float32": torch.float32}
PEER_TARGETS = {
    ("int8, merging 300", "transformers' Vivit"): 3.9,
    ("int8, merging 300", "transformers' Vivit in float32"): 6.0,
}


def cheaper_ways(bench: Bench, name: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return the arguments of `optimize` that change outputs, by the words for them in the table."""
    layers = bench.config(name).num_hidden_layers
    counts = {"Model 1": (150, 300), "Model 2": (4, 8, 12, 16)}.get(name, ())
    ways: dict[str, dict[str, Any]] = {f"merging {count}": {"merge_tokens": count} for count in counts}
    for count in counts[:2]:
        ways[f"merging {count}, decreasing"] = {"merge_tokens": decreasing_schedule(count, layers)}
    if has_vnni() and bench.device.type == "cpu" and dtype == torch.bfloat16:
        both = [f"merging {count}{rest}" for count in counts[1:2] for rest in ("", ", decreasing")]
        ways["int8"] = {"int8": True}
        ways |= {f"int8, {way}": {"int8": True, **ways[way]} for way in both}
    return ways


def measure_cheaper(bench: Bench, names: Iterable[str]) -> None:
    """
    Measure what is faster for other outputs against the exact optimised model, and Model 1 against transformers'.

    The weights are random, which says nothing about the outputs: this measures the speed alone.
    """
    dtypes = [torch.bfloat16, torch.float32]
    if bench.device.type == "cpu" and not has_bfloat16_units() and not bench.is_smoke:
        dtypes.remove(torch.bfloat16)
        bench.skipped.append("cheaper in bfloat16: this CPU has no units for it")
    for dtype in dtypes:
        for name in names:
            if ways := cheaper_ways(bench, name, dtype):
                _measure_ways(bench, name, dtype, ways)


def _measure_ways(bench: Bench, name: str, dtype: torch.dtype, ways: dict[str, dict[str, Any]]) -> None:
    word, jobs = str(dtype).removeprefix("torch."), dict[str, Callable[[], Any]]()
    clip = bench.clips(bench.config(name), dtype)
    for way, options in {"exact": {}, **ways}.items():
        model = bench.model(name, dtype)
        optimize(model, **options, calibration=[clip] if "int8" in options else None)
        jobs[way] = lambda model=model: model(clip).logits
    if name == "Model 1" and dtype == torch.bfloat16:
        for peer, its_dtype in PEERS.items():
            native, own = transformers_vivit(bench.model(name)).to(bench.device, its_dtype), clip.to(its_dtype)
            jobs[peer] = lambda native=native, own=own: native(own).logits
    with torch.inference_mode():
        seconds = bench.timed(jobs)
    for way in jobs:
        what = f"{word}, batch 1: {name}, {way}"
        bench.add(at_most(f"{what}: latency", statistics.median(seconds[way]) * 1000, "ms", None))
        if way not in ways:
            continue
        ratio = median_ratio(seconds["exact"], seconds[way])
        bench.add(at_least(f"{what}: speed over exact", ratio, "x", TARGETS.get((word, name, way))))
        for peer in [one for one in PEERS if one in jobs]:
            ratio = median_ratio(seconds[peer], seconds[way])
            bench.add(at_least(f"{what}: speed over {peer}", ratio, "x", PEER_TARGETS.get((way, peer))))
