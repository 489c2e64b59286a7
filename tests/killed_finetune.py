"""
examples/finetune.py, but the process stops itself at a chosen moment; for test_finetune_processes.py.

    python tests/killed_finetune.py step:5 ...            kill -9 in the 5th training step
    python tests/killed_finetune.py optimizer.pt:2 ...    kill -9 with half of the 2nd optimizer.pt written
    python tests/killed_finetune.py tokens:5 ...          kill -9 with half of the 5th file of stored tokens written
    python tests/killed_finetune.py Ctrl-C:2 ...          Ctrl-C before the 2nd optimizer.pt is written
"""

import io
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune
import torch

from vivit_hf.training import feature_cache
from vivit_hf.training.trainer import ClipTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    what, _, number = sys.argv[1].partition(":")
    remaining = int(number)

    if what == "step":
        step = ClipTrainer.training_step

        def counted_step(self, *arguments, **settings):
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                kill()
            return step(self, *arguments, **settings)

        ClipTrainer.training_step = counted_step
    elif what == "tokens":
        save_tokens = feature_cache.save_file

        def half_save_tokens(tensors, path, metadata):
            nonlocal remaining
            remaining -= 1
            save_tokens(tensors, path, metadata)
            if remaining == 0:
                path.write_bytes(path.read_bytes()[:100])
                kill()

        feature_cache.save_file = half_save_tokens
    else:
        save = torch.save

        def half_save(value, file, *arguments, **settings):
            nonlocal remaining
            if os.path.basename(str(file)) == ("optimizer.pt" if what == "Ctrl-C" else what):
                remaining -= 1
                if remaining == 0 and what == "Ctrl-C":
                    os.kill(os.getpid(), signal.SIGINT)
                elif remaining == 0:
                    whole = io.BytesIO()
                    save(value, whole, *arguments, **settings)
                    Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
                    kill()
            return save(value, file, *arguments, **settings)

        torch.save = half_save
    finetune.main(sys.argv[2:])


if __name__ == "__main__":
    main()
