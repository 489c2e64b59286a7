"""`vivit-hf demo`: sample videos, their labels, and what to do next."""

import shlex

import pytest
from command_line import MOTIONS, SAMPLES, check_refusal, invoke, start


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "with space"
    process = start("demo", "--output", folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_the_sample_videos_are_written_and_labelled(shown):
    folder, printed = shown
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in SAMPLES.glob("*.mp4"))
    for motion in MOTIONS:
        assert any(motion in line and f"{motion}.mp4" in line for line in printed.splitlines())


def test_the_commands_that_are_shown_run(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timeline, explain = [shlex.split(line)[1:] for line in shown[1].splitlines() if line.startswith("vivit-hf ")]
    assert invoke(*timeline, "--hop", 16).exit_code == 0
    assert invoke(*explain).exit_code == 0 and (tmp_path / explain[-1]).exists()


def test_other_videos_of_these_names_are_kept(tmp_path):
    mine = tmp_path / "all.mp4"
    mine.write_bytes(b"mine")
    check_refusal(["demo", "--output", tmp_path], 2, "there is another video of that name")
    assert mine.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [mine]


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    check_refusal(["demo", "--output", tmp_path / "file"], 2, "File exists")
