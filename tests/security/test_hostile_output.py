"""Nothing that comes from outside reaches the terminal as a command, and no score that is none is printed."""

import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from paths import EXAMPLES
from tiny_models import make_model, tiny_config
from typer.testing import CliRunner
from video_files import damage_packet, write_video

from vivit_hf import ViViTVideoProcessor, demo_model_path
from vivit_hf.cli.app import app
from vivit_hf.cli.output import echo_json
from vivit_hf.data.escaping import printable


SAMPLE = demo_model_path() / "samples" / "up_left.mp4"
RED = "\x1b[31m"
TITLE = "\x1b]0;owned\x07"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), terminal_width=200)


def write_model(folder, labels, break_weights=False):
    model = make_model(tiny_config("factorised_encoder", id2label=dict(enumerate(labels))))
    if break_weights:
        with torch.no_grad():
            model.classifier.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 40}}
    ViViTVideoProcessor(num_frames=8, frame_stride=1, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model whose labels are commands for a terminal."""
    labels = [f"a{RED}", f"b{RED}{TITLE}", f"c{RED}\x9b31m", f"d{RED}\u202e", f"e{RED}\r\nWritten: by a label"]
    return write_model(tmp_path_factory.mktemp("model") / f"m{RED}", labels)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose classifier is NaN."""
    return write_model(tmp_path_factory.mktemp("nan"), "abcde", break_weights=True)


def assert_is_text(process):
    assert isinstance(process.exception, SystemExit | None)
    for text in (process.stdout, process.stderr):
        assert not [one for one in text if not one.isprintable() and one != "\n"], repr(text)


def test_only_what_is_printable_stays():
    assert printable(f"a{RED}ü 写\n\x9b\u202e") == "a\\x1b[31mü 写\n\\x9b\\u202e"


@pytest.mark.parametrize(
    "command", ["classify", "timeline", "watch", "explain", "inspect", "inspect --labels", "scan", "tune"]
)
def test_names_and_labels_are_escaped(command, hostile, tmp_path):
    video = tmp_path / f"v{RED}{TITLE}.mp4"
    video.write_bytes(SAMPLE.read_bytes())
    arguments = {
        "classify": [video, "--model", hostile],
        "timeline": [video, "--model", hostile],
        "watch": [video, "--model", hostile, "--policy", "wait"],
        "explain": [video, "--model", hostile, "--output", tmp_path / f"o{RED}.png"],
        "inspect": [hostile],
        "inspect --labels": [hostile, "--labels"],
        "scan": [tmp_path, "--all", "--workers", 1],
        "tune": [hostile, "--videos", tmp_path, "--workers", 0, "--merge-tokens", 1, "--output", tmp_path / f"o{RED}"],
    }
    if command == "tune":
        (tmp_path / f"w{RED}{TITLE}.mp4").write_bytes(b"broken")
    process = run(command.split()[0], *arguments[command])
    assert process.exit_code == 0, process.stderr
    assert_is_text(process)
    assert r"\x1b[31m" in process.stdout and "\nWritten: by a label" not in process.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", f"gone{RED}.mp4"],
        ["timeline", f"gone{RED}.mp4"],
        ["watch", f"gone{RED}.mp4"],
        ["evaluate", "--model", "x", "--data", f"gone{RED}", "--output-dir", "x"],
        ["explain", f"gone{RED}.mp4", "-o", "x.png"],
        ["explain", "x.mp4", "-o", f"x{RED}.txt"],
        ["inspect", f"gone{RED}"],
        ["scan", f"gone{RED}"],
        ["classify", "x.mp4", "--model", f"gone{RED}"],
        ["classify", "x.mp4", f"--{RED}"],
        [f"gone{RED}"],
        [f"-{RED}"],
    ],
)
def test_errors_are_escaped(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = run(*arguments)
    assert process.exit_code in (1, 2)
    assert_is_text(process)
    assert r"\x1b" in process.stderr + process.stdout


def test_warnings_are_escaped(tmp_path):
    path = write_video(tmp_path / f"v{RED}.mp4", num_frames=50, options={"bf": "0"})
    damage_packet(path, 20)
    command = [sys.executable, "-m", "vivit_hf", "timeline", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and r"v\x1b[31m.mp4 is damaged" in process.stderr
    assert RED not in process.stdout + process.stderr


@pytest.mark.slow
def test_warnings_of_the_training_script_are_escaped(tmp_path):
    for name in ("a/1.mp4", "b/2.mp4", f"b/v{RED}.mp4"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "v" / name, num_frames=20)
    (tmp_path / "v" / f"b/v{RED}.mp4").write_bytes(b"broken")
    command = "--model_name_or_path vivit-tiny --train_dir v --train_val_split 0 --max_steps 1 --num_frames 4 --use_cpu"
    command += " --image_size 32 --report_to none --dataloader_num_workers 0 --disable_tqdm true --output_dir out"
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *command.split()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert process.returncode == 0 and r"v\x1b[31m.mp4: " in process.stderr, process.stderr[-2000:]
    assert RED not in process.stdout + process.stderr


class _Rude(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404, f"no {RED}{TITLE}")
        self.end_headers()

    def log_message(self, *_):
        return


@pytest.mark.parametrize("command", ["classify", "timeline", "explain"])
def test_what_a_server_says_is_escaped(command, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Rude) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/x.mp4"
        output = ["--output", tmp_path / "x.png"] if command == "explain" else []
        process = run(command, address, "--allow-private-addresses", *output)
        server.shutdown()
    assert process.exit_code == 1 and "404" in process.stdout + process.stderr
    assert_is_text(process)


def test_nan_is_an_error_of_every_file(broken, tmp_path):
    process = run("classify", SAMPLE, SAMPLE.parent / "up_right.mp4", "--model", broken, "--json")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in process.stdout.splitlines()]
    assert process.exit_code == 1 and [set(row) for row in rows] == [{"file", "error"}] * 2
    assert all("NaN or infinite" in row["error"] and "classifier.weight" in row["error"] for row in rows)
    process = run("classify", SAMPLE, "--model", broken)
    assert process.exit_code == 1 and "NaN or infinite" in process.stdout and "1 without labels" in process.stdout


@pytest.mark.parametrize(
    "arguments",
    [["timeline"], ["timeline", "--json"], ["timeline", "--windows"], ["watch", "--policy", "wait"], ["explain"]],
)
def test_nan_is_an_error_of_every_command(arguments, broken, tmp_path):
    output = ["--output", tmp_path / "x.png"] if arguments == ["explain"] else []
    process = run(*arguments, SAMPLE, "--model", broken, *output)
    assert process.exit_code == 1 and process.stdout == "" and "NaN or infinite" in process.stderr
    assert isinstance(process.exception, SystemExit) and not list(tmp_path.iterdir())


def test_json_has_no_nan(capsys):
    with pytest.raises(Exception, match="1"):
        echo_json({"score": float(np.nan)})
    printed = capsys.readouterr()
    assert printed.out == "" and "NaN" in printed.err
