"""Test that files are written completely or not at all."""

import os
import stat
import threading

import pytest

from vivit_hf.data.whole_files import written_whole


def test_file_is_replaced_at_the_end_with_default_permissions(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("old")
    previous = os.umask(0o022)
    try:
        with written_whole(path) as unfinished:
            unfinished.write_text("new")
            assert path.read_text() == "old" and unfinished.parent == tmp_path
    finally:
        os.umask(previous)
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["rows.json"]


def test_links_are_kept_and_pipes_are_written_to_directly(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    with written_whole(tmp_path / "link.json") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"

    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with written_whole(pipe) as unfinished:
        unfinished.write_text("rows")
    reader.join(10)
    assert received == ["rows"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_error_leaves_the_old_file_unchanged(tmp_path):
    path = tmp_path / "rows.json"
    for was_there in (False, True):
        with pytest.raises(ZeroDivisionError), written_whole(str(path)) as unfinished:
            unfinished.write_text(f"{1 / 0}")
        assert path.exists() == was_there
        path.write_text("old")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["rows.json"]
