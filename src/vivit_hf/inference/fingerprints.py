"""Fingerprints of stored models: if two are equal, the models give the same answers on the same clips."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..calibration_vivit import KNOWN_FEATURES


_CHUNK_BYTES = 1 << 22
_NAMES_AND_VERSIONS = ("_name_or_path", "transformers_version", "calibration")


def hub_commit(model: str | os.PathLike[str]) -> str | None:
    """Return the current commit of a Hub id, or None for a folder. Raises OSError if it is neither."""
    if os.path.isdir(model):
        return None
    return extract_commit_hash(cached_file(str(model), CONFIG_NAME), None)


def model_fingerprint(
    model: str | os.PathLike[str], config: Any, processor: Any, commit: str | None = None
) -> dict[str, str]:
    """
    Return digests of a stored model's weights, configuration and processor, without permissions to download.

    Args:
        model: a folder, whose weight files are read (about a second per gigabyte), or a Hub id.
        config: its configuration.
        processor: the processor that makes the clips.
        commit: for a Hub id, the commit that it was loaded from, which identifies the weights.
    """
    made = processor.to_dict()
    limits = {**(made.get("video_limits") or {}), "allow_private_addresses": False}
    return {
        "weights": commit or _weights(Path(model)),
        "config": _settings(config.to_dict(), type(config)().to_dict()),
        "processor": _settings({**made, "video_limits": limits}, type(processor)().to_dict()),
    }


def _weights(folder: Path) -> str:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = [
        name
        for name in names
        if (name.endswith((".safetensors", ".safetensors.index.json")) and name != KNOWN_FEATURES)
        or (name.startswith(("pytorch_model", "adapter_model")) and name.endswith((".bin", ".bin.index.json")))
    ]
    digest = hashlib.sha256()
    for name in sorted(weights):
        content = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"{name}\0{content.hexdigest()}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _settings(values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return the digest of the values that are no defaults, so that it outlives new settings of later versions."""
    changed = {name: value for name, value in values.items() if value != defaults.get(name)}
    kept = {name: value for name, value in changed.items() if name not in _NAMES_AND_VERSIONS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
