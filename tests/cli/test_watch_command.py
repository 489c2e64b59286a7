"""`vivit-hf watch`: pipes and other live sources, as they come."""

import os
import signal
import subprocess
import sys
import time

import av
import psutil
import pytest
from command_line import MOTIONS, SAMPLES, check_refusal, invoke, rows, start


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """The packets of a sample in a container that can be read from any place."""
    path = tmp_path_factory.mktemp("stream") / "all.ts"
    with av.open(str(SAMPLES / "all.mp4")) as source, av.open(str(path), "w") as sink:
        output = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = output
                sink.mux(packet)
    return path


def test_a_pipe_is_watched_without_losing_a_frame(stream):
    process = start("watch", "-", input=stream.read_bytes())
    assert process.returncode == 0, process.stderr
    assert [line.split()[-1] for line in process.stdout.decode().splitlines()] == MOTIONS
    assert "192 frames received, 0 dropped" in process.stderr.decode()


def test_a_file_is_watched_as_json(stream):
    result = invoke("watch", stream, "--policy", "wait", "--json", "--hop", 8)
    assert result.exit_code == 0 and [row["label"] for row in rows(result.stdout)] == MOTIONS


def test_every_window_can_be_watched(stream):
    result = invoke("watch", stream, "--policy", "wait", "--json", "--hop", 16, "--windows")
    assert len(rows(result.stdout)) == 192 // 16


def test_watching_gives_the_timeline_of_the_file(stream):
    watched = rows(invoke("watch", stream, "--policy", "wait", "--json", "--hop", 8).stdout)
    timeline = rows(invoke("timeline", SAMPLES / "all.mp4", "--json", "--hop", 8).stdout)
    assert watched == [
        {**row, **{key: pytest.approx(row[key], abs=0.01) for key in ("start", "end", "score")}} for row in timeline
    ]


def test_watching_counts_unchanged_steps(stream):
    result = invoke("watch", stream, "--policy", "wait", "--json", "--hop", 8, "--unchanged-threshold", 255)
    assert "95 of 96 time steps took the token of the last encoded one" in result.stderr
    assert "computed both ways, the largest change of a probability was" in result.stderr


def test_a_segment_is_printed_while_the_source_goes_on(stream):
    data = stream.read_bytes()
    command = [sys.executable, "-m", "vivit_hf", "watch", "-", "--json"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(data[: len(data) * 3 // 4])
        process.stdin.flush()
        (first,) = rows(process.stdout.readline().decode())
        process.stdin.close()
    assert first["label"] == MOTIONS[0]


def test_a_silent_pipe_can_be_interrupted():
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vivit_hf", "watch", "-"],
        stdin=read,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = process.stderr.readline()  # about the demo model, whose weights are loaded next
    used = None
    while used != (used := psutil.Process(process.pid).cpu_times()):  # until it waits for the pipe
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    os.close(write), os.close(read)
    assert "demo model" in first and process.returncode == 130 and errors.strip() == "Interrupted."


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["gone.ts"], 1, "Cannot read gone.ts"),
        (["tcp://127.0.0.1:1"], 1, "Cannot read tcp://127.0.0.1:1"),
        (["gone.ts", "--policy", "drop_newest"], 2, "drop_newest"),
        (["gone.ts", "--windows", "--min-duration", "1"], 2, "every window is printed"),
        (["gone.ts", "--on-error", "warn"], 2, "No such option"),
    ],
)
def test_what_goes_wrong_in_watch_is_named(arguments, code, message):
    check_refusal(["watch", *arguments], code, message)


def test_a_source_that_is_no_video_is_named(tmp_path):
    (tmp_path / "text.ts").write_text("no video " * 99)
    check_refusal(["watch", tmp_path / "text.ts"], 1, "Cannot read")
