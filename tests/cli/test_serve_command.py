"""How `vivit-hf serve` starts, or says why not; tests/serving asks it."""

import socket
import subprocess

import pytest
from command_line import check_refusal
from paths import ROOT
from python_without import python_without


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check_refusal(
            ["serve", "--port", port], 2, f"cannot listen at '127.0.0.1', port {port}: Address already in use"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-crops", 2], "expected 1 or 3, got 2"),
        (["--deadline", 0], "Invalid value for '--deadline'"),
        (["--max-requests", "many"], "Invalid value for '--max-requests'"),
        (["--host", "nowhere.invalid"], "cannot listen at 'nowhere.invalid', port 0"),
        (["--model", "no/such_model"], "no/such_model"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    check_refusal(["serve", "--port", 0, *options], 2, message)


def test_views_that_the_processor_cannot_make_are_named(grouped):
    check_refusal(["serve", "--port", 0, "--model", grouped, "--num-crops", 3], 2, "use num_crops=1")


@pytest.mark.slow
def test_what_is_not_installed_is_named(tmp_path):
    program = tmp_path / "program.py"
    path = str(ROOT / "src")
    program.write_text(
        f"import sys; sys.path.insert(0, {path!r})\nfrom vivit_hf.cli.app import main; main(['serve', '--port', '0'])"
    )
    command = [*python_without(tmp_path / "site", "fastapi"), str(program)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 2, process.stderr
    assert "`vivit-hf serve` needs fastapi: pip install 'vivit-hf[serve]'." in process.stderr
