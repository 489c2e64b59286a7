"""
Files at addresses such as s3://bucket/folder beside those on local disks, through fsspec.

`location_of` returns a `Path` for a local name, and for an address a `RemotePath` with the few methods of `Path` that
runs in shards need.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias


# Objects of these appear when they are complete, and folders are only parts of their names.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}


@dataclass(frozen=True)
class RemotePath:
    """
    A file or folder of a file system of fsspec. Its methods are those of `Path`.

    `filesystem`: the `fsspec.AbstractFileSystem`.
    `path`: the name in it, without the protocol.

    All methods raise OSError with the address if the file system fails, whatever that raises.
    """

    filesystem: Any
    path: str

    def __str__(self) -> str:
        return _shown(self.filesystem.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(self.filesystem, f"{self.path.rpartition('/')[0]}/{name}")

    def exists(self) -> bool:
        with self._named("look for"):
            self.filesystem.invalidate_cache()
            try:
                self.filesystem.info(self.path)  # its `exists` takes any failure for an absence
            except FileNotFoundError:
                return False
        return True

    def read_bytes(self) -> bytes:
        with self._named("read"):
            return self.filesystem.cat_file(self.path)

    def open(self, mode: str = "rb") -> BinaryIO:
        with self._named("read"):
            return self.filesystem.open(self.path, mode)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        if not self._is_object:  # where it would create a bucket whose name is misspelt
            with self._named("create"):
                self.filesystem.makedirs(self.path, exist_ok=exist_ok)

    def unlink(self) -> None:
        with self._named("delete"):
            self.filesystem.rm_file(self.path)

    def file_names(self) -> set[str]:
        with self._named("list"):
            self.filesystem.invalidate_cache()
            try:
                found = self.filesystem.ls(self.path, detail=False)
            except FileNotFoundError:
                return set()
        return {one.rstrip("/").rpartition("/")[2] for one in found}

    def remove_folder(self) -> None:
        with self._named("delete"):
            self.filesystem.rm(self.path, recursive=True)

    @contextmanager
    def written_whole(self) -> Iterator[Path]:
        """Yield a local path to write to, and give the file its name here when it has arrived completely."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, self.name)
            yield local
            with self._named("write"):
                if self._is_object:
                    self.filesystem.put_file(str(local), self.path)
                else:
                    self._put_and_rename(str(local))

    def _put_and_rename(self, local: str) -> None:
        unfinished = self.with_name(f".{self.name}.{uuid.uuid4().hex}.unfinished").path
        try:
            self.filesystem.put_file(local, unfinished)
            self.filesystem.mv(unfinished, self.path)
        except Exception:
            with suppress(Exception):
                self.filesystem.rm_file(unfinished)
            raise

    @property
    def _is_object(self) -> bool:
        protocols = self.filesystem.protocol
        return not _OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)

    @contextmanager
    def _named(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise OSError(f"Cannot {action} {self}: {type(error).__name__}: {error}") from error


Location: TypeAlias = Path | RemotePath


def location_of(name: str | os.PathLike[str] | RemotePath) -> Location:
    """
    Return the place that a path or an address names; `file://...` is local.

    Raises:
        ValueError: if the protocol is not known, needs a package that is missing, or the address is a chain or pattern.
        OSError: if the file system cannot be used, as without credentials.
    """
    import fsspec  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
    from fsspec.registry import known_implementations  # type: ignore[import-untyped]

    if isinstance(name, RemotePath):
        return name
    text = os.fspath(name)
    protocol, is_address, rest = text.partition("://")
    if not isinstance(name, str) or not is_address or "/" in protocol or len(protocol) < 2:  # C:// is a drive
        return Path(name)
    if protocol in ("file", "local"):
        return Path(LocalFileSystem._strip_protocol(text))
    shown = _shown(text)
    if "::" in text or glob.has_magic(rest):
        raise ValueError(f"{shown}: expected an address without `::`, *, ? and [, such as s3://bucket/folder.")
    try:
        filesystem, path = fsspec.core.url_to_fs(text)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        reason = f"it needs {package}: pip install {package}" if package != "fsspec" else str(error)
        raise ValueError(f"Cannot use {shown}: {reason}.") from error
    except ValueError as error:
        raise ValueError(f"Cannot use {shown}: {error}. Expected a local path, or s3://, gs://, hf:// ...") from error
    except Exception as error:
        raise OSError(f"Cannot use {shown}: {type(error).__name__}: {error}") from error
    return RemotePath(filesystem, path)


def file_names(folder: Location) -> set[str]:
    """Return the names of what is in a folder, by one request; none if there is no folder."""
    if isinstance(folder, RemotePath):
        return folder.file_names()
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def remove_folder(folder: Location) -> None:
    """Delete a folder and what is in it."""
    if isinstance(folder, RemotePath):
        folder.remove_folder()
    else:
        shutil.rmtree(folder)


def _shown(address: str) -> str:
    from ..video_download import redacted  # imports ssl, which most commands do not need

    return redacted(address)
