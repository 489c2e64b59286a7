"""`vivit-hf embed` on two processes and after a kill: the file is the one of an undisturbed run on one process."""

import sys

import pytest
from labelled_videos import TORCHRUN, start, start_and_kill, write_labelled_videos


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 videos, one of them broken."""
    return write_labelled_videos(tmp_path_factory.mktemp("data"))


def embed(data, output, *more):
    return [
        *("embed", data / "videos", "--model", data / "model", "--output", output, "--device", "cpu"),
        *("--workers", 0, "--num-clips", 2, "--num-crops", 1, *more),
    ]


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "f.parquet"
    process = start([sys.executable, "-m", "vivit_hf", *embed(data, output)])
    assert process.returncode == 1 and "15 videos" in process.stdout, process.stderr[-3000:]
    assert "up_left/001.mp4" in process.stdout and "1 without features" in process.stdout
    return output


def test_two_processes_write_the_file_of_one(data, one_process, tmp_path):
    output = tmp_path / "f.parquet"
    process = start([*TORCHRUN, "-m", "vivit_hf", *embed(data, output)])
    assert process.stdout.count("15 videos with a vector") == 1, process.stderr[-3000:]
    assert output.read_bytes() == one_process.read_bytes()
    assert list(tmp_path.iterdir()) == [output]


def test_a_killed_run_goes_on_where_it_stopped(data, one_process, tmp_path):
    output = tmp_path / "f.parquet"
    command = [sys.executable, "-m", "vivit_hf", *embed(data, output)]
    start_and_kill(command, num_files=5)
    assert len(list((tmp_path / "f.parquet.parts").glob("part-*.parquet"))) == 5 and not output.exists()

    again = start(command)
    assert again.returncode == 1, again.stderr[-3000:]
    assert "5 of 16 shards are there already" in again.stderr
    assert output.read_bytes() == one_process.read_bytes()
