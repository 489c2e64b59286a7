"""Several processes that share work."""

import os
import subprocess
import sys


def test_processes_wait_for_days_for_a_slow_one():
    code = """
import torch.distributed
from vivit_hf.inference.processes import process_group

state = process_group(use_cpu=True)
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(state.device).options._timeout.total_seconds())
state.destroy_process_group()
"""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env={**os.environ, **launched}, capture_output=True, text=True, check=True)
    assert float(process.stdout) > 24 * 3600
