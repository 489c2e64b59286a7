"""A probe as a model: its logits are those of the head on the features, on every variant."""

import json

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_clips, make_model, tiny_config
from tuned_models import store

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.training.probe_checkpoint import model_with_head, possible_heads, save_probe
from vivit_hf.training.probe_data import LabelledFeatures
from vivit_hf.training.probe_heads import HEADS
from vivit_hf.training.probes import score_probes


NAMES = ("läuft", "jump", "跳")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def settings_of(config, kind, num_clips=1):
    return {"kind": kind, "views": {"num_clips": num_clips, "num_crops": 1}, "model": "encoder"}


@torch.no_grad()
def features_of(encoder, clips, kind):
    """(videos, steps, hidden), as the features file has them."""
    if kind == "video":
        return encoder.vivit(clips).pooler_output[:, None].numpy()
    if encoder.config.attention_type == "factorised_encoder":
        return encoder.vivit.encode_steps(clips).numpy()
    time, height, width = encoder.config.grid_size
    tokens = encoder.vivit(clips).last_hidden_state[:, -time * height * width :]
    return tokens.unflatten(1, (time, -1)).mean(dim=2).numpy()


def fitted(encoder, name, kind, labels):
    clips = make_clips(encoder.config, batch=len(labels))
    vectors = features_of(encoder, clips, kind)
    return clips, vectors, HEADS[name](vectors, np.array(labels), [])


LABELS = [0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("case", ["factorised_encoder", "average_pool_baseline", "uniform_frames_factorised_encoder"])
@pytest.mark.parametrize("name", ["linear, mean", "linear, ordered", "attentive"])
def test_heads_on_steps_become_the_pooling_of_a_spatial_encoder(case, name, tmp_path):
    encoder = make_model(case_config(case))
    clips, vectors, head = fitted(encoder, name, "step", LABELS)
    model_with_head(encoder, head, NAMES, settings_of(encoder.config, "step")).save_pretrained(tmp_path)
    model = ViViTForVideoClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(clips).logits
    torch.testing.assert_close(logits, torch.from_numpy(head.logits(vectors)).float(), **CLOSE)
    assert model.config.num_temporal_layers == 0 and model.vivit.temporal_encoder is None
    assert model.config.temporal_pooling == head.pooling
    assert [model.config.id2label[index] for index in range(3)] == list(NAMES)


def test_a_setting_of_tune_was_not_measured_with_the_head():
    encoder = store(make_model(case_config("factorised_encoder")), merge_tokens=2)
    _, _, head = fitted(encoder, "linear, mean", "video", LABELS)
    assert model_with_head(encoder, head, NAMES, settings_of(encoder.config, "video")).config.optimization is None


def test_heads_on_vectors_become_classifiers_of_the_whole_model(case):
    encoder = make_model(case_config(case))
    clips, vectors, head = fitted(encoder, "linear, mean", "video", LABELS)
    model = model_with_head(encoder, head, NAMES, settings_of(encoder.config, "video"))
    with torch.no_grad():
        logits = model(clips).logits
    torch.testing.assert_close(logits, torch.from_numpy(head.logits(vectors)).float(), **CLOSE)
    assert model.config.num_temporal_layers == encoder.config.num_temporal_layers


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_type": "spatio_temporal", "pooling": "mean"},
        {"attention_type": "factorised_self_attention"},
        {"attention_type": "factorised_dot_product_attention", "representation_size": 12},
    ],
)
def test_the_mean_of_the_steps_becomes_the_mean_of_the_tokens(overrides):
    encoder = make_model(tiny_config(**overrides))
    settings = settings_of(encoder.config, "step")
    assert possible_heads(settings, encoder.config) == ("linear, mean",)
    clips, vectors, head = fitted(encoder, "linear, mean", "step", LABELS)
    with torch.no_grad():
        logits = model_with_head(encoder, head, NAMES, settings)(clips).logits
    torch.testing.assert_close(logits, torch.from_numpy(head.logits(vectors)).float(), **CLOSE)


def test_two_classes_have_two_logits():
    encoder = make_model(tiny_config("factorised_encoder"))
    clips, vectors, head = fitted(encoder, "attentive", "step", [0, 1] * 4)
    with torch.no_grad():
        logits = model_with_head(encoder, head, NAMES[:2], settings_of(encoder.config, "step"))(clips).logits
    torch.testing.assert_close(logits, torch.from_numpy(head.logits(vectors)).float(), **CLOSE)


def test_a_representation_layer_and_label_groups_of_the_encoder_are_left_behind():
    overrides = {"representation_size": 12, "label_groups": {"noun": 3, "verb": 2}}
    encoder = make_model(tiny_config("factorised_encoder", **overrides))
    clips, vectors, head = fitted(encoder, "linear, ordered", "step", LABELS)
    model = model_with_head(encoder, head, NAMES, settings_of(encoder.config, "step"))
    with torch.no_grad():
        logits = model(clips).logits
    torch.testing.assert_close(logits, torch.from_numpy(head.logits(vectors)).float(), **CLOSE)
    assert model.config.label_groups is None and model.config.representation_size is None


def test_steps_of_several_clips_have_only_a_mean():
    config = tiny_config("factorised_encoder")
    assert possible_heads(settings_of(config, "step", num_clips=4), config) == ("linear, mean",)
    assert possible_heads(settings_of(config, "step"), config) == ("linear, mean", "linear, ordered", "attentive")
    assert possible_heads(settings_of(config, "video", num_clips=4), config) == ("linear, mean",)


def test_steps_that_the_model_does_not_pool_are_refused():
    config = tiny_config("spatio_temporal")
    with pytest.raises(ValueError, match="attention_type='spatio_temporal' and pooling='cls' does not pool"):
        possible_heads(settings_of(config, "step"), config)


def test_the_best_head_that_a_model_can_have_is_written_with_its_report(tmp_path):
    """Four clusters at the corners of a square, two classes on its diagonals: only neighbours tell them apart."""
    rng = np.random.default_rng(0)
    corners = np.arange(80) % 4
    signs = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]])[corners]
    vectors = np.zeros((80, 1, 32))
    vectors[:, 0, :2] = signs + 0.1 * rng.normal(size=(80, 2))
    data = LabelledFeatures(
        vectors=vectors.astype(np.float32),
        labels=corners // 2,
        names=("a", "b"),
        groups=np.arange(80),
        held_out=None,
        held_out_split=None,
        without_features=("lost.mp4 (damaged)",),
        without_label=(),
    )
    report = score_probes(data, num_repeats=1)
    assert report.best().head == "neighbours, mean"
    encoder, processor = make_model(tiny_config("spatio_temporal")), ViViTVideoProcessor(num_frames=8)
    settings = settings_of(encoder.config, "video")
    assert save_probe(tmp_path, "probe", encoder, processor, settings, data, report) == "linear, mean"
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["written"] == "linear, mean" and written["videos_per_class"] == {"a": 40, "b": 40}
    assert set(written["scores"]) == {"linear, mean", "neighbours, mean"}
    assert written["scores"]["neighbours, mean"]["accuracy"] > 0.95
    assert written["without_features"] == ["lost.mp4 (damaged)"]
    assert "accuracy 0." in (tmp_path / "README.md").read_text()
    assert ViViTConfig.from_pretrained(tmp_path).num_labels == 2
