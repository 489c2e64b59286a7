"""The command that reads official checkpoints: all three msgpack layouts, every array accounted for, no half output."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from convert_scenic_checkpoint import config_from_scenic, main, read_scenic_checkpoint, state_dict_from_scenic
from transformers import AutoImageProcessor, AutoModelForVideoClassification

import vivit_hf


ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "scenic"
LAYOUTS = ["old_optimizer_target", "new_params", "old_chunked"]
CASE = np.load(FIXTURES / "03_fe_token.npz")
GOLDEN = json.loads(str(CASE["config"]))
PARAMS = {name.removeprefix("params/"): CASE[name] for name in CASE.files if name.startswith("params/")}


@pytest.fixture
def convert(tmp_path, capfd):
    """Runs the command: (exit code, standard output, standard error, output folder)."""

    def run(checkpoint, *arguments):
        command, output = command_line(tmp_path, checkpoint, *arguments)
        code = main(command)
        return code, *capfd.readouterr(), output

    return run


def command_line(tmp_path, checkpoint, *arguments):
    model_config = tmp_path / "model.json"
    model_config.write_text(json.dumps(GOLDEN["model"]))
    output = tmp_path / "converted"
    command = ["--checkpoint", checkpoint, "--model-config", model_config, "--output", output]
    command += ["--num-frames", "8", "--image-size", "24", *arguments]
    return list(map(str, command)), output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_are_read_to_the_bit(layout):
    params = read_scenic_checkpoint(FIXTURES / f"ckpt_03_{layout}.msgpack")
    assert set(params) == set(PARAMS)
    for name, array in PARAMS.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_command_writes_a_folder_that_gives_the_official_logits(tmp_path, convert, layout):
    labels = [f"motion {index}" for index in range(GOLDEN["num_classes"])]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    checkpoint = FIXTURES / f"ckpt_03_{layout}.msgpack"
    code, printed, errors, output = convert(checkpoint, "--labels", tmp_path / "labels.json")
    assert code == 0, errors
    assert f"{len(PARAMS)} of {len(PARAMS)}" in printed

    model = AutoModelForVideoClassification.from_pretrained(output)
    assert isinstance(model, vivit_hf.ViViTForVideoClassification)
    assert [model.config.id2label[index] for index in range(7)] == labels
    video = torch.from_numpy(CASE["inputs/video"]).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(video).logits.double(), torch.from_numpy(CASE["outputs_f64/logits"]), atol=1e-5, rtol=0
        )
    processor = AutoImageProcessor.from_pretrained(output)
    frames = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    assert processor(frames, return_tensors="pt")["pixel_values"].shape == (1, 8, 3, 24, 24)


def test_the_script_runs_by_itself_without_jax_or_flax(tmp_path):
    assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("flax") is None
    command, output = command_line(tmp_path, FIXTURES / "ckpt_03_new_params.msgpack")
    script = ROOT / "conversion" / "convert_scenic_checkpoint.py"
    process = subprocess.run([sys.executable, str(script), *command], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in output.iterdir()}


def test_every_array_is_accounted_for():
    config = config_from_scenic(GOLDEN["model"], num_frames=8, image_size=24, num_labels=7)
    renamed = dict(PARAMS)
    renamed["Transformer/left_over"] = renamed.pop("cls_SpatialTransformer")
    renamed["output_projection/kernel"] = np.zeros((24, 9), np.float32)
    with pytest.raises(ValueError) as error:
        state_dict_from_scenic(renamed, config)
    for expected in (
        "missing: cls_SpatialTransformer (for vivit.embeddings.cls_token)",
        "no place for: Transformer/left_over (1, 1, 24)",
        "another shape: output_projection/kernel gives (9, 24)",
    ):
        assert expected in str(error.value)


def test_bfloat16_arrays_are_widened(tmp_path):
    values = np.array([1.0, -2.5, 0.15625], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    array = msgpack.ExtType(1, msgpack.packb([[3], "bfloat16", halves]))
    (tmp_path / "c.msgpack").write_bytes(msgpack.packb({"params": {"a": array}}))
    np.testing.assert_array_equal(read_scenic_checkpoint(tmp_path / "c.msgpack")["a"], values)


@pytest.mark.parametrize("damage", ["truncated", "text", "elsewhere"])
def test_a_damaged_file_is_one_line_and_leaves_no_folder(tmp_path, convert, damage):
    whole = (FIXTURES / "ckpt_03_new_params.msgpack").read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>404</html>",
        "elsewhere": msgpack.packb({"weights": {}}),
    }[damage]
    checkpoint = tmp_path / "damaged.msgpack"
    checkpoint.write_bytes(content)
    code, _, errors, _ = convert(checkpoint)
    assert code == 1
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert "damaged.msgpack" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.msgpack", "model.json"]


def test_wrong_number_of_labels_and_full_output_folder_are_refused(tmp_path, convert):
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    checkpoint = FIXTURES / "ckpt_03_new_params.msgpack"
    code, _, errors, output = convert(checkpoint, "--labels", tmp_path / "labels.txt")
    assert code == 1 and "names 2 labels, but the classifier has 7 outputs" in errors
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    code, _, errors, output = convert(checkpoint)
    assert code == 1 and "not an empty folder" in errors
    assert [path.name for path in output.iterdir()] == ["precious.txt"]
