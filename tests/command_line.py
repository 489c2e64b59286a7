"""Runs `vivit-hf` for tests: in this process, which is quick, or as a process of its own."""

import json
import os
import subprocess
import sys

from typer.testing import CliRunner

from vivit_hf import demo_model_path
from vivit_hf.cli.app import app


SAMPLES = demo_model_path() / "samples"
MOTIONS = ["down_left", "down_right", "up_left", "up_right"]


def invoke(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), terminal_width=200, **options)


def start(*arguments, **options):
    command = [sys.executable, "-m", "vivit_hf", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": "input" not in options}
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, timeout=120, env=environment, **{**pipes, **options})


def said(errors):
    """The text of an error box, whose lines break at any place."""
    return " ".join(errors.replace("│", " ").split())


def rows(output):
    """The JSON lines of an output."""
    return [json.loads(line) for line in output.splitlines()]


def check_refusal(arguments, code, message):
    """A command ends with an exit code and a message, and not with a traceback."""
    result = invoke(*arguments)
    assert result.exit_code == code and message in said(result.stderr), result.stderr
    assert isinstance(result.exception, SystemExit)
