"""How much memory a job takes at its peak, of the process or of the GPU."""

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
