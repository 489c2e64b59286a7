"""Videos and the answers of one process, which all engines must give."""

import os
import subprocess
import sys

import pyarrow.parquet
import pytest
from engine_data import arguments
from labelled_videos import write_labelled_videos


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """16 videos, one of them broken, a model, and a list with a second name and a repetition."""
    folder = write_labelled_videos(tmp_path_factory.mktemp("data"))
    videos = sorted((folder / "videos").rglob("*.mp4"))
    os.link(videos[0], folder / "second_name.mp4")
    names = [*map(str, videos), str(folder / "second_name.mp4"), str(videos[3])]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="session")
def run_python():
    """Run a command of Python on one thread and return what it printed."""

    def run(*command, timeout=240, **environment):
        process = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
        )
        assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
        return process.stdout

    return run


@pytest.fixture(scope="session")
def one_process(data, run_python, tmp_path_factory):
    """The rows that one process writes on a local disk."""
    output = tmp_path_factory.mktemp("one") / "labels"
    run_python("-m", "vivit_hf", "classify-dataset", *arguments(data, output))
    return pyarrow.parquet.read_table(output).to_pylist()
