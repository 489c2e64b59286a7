"""Find and read files of weights and settings in a folder or Hub repository, without executing anything in them."""

import functools
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..model_files import check_weight_indices, check_weights


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_HUB_TIMEOUT = 5.0  # seconds


class ConversionError(ValueError):
    """The source cannot be converted; the message says why."""


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise a ConversionError that names it if its content is something else."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error


def find_file(source: str, name: str) -> Path | None:
    """
    Return the path of a file in a folder or Hub repository, or None if that has no such file.

    Without a connection, or with HF_HUB_OFFLINE, the cache is used.

    Raises:
        OSError: if there is no such folder or repository, or if the Hub does not answer and the cache does not tell
            whether the file exists.
    """
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    if (reason := why_hub_is_silent(source)) is not None:
        cached = try_to_load_from_cache(source, name)
        if isinstance(cached, str):
            return Path(cached)
        is_known = isinstance(try_to_load_from_cache(source, "config.json"), str)
        if is_known and (cached is not None or constants.HF_HUB_OFFLINE):
            return None
        raise OSError(f"there is no folder {source!r}, and the Hub cannot be asked for {source}/{name}: {reason}")
    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise OSError(f"{source}/{name} cannot be downloaded from the Hub: {error}") from error


def why_hub_is_silent(name: str) -> str | None:
    """
    Return None for a folder and for a model that the Hub has, or the reason why the Hub cannot be asked.

    Raises OSError at once if there is neither such a folder nor such a model on the Hub. transformers alone would try
    to download every file several times.
    """
    if os.path.isdir(name):
        return None
    if not _HUB_ID.fullmatch(name) or os.path.exists(name):
        raise OSError(f"there is no folder {name!r}, and models on the Hub are named like 'owner/name'")
    return _ask(name)


@functools.cache
def _ask(name: str) -> str | None:
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise OSError(f"there is no folder {name!r}, and the Hub has no public model of that name") from error
    except Exception as error:  # huggingface_hub lets the errors of its HTTP client and its own pass
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def read_config(source: str) -> dict[str, Any]:
    """Read the config.json of a folder or Hub id; raise a ConversionError if there is none."""
    config_file = find_file(source, "config.json")
    if config_file is None:
        raise ConversionError(f"{source} has no config.json, so the kind of model is unknown.")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ConversionError(f"{config_file} holds a {type(config).__name__}; expected a JSON object.")
    return config


def has_processor(source: str) -> bool:
    """Return whether a folder or repository has an image or video processor, under any of transformers' names."""
    names = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    return any(find_file(source, name) is not None for name in names)


def find_weights(source: str) -> Path:
    """
    Return the weights of a folder or repository, preferring safetensors; if they are sharded, their index.

    Raises:
        ValueError: naming a file that is damaged, or that cannot be read without running code in it.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (path := find_file(source, name)) is not None:
            check_weight_indices(path.parent, is_complete=os.path.isdir(source))
            check_weights(path.parent)
            return path
    raise ConversionError(f"{source} has no weights; expected {' or '.join(names)}.")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, or a torch file that `find_weights` found; neither executes anything in it."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged, or no safetensors file: {error}") from error


def weight_names(weights: Path) -> list[str]:
    """Return the names of all arrays in the weights that `find_weights` found."""
    if weights.suffix == ".json":
        return sorted(read_json(weights)["weight_map"])
    if weights.suffix != ".safetensors":
        return sorted(read_tensors(weights))
    with safe_open(weights, framework="pt") as file:
        return sorted(file.keys())


def loading_problems(info: dict[str, Any]) -> list[str]:
    """Describe the weights that a `from_pretrained` missed, from its `output_loading_info`."""
    return [
        *(f"missing: {name}" for name in sorted(info["missing_keys"])),
        *(
            f"wrong shape: {name} is {tuple(there)}, config.json expects {tuple(here)}"
            for name, there, here in sorted(info["mismatched_keys"])
        ),
    ]


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return floats as float32, also bfloat16, which numpy reads as two untyped bytes."""
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float32)


def from_flax(name: str, array: np.ndarray) -> np.ndarray:
    """Convert an array from flax's layout to that of the parameter of this name in torch; comments give the shapes."""
    if name.endswith("projection.weight"):
        return np.moveaxis(array, (-1, -2), (0, 1))  # ([time,] height, width, in, out) -> (out, in, ...)
    if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
        return array.reshape(-1)  # (heads, head_dim) -> (out,)
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return array.reshape(len(array), -1).T  # (in, heads, head_dim) -> (out, in)
    if name.endswith("o_proj.weight"):
        return array.reshape(-1, array.shape[-1]).T  # (heads, head_dim, out) -> (out, in)
    return array.T if array.ndim == 2 else array  # (in, out) -> (out, in)
