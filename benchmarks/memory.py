"""How much memory a job takes at its peak: of the process, of the GPU, or in tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


PEAK_RESET = Path("/proc/self/clear_refs")  # writing 5 there sets the peak of this process to what it has now


def peak_megabytes(device: torch.device, job: Callable[[], Any]) -> float:
    """How far the memory of the process or of the GPU grows above what is there before, at its peak in the job."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    PEAK_RESET.write_text("5")
    before = _status("VmRSS")
    job()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> float:
    """Kilobytes, as the kernel counts them."""
    return float(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def peak_of_tensors(device: torch.device, job: Callable[[], Any]) -> float:
    """
    Megabytes of tensors that the job adds at its peak, as PyTorch's allocator counts them.

    Unlike the memory of the process on a CPU, where glibc keeps what has been freed, this is the same in every run.
    """
    if device.type == "cuda":
        return peak_megabytes(device, job)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6
