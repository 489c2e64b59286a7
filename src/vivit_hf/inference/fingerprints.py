"""Fingerprints of stored models: if two are equal, the models give the same answers on the same clips."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash

from ..calibration_vivit import KNOWN_FEATURES
from ..configuration_vivit import ViViTConfig
from ..initialisation.weight_files import find_file


_CHUNK_BYTES = 1 << 22
_NOT_COMPARED = ("_name_or_path", "transformers_version", "calibration", "optimization")
# Fields of a configuration that change nothing about the logits of a trained classifier.
_NO_LOGITS = (
    *("calibration", "optimization", "initializer_range", "mask_ratio"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"),
)


def hub_commit(model: str | os.PathLike[str]) -> str | None:
    """Return the current commit of a Hub id, or None for a folder. Raises OSError at once if it is neither."""
    if os.path.isdir(model):
        return None
    path = find_file(str(model), CONFIG_NAME)
    if path is None:
        raise OSError(f"{model} has no {CONFIG_NAME}, so it is no model.")
    return extract_commit_hash(str(path), None)


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
    return {
        "weights": commit or _weights(Path(model)),
        "config": _settings(config.to_dict(), type(config)().to_dict()),
        "processor": processor_fingerprint(processor),
    }


def processor_fingerprint(processor: Any) -> str:
    """Return the digest of a processor's settings, without permissions to download."""
    made = processor.to_dict()
    limits = {**(made.get("video_limits") or {}), "allow_private_addresses": False}
    return _settings({**made, "video_limits": limits}, type(processor)().to_dict())


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
    kept = {name: value for name, value in changed.items() if name not in _NOT_COMPARED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def loaded_fingerprint(model: Any) -> str:
    """
    Return the digest of a model's weights, rounded to bfloat16, and of the configuration that they compute with.

    It is the same in float32 and bfloat16, whatever the names of the labels.

    Args:
        model: a ViViT as it was loaded, see `restore`; no weight is offloaded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy())
    fields = [name for name in ViViTConfig.__annotations__ if name not in _NO_LOGITS]
    config, defaults = ({name: getattr(one, name) for name in fields} for one in (model.config, ViViTConfig()))
    digest.update(_settings(config, defaults).encode())
    return digest.hexdigest()
