"""Addresses of fsspec: files are written whole, failures name the address, and local names stay paths."""

import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from vivit_hf.data.remote_files import file_names, location_of, remove_folder
from vivit_hf.data.whole_files import written_whole


class Disk(LocalFileSystem):
    """A file system whose files grow in sight, as with SFTP; it can fail half-way."""

    protocol = "disk"
    is_broken = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("disk://"))

    def unstrip_protocol(self, name):
        return f"disk://{name}"

    def put_file(self, lpath, rpath, **kwargs):
        content = Path(lpath).read_bytes()
        if self.is_broken:
            Path(rpath).write_bytes(content[: len(content) // 2])
            raise ConnectionError("the line is dead")
        Path(rpath).write_bytes(content)

    def rm_file(self, path):
        if self.is_broken:
            raise ConnectionError("the line is dead")
        super().rm_file(path)


class Locked(MemoryFileSystem):
    """A store that refuses every request, by an exception that is no OSError."""

    protocol = "locked"

    def refuse(self, *args, **kwargs):
        raise RuntimeError("no credentials")

    info = ls = put_file = rm_file = cat_file = rm = _open = refuse


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    fsspec.register_implementation("disk", Disk, clobber=True)
    yield location_of(f"{request.param}://{tmp_path}/run")
    shutil.rmtree(tmp_path)
    MemoryFileSystem.store.clear()


def write(path, content):
    with written_whole(path) as unfinished:
        unfinished.write_bytes(content)


@pytest.mark.parametrize("name", ["labels", "/a/b.parquet", Path("s3://x"), "C:\\labels", "C://labels", "a/b://c"])
def test_what_is_no_address_is_a_local_path(name):
    assert location_of(name) == Path(name)


def test_a_file_address_is_a_local_path(tmp_path):
    assert location_of(f"file://{tmp_path}/a") == tmp_path / "a"


def test_a_file_is_there_once_it_is_complete(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "part-00000.parquet"
    assert not path.exists() and file_names(folder) == set()
    with written_whole(path) as unfinished:
        unfinished.write_bytes(b"one")
        assert not path.exists()
    assert path.exists() and path.read_bytes() == b"one" and file_names(folder) == {"part-00000.parquet"}
    write(path, b"two")
    with path.open("rb") as file:
        assert file.read() == b"two"
    write(folder.with_name("beside.txt"), b"")
    path.unlink()
    assert file_names(folder) == set() and location_of(path) is path
    write(path, b"three")
    remove_folder(folder)
    assert not path.exists() and file_names(folder) == set()
    assert folder.with_name("beside.txt").exists()


def test_an_error_while_writing_leaves_the_file_as_it_was(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "a", b"old")
    with pytest.raises(ZeroDivisionError), written_whole(folder / "a") as unfinished:
        unfinished.write_bytes(bytes([1 // 0]))
    assert (folder / "a").read_bytes() == b"old" and file_names(folder) == {"a"}


def test_half_an_upload_has_another_name(tmp_path, monkeypatch):
    fsspec.register_implementation("disk", Disk, clobber=True)
    folder = location_of(f"disk://{tmp_path}")
    monkeypatch.setattr(Disk, "is_broken", True)
    with pytest.raises(OSError, match=rf"Cannot write disk://{tmp_path}/part-0: ConnectionError: the line is dead"):
        write(folder / "part-0", b"four")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".part-0.") and left.read_bytes() == b"fo"


def test_every_failure_names_the_address_and_is_an_os_error():
    fsspec.register_implementation("locked", Locked, clobber=True)
    place = location_of("locked://bucket/a")
    for action in (
        place.exists,
        place.file_names,
        place.read_bytes,
        place.open,
        place.unlink,
        place.remove_folder,
        lambda: write(place, b""),
    ):
        with pytest.raises(OSError, match=r"Cannot [\w ]+ locked:///?bucket/a: RuntimeError: no credentials"):
            action()


def test_a_missing_file_cannot_be_read(folder):
    with pytest.raises(OSError, match=r"Cannot read .*/run/no: FileNotFoundError"):
        (folder / "no").read_bytes()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere://a", r"Cannot use nowhere://a: Protocol not known: nowhere\. Expected a local path, or s3://"),
        ("simplecache::memory://a", "without `::`"),
        ("memory://a/*.parquet", r"without `::`, \*, \? and \["),
        ("oci://bucket/a", "Cannot use oci://bucket/a: it needs ocifs: pip install ocifs"),
        ("sftp://me:secret@host/a", r"Cannot use sftp://\*\*\*@host/a: SFTPFileSystem requires"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_by_name(address, message):
    with pytest.raises(ValueError, match=message) as raised:
        location_of(address)
    assert "secret" not in str(raised.value)
