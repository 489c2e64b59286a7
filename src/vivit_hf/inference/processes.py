"""Share work among the processes that `torchrun` or `accelerate launch` has started; one process needs no launcher."""

import os
from datetime import timedelta

from accelerate import PartialState  # type: ignore[import-untyped]


# Finished processes wait for the slowest, and torch would end the run of all after 10 minutes (NCCL) or 30 (gloo).
# A process that died is noticed earlier: gloo sees the closed connection, and launchers end the others.
_LONGEST_WAIT = timedelta(days=7)


def process_group(use_cpu: bool = False) -> PartialState:
    """
    Return the state of the group of processes that this one belongs to, with its device.

    Raises:
        ValueError: if several processes were started and cannot reach each other, since each would do all the work.
    """
    state = PartialState(cpu=use_cpu, timeout=_LONGEST_WAIT)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ValueError(f"{started} processes were started, but each is alone: add --use_cpu, or --device cpu.")
    return state
