"""Image ViTs in every layout of transformers become ViViTs with exactly their weights; misfits are refused."""

import json
import pickle
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from image_conversion import EXECUTED, Attack, assert_refused, converter, difference, jax_arrays
from safetensors.torch import load_file, save_file
from tiny_models import ATTENTION_TYPES
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTModel, ViTMSNConfig, ViTMSNModel
from vit_models import make_vit, perturb, write_layout

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.conversion import convert_vit
from vivit_hf.hub.model_card import read_initialisation
from vivit_hf.initialisation import weight_files
from vivit_hf.initialisation.from_image import TUBELET_INITS, config_from_vit, initialise_from_vit
from vivit_hf.initialisation.image_sources import read_image_source


SETTINGS = {
    "image_processor_type": "ViTImageProcessor",
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
    "size": {"height": 24, "width": 24},
}


@pytest.fixture
def convert(tmp_path, capfd):
    return converter(tmp_path, capfd)


@pytest.fixture
def folder(tmp_path):
    """The folder of a tiny ViT with a pooler, as written by `save_pretrained`."""
    make_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


# transformers' ViT


@pytest.mark.parametrize("layout", ["names in files", "names in memory", "torch file", "sharded"])
@pytest.mark.parametrize("kind", ["pooler", "no pooler", "classifier"])
def test_every_layout_of_transformers_keeps_its_exact_weights(tmp_path, convert, kind, layout):
    if kind == "classifier":
        vit = make_vit(ViTForImageClassification, num_labels=3)
    else:
        vit = make_vit(lambda config: ViTModel(config, add_pooling_layer=kind == "pooler"))
    write_layout(vit, tmp_path / "vit", layout)
    code, printed, errors, output = convert(tmp_path / "vit", "--attention-type", "factorised_encoder")
    assert code == 0, errors
    total, unused = len(vit.state_dict()), 0 if kind == "no pooler" else 2
    assert f"arrays mapped {total - unused} of {total} " in printed
    reason = {"pooler": "pooler.dense.bias (pooler)", "classifier": "classifier.bias (classification head)"}
    assert reason.get(kind, "unused none") in printed
    assert difference(printed) < 1e-5 and "newly initialised 68: vivit.temporal_embeddings" in printed

    torch.manual_seed(0)
    config = config_from_vit(vit.config, attention_type="factorised_encoder", num_frames=4, num_labels=0)
    expected = ViViTForVideoClassification(config)
    initialise_from_vit(expected, vit)
    actual = ViViTForVideoClassification.from_pretrained(output)
    assert (
        actual.config.num_labels == 0 and actual.config.layer_norm_eps == 1e-12 and actual.config.hidden_act == "gelu"
    )
    assert set(actual.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


def test_a_similar_encoder_is_converted(tmp_path, convert):
    """ViTMSN has ViT's encoder and names, but another type and other defaults."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    msn = ViTMSNModel(ViTMSNConfig(**sizes, image_size=24, patch_size=8)).eval()
    msn.save_pretrained(tmp_path / "msn")
    code, _, errors, output = convert(tmp_path / "msn")
    assert code == 0, errors
    model = ViViTForVideoClassification.from_pretrained(output)
    assert model.config.layer_norm_eps == 1e-6
    assert torch.equal(model.vivit.embeddings.cls_token, msn.embeddings.cls_token)


# The parity check


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("init", [*TUBELET_INITS, "uniform_frame_sampling"])
def test_every_variant_is_compared_with_the_vit(folder, convert, attention_type, init):
    is_sampled = init == "uniform_frame_sampling"
    options = ["--embedding-type", init] if is_sampled else ["--tubelet-init", init]
    code, printed, errors, _ = convert(folder, "--attention-type", attention_type, *options)
    assert code == 0, errors
    assert difference(printed) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        "--image-size 32",
        "--image-size 24 40",
        "--image-size 24 40 --position-init tile_linear",
        "--image-size 29",
        "--tubelet-size 4 8 8 --tubelet-init approximate_rank_pooling",
        "--pooling mean",
        "--attention-type factorised_encoder --pooling mean --temporal-encoder-init copy_last --num-temporal-layers 1",
        "--attention-type factorised_encoder --num-temporal-layers 0 --pooling max",
        "--attention-type factorised_encoder --temporal_pooling mean --num-temporal-layers 1",
        "--attention-type factorised_encoder --temporal-pooling attention --num-temporal-layers 0",
        "--attention-type factorised_self_attention --temporal-attention-init copy --attention-order time_space",
        "--attention-type factorised_self_attention --temporal-attention-init random",
        "--attention-type factorised_self_attention --temporal-attention-init zero",
        "--attention-type factorised_dot_product_attention --image-size 40 24",
        "--attention-type factorised_encoder --embedding-type uniform_frame_sampling --num-sampled-frames 3",
    ],
)
def test_every_option_is_compared_with_the_vit(folder, convert, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning of `zero` has a test of its own
        code, printed, errors, _ = convert(folder, *options.split())
    assert code == 0, errors
    assert difference(printed) < 1e-5


def swap_halves(tensor):
    with torch.no_grad():
        tensor.copy_(tensor.roll(tensor.shape[0] // 2, 0))


@pytest.mark.parametrize(
    ("attention_type", "name", "damage"),
    [
        ("spatio_temporal", "vivit.embeddings.position_embeddings", perturb),
        ("spatio_temporal", "vivit.embeddings.cls_token", perturb),
        ("spatio_temporal", "vivit.encoder.layer.1.attention.k_proj.weight", swap_halves),
        ("factorised_encoder", "vivit.embeddings.patch_embeddings.projection.weight", perturb),
        ("factorised_encoder", "vivit.encoder.layer.1.mlp.fc2.weight", perturb),
        ("factorised_self_attention", "vivit.encoder.layer.0.attention_time.o_proj.bias", perturb),
        ("factorised_self_attention", "vivit.layernorm.bias", perturb),
        ("factorised_dot_product_attention", "vivit.encoder.layer.0.attention.q_proj.weight", swap_halves),
    ],
)
def test_the_parity_check_finds_damage(tmp_path, folder, convert, monkeypatch, attention_type, name, damage):
    def initialise(vivit, vit, **options):
        report = initialise_from_vit(vivit, vit, **options)
        damage(vivit.get_parameter(name))
        return report

    monkeypatch.setattr(convert_vit, "initialise_from_vit", initialise)
    assert_refused(convert(folder, "--attention-type", attention_type), tmp_path, "parity: ", "nothing was written")
    code, printed, errors, _ = convert(folder, "--attention-type", attention_type, "--skip-parity")
    assert code == 0 and "parity not checked (--skip-parity)" in printed, errors


# What cannot be converted


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "swin"}, "of type 'swin', not a plain ViT"),
        ({"model_type": "deit"}, "a distilled DeiT"),
        ({"model_type": "vivit_hf"}, "of type 'vivit_hf'"),
        ({"hidden_size": 24}, "neither transformers' `model_type` nor timm's `architecture`"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, convert, config, expected):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(convert(folder), tmp_path, folder, expected)


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.bias"), "missing: layers.1.mlp.fc2.bias"),
        (lambda w: w.update({"layernorm.bias": torch.ones(7)}), "wrong shape: layernorm.bias is (7,)"),
        (lambda w: w.update({"embeddings.distillation_token": torch.ones(1)}), "embeddings.distillation_token"),
        (lambda w: w.update({"encoder.layer.0.lambda_1": torch.ones(24)}), "no place for: layers.0.lambda_1"),
        (lambda w: w.clear() or w.update({"a": torch.ones(1)}), "missing: embeddings.cls_token"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, folder, convert, change, expected):
    edit(folder, change)
    assert_refused(convert(folder), tmp_path, folder, expected)


def test_a_configuration_that_does_not_fit_the_weights(tmp_path, folder, convert):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert_refused(convert(folder), tmp_path, "missing: layers.2.")
    (folder / "config.json").write_text("{")
    assert_refused(convert(folder), tmp_path, "config.json is not JSON")


def test_missing_files(tmp_path, folder, convert):
    assert_refused(convert(tmp_path / "nowhere"), tmp_path, tmp_path / "nowhere")
    assert_refused(convert(tmp_path / "nowhere.npz"), tmp_path, "There is no file", "nowhere.npz")
    (folder / "model.safetensors").unlink()
    assert_refused(convert(folder), tmp_path, "has no weights; expected model.safetensors")
    (folder / "config.json").unlink()
    assert_refused(convert(folder), tmp_path, "has no config.json")
    (tmp_path / "notes.txt").write_text("text")
    assert_refused(convert(tmp_path / "notes.txt"), tmp_path, "notes.txt is neither a folder")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "vit.npz"])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_files_are_named(tmp_path, folder, convert, name, damage):
    source, path = folder, folder / name
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), path)
        (folder / "model.safetensors").unlink()
    elif name.endswith(".npz"):
        source = path = tmp_path / name
        np.savez(path, **jax_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>404</html>")
    assert_refused(convert(source), tmp_path, path)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_cannot_execute_code(tmp_path, folder, convert, form):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if form == "torch":
        torch.save({"layernorm.bias": Attack()}, path)
    else:
        path.write_bytes(pickle.dumps({"layernorm.bias": Attack()}, protocol=2))
    assert_refused(convert(folder), tmp_path, path, "needs code in the file to be run, which is refused")
    assert not EXECUTED


def test_a_full_output_folder_is_left_alone(tmp_path, folder, convert):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "precious.txt").write_text("keep")
    code, _, errors, output = convert(folder)
    assert code == 1 and "not an empty folder" in errors
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--attention-type factorized_everything", "`attention_type='factorized_everything'` is not known"),
        ("--tubelet-size 2 16 16", "tubelet_size"),
        ("--num-frames 1", "Use a smaller tubelet or a larger clip"),
        ("--attention-type factorised_encoder --temporal-encoder-init copy_last", "use `temporal_pooling='mean'`"),
    ],
)
def test_options_that_no_model_can_have_are_refused(tmp_path, folder, convert, options, expected):
    assert_refused(convert(folder, *options.split()), tmp_path, expected)


# What is written beside the weights


def test_the_processor_prepares_frames_like_the_image_model(folder, convert):
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    code, printed, errors, output = convert(folder, "--image-size", 32)
    assert code == 0, errors
    processor = AutoImageProcessor.from_pretrained(output)
    assert isinstance(processor, ViViTVideoProcessor)
    assert processor.num_frames == 4 and processor.size == {"shortest_edge": 37}
    assert processor.crop_size == {"height": 32, "width": 32} and processor.do_center_crop
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    expected = (frames / 255 - SETTINGS["image_mean"]) / SETTINGS["image_std"]
    actual = processor(frames, do_resize=False)["pixel_values"][0].permute(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert "resized to short side 37, cropped to 32 x 32, values in [-2.4, 3]" in printed


@pytest.mark.parametrize(
    ("settings", "options", "short_side"),
    [
        ({}, "", 27),
        ({"size": 24}, "", 27),
        ({"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": 24}, "", 30),
        (
            {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}},
            "--image-size 32",
            40,
        ),
        ({}, "--resize 28", 28),
    ],
)
def test_how_frames_are_resized(folder, convert, settings, options, short_side):
    (folder / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    code, _, errors, output = convert(folder, *options.split(), "--skip-parity")
    assert code == 0, errors
    processor = ViViTVideoProcessor.from_pretrained(output)
    assert processor.size == {"shortest_edge": short_side} and processor.do_center_crop
    assert set(processor.crop_size.values()) == {32 if "32" in options else 24}


def test_labels_and_model_card_are_written(tmp_path, folder, convert):
    (tmp_path / "labels.json").write_text(json.dumps({"1": "run", "0": "walk", "2": "sit"}))
    code, printed, errors, output = convert(folder, "--labels", tmp_path / "labels.json")
    assert code == 0, errors
    model = ViViTForVideoClassification.from_pretrained(output)
    assert model.config.id2label == {0: "walk", 1: "run", 2: "sit"} and model.config.label2id["run"] == 1
    assert "newly initialised 2: classifier.weight, classifier.bias" in printed
    _, initialisation = read_initialisation(output)
    assert str(folder) in initialisation and "Newly initialised: `classifier.weight`" in initialisation

    (output / "model.safetensors").unlink()
    code, _, errors, _ = convert(folder, "--labels", tmp_path / "labels.json", "--num-labels", 4)
    assert code == 1


def test_a_label_file_of_groups_gives_a_model_with_groups(tmp_path, folder, convert):
    (tmp_path / "labels.json").write_text(json.dumps({"noun": ["pan", "cup"], "verb": ["take", "put", "wash"]}))
    code, _, errors, output = convert(folder, "--labels", tmp_path / "labels.json", "--num-labels", 5)
    assert code == 0, errors
    config = ViViTConfig.from_pretrained(output)
    assert config.label_groups == {"noun": 2, "verb": 3} and config.id2label[2] == "verb: take"


def test_labels_with_a_name_twice_are_refused(tmp_path, folder, convert):
    (tmp_path / "labels.txt").write_text("run\nwalk\nrun\n")
    code, _, errors, output = convert(folder, "--labels", tmp_path / "labels.txt")
    assert code == 1 and "labels.txt" in errors and "repeated: run" in errors and not output.exists()


def test_without_labels_there_is_no_random_classifier(folder, convert):
    code, printed, errors, output = convert(folder)
    assert code == 0 and "newly initialised none" in printed, errors
    assert not [name for name in load_file(output / "model.safetensors") if "classifier" in name]
    assert ViViTForVideoClassification.from_pretrained(output, num_labels=3).classifier.weight.shape == (3, 24)


@pytest.mark.parametrize("private", [True, False])
def test_push_uploads_the_result(folder, convert, monkeypatch, private):
    pushed = []

    def push(self, repository, **options):
        pushed.append((type(self), repository, options))

    monkeypatch.setattr(ViViTForVideoClassification, "push_to_hub", push)
    monkeypatch.setattr(ViViTVideoProcessor, "push_to_hub", push)
    code, printed, errors, output = convert(folder, "--push-to-hub", "me/mine", *["--private"] * private)
    assert code == 0 and "uploaded to me/mine" in printed, errors
    options = {"private": private or None}  # else the Hub's default, which an organisation may set to private
    assert pushed == [
        (ViViTForVideoClassification, "me/mine", options),
        (ViViTVideoProcessor, "me/mine", options),
    ]
    assert "me/mine" in (output / "README.md").read_text()


def test_an_endpoint_is_uploaded_with_the_model(folder, convert, monkeypatch):
    pushed = []
    monkeypatch.setattr(ViViTForVideoClassification, "push_to_hub", lambda self, *args, **card: pushed.append(card))
    monkeypatch.setattr(ViViTVideoProcessor, "push_to_hub", lambda *args, **options: None)
    code, _, errors, _ = convert(folder, "--push-to-hub", "me/mine", "--endpoint")
    assert code == 0 and pushed[0]["endpoint"] is True, errors


def test_a_failed_push_keeps_the_folder(folder, convert, monkeypatch):
    def push(self, repository, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(ViViTForVideoClassification, "push_to_hub", push)
    code, _, errors, output = convert(folder, "--push-to-hub", "me/mine")
    assert code == 1 and "is complete, but was not uploaded to me/mine: no network" in errors
    assert ViViTForVideoClassification.from_pretrained(output)


def test_hub_ids_are_read_through_the_cache(tmp_path, folder, convert, monkeypatch):
    """Files of a Hub id are downloaded one by one, and optional ones may be missing."""
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    asked = []

    def download(source, name):
        asked.append((source, name))
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    def from_pretrained(source, **options):
        return load(folder if source == "me/vit" else source, **options)

    load = ViTModel.from_pretrained
    monkeypatch.setattr(weight_files, "hf_hub_download", download)
    monkeypatch.setattr(weight_files, "HfApi", Mock())
    monkeypatch.setattr(ViTModel, "from_pretrained", from_pretrained)
    code, _, errors, _ = convert("me/vit")
    assert code == 0, errors
    expected = {("me/vit", name) for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    assert expected <= set(asked)


def test_settings_of_the_source_are_kept(folder):
    """Settings that decide what the weights compute must not come from defaults."""
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=24,
                       patch_size=8, hidden_act="relu", layer_norm_eps=1e-3, qkv_bias=False)  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    vit = read_image_source(str(folder)).vit
    for name in ("hidden_act", "layer_norm_eps", "qkv_bias", "patch_size", "image_size"):
        assert getattr(vit.config, name) == getattr(config, name)
