"""The command line as users run it: real processes, real files."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner
from video_files import damage_packet, write_kind, write_video

from vivit_hf.cli.app import app


def run(*arguments, **environment):
    command = [sys.executable, "-m", "vivit_hf", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80", **environment}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data set")
    for name in ("good", "odd"):
        (path / name).mkdir()
    for number in range(3):
        write_video(path / "good" / f"clip_with_a_rather_long_name_that_must_not_be_cut_{number}.mp4", num_frames=70)
    write_kind(path / "odd", "turned_90")
    write_kind(path / "odd", "h264_variable_rate")
    damaged = write_video(path / "odd" / "damaged.mp4", num_frames=70, options={"bf": "0"})
    damage_packet(damaged, 20)
    return path


def test_scan_lists_what_there_is_to_look_at(folder, tmp_path):
    process = run("scan", folder, "--json", tmp_path / "scan.jsonl")
    assert process.returncode == 0, process.stderr
    assert "clip_with" not in process.stdout and process.stderr.strip() == ""
    lines = {line.split()[1]: line for line in process.stdout.splitlines() if line.startswith("│")}
    assert set(lines) == {"odd/damaged.mp4", "odd/turned_90.mp4", "odd/variable.mp4"}
    assert "damaged: 1 packets are rejected, 1 frames are lost" in lines["odd/damaged.mp4"]
    assert "short; rotated by 90 degrees" in lines["odd/turned_90.mp4"]
    assert "short; variable rate" in lines["odd/variable.mp4"]
    assert "6 files" in process.stdout and "5 ok, 1 damaged, 0 unusable" in process.stdout
    assert "2 short (fewer than 63 frames), 1 of variable rate, 1 rotated" in process.stdout
    assert "frames: 30 to 70, median 70" in process.stdout
    rows = [json.loads(line) for line in (tmp_path / "scan.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows) and len(rows) == 6
    assert {row["path"]: row["status"] for row in rows}["odd/damaged.mp4"] == "damaged"


def test_scan_of_everything_with_unusable_files(folder, tmp_path):
    for path in folder.rglob("*.mp4"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mkv").write_text("not a video " * 99)
    process = run("scan", tmp_path, "--all", "--num-frames", 8, "--workers", 2)
    assert process.returncode == 1, process.stderr
    assert "clip_with_a_rather_long_name_that_must_not_be_cut_2.mp4" in process.stdout
    assert "unusable: it is empty" in process.stdout and "5 ok, 1 damaged, 2 unusable" in process.stdout
    process = run("scan", tmp_path, "--fast", "--json", "-")
    assert process.returncode == 1
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    statuses = {row["path"]: row["status"] for row in rows}
    assert len(rows) == 8 and statuses["text.mkv"] == "unusable" and statuses["damaged.mp4"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["."], "contains no video"),
        ([".", "--extension", "xyz"], "looked for: xyz"),
        ([".", "--num-frames", "0"], "--num-frames"),
        ([".", "--json", "nowhere/rows.jsonl"], "no folder for 'nowhere/rows.jsonl'"),
        ([], "Missing argument 'FOLDER'"),
    ],
)
def test_wrong_usage_is_said_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "rows.jsonl" in message:
        (tmp_path / "empty.mp4").touch()
    result = CliRunner().invoke(app, ["scan", *arguments], terminal_width=200)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


def _reads(process, name):
    try:
        return any(file.path.endswith(name) for file in process.open_files())
    except psutil.Error:
        return False


def test_an_interrupted_scan_leaves_nothing_half_written(tmp_path):
    video = write_video(tmp_path / "video.mp4", num_frames=300)
    for number in range(4000):  # long enough to be interrupted in the middle on any machine
        (tmp_path / f"{number}.mp4").symlink_to(video)
    output = tmp_path / "scan.jsonl"
    output.write_text("what was there\n")
    command = [sys.executable, "-m", "vivit_hf", "scan", str(tmp_path), "--json", str(output)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background is deaf to it, and so is all that this starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(_reads(child, "video.mp4") for child in psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Interrupted" in errors and "Traceback" not in errors
    assert output.read_text() == "what was there\n"
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".mp4") == [".jsonl"]


def test_help_reads_well():
    result = CliRunner().invoke(app, ["scan", "--help"])
    assert result.exit_code == 0
    for words in ("FOLDER", "--json", "Exit code 0", "Example: vivit-hf scan"):
        assert words in result.stdout
    assert "scan" in CliRunner().invoke(app, ["--help"]).stdout
