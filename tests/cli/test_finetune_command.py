"""`vivit-hf finetune` and examples/finetune.py are one program."""

import json

import finetune
import pytest
from finetune_runs import settings_for, to_argv, write_data
from typer.testing import CliRunner

from vivit_hf.cli.app import app


def test_the_help_of_command_and_script_is_the_same(capsys):
    for option in ("--help", "--help-all", "-h"):
        result = CliRunner().invoke(app, ["finetune", option])
        with pytest.raises(SystemExit):
            finetune.main([option])
        assert result.exit_code == 0 and "--model_name_or_path" in result.stdout
        assert result.stdout == capsys.readouterr().out


def test_the_command_takes_a_settings_file_and_arguments_and_trains(tmp_path):
    data = write_data(tmp_path)
    argv = to_argv(settings_for(data, tmp_path / "out", train_dir=None, max_steps=1))
    (tmp_path / "settings.yaml").write_text(f"train_dir: {data / 'videos' / 'train'}\nmax_steps: 7\n")
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "settings.yaml"), *argv])
    assert result.exit_code == 0, result.output
    assert "16 videos to train on, 4 for validation, 4 classes" in result.stdout
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


def test_errors_are_one_escaped_line(tmp_path):
    argv = ["finetune", "--train_dir", "a\x1b[31mb", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(SystemExit) as ended:
        app(argv, standalone_mode=False)
    assert ended.value.code == r"finetune: a\x1b[31mb: there is no such file or folder."
