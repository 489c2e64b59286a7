"""`vivit-hf convert` and `vivit-hf export`, run as users run them, do what the scripts in `conversion/` do."""

import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_conversion import jax_arrays
from paths import CONVERSION, FIXTURES
from safetensors.torch import save_file
from tiny_models import make_model, tiny_config
from transformers import VivitConfig, VivitForVideoClassification
from vit_models import make_dinov2, make_vit, timm_weights, write_layout

from vivit_hf.configuration_vivit import ATTENTION_ORDERS, ATTENTION_TYPES, EMBEDDING_TYPES, POOLINGS
from vivit_hf.conversion.command import main
from vivit_hf.conversion.results import Result, shortened
from vivit_hf.initialisation.from_image import (
    POSITION_INITS,
    TEMPORAL_ATTENTION_INITS,
    TEMPORAL_ENCODER_INITS,
    TUBELET_INITS,
)


pytestmark = pytest.mark.slow


SCRIPTS = {
    "convert vit": "convert_vit_checkpoint.py",
    "convert scenic": "convert_scenic_checkpoint.py",
    "convert transformers": "convert_transformers_vivit.py",
    "export": "export_onnx.py",
}
SHARED = "--help --output --push-to-hub --endpoint --private --skip-parity "
OPTIONS = {
    "convert vit": SHARED + "--source --num-heads --attention-type --attention-order --num-frames --tubelet-size "
    "--image-size --embedding-type --num-sampled-frames --num-temporal-layers --pooling --temporal-pooling "
    "--labels --num-labels "
    "--tubelet-init --temporal-attention-init --temporal-encoder-init --position-init --seed --resize",
    "convert scenic": SHARED + "--checkpoint --model --model-config --num-frames --image-size --resize --labels",
    "convert transformers": SHARED + "--source --to",
    "export": "--help --output --model --int8 --calibration --merge-tokens --videos --num-clips-checked --opset",
}


def arguments_of(command, folder):
    """Write a source into the folder, and return the arguments that convert it."""
    source = folder / "source"
    if command == "convert vit":
        write_layout(make_vit(), source, "names in files")
        return ["--source", source, "--attention-type", "factorised_encoder", "--num-frames", 4, "--num-labels", 3]
    if command == "convert scenic":
        with np.load(FIXTURES / "scenic" / "03_fe_token.npz") as case:
            (folder / "model.json").write_text(json.dumps(json.loads(str(case["config"]))["model"]))
        checkpoint = FIXTURES / "scenic" / "ckpt_03_new_params.msgpack"
        options = ["--model-config", folder / "model.json", "--num-frames", 8, "--image-size", 24]
        return ["--checkpoint", checkpoint, *options]
    if command == "convert transformers":
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
        config = VivitConfig(**sizes, image_size=24, num_frames=4, tubelet_size=[2, 8, 8])
        VivitForVideoClassification(config).save_pretrained(source)
        return ["--source", source]
    make_model(tiny_config("spatio_temporal")).save_pretrained(source)
    return ["--model", source, "--num-clips-checked", 4]


def run_command(command, *arguments):
    """Run the command in a process of its own; return its exit code, standard output and standard error."""
    program = [sys.executable, "-m", "vivit_hf", *command.split(), *map(str, arguments)]
    process = subprocess.run(program, capture_output=True, text=True, timeout=240)
    return process.returncode, process.stdout, process.stderr


def run_script(command, *arguments, monkeypatch, capfd):
    """The same for the script, in this process."""
    script = CONVERSION / SCRIPTS[command]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    capfd.readouterr()  # discard earlier output
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code, *capfd.readouterr()


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_does_what_its_script_does(tmp_path, monkeypatch, capfd, command):
    output = tmp_path / "output"
    arguments = [*arguments_of(command, tmp_path), "--output", output]
    expected = run_script(command, *arguments, monkeypatch=monkeypatch, capfd=capfd)
    assert expected[0] == 0, expected[2]
    assert re.search(r"max\s+abs\s+difference", expected[1].replace("│", " "))
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    output.rename(tmp_path / "of the script")

    assert run_command(command, *arguments) == expected
    assert {path.name: path.read_bytes() for path in output.iterdir()} == files


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_lists_the_same_options_for_command_and_script(monkeypatch, capfd, command):
    _, of_script, _ = run_script(command, "--help", monkeypatch=monkeypatch, capfd=capfd)
    with pytest.raises(SystemExit) as ended:
        main(command.split()[-1], ["--help"], f"vivit-hf {command}")
    of_command = capfd.readouterr().out
    assert ended.value.code == 0 and of_command.startswith(f"usage: vivit-hf {command} ")
    for printed in (of_script, of_command):
        assert set(re.findall(r"^  (?:-h, )?(--[\w-]+)", printed, re.MULTILINE)) == set(OPTIONS[command].split())


def test_errors_of_arguments_reach_the_user(tmp_path):
    code, _, errors = run_command("convert vit", "--source", "x", "--output", tmp_path / "o", "--atention-type", "x")
    assert code == 2 and "unrecognized arguments: --atention-type x" in errors
    code, _, errors = run_command("convert vit", "--source", tmp_path / "none.npz", "--output", tmp_path / "o")
    assert code == 1 and errors == f"error: There is no file {tmp_path / 'none.npz'}.\n"


# Sources in the layouts in which image models are published


def in21k(folder):
    """google/vit-base-patch16-224-in21k: a pooler, and a processor that only resizes."""
    write_layout(make_vit(), folder, "names in files")
    settings = {"do_resize": True, "size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **settings})
    )
    return folder


def dinov2(folder):
    """facebook/dinov2-small: LayerScale."""
    make_dinov2().save_pretrained(folder)
    return folder


def timm_dinov2(folder):
    """timm/vit_small_patch14_dinov2: LayerScale, and no head."""
    folder.mkdir()
    weights = timm_weights(make_vit(image_size=24))
    weights = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    weights |= {f"blocks.{block}.ls{branch}.gamma": torch.randn(24) for block in (0, 1) for branch in (1, 2)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    settings = {"input_size": [3, 24, 24], "mean": [0.4] * 3, "std": [0.2] * 3}
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": {"num_heads": 4}, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def jax_npz(folder):
    np.savez(folder.with_suffix(".npz"), **jax_arrays())
    return folder.with_suffix(".npz")


@pytest.mark.parametrize("source", [in21k, dinov2, timm_dinov2, jax_npz])
def test_convert_vit_reads_published_layouts(tmp_path, source):
    arguments = ["--source", source(tmp_path / "vit"), "--output", tmp_path / "output", "--num-frames", 4]
    code, printed, errors = run_command("convert vit", *arguments)
    assert (code, errors) == (0, "")
    assert re.search(r"max\s+abs\s+difference", printed.replace("│", " "))


# What is printed


def test_names_from_files_cannot_control_the_terminal(tmp_path, capfd):
    vit = make_vit()
    folder = tmp_path / "vit"
    write_layout(vit, folder, "names in memory")
    weights = {name: tensor.contiguous() for name, tensor in vit.state_dict().items()}
    save_file({**weights, "classifier.\x1b[31m[red]": torch.ones(1)}, folder / "model.safetensors")
    arguments = ["--source", str(folder), "--num-frames", "4", "--skip-parity", "--output"]
    assert main("vit", [*arguments, str(tmp_path / "output")]) == 0
    printed, errors = capfd.readouterr()
    assert "\x1b" not in printed + errors and "\\x1b[31m[red]" in re.sub(r"[\s│]+", "", printed)

    save_file({**weights, "odd\x1b]0;title\x07": torch.ones(1)}, folder / "model.safetensors")
    assert main("vit", [*arguments, str(tmp_path / "other")]) == 1
    errors = capfd.readouterr().err
    assert "\x1b" not in errors and "no place for: odd\\x1b]0;title\\x07" in errors


@pytest.mark.parametrize(
    ("package", "modules", "extra", "command", "options"),
    [
        ("msgpack", ["scenic_checkpoint", "convert_scenic"], "conversion", "scenic", "--checkpoint c --model-config m"),
        ("onnx", ["onnx_models", "onnx_int8", "export_onnx"], "export", "export", "--model m"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, capfd, monkeypatch, package, modules, extra, command, options):
    for module in modules:
        monkeypatch.delitem(sys.modules, f"vivit_hf.conversion.{module}", raising=False)
        monkeypatch.delattr(f"vivit_hf.conversion.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command, [*options.split(), "--output", str(tmp_path / "output")]) == 1
    assert capfd.readouterr().err == f"error: {package} is not installed; run `pip install 'vivit-hf[{extra}]'`.\n"


def test_the_parser_offers_what_the_package_accepts(capfd):
    """It names them again, so that it need not import torch."""
    with pytest.raises(SystemExit):
        main("vit", ["--help"])
    printed = capfd.readouterr().out
    assert all(name in printed for name in ATTENTION_TYPES)
    for option, choices in {
        "--attention-order": ATTENTION_ORDERS,
        "--embedding-type": EMBEDDING_TYPES,
        "--pooling": POOLINGS,
        "--tubelet-init": TUBELET_INITS,
        "--temporal-attention-init": TEMPORAL_ATTENTION_INITS,
        "--temporal-encoder-init": TEMPORAL_ENCODER_INITS,
        "--position-init": POSITION_INITS,
    }.items():
        assert f"  {option} {{{','.join(choices)}}}\n" in printed


def test_layers_are_listed_once():
    names = [f"encoder.layer.{index}.{part}" for index in range(12) for part in ("weight", "bias")]
    assert shortened(names) == "24: encoder.layer.N.weight, encoder.layer.N.bias"
    assert shortened([f"a{index}" for index in range(10)]).endswith("a7, and 2 more kinds") and shortened([]) == ""


def test_a_result_without_unused_arrays_says_so(tmp_path, capfd):
    Result(str(tmp_path), "model", mapped=3).print()
    printed = re.sub(r"[\s│]+", " ", capfd.readouterr().out)
    assert "arrays mapped 3 of 3 newly initialised none unused none parity not checked" in printed
