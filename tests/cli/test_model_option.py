"""`--model`, `--device` and `--dtype`: what cannot be loaded is named, whichever command asks for it."""

import os

import pytest
from command_line import check_refusal
from tiny_models import make_model, tiny_config

from vivit_hf import ViViTVideoProcessor


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "x.mp4", "--model", "my_vivit"], 2, "there is no folder 'my_vivit', and models on the Hub"),
        (["classify", "x.mp4", "--model", "./nope"], 2, "there is no folder './nope'"),
        (["classify", "x.mp4", "--model", ""], 2, "there is no folder ''"),
        (["classify", "x.mp4", "--model", "nowhere/at-all"], 2, "Cannot load the model nowhere/at-all"),
        (["classify", "x.mp4", "--model", "vivit-b-16x2-fe"], 2, "is a preset without weights"),
        (
            ["inspect", "my_vivit"],
            1,
            "there is no folder 'my_vivit', and models on the Hub are named like 'owner/name'",
        ),
        (["inspect", "nowhere/at-all"], 1, "there is no folder 'nowhere/at-all', and the Hub cannot be reached"),
        (["classify", "x.mp4", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["classify", "x.mp4", "--device", "abacus"], 2, "'abacus' cannot be used here"),
        (["classify", "x.mp4", "--device", "meta"], 2, "'meta' cannot be used here: it computes nothing"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, code, message):
    check_refusal(arguments, code, message)


@pytest.mark.parametrize(
    "arguments",
    [["classify", "x.mp4"], ["timeline", "x.mp4"], ["watch", "x.mp4"], ["explain", "x.mp4", "-o", "x.png"]],
    ids=lambda one: one[0],
)
def test_a_model_without_labels_is_refused(arguments, tmp_path):
    make_model(tiny_config("factorised_encoder", num_labels=0)).save_pretrained(tmp_path)
    ViViTVideoProcessor(num_frames=8).save_pretrained(tmp_path)
    method = ["--method", "gradient"] if arguments[0] == "explain" else []
    check_refusal([*arguments, *method, "--model", tmp_path], 2, "has no classifier (num_labels is 0)")


@pytest.mark.parametrize(
    ("num_frames", "width", "message"),
    [(4, 40, "makes clips of (4, 24, 40) (frames, height, width)"), (8, 41, "but the model expects (8, 24, 40)")],
)
def test_a_processor_that_does_not_fit_the_model_is_refused(num_frames, width, message, tmp_path):
    make_model(tiny_config("factorised_encoder")).save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 24, "width": width}}
    ViViTVideoProcessor(num_frames=num_frames, **sizes).save_pretrained(tmp_path)
    check_refusal(["classify", "x.mp4", "--model", tmp_path], 2, message)


def test_damaged_weights_are_named(tmp_path):
    make_model(tiny_config("factorised_encoder")).save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    check_refusal(["classify", "x.mp4", "--model", tmp_path], 2, "model.safetensors is damaged")


def test_weights_of_another_model_are_refused(tmp_path):
    make_model(tiny_config("factorised_encoder")).save_pretrained(tmp_path)
    tiny_config("spatio_temporal").save_pretrained(tmp_path)
    check_refusal(["classify", "x.mp4", "--model", tmp_path], 2, "Load it with the configuration")
