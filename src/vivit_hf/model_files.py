"""
The files of a model folder: checks before they are trusted, and removal of the weights of an earlier save.

A folder may come from a stranger. An error names the damaged file, and no file outside the folder is read.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError, safe_open
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Every layout of the weights of a model: `from_pretrained` loads the first that it finds, also one of an earlier save.
WEIGHTS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
# `from_pretrained` loads an adapter that it finds beside the weights.
ADAPTERS = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")
_INDICES = ("*.safetensors.index*.json", "*.bin.index*.json")


class AutoClassMixin:
    """
    Do not let subclasses inherit `_auto_class`, which `register_for_auto_class` sets.

    Saving an object copies the source file of a class that has one: a subclass in a training script would publish the
    script, and the subclass that FSDP makes would publish a file of PyTorch.
    """

    _auto_class: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._auto_class = vars(cls).get("_auto_class")


@contextmanager
def named_json_errors(source: Any, file: str) -> Iterator[None]:
    """Name the file in the errors of Python and transformers when they read JSON of a folder or repository."""
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


def check_weight_indices(folder: Path, is_complete: bool = True) -> None:
    """
    Raise a ValueError for an index of sharded weights that is damaged, or that names files outside its folder.

    In a complete folder, all files that it names must exist; the cache of an interrupted download may lack some.
    """
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
            if is_complete and not (folder / name).is_file():
                raise ValueError(f"The {path.name} of {folder} names the file {name!r}, which does not exist.")


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_weights(folder: Path) -> None:
    """Raise a ValueError for the first file of weights that is damaged or cannot be read without running its code."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        with named_json_errors(folder, adapter.name):
            kind = dict(json.loads(adapter.read_text(encoding="utf-8")))["peft_type"]
        _check_peft_type(kind, adapter)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged: {error}. Save it again, or download it again (`force_download=True`)."
            ) from error
    for path in sorted(folder.glob("pytorch_model*.bin")):  # others, such as training_args.bin, hold no weights
        try:
            with torch.device("meta"):
                weights = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # the unpickler raises almost any kind of error
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} is damaged, or needs code in the file to be run, which is refused "
                f"({type(error).__name__}: {reason}). Ask for the weights as safetensors."
            ) from error
        if not isinstance(weights, dict) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
            raise ValueError(f"{path} does not hold a state dict (tensors by name).")


def _check_peft_type(kind: object, adapter: Path) -> None:
    """Raise a ValueError for a kind of adapter that the installed peft does not know; it would raise a KeyError."""
    try:
        from peft import PeftType
    except ImportError:
        return  # `from_pretrained` asks for peft
    known = [one.value for one in PeftType]
    if kind not in known:
        raise ValueError(
            f"{adapter} has the peft_type {kind!r}; expected one of {', '.join(known)}. Correct it, update peft if the "
            "kind is newer, or delete the adapter to load the weights without it."
        )


def stale_weights(there: Iterable[str], written: Iterable[str]) -> list[str]:
    """
    Return the names of the files in `there` that a save of the files `written` has made stale.

    If the save wrote the weights of a whole model, these are adapters and weights in another layout. Saving an adapter,
    or a variant such as fp16, makes nothing stale.
    """
    written = set(written)
    if not any(_matches(name, WEIGHTS) for name in written):
        return []
    return [name for name in there if name not in written and _matches(name, (*WEIGHTS, *ADAPTERS))]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def stale_weights_removed(folder: Path) -> Iterator[None]:
    """Remove the `stale_weights` of a folder after a save into it; an error leaves every file in place."""
    before = _states(folder)
    yield
    after = _states(folder)
    stale = stale_weights(after, [name for name, state in after.items() if before.get(name) != state])
    for name in stale:
        (folder / name).unlink()
    if adapters := [name for name in stale if _matches(name, ADAPTERS)]:
        logger.warning("Removed %s of an earlier save from %s.", ", ".join(adapters), folder)


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of every file; at least one of them changes when a file is written."""
    files = [entry for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
    states = {entry.name: entry.stat() for entry in files}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states.items()}


def upload(api: HfApi, repo_id: str, paths: Iterable[Path], *, revision: str | None, **commit: Any) -> CommitInfo:
    """Commit files to a repository on the Hub, without their folders, and delete its `stale_weights`."""
    files = {path.name: path for path in paths}
    stale = stale_weights(api.list_repo_files(repo_id, revision=revision), files)
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    deletions = [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(repo_id, [*additions, *deletions], revision=revision, **commit)
