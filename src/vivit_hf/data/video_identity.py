"""Tell whether a video is still the one that results were computed from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


_END_BYTES = 1 << 14  # tables of sizes and times differ between any two videos of one length


def identity_of(source: Any) -> str:
    """
    Return what tells a video from others and from its own older versions, as JSON.

    For a file, this is its name with its folder, its size, its time of change and a digest of its first and last bytes,
    so that a data set can be moved; for bytes their digest, and for an address the address. Start and end are added.

    Raises:
        OSError: if the file does not exist.
    """
    parts: dict[str, Any] = source if isinstance(source, dict) else {"path": source}
    path, content = parts.get("path"), parts.get("bytes")
    if isinstance(path, (bytes, bytearray, memoryview)):
        path, content = None, path
    if content is not None:
        what: list[Any] = [hashlib.sha256(content).hexdigest()]
    elif str(path).lower().startswith(("http://", "https://")):
        what = [str(path)]
    else:
        with open(path, "rb") as file:  # type: ignore[arg-type]
            status = os.fstat(file.fileno())
            ends = file.read(_END_BYTES)
            file.seek(max(0, status.st_size - _END_BYTES))
            ends += file.read()
        name = Path(os.fsdecode(path)).absolute().parts[-2:]  # type: ignore[arg-type]
        what = [*name, status.st_size, status.st_mtime_ns, hashlib.sha256(ends).hexdigest()]
    return json.dumps([*what, parts.get("start"), parts.get("end")])


def content_of(identity: str) -> str:
    """Return what copies of a video share: its identity without name, folder and time of change."""
    parts = json.loads(identity)
    is_file = len(parts) > 3
    return json.dumps([parts[2], *parts[4:]] if is_file else parts)


def known_identity(source: Any) -> str | None:
    """Return the `identity_of` a video; None if it cannot be opened, which reading it will report."""
    try:
        return identity_of(source)
    except (OSError, ValueError):
        return None
