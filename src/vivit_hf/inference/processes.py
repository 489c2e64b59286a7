"""Share work among the processes that `torchrun` or `accelerate launch` has started; one process needs no launcher."""

import os

from accelerate import PartialState  # type: ignore[import-untyped]


def process_group(use_cpu: bool = False) -> PartialState:
    """
    Return the state of the group of processes that this one belongs to, with its device.

    Raises:
        ValueError: if several processes were started and cannot reach each other, since each would do all the work.
    """
    state = PartialState(cpu=use_cpu)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ValueError(f"{started} processes were started, but each is alone: add --use_cpu, or --device cpu.")
    return state
