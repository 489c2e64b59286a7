"""Files of weights and of settings, in a folder or a repository of the Hub; nothing that is read is executed."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file


class ConversionError(ValueError):
    """The source cannot be converted; the message names what is in the way."""


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or of a repository of the Hub; None where that has no such file."""
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ConversionError(f"{source} is no folder here, and cannot be read from the Hub: {error}") from error
    return Path(found) if found else None


def find_weights(source: str) -> Path:
    """The weights of a folder or repository, safetensors before torch's old file; an index where they are sharded."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (path := find_file(source, name)) is not None:
            return path
    raise ConversionError(f"{source} has no weights; expected {' or '.join(names)}.")


def shards(weights: Path) -> list[Path]:
    """The files behind `find_weights`."""
    if weights.suffix != ".json":
        return [weights]
    names = sorted(set(_weight_map(weights).values()))
    if any(Path(name).name != name for name in names):
        raise ConversionError(f"{weights} names a file outside of its folder.")
    # transformers fetches them all by itself; of a repository, they may not be here yet.
    return [path for name in names if (path := weights.parent / name).exists()]


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise ConversionError(f"{index} has no `weight_map`, and so is not an index of sharded weights.")
    return content["weight_map"]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, or of a torch file (`weights_only`: nothing in it is executed).

    Raises:
        ConversionError: naming the file that is not whole or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise weights_error(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConversionError(f"{path} does not hold a plain mapping of names to tensors.")
    return tensors


def check_weights(path: Path) -> None:
    """Raises a ConversionError that names the file if it is not whole, or holds more than weights."""
    for shard in shards(path):
        if shard.suffix != ".safetensors":
            read_tensors(shard)
            continue
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise weights_error(shard, error) from error


def weight_names(weights: Path) -> list[str]:
    """The names of all arrays behind `find_weights`."""
    if weights.suffix == ".json":
        return sorted(_weight_map(weights))
    if weights.suffix != ".safetensors":
        return sorted(read_tensors(weights))
    with safe_open(weights, framework="pt") as file:
        return sorted(file.keys())


def weights_error(path: Path, error: Exception) -> ConversionError:
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL:? (\S+)", str(error))
        what = f"calls {wanted[1]}" if wanted else "is not one that torch writes"
        return ConversionError(
            f"{path} is a pickle that holds more than weights: it {what}. It was refused; nothing in it was executed."
        )
    return ConversionError(f"{path} is not a whole file of weights: {error}")


def as_float32(array: np.ndarray) -> np.ndarray:
    """Floats as float32; numpy reads bfloat16, which it does not know, as two nameless bytes."""
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float32)
