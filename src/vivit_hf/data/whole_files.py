"""Writing files: whole or not at all, and text that UTF-8 can hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    A file to write instead of `path`, whose place it takes at the end; after an error `path` is what it was.

    It lies in the same folder, since files are not moved in one step from one disk to another. A link stays one, and
    what is no regular file (a pipe, a device) is written into.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def as_utf8(text: str | os.PathLike[str]) -> str:
    """The text with what UTF-8 cannot hold, such as the bytes of file names in other encodings, as `\\udce9`."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode("utf-8")
