"""Official checkpoints are converted from every msgpack layout; every array is accounted for, and misfits refused."""

import importlib.util
import json
import re
import subprocess
import sys

import msgpack
import numpy as np
import pytest
import torch
from golden import CASES, load_case
from paths import FIXTURES, ROOT
from transformers import AutoImageProcessor, AutoModelForVideoClassification

import vivit_hf
from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.conversion import convert_scenic, label_files
from vivit_hf.conversion.command import main
from vivit_hf.conversion.parity import tokens_and_logits
from vivit_hf.conversion.scenic_checkpoint import read_scenic_checkpoint
from vivit_hf.conversion.scenic_reference import official_forward
from vivit_hf.conversion.scenic_releases import RELEASES, Release
from vivit_hf.conversion.scenic_weights import config_from_scenic, name_map, state_dict_from_scenic


SCENIC = FIXTURES / "scenic"
LAYOUTS = ["old_optimizer_target", "new_params", "old_chunked"]
CASE = np.load(SCENIC / "03_fe_token.npz")
GOLDEN = json.loads(str(CASE["config"]))
PARAMS = {name.removeprefix("params/"): CASE[name] for name in CASE.files if name.startswith("params/")}


@pytest.fixture
def convert(tmp_path, capfd):
    """Return a function that runs the command: (exit code, standard output, standard error, output folder)."""

    def run(checkpoint, *arguments):
        command, output = command_line(tmp_path, checkpoint, *arguments)
        code = main("scenic", command)
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
def test_arrays_are_read_exactly(layout):
    params = read_scenic_checkpoint(SCENIC / f"ckpt_03_{layout}.msgpack")
    assert set(params) == set(PARAMS)
    for name, array in PARAMS.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converted_model_gives_the_official_logits(tmp_path, convert, layout):
    labels = [f"motion {index}" for index in range(GOLDEN["num_classes"])]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    checkpoint = SCENIC / f"ckpt_03_{layout}.msgpack"
    code, printed, errors, output = convert(checkpoint, "--labels", tmp_path / "labels.json")
    assert code == 0, errors
    assert f"{len(PARAMS)} of {len(PARAMS)}" in printed
    assert float(re.search(r"max abs difference (\S+):", printed)[1]) < 1e-5

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


def test_the_script_needs_neither_jax_nor_flax(tmp_path):
    assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("flax") is None
    command, output = command_line(tmp_path, SCENIC / "ckpt_03_new_params.msgpack")
    script = ROOT / "conversion" / "convert_scenic_checkpoint.py"
    process = subprocess.run([sys.executable, str(script), *command], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in output.iterdir()}


def test_every_array_is_accounted_for():
    config = config_from_scenic(GOLDEN["model"], num_frames=8, image_size=24, num_labels=7)
    renamed = dict(PARAMS)
    renamed["Transformer/left_over"] = renamed.pop("cls_SpatialTransformer")
    renamed["output_projection/kernel"] = np.zeros((24, 9), np.float32)
    with pytest.raises(ValueError, match="does not fit the configuration in 3 places") as error:
        state_dict_from_scenic(renamed, config)
    for expected in (
        "missing: cls_SpatialTransformer (for vivit.embeddings.cls_token)",
        "no place for: Transformer/left_over (1, 1, 24)",
        "wrong shape: output_projection/kernel gives (9, 24)",
    ):
        assert expected in str(error.value)


def test_bfloat16_arrays_are_widened(tmp_path):
    values = np.array([1.0, -2.5, 0.15625], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    array = msgpack.ExtType(1, msgpack.packb([[3], "bfloat16", halves]))
    (tmp_path / "c.msgpack").write_bytes(msgpack.packb({"params": {"a": array}}))
    np.testing.assert_array_equal(read_scenic_checkpoint(tmp_path / "c.msgpack")["a"], values)


@pytest.mark.parametrize("damage", ["truncated", "text", "elsewhere"])
def test_a_damaged_file_is_named_in_one_line_and_leaves_no_folder(tmp_path, convert, damage):
    whole = (SCENIC / "ckpt_03_new_params.msgpack").read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>404</html>",
        "elsewhere": msgpack.packb({"weights": {}}),
    }[damage]
    checkpoint = tmp_path / "damaged.msgpack"
    checkpoint.write_bytes(content)
    code, _, errors, _ = convert(checkpoint)
    assert code == 1, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert "damaged.msgpack" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.msgpack", "model.json"]


def test_wrong_number_of_labels_and_full_output_folder_are_refused(tmp_path, convert):
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    checkpoint = SCENIC / "ckpt_03_new_params.msgpack"
    code, _, errors, output = convert(checkpoint, "--labels", tmp_path / "labels.txt")
    assert code == 1 and "names 2 labels, but the classifier has 7 outputs" in errors
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    code, _, errors, output = convert(checkpoint)
    assert code == 1 and "not an empty folder" in errors
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


# The reference that every conversion is run against


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_the_official_model(case):
    """In float64 to 1e-9, directly from the official parameters and configuration."""
    with np.load(SCENIC / f"{case}.npz") as arrays:
        facts = json.loads(str(arrays["config"]))
        params = {name.removeprefix("params/"): arrays[name] for name in arrays.files if name.startswith("params/")}
        video, expected = torch.from_numpy(arrays["inputs/video"]), arrays["outputs_f64/logits"]
    tokens, logits = official_forward(params, facts["model"], video)
    np.testing.assert_allclose(logits, expected, atol=1e-9, rtol=0)

    model, _, _ = load_case(case)  # and our part of the comparison, on the first time step and the last
    clip = video.permute(0, 1, 4, 2, 3)
    steps = [0, tokens.shape[1] - 1]
    ours = tokens_and_logits(model, clip)
    tokens, logits = official_forward(params, facts["model"], video, steps)
    np.testing.assert_allclose(ours["tokens"], tokens, atol=1e-5)
    np.testing.assert_allclose(ours["logits"], logits, atol=1e-5)


def swap_query_and_key(state_dict):
    layer = "vivit.encoder.layer.1.attention"
    query, key = f"{layer}.q_proj.bias", f"{layer}.k_proj.bias"
    state_dict[query], state_dict[key] = state_dict[key], state_dict[query]


def reverse_positions(state_dict):
    state_dict["vivit.temporal_embeddings.position_embeddings"] = state_dict[
        "vivit.temporal_embeddings.position_embeddings"
    ].flip(1)


@pytest.mark.parametrize("damage", [swap_query_and_key, reverse_positions])
def test_the_parity_check_finds_damage(tmp_path, convert, monkeypatch, damage):
    def damaged(params, config):
        state_dict = state_dict_from_scenic(params, config)
        damage(state_dict)
        return state_dict

    monkeypatch.setattr(convert_scenic, "state_dict_from_scenic", damaged)
    checkpoint = SCENIC / "ckpt_03_new_params.msgpack"
    code, _, errors, output = convert(checkpoint)
    assert code == 1 and "error: parity: logits of the result differ" in errors
    assert not output.exists() and [path.name for path in tmp_path.iterdir()] == ["model.json"]
    code, printed, errors, _ = convert(checkpoint, "--skip-parity")
    assert code == 0 and "not checked" in printed, errors


def test_a_wrong_number_of_heads_is_an_error():
    """Our kernels do not show their heads, so a wrong number would go unnoticed and change the result."""
    encoder = {**GOLDEN["model"]["temporal_transformer"], "num_heads": 2}
    config = config_from_scenic(
        {**GOLDEN["model"], "temporal_transformer": encoder}, num_frames=8, image_size=24, num_labels=7
    )
    with pytest.raises(ValueError, match=r"TemporalTransformer/\S+/query/kernel has 4, the configuration 2"):
        state_dict_from_scenic(PARAMS, config)


# The released models


PRESETS = {
    "vivit-b-16x2-kinetics400": "vivit-b-16x2",
    "vivit-b-16x2-fe-kinetics400": "vivit-b-16x2-fe",
    "vivit-l-16x2-fe-kinetics400": "vivit-l-16x2-fe",
    "vivit-l-16x2-fe-kinetics600": "vivit-l-16x2-fe",
    "vivit-l-16x2-fe-epic-kitchens": "vivit-l-16x2-fe-epic-kitchens",
}
LABEL_COUNTS = {"kinetics400": 400, "kinetics600": 600, "kitchens": 397}


@pytest.mark.parametrize("name", RELEASES)
def test_released_models_have_their_official_configuration(name):
    release = RELEASES[name]
    num_labels = LABEL_COUNTS[name.rpartition("-")[2]]
    assert release.num_labels == num_labels
    config = config_from_scenic(
        release.model_config, num_frames=release.num_frames, image_size=release.image_size, num_labels=num_labels
    )
    preset = ViViTConfig.from_preset(PRESETS[name], num_labels=num_labels)
    if name.endswith("kitchens"):
        assert config.drop_path_rate == 0.2  # of training, where the preset leaves it open
        preset.drop_path_rate = 0.2
        assert release.frame_stride == 1
    fields = set(ViViTConfig.__annotations__)
    given = {key: value for key, value in config.to_dict().items() if key in fields}
    # Written out for the temporal encoder, though the same as for the spatial one.
    heads, width = given.pop("temporal_num_attention_heads"), given.pop("temporal_intermediate_size")
    assert heads in (None, config.num_attention_heads) and width in (None, config.intermediate_size)
    assert given == {key: value for key, value in preset.to_dict().items() if key in given}
    layers = config.num_hidden_layers + ("fe" in name) * config.num_temporal_layers
    encoders = 2 if "fe" in name else 1
    # 16 arrays a block; norm and position embedding an encoder, and its class token; embedding and classifier
    assert len(name_map(config)) == 16 * layers + 4 * encoders + 4


@pytest.fixture
def tiny_release(tmp_path, monkeypatch):
    """Register the golden checkpoint as a released model with two heads in its 7 outputs."""

    def release(**fields):
        fields = {"label_groups": {"noun": 4, "verb": 3}, "num_labels": 7, "frame_stride": 1, **fields}
        monkeypatch.setitem(RELEASES, "vivit-tiny", Release(GOLDEN["model"], num_frames=8, image_size=24, **fields))

    return release


@pytest.fixture
def convert_release(tmp_path, capfd):
    def run(*arguments):
        output = tmp_path / "converted"
        command = ["--checkpoint", SCENIC / "ckpt_03_old_optimizer_target.msgpack", "--model", "vivit-tiny"]
        code = main("scenic", list(map(str, [*command, "--output", output, *arguments])))
        return code, *capfd.readouterr(), output

    return run


def test_two_heads_become_groups_of_labels(tmp_path, tiny_release, convert_release):
    tiny_release()
    code, _, errors, output = convert_release()
    assert code == 0 and "warning: the labels have no names" in errors
    model = AutoModelForVideoClassification.from_pretrained(output)
    assert model.config.label_groups == {"noun": 4, "verb": 3}
    assert [model.config.id2label[index] for index in (0, 3, 4, 6)] == [
        *("noun: LABEL_0", "noun: LABEL_3", "verb: LABEL_0", "verb: LABEL_2")
    ]
    assert len(model.config.label2id) == 7
    assert AutoImageProcessor.from_pretrained(output).frame_stride == 1


def test_the_data_set_of_a_release_goes_to_the_hub(tiny_release, convert_release, monkeypatch):
    tiny_release(datasets=("epic-kitchens-100",))
    pushed = []
    monkeypatch.setattr(ViViTForVideoClassification, "push_to_hub", lambda self, *args, **card: pushed.append(card))
    monkeypatch.setattr(ViViTVideoProcessor, "push_to_hub", lambda *args, **options: None)
    code, _, errors, _ = convert_release("--skip-parity", "--push-to-hub", "me/mine")
    assert code == 0 and pushed == [{"private": None, "datasets": ("epic-kitchens-100",)}], errors


NOUNS, VERBS = ["pan", "cut", "tap", "lid"], ["take", "cut", "wash"]


@pytest.mark.parametrize("form", ["groups", "list", "text"])
def test_label_files_name_two_heads(tmp_path, tiny_release, convert_release, form):
    tiny_release()
    path = tmp_path / ("labels.txt" if form == "text" else "labels.json")
    content = {"groups": {"verb": VERBS, "noun": NOUNS}, "list": NOUNS + VERBS}.get(form)
    path.write_text("\n".join(NOUNS + VERBS) if form == "text" else json.dumps(content))
    code, _, errors, output = convert_release("--labels", path)
    assert code == 0 and not errors, errors
    id2label = ViViTConfig.from_pretrained(output).id2label
    assert list(id2label.values()) == [f"noun: {noun}" for noun in NOUNS] + [f"verb: {verb}" for verb in VERBS]


def test_too_few_names_for_a_head_are_refused(tmp_path, tiny_release, convert_release):
    tiny_release()
    (tmp_path / "labels.json").write_text(json.dumps({"noun": NOUNS[:3], "verb": VERBS}))
    code, _, errors, output = convert_release("--labels", tmp_path / "labels.json")
    assert code == 1 and "names 3 of noun; expected 4 of noun and 3 of verb" in errors and not output.exists()


def test_labels_come_from_the_hub(tmp_path, tiny_release, convert_release, monkeypatch):
    tiny_release(label_groups=None, label_file="tiny-id2label.json")
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        (tmp_path / name).write_text(json.dumps({str(index): f"motion {index}" for index in range(7)}))
        return str(tmp_path / name)

    monkeypatch.setattr(label_files, "hf_hub_download", download)
    code, _, errors, output = convert_release()
    assert code == 0 and not errors, errors
    assert asked == [("huggingface/label-files", "tiny-id2label.json", "dataset")]
    assert ViViTConfig.from_pretrained(output).id2label[6] == "motion 6"


def test_without_the_hub_labels_are_numbers_after_a_warning(tiny_release, convert_release):
    tiny_release(label_groups=None, label_file="tiny-id2label.json")  # the tests are offline
    code, _, errors, output = convert_release()
    assert code == 0 and "warning: no tiny-id2label.json from huggingface/label-files" in errors
    assert ViViTConfig.from_pretrained(output).id2label[6] == "LABEL_6"


def test_a_checkpoint_of_another_model_is_refused(tiny_release, convert_release):
    tiny_release(num_labels=9)
    code, _, errors, output = convert_release()
    assert code == 1 and "has 7 outputs, but vivit-tiny has 9" in errors and not output.exists()


def test_optimiser_state_is_skipped_without_being_decoded(tmp_path):
    """It is as large as the model and not needed: even an unknown extension type in it is skipped."""
    weights = {"a": msgpack.ExtType(1, msgpack.packb([[2], "float32", np.array([1, 2], np.float32).tobytes()]))}
    tree = {"optimizer": {"state": {"momentum": msgpack.ExtType(77, b"?")}, "target": weights}, "step": 3}
    (tmp_path / "c.msgpack").write_bytes(msgpack.packb(tree))
    assert read_scenic_checkpoint(tmp_path / "c.msgpack")["a"].tolist() == [1, 2]
