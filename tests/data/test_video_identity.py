"""A video is the same as long as its file is."""

import os
import shutil

import pytest

from vivit_hf.data.video_identity import identity_of


def test_a_video_is_known_by_name_size_time_ends_and_part(tmp_path):
    path = tmp_path / "a" / "video.mp4"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    one = identity_of(path)
    assert identity_of(str(path)) == identity_of({"path": str(path)}) == one
    assert identity_of({"path": path, "start": 1.0, "end": 2.0}) != one
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "a", moved / "a")
    assert identity_of(moved / "a" / "video.mp4") == one
    other = tmp_path / "other" / "a" / "video.mp4"  # another video of the same name, size and time
    shutil.copytree(tmp_path / "a", other.parent)
    other.write_bytes(b"12354")
    shutil.copystat(path, other)
    assert other.stat().st_mtime_ns == path.stat().st_mtime_ns and identity_of(other) != one
    os.utime(path, ns=(5, 5))
    assert identity_of(path) != one
    assert identity_of({"bytes": b"1", "path": None}) != identity_of({"bytes": b"2", "path": None})
    assert identity_of({"bytes": b"1", "path": "x"}) == identity_of(b"1")
    with pytest.raises(OSError, match="nowhere"):
        identity_of(tmp_path / "nowhere.mp4")
