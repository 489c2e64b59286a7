"""Loading: transformers' own Vivit under both key layouts, new classifiers, folders of earlier versions, and errors."""

import json
import logging

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tiny_models import ATTENTION_TYPES, make_model, tiny_config
from transformers import AutoModelForVideoClassification, VivitConfig, VivitForVideoClassification, VivitModel

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel


@pytest.fixture(scope="module")
def native():
    """A random Vivit of transformers, with every parameter far from what an initialisation would give."""
    config = VivitConfig(
        image_size=32,
        num_frames=8,
        tubelet_size=[2, 8, 8],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        id2label={0: "run", 1: "walk", 2: "sit", 3: "eat", 4: "dance"},
        label2id={"run": 0, "walk": 1, "sit": 2, "eat": 3, "dance": 4},
    )
    torch.manual_seed(0)
    model = VivitForVideoClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def clips():
    return torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def save_native(model, folder, layout):
    """`file`: the names that save_pretrained writes; `memory`: those of a plain dump of the state dict."""
    if layout == "file":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "vivit"}))
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["file", "memory"])
def test_native_checkpoint_gives_the_same_logits(native, clips, tmp_path, layout):
    folder = save_native(native, tmp_path, layout)
    names = set(load_file(folder / "model.safetensors"))
    marker = {
        "file": "vivit.encoder.layer.0.attention.attention.query.weight",
        "memory": "vivit.layers.0.mlp.fc1.weight",
    }
    assert marker[layout] in names, "transformers changed its names: this test no longer covers the layout"

    model, info = ViViTForVideoClassification.from_pretrained(folder, output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == "vivit_hf" and model.config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.id2label == native.config.id2label
    with torch.no_grad():
        torch.testing.assert_close(model(clips).logits, native(clips).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["file", "memory"])
def test_what_is_saved_has_our_names_and_nothing_of_the_source(native, clips, tmp_path, layout):
    model = ViViTForVideoClassification.from_pretrained(save_native(native, tmp_path / "native", layout))
    model.save_pretrained(tmp_path / "ours")

    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(model.state_dict())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "vivit_hf" and config["architectures"] == ["ViViTForVideoClassification"]
    again = AutoModelForVideoClassification.from_pretrained(tmp_path / "ours")
    assert type(again) is ViViTForVideoClassification
    assert torch.equal(again(clips).logits, model(clips).logits)


def test_native_base_model_loads_and_its_pooler_is_left_out(native, clips, tmp_path):
    base = VivitModel(native.config).eval()
    base.load_state_dict({name.removeprefix("vivit."): p for name, p in native.state_dict().items()}, strict=False)
    base.save_pretrained(tmp_path)
    assert "pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    model = ViViTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model(clips).last_hidden_state, base(clips).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", sorted(path.name for path in (FIXTURES / "saved_by_0.1.0").iterdir()))
def test_a_folder_saved_by_the_first_version_gives_the_same_logits(case):
    """Parameter names never change: these files were written by version 0.1.0, before its modules moved."""
    folder = FIXTURES / "saved_by_0.1.0" / case
    model = AutoModelForVideoClassification.from_pretrained(folder).eval()
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
    clips = torch.linspace(-1, 1, 4 * 3 * 8 * 16, dtype=torch.float64).mul(50).cos().float().reshape(1, 4, 3, 8, 16)
    with torch.no_grad():
        logits = model(clips).logits[0]
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_a_foreign_key_is_an_error_that_names_it(native, tmp_path):
    folder = save_native(native, tmp_path, "file")
    state_dict = load_file(folder / "model.safetensors")
    state_dict["vivit.encoder.layer.0.extra.weight"] = torch.zeros(1)
    save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without a place in the model: vivit\.encoder\.layer\.0\.extra\.weight"):
        ViViTForVideoClassification.from_pretrained(folder)


def test_a_missing_key_is_an_error_that_names_it(native, tmp_path):
    folder = save_native(native, tmp_path, "file")
    state_dict = load_file(folder / "model.safetensors")
    del state_dict["vivit.encoder.layer.1.intermediate.dense.bias"]
    save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not in the checkpoint: vivit\.encoder\.layer\.1\.mlp\.fc1\.bias"):
        ViViTForVideoClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    "override", [{"pooling": "mean"}, {"attention_type": "factorised_encoder"}, {"tubelet_size": (2, 16, 16)}]
)
def test_a_configuration_that_does_not_fit_the_weights_is_an_error(native, tmp_path, override):
    folder = save_native(native, tmp_path, "file")
    with pytest.raises(ValueError, match="do not fit a ViViTForVideoClassification"):
        ViViTForVideoClassification.from_pretrained(folder, **override)


def test_an_image_model_is_refused_by_name(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model of type 'vit', not a ViViT"):
        ViViTForVideoClassification.from_pretrained(tmp_path)


@pytest.fixture(params=ATTENTION_TYPES)
def saved(request, tmp_path):
    torch.manual_seed(0)
    labels = {0: "run", 1: "walk", 2: "sit", 3: "eat", 4: "dance"}
    model = make_model(tiny_config(request.param, id2label=labels))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def assert_only_the_head_differs(old, new):
    new_state = new.state_dict()
    for name, parameter in old.state_dict().items():
        if name.startswith("classifier."):
            assert not (new_state[name].shape == parameter.shape and torch.equal(new_state[name], parameter)), name
        else:
            assert torch.equal(new_state[name], parameter), name
    assert new.classifier.weight.std() > 0


@pytest.fixture
def warnings_of_loading(caplog):
    """Messages of transformers' loggers and ours, which do not reach pytest by themselves."""
    loggers = [logging.getLogger("transformers"), logging.getLogger("vivit_hf")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_another_number_of_labels_gives_a_fresh_head_named_in_the_log(saved, warnings_of_loading):
    model, folder = saved
    for loader in (ViViTForVideoClassification, AutoModelForVideoClassification):
        warnings_of_loading.clear()
        new = loader.from_pretrained(folder, num_labels=7)
        assert new.classifier.weight.shape[0] == 7 == new.config.num_labels == len(new.config.label2id)
        assert_only_the_head_differs(model, new)
        assert "classifier.weight" in warnings_of_loading.text


def test_other_label_names_give_a_fresh_head_named_in_the_log(saved, warnings_of_loading):
    model, folder = saved
    labels = {0: "jump", 1: "swim", 2: "row", 3: "ski", 4: "climb"}
    for loader in (ViViTForVideoClassification, AutoModelForVideoClassification):
        warnings_of_loading.clear()
        new = loader.from_pretrained(folder, id2label=labels, label2id={name: i for i, name in labels.items()})
        assert new.config.id2label == labels
        assert_only_the_head_differs(model, new)
        assert "classifier.weight" in warnings_of_loading.text


def test_the_same_labels_keep_the_head(saved):
    model, folder = saved
    new = ViViTForVideoClassification.from_pretrained(folder, id2label=dict(model.config.id2label))
    assert torch.equal(new.classifier.weight, model.classifier.weight)


def test_names_for_generic_labels_keep_the_head(tmp_path):
    model = ViViTForVideoClassification(tiny_config("spatio_temporal"))
    model.save_pretrained(tmp_path)
    labels = {index: f"class {index}" for index in range(model.config.num_labels)}
    new = ViViTForVideoClassification.from_pretrained(tmp_path, id2label=labels)
    assert new.config.id2label == labels
    assert torch.equal(new.classifier.weight, model.classifier.weight)


def test_contradicting_labels_are_an_error(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="`num_labels=3` contradicts a label map of 2 labels"):
        ViViTForVideoClassification.from_pretrained(folder, num_labels=3, id2label={0: "a", 1: "b"})


def test_a_base_model_gets_a_head_and_a_classifier_loses_it(saved, tmp_path):
    model, folder = saved
    base = ViViTModel.from_pretrained(folder)
    for name, parameter in base.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[f"vivit.{name}"]), name
    base.save_pretrained(tmp_path / "base")
    again = ViViTForVideoClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert again.classifier.weight.shape[0] == 3
    for name, parameter in base.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[f"vivit.{name}"]), name


def test_config_overrides_are_validated_while_loading(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="larger than the clip"):
        ViViTForVideoClassification.from_pretrained(folder, num_frames=1)


def test_a_state_dict_loads_without_a_folder(saved):
    model, _ = saved
    config = ViViTConfig.from_dict(model.config.to_dict())
    new = ViViTForVideoClassification.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(OSError, match="no/such/folder"):
        ViViTForVideoClassification.from_pretrained("no/such/folder")
