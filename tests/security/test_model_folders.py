"""Model folders from strangers: errors name the file or the field that is damaged, hostile or absurd."""

import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_model

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor


BIG = 10**30
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound")
    make_model(case_config("factorised_encoder")).save_pretrained(path)
    ViViTVideoProcessor(num_frames=8, crop_size=(24, 40)).save_pretrained(path)
    return path


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused_at_once(load, match, error=ValueError):
    begin = time.process_time()
    with pytest.raises(error, match=match) as caught:
        load()
    assert type(caught.value) is error
    assert time.process_time() - begin < 2, "seconds of CPU"


# Configurations


FIELDS = [
    *[(name, value) for name in ("num_frames", "hidden_size", "intermediate_size") for value in (BIG, 2**31)],
    *[("num_hidden_layers", 10**7), ("num_temporal_layers", 10**7), ("num_attention_heads", 2**31)],
    *[("image_size", BIG), ("image_size", [24, 2**31]), ("tubelet_size", [2, 8, BIG]), ("num_channels", BIG)],
    *[("hidden_size", 2**20), ("representation_size", BIG), ("temporal_intermediate_size", BIG)],
    *[("num_labels", 10**9), ("num_labels", -1), ("num_labels", "x"), ("num_labels", 1.5)],
    *[("id2label", value) for value in (5, "x", [[]], {"a": "b"}, {"0": 5}, {"0": None}, {"1": "one"}, {"-1": "x"})],
    *[("id2label", {str(BIG): "x"}), ("id2label", {"0": "x" * 10_000}), ("label2id", [1]), ("label2id", {"a": None})],
    *[("label_groups", {"a": 10**9, "b": 1}), ("label_groups", {str(i): 1 for i in range(2000)})],
    *[("dtype", "os"), ("dtype", [1]), ("quantization_config", "x"), ("transformers_weights", 5)],
    *[("initializer_range", 1e300), ("layer_norm_eps", float("inf")), ("hidden_dropout_prob", BIG)],
    *[("model_type", []), ("model_type", 5)],
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: str(value)[:24])
def test_a_field_that_no_model_can_have_is_named(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    if name in ("num_labels", "label2id"):
        config.pop("id2label")
    if name == "label_groups":
        config = {key: config[key] for key in config if key not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    named = {"label2id": "label", "label_groups": "num_labels|label_groups", "model_type": "type"}.get(name, name)
    for load in (ViViTConfig, ViViTForVideoClassification):
        refused_at_once(lambda cls=load: cls.from_pretrained(folder), named)


STRANGE = [
    *[("check", 5), ("to_dict", {}), ("frame_size", 5), ("__class__", "x"), ("__validators__", 5)],
    *[("attribute_map", 5), ("layer_types", 5), ("layer_types", ["x"]), ("per_layer_config", [1])],
    *[("rope_parameters", {"rope_type": "yarn"}), ("_heterogeneity_spec", 5)],
]


@pytest.mark.parametrize(("name", "value"), STRANGE, ids=lambda value: str(value)[:24])
def test_a_name_that_no_field_may_have_is_a_value_error(folder, name, value):
    edit(folder / "config.json", **{name: value})
    for load in (ViViTConfig, ViViTForVideoClassification):
        refused_at_once(lambda cls=load: cls.from_pretrained(folder), "configuration|method|layer_types")


def test_too_many_labels_are_refused_at_once(folder):
    named = "`num_labels=262,145` is too large; the limit is 262,144"
    refused_at_once(lambda: ViViTConfig(num_labels=262_145), named)
    edit(folder / "config.json", id2label={str(index): "x" for index in range(262_145)})
    refused_at_once(lambda: ViViTForVideoClassification.from_pretrained(folder), named)


def test_sizes_that_are_each_allowed_are_not_allowed_together():
    with pytest.raises(ValueError, match=r"`parameters=[\d,]+` is too large; the limit is 30,000,000,000"):
        ViViTConfig(hidden_size=16_384, num_attention_heads=128, intermediate_size=65_536, num_hidden_layers=200)
    decoder = {"decoder_hidden_size": 16_384, "decoder_num_hidden_layers": 200, "decoder_num_attention_heads": 128}
    with pytest.raises(ValueError, match=r"`parameters=[\d,]+` is too large"):
        ViViTConfig(**decoder)
    with pytest.raises(ValueError, match=r"give a clip of 4096 frames of 1024 x 1024 pixels"):
        ViViTConfig(num_frames=4096, image_size=1024)


def test_the_largest_models_of_the_literature_are_allowed():
    """ViT-22B, and clips longer and larger than any that have been published."""
    ViViTConfig(hidden_size=6144, num_hidden_layers=48, num_attention_heads=48, intermediate_size=24_576)
    ViViTConfig(num_frames=1024, image_size=448, tubelet_size=(8, 32, 32))
    ViViTConfig(num_labels=100_000)


def test_parameters_that_no_file_holds_take_no_memory(folder):
    edit(folder / "config.json", intermediate_size=2**20)
    refused_at_once(lambda: ViViTModel.from_pretrained(folder), "parameters that are not in the checkpoint")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_what_a_file_says_about_the_computation_is_not_followed(folder, name):
    edit(folder / "config.json", **{name: "stranger/kernel"})
    assert ViViTForVideoClassification.from_pretrained(folder).config._attn_implementation == "sdpa"


# Files


TEXTS = {"null": "null", "number": "5", "string": '"x"', "deep": DEEP, "digits": '{"num_frames": ' + "1" * 5000 + "}"}


@pytest.mark.parametrize("text", TEXTS)
def test_json_that_is_no_configuration_is_named(folder, text):
    (folder / "config.json").write_text(TEXTS[text])
    for load in (ViViTConfig, ViViTForVideoClassification):
        refused_at_once(lambda cls=load: cls.from_pretrained(folder), "model.* (nested|JSON|cannot be read)")
    (folder / "preprocessor_config.json").write_text(TEXTS[text])
    (folder / "video_preprocessor_config.json").unlink()
    error = OSError if text == "null" else ValueError  # transformers treats null as a missing file
    refused_at_once(lambda: ViViTVideoProcessor.from_pretrained(folder), "model", error)


class _Code:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder, ran):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": _Code(ran)}))


def saved_with_code(folder, ran):
    torch.save({"x": _Code(ran)}, folder / "pytorch_model.bin")


def saved_list(folder, ran):
    torch.save([1, 2], folder / "pytorch_model.bin")


def saved_text(folder, ran):
    torch.save({"classifier.weight": "x"}, folder / "pytorch_model.bin")


def garbage(folder, ran):
    (folder / "pytorch_model.bin").write_bytes(b"hello" * 100)


def empty(folder, ran):
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize("write", [pickled, saved_with_code, saved_list, saved_text, garbage, empty])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_executed_and_named(folder, tmp_path, write):
    (folder / "model.safetensors").unlink()
    write(folder, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (is damaged|does not hold a state dict)"):
        ViViTForVideoClassification.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickles_that_hold_no_weights_are_left_alone(folder, tmp_path):
    (folder / "training_args.bin").write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    ViViTForVideoClassification.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        ViViTForVideoClassification.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 1000, (2**62).to_bytes(8, "little") + b"{}", "half"], ids=range(4))
def test_damaged_safetensors_are_named(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        ViViTForVideoClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", "..\\x"]
)
def test_an_index_names_no_file_outside_of_its_folder(folder, name, target):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.weight": target}}))
    refused_at_once(lambda: ViViTForVideoClassification.from_pretrained(folder), "weights must lie in the same folder")


@pytest.mark.parametrize(
    "index",
    [
        *["null", "[]", "5", "{", DEEP, '{"metadata": {}}', '{"weight_map": {"a": "b"}}'],
        *['{"metadata": {}, "weight_map": [1]}', '{"metadata": {}, "weight_map": {}}'],
        *['{"metadata": {}, "weight_map": {"a": 5}}', '{"metadata": {}, "weight_map": {"a": "not_there.safetensors"}}'],
    ],
    ids=range(11),
)
def test_a_damaged_index_is_named(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused_at_once(
        lambda: ViViTForVideoClassification.from_pretrained(folder), r"The model\.safetensors\.index\.json of .*model "
    )


@pytest.mark.parametrize("text", ["null", "5", "[]", "{", DEEP, "{}"], ids=range(6))
def test_a_damaged_adapter_configuration_is_named(folder, text):
    (folder / "adapter_config.json").write_text(text)
    refused_at_once(
        lambda: ViViTForVideoClassification.from_pretrained(folder), r"The adapter_config\.json of .*model "
    )


def test_an_adapter_of_an_unknown_kind_is_named(folder):
    pytest.importorskip("peft")
    (folder / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    refused_at_once(
        lambda: ViViTForVideoClassification.from_pretrained(folder),
        r"adapter_config\.json has the peft_type 'MAGIC'; expected one of .*LORA",
    )


# Processors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("frames_per_second", 3e7), ("frames_per_second", 1e-300), ("frame_stride", BIG), ("num_frames", BIG)],
        *[("num_frames", 2**31), ("num_clips", 10**6), ("num_threads", 10**6), ("rescale_factor", 1e300)],
        *[("size", BIG), ("size", {"shortest_edge": 2**20}), ("crop_size", {"height": BIG, "width": 1})],
        *[("image_mean", None), ("image_mean", "x"), ("image_mean", [[[]]]), ("image_std", 1e300)],
        *[("resample", None), ("resample", []), ("resample", BIG), ("do_sample_frames", "x")],
        *[("video_limits", 5), ("video_limits", [[]]), ("video_limits", {"max_frames": "x"})],
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_parameter_that_no_processor_can_have_is_named(folder, name, value):
    edit(folder / "preprocessor_config.json", **{name: value})
    refused_at_once(lambda: ViViTVideoProcessor.from_pretrained(folder), name)


def test_clips_that_would_fill_the_memory_are_refused():
    with pytest.raises(ValueError, match="`num_frames` and `crop_size` give a clip of 4096 frames of 4096 x 4096"):
        ViViTVideoProcessor(num_frames=4096, crop_size=4096)
    with pytest.raises(ValueError, match="`num_frames` and `size` give a clip of 4096 frames"):
        ViViTVideoProcessor(num_frames=4096, size=4096, do_center_crop=False)


def test_a_file_lowers_limits_on_videos_but_does_not_raise_them(folder):
    video = np.zeros((4, 24, 40, 3), dtype=np.uint8)
    edit(folder / "preprocessor_config.json", video_limits={"max_frames": 10**12, "max_pixels": 5000})
    processor = ViViTVideoProcessor.from_pretrained(folder)
    assert processor.video_limits == {"max_pixels": 5000}
    raised = ViViTVideoProcessor.from_pretrained(folder, video_limits={"max_frames": 10**12})
    assert raised.video_limits == {"max_pixels": 5000, "max_frames": 10**12}
    assert processor(video)["pixel_values"].shape[1] == 8
