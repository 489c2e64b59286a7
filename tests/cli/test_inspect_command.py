"""`vivit-hf inspect` reads configurations alone, and its counts are those of the models."""

import json

import pytest
from command_line import invoke
from paper_table import PAPER
from tiny_models import CASES, case_config, make_model

from vivit_hf import ViViTConfig, ViViTVideoProcessor
from vivit_hf.initialisation.inspection import describe_model, inspect_parts


pytestmark = pytest.mark.slow


def run(*arguments):
    process = invoke("inspect", *arguments)
    assert process.exception is None or isinstance(process.exception, SystemExit)
    return process


@pytest.mark.parametrize(("preset", "parameters", "multiply_adds"), PAPER)
def test_the_parts_add_up_to_the_papers_numbers(preset, parameters, multiply_adds):
    found = describe_model(ViViTConfig.from_preset(preset, num_labels=400))
    assert found["parameters"] / 1e6 == pytest.approx(parameters, abs=0.06)
    assert found["multiply_adds"] / 1e9 == pytest.approx(multiply_adds, rel=0.015)
    has_time = "temporal encoder" in found["parts"]
    assert has_time == (preset == "vivit-b-16x2-fe")


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_in_a_part(case):
    config = case_config(case)
    parts = inspect_parts(config)
    assert sum(part.parameters for part in parts) == make_model(config).num_parameters()
    assert all(part.multiply_adds > 0 for part in parts)


def test_inspect_needs_no_weights(tmp_path):
    config = ViViTConfig.from_preset("vivit-b-16x2-fe", num_labels=3, id2label={0: "run", 1: "jump", 2: "sit"})
    config.save_pretrained(tmp_path)
    process = run(tmp_path)
    assert process.exit_code == 0 and not list(tmp_path.glob("*.safetensors"))
    for text in ("factorised_encoder (Model 2", "32 frames of 224 x 224", "3,136", "3: run, jump, sit", "none beside"):
        assert text in process.stdout
    found = json.loads(run(tmp_path, "--json").stdout)
    assert found["tokens"]["grid"] == [16, 14, 14] and found["processor"] is None


def test_the_range_of_the_input_is_that_of_the_processor(tmp_path):
    ViViTConfig.from_preset("vivit-tiny", num_labels=2).save_pretrained(tmp_path)
    ViViTVideoProcessor(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28], offset=False).save_pretrained(
        tmp_path
    )
    expected = [-0.48 / 0.27, 0.59 / 0.28]
    assert json.loads(run(tmp_path, "--json").stdout)["input"]["range"] == pytest.approx(expected, abs=1e-2)
    assert "values in [-1.778, " in run(tmp_path).stdout
    assert "values in [-1, 1]" in run().stdout


def test_inspect_shows_the_demo_model_and_presets():
    assert "16 frames, stride 1" in run().stdout
    assert json.loads(run("vivit-b-16x2", "--json").stdout)["variant"]["paper"] == "Model 1"


def test_what_has_no_configuration_is_named(tmp_path):
    process = run(tmp_path / "nowhere")
    assert process.exit_code == 1 and "Cannot read the configuration of" in process.stderr


def test_a_processor_that_is_broken_is_not_one_that_is_missing(tmp_path):
    ViViTConfig.from_preset("vivit-tiny", num_labels=2).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"num_frames": 16, ')
    process = run(tmp_path)
    assert process.exit_code == 1 and f"Cannot read the processor of {tmp_path}" in process.stderr
    (tmp_path / "preprocessor_config.json").write_text('{"num_frames": 0}')
    process = run(tmp_path)
    assert process.exit_code == 1 and "num_frames" in process.stderr
