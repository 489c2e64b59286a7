"""Write files completely or not at all, and make text encodable as UTF-8."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .remote_files import RemotePath


@contextmanager
def written_whole(path: str | os.PathLike | RemotePath) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` at the end; an error leaves `path` unchanged.

    The temporary file is in the same folder, because a move between disks is not atomic; that of a remote file is on
    this machine. Symbolic links are kept: their target is replaced. Pipes and devices are written to directly.
    """
    if isinstance(path, RemotePath):
        with path.written_whole() as unfinished:
            yield unfinished
        return
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
    """Return the text with characters that UTF-8 cannot encode, such as undecodable file name bytes, as `\\udce9`."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode("utf-8")
