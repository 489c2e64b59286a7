"""Files that are written whole or not at all."""

import os
import stat

import pytest

from vivit_hf.whole_files import written_whole


def test_a_file_takes_its_place_at_the_end_with_usual_rights(tmp_path):
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


def test_what_was_there_stays_after_an_error(tmp_path):
    path = tmp_path / "rows.json"
    for was_there in (False, True):
        with pytest.raises(ZeroDivisionError), written_whole(str(path)) as unfinished:
            unfinished.write_text(f"{1 / 0}")
        assert path.exists() == was_there
        path.write_text("old")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["rows.json"]
