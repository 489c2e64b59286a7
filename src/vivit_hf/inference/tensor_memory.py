"""How much memory the tensors of a job take at their peak."""

import os
from collections.abc import Callable
from typing import Any

import torch


# The profiler prints a line when it starts and ends, at a level above errors.
_SILENT = "6"


def peak_of_tensors(device: torch.device, job: Callable[[], Any]) -> float:
    """
    Return the megabytes of tensors that a job adds at its peak, as PyTorch's allocator counts them.

    Unlike the memory of the process on a CPU, where glibc keeps what has been freed, this is the same in every run.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)  # is read at the first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6
