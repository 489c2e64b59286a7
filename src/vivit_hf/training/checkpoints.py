"""Checkpoints of a `Trainer`: written whole, and found again."""

import json
import re
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block, so that it leaves no file half written."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C interrupts the main thread alone
        yield
        return
    received: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *signals: received.append(signals))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


def is_complete_checkpoint(folder: Path) -> bool:
    """Return whether all files of a `Trainer` checkpoint are there and whole; a killed process leaves fewer."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
        for path in weights:
            with safe_open(path, framework="pt"):  # raises if the file is shorter than its header says
                continue
        zipped = [*folder.glob("*.pt"), *folder.glob("*.pth")]
        names = {path.name for path in zipped}
        is_sharded = any(path.is_dir() for path in folder.glob("*_fsdp_*")) or any(folder.glob("optimizer_*"))
        return (
            "global_step" in state
            and {path.name for path in weights}.issuperset(named)
            and (is_sharded or (bool(weights) and {"optimizer.pt", "scheduler.pt"} <= names))
            and any(name.startswith("rng_state") for name in names)
            and all(zipfile.is_zipfile(path) for path in zipped)  # the directory of a zip file is at its end
        )
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the latest whole `checkpoint-N` of a folder, or None; warn of later ones that are not whole."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        if is_complete_checkpoint(path):
            return path
        logger.warning(f"{path} is not whole, probably because its process was killed while writing it: it is skipped.")
    return None
