"""transformers' Vivit becomes ours and back, with the same logits, the same weights, and an equivalent processor."""

import json
import re

import numpy as np
import pytest
import torch
from image_conversion import EXECUTED, Attack, assert_refused, difference
from safetensors.torch import load_file, save_file
from tiny_models import make_clips, make_model, randomise, tiny_config
from transformers import AutoImageProcessor, VivitConfig, VivitForVideoClassification, VivitImageProcessor, VivitModel
from vit_models import perturb, write_layout

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.conversion import convert_transformers
from vivit_hf.conversion.command import main


@pytest.fixture
def convert(tmp_path, capfd):
    """Return a function that runs the command: (exit code, printed text without line breaks, errors, output folder)."""

    def run(source, *arguments, output="converted"):
        capfd.readouterr()  # what was printed before
        code = main("transformers", list(map(str, ["--source", source, "--output", tmp_path / output, *arguments])))
        printed, errors = capfd.readouterr()
        return code, re.sub(r"[\s│]+", " ", printed), errors, tmp_path / output

    return run


def make_native(cls=VivitForVideoClassification, **overrides):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    labels = {"id2label": {0: "walk", 1: "run", 2: "sit"}, "label2id": {"walk": 0, "run": 1, "sit": 2}}
    fields = {**sizes, **labels, "image_size": 24, "num_frames": 4, "tubelet_size": [2, 8, 8], **overrides}
    return randomise(cls(VivitConfig(**fields))).eval()


@pytest.fixture
def native(tmp_path):
    """A tiny Vivit of transformers, and the folder with its weights."""
    model = make_native()
    model.save_pretrained(tmp_path / "native")
    return model, tmp_path / "native"


# From transformers


@pytest.mark.parametrize("layout", ["names in files", "names in memory", "torch file", "sharded"])
def test_every_layout_gives_the_logits_of_transformers(tmp_path, convert, layout):
    native = make_native(image_size=[24, 40])
    write_layout(native, tmp_path / "native", layout)
    code, printed, errors, output = convert(tmp_path / "native")
    assert code == 0, errors
    total = len(native.state_dict())
    assert f"arrays mapped {total} of {total} " in printed and "newly initialised none" in printed
    assert difference(printed) < 1e-5
    ours = ViViTForVideoClassification.from_pretrained(output)
    assert ours.config.id2label == {0: "walk", 1: "run", 2: "sit"}
    clips = make_clips(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips).logits, native(clips).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("add_pooling_layer", [True, False])
def test_a_model_without_classifier_is_converted_without_one(tmp_path, convert, add_pooling_layer):
    native = make_native(lambda config: VivitModel(config, add_pooling_layer=add_pooling_layer))
    native.save_pretrained(tmp_path / "native")
    code, printed, errors, output = convert(tmp_path / "native")
    assert code == 0, errors
    assert ("pooler.dense.weight (pooler" in printed) == add_pooling_layer and "newly initialised none" in printed
    ours = ViViTForVideoClassification.from_pretrained(output)
    clips = make_clips(ours.config)
    with torch.no_grad():
        expected = native(clips).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(clips).logits, expected, atol=1e-5, rtol=0)
    code, printed, errors, back = convert(output, "--to", "transformers", output="back")
    assert code == 0 and "VivitModel, 0 labels" in printed, errors
    again = VivitModel.from_pretrained(back, add_pooling_layer=False).state_dict()
    assert all(torch.equal(tensor, native.state_dict()[name]) for name, tensor in again.items())


# The processor


def frames_of(config, seed=0):
    height, width = config.frame_size
    return list(np.random.default_rng(seed).integers(0, 256, (config.num_frames, height, width, 3), dtype=np.uint8))


def test_without_a_processor_values_are_in_the_official_range(native, convert):
    code, printed, errors, output = convert(native[1])
    assert code == 0 and "has no preprocessor_config.json" in errors
    assert "values in [-1, 1]" in printed
    processor = AutoImageProcessor.from_pretrained(output)
    assert isinstance(processor, ViViTVideoProcessor) and processor.num_frames == 4
    black = processor([np.zeros((24, 24, 3), np.uint8)] * 4)["pixel_values"]
    assert black.shape == (1, 4, 3, 24, 24) and torch.all(black == -1)


def test_the_settings_of_a_processor_are_kept(native, convert):
    """transformers' default normalises twice; the source model was used with that, so the conversion keeps it."""
    _, folder = native
    theirs = VivitImageProcessor(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24})
    theirs.save_pretrained(folder)
    code, printed, errors, output = convert(folder)
    assert code == 0 and "values in [-3, 1], not the [-1, 1] of the official models" in errors
    assert "values in [-3, 1]" in printed
    ours = ViViTVideoProcessor.from_pretrained(output)
    frames = frames_of(ViViTForVideoClassification.from_pretrained(output).config)
    expected = theirs(frames, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours(frames)["pixel_values"], expected, atol=1e-5, rtol=0)

    code, _, errors, back = convert(output, "--to", "transformers", output="back")
    assert code == 0, errors
    again = VivitImageProcessor.from_pretrained(back)
    torch.testing.assert_close(again(frames, return_tensors="pt")["pixel_values"], expected, atol=1e-5, rtol=0)


# And back


def test_there_and_back_gives_the_same_files(native, convert):
    _, folder = native
    code, _, errors, ours = convert(folder)
    assert code == 0, errors
    code, printed, errors, back = convert(ours, "--to", "transformers", output="back")
    assert code == 0, errors
    assert difference(printed) < 1e-5 and "does not sample frames" in printed
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert before == after
    assert "auto_map" not in after and "vivit_hf" not in json.dumps(after)


def test_our_model_has_the_same_logits_in_transformers(tmp_path, convert):
    config = tiny_config("spatio_temporal", drop_path_rate=0.1, layer_norm_eps=1e-5, hidden_act="relu", qkv_bias=False)
    ours = make_model(config)
    ours.save_pretrained(tmp_path / "ours")
    code, printed, errors, output = convert(tmp_path / "ours", "--to", "transformers")
    assert code == 0, errors
    assert "drop_path_rate=0.1 is lost" in printed
    native = VivitForVideoClassification.from_pretrained(output).eval()
    clips = make_clips(config)
    with torch.no_grad():
        torch.testing.assert_close(native(clips).logits, ours(clips).logits, atol=1e-5, rtol=0)
    processor = VivitImageProcessor.from_pretrained(output)
    frames = frames_of(config)
    values = processor(frames, do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        values[0], torch.tensor(np.stack(frames)).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"attention_type": "factorised_encoder"}, "attention_type='spatio_temporal'"),
        ({"attention_type": "spatio_temporal", "pooling": "mean"}, "pooling='cls'"),
        ({"attention_type": "spatio_temporal", "representation_size": 8}, "representation_size=None"),
        (
            {"attention_type": "spatio_temporal", "embedding_type": "uniform_frame_sampling"},
            "embedding_type='tubelet'",
        ),
    ],
)
def test_models_without_equivalent_in_transformers_are_refused(tmp_path, convert, overrides, expected):
    make_model(tiny_config(**overrides)).save_pretrained(tmp_path / "ours")
    assert_refused(convert(tmp_path / "ours", "--to", "transformers"), tmp_path, expected)


# What cannot be converted


def test_the_kind_of_labels_goes_along(tmp_path, convert):
    several = {"problem_type": "multi_label_classification", "num_labels": 3}
    make_model(tiny_config("spatio_temporal", **several)).save_pretrained(tmp_path / "ours")
    code, _, errors, output = convert(tmp_path / "ours", "--to", "transformers", "--skip-parity")
    assert code == 0, errors
    assert VivitConfig.from_pretrained(output).problem_type == "multi_label_classification"
    code, _, errors, again = convert(output, "--skip-parity", output="again")
    assert (
        code == 0 and ViViTForVideoClassification.from_pretrained(again).config.problem_type == several["problem_type"]
    )
    make_model(tiny_config("spatio_temporal", label_groups={"noun": 3, "verb": 2})).save_pretrained(tmp_path / "groups")
    code, printed, errors, _ = convert(tmp_path / "groups", "--to", "transformers", "--skip-parity", output="one")
    assert code == 0 and "label_groups are lost" in printed, errors


def test_the_wrong_direction_is_named(tmp_path, native, convert):
    _, folder = native
    assert_refused(convert(folder, "--to", "transformers"), tmp_path, "is of type 'vivit'", "'vivit_hf' only")
    make_model(tiny_config("spatio_temporal")).save_pretrained(tmp_path / "ours")
    assert_refused(convert(tmp_path / "ours"), tmp_path, "is of type 'vivit_hf'", "'vivit' only")
    assert_refused(convert(tmp_path / "nowhere"), tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("vivit.encoder.layer.1.output.dense.bias"), "vivit.encoder.layer.1.mlp.fc2.bias"),
        (lambda w: w.pop("classifier.bias"), "missing: classifier.bias"),
        (lambda w: w.update({"classifier.weight": torch.ones(5, 24)}), "wrong shape: classifier.weight is (5, 24)"),
        (lambda w: w.update({"vivit.layernorm.bias": torch.ones(7)}), "vivit.layernorm.bias (7,) -> (24,)"),
        (lambda w: w.update({"vivit.adapter.weight": torch.ones(2)}), "vivit.adapter.weight"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, native, convert, change, expected):
    _, folder = native
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert_refused(convert(folder), tmp_path, folder, expected)


def test_damaged_files_and_pickles_are_named(tmp_path, native, convert):
    _, folder = native
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(convert(folder), tmp_path, weights)
    weights.unlink()
    torch.save({"classifier.bias": Attack()}, folder / "pytorch_model.bin")
    assert_refused(convert(folder), tmp_path, folder / "pytorch_model.bin", "which is refused")
    assert not EXECUTED


@pytest.mark.parametrize("name", ["vivit.embeddings.position_embeddings", "vivit.encoder.layer.1.mlp.fc2.weight"])
def test_the_parity_check_finds_damage(tmp_path, native, convert, monkeypatch, name):
    load = convert_transformers.load_ours

    def load_damaged(source, **overrides):
        model = load(source, **overrides)
        perturb(model.get_parameter(name))
        return model

    monkeypatch.setattr(convert_transformers, "load_ours", load_damaged)
    result = convert(native[1], "--to", "vivit_hf")
    assert result[0] == 1 and "parity: " in result[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]
