"""
The files of a model folder: checked before they are trusted, and replaced as a whole.

A folder may come from a stranger. What is wrong with a file is an error that names it, and no file outside of the
folder is read.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


# Every layout of weights. `from_pretrained` takes the first that it finds, also one from an earlier save.
WEIGHTS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
_INDICES = ("*.safetensors.index*.json", "*.bin.index*.json")


@contextmanager
def named_json_errors(source: Any, file: str) -> Iterator[None]:
    """Name the file in what Python and transformers raise while they read the JSON file of a folder or repository."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"The {file} of {source} is nested too deeply.") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if not isinstance(source, (str, os.PathLike)):
            raise
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"The {file} of {source} does not hold the expected JSON object ({what}).") from error
    except ValueError as error:
        raise ValueError(f"The {file} of {source} cannot be read: {error}") from error


def check_weight_indices(folder: Path) -> None:
    """ValueError for an index of sharded weights that is damaged, or that names files outside of its folder."""
    for path in sorted(path for pattern in _INDICES for path in folder.glob(pattern)):
        with named_json_errors(folder, path.name):
            index = json.loads(path.read_text(encoding="utf-8"))
            weight_map, _ = dict(index["weight_map"]), dict(index["metadata"])
        if not weight_map:
            raise ValueError(f"The {path.name} of {folder} names no weights.")
        for name in sorted({str(file) for file in weight_map.values()}):
            if not _is_file_name(name):
                raise ValueError(
                    f"The {path.name} of {folder} names the file {name!r}; weights must lie in the same folder."
                )
            if not (folder / name).is_file():
                raise ValueError(f"The {path.name} of {folder} names the file {name!r}, which is not there.")


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_weights(folder: Path) -> None:
    """ValueError for the first file of weights that cannot be read, or not without running the code in it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}. Download or save it again.") from error
    for path in sorted(folder.glob("pytorch_model*.bin")):  # others, such as training_args.bin, hold no weights
        try:
            with torch.device("meta"):
                weights = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # whatever it is, the file holds no weights that can be read
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, which only code inside the file could read; such code "
                f"is not run ({type(error).__name__}: {reason}). Ask for the weights as safetensors."
            ) from error
        if not isinstance(weights, dict) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
            raise ValueError(f"{path} does not hold a state dict: names and their tensors.")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name, without a folder, holds weights or an index of weights."""
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


@contextmanager
def stale_weights_removed(folder: Path) -> Iterator[None]:
    """
    Around a save into `folder`: at its end, remove the weights that it has not written.

    After an error, or where no weights were written (an adapter, a variant such as fp16), every file stays.
    """
    before = _states(folder)
    yield
    after = _states(folder)
    if any(before.get(path) != state for path, state in after.items()):
        for path, state in after.items():
            if before.get(path) == state:
                path.unlink()


def _states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """The files of weights in a folder, and what changes when one is written: inode, size and time."""
    states = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_weight_file(path.name):
            state = path.stat()
            states[path] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return states
