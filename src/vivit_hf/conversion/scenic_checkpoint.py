"""Read flax msgpack checkpoints of google-research/scenic without flax."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..initialisation.weight_files import ConversionError, as_float32
from .terminal import needs_extra


with needs_extra("conversion"):
    import msgpack


# Layouts of the released files: flax's older optimiser state, and the newer train state.
WEIGHT_LOCATIONS = (("optimizer", "target"), ("params",))


def read_scenic_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """
    Return the model's arrays in a flax msgpack checkpoint by their `/`-joined names, without the optimiser's state.

    Raises:
        ConversionError: if the file is not such a checkpoint.
    """
    try:
        with open(path, "rb") as file:
            # Decode one value at a time and skip the optimiser's state, which is as large as the model.
            unpacker = msgpack.Unpacker(
                file, ext_hook=_decode_array, raw=False, strict_map_key=False, max_buffer_size=0
            )
            weights, found = _find_weights(unpacker, WEIGHT_LOCATIONS)
        if isinstance(weights, dict):
            return dict(_flatten(weights))
    except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
        raise ConversionError(
            f"{path} is not a complete flax msgpack checkpoint: {str(error) or 'it ends too early'}"
        ) from error
    expected = " or ".join("/".join(location) for location in WEIGHT_LOCATIONS)
    raise ConversionError(f"{path} has no weights under {expected}; its top level has {found}.")


def _find_weights(unpacker: msgpack.Unpacker, locations: Sequence[tuple[str, ...]]) -> tuple[Any, list[str]]:
    """Return the value at the first of the locations that the next map has, or None, and the keys of that map."""
    weights, keys = None, []
    for _ in range(unpacker.read_map_header()):
        keys.append(unpacker.unpack())
        below = [location[1:] for location in locations if location[0] == keys[-1]]
        if weights is not None or not below:
            unpacker.skip()
        elif () in below:
            weights = unpacker.unpack()
        else:
            weights, _ = _find_weights(unpacker, below)
    return weights, keys


def _decode_array(code: int, data: bytes) -> Any:
    """Decode flax's extension types: 1, an array, and 3, a numpy scalar, as (shape, dtype, bytes); 2, a complex."""
    if code in (1, 3):
        shape, dtype, buffer = msgpack.unpackb(data, raw=False)
        if dtype == "bfloat16":
            return as_float32(np.frombuffer(buffer, "V2")).reshape(shape)
        return np.frombuffer(buffer, np.dtype(dtype)).reshape(shape)
    if code == 2:
        return complex(*msgpack.unpackb(data, raw=False))
    raise ValueError(f"unknown msgpack extension type {code}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            chunks = value["chunks"]
            parts = [chunks[str(index)] for index in range(len(chunks))]
            shape = [value["shape"][str(index)] for index in range(len(value["shape"]))]
            yield f"{prefix}{name}", np.concatenate(parts).reshape(shape)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)
