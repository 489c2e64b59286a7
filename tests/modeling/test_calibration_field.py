"""`ViViTConfig.calibration`: typed, kept where it holds, and left out where it does not."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import ATTENTION_TYPES, make_clips, make_model, tiny_config

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.calibration_vivit import Calibration, answer_fingerprint
from vivit_hf.data import LabelMap
from vivit_hf.data.labels import to_probabilities


FIELDS = {
    "temperatures": [2.0],
    "num_files": 40,
    "num_units": 40,
    "num_clips": 4,
    "num_crops": 3,
    "averaging": "probabilities",
}


def calibrated(attention_type="factorised_encoder", **overrides):
    model = make_model(tiny_config(attention_type, **overrides))
    model.config.calibration = {**FIELDS, "weights": answer_fingerprint(model)}
    return model


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_logits_stay_plain_and_probabilities_are_calibrated(attention_type, tmp_path):
    model = calibrated(attention_type)
    model.save_pretrained(tmp_path)
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path).eval()
    assert Calibration.of(loaded.config) == Calibration.of(model.config)
    clips = make_clips(model.config)
    plain = make_model(tiny_config(attention_type))
    with torch.no_grad():
        logits, expected = loaded(clips).logits, plain(clips).logits
    assert torch.equal(logits, expected)
    assert torch.equal(to_probabilities(logits, LabelMap.from_config(loaded.config)), (logits / 2).softmax(-1))
    assert torch.equal(to_probabilities(logits, LabelMap.from_config(plain.config)), logits.softmax(-1))


def test_each_head_has_its_temperature():
    names = dict(enumerate(("noun: a", "noun: b", "noun: c", "verb: x", "verb: y")))
    config = tiny_config("spatio_temporal", id2label=names, label_groups={"noun": 3, "verb": 2})
    config.calibration = {**FIELDS, "temperatures": [2.0, 0.5]}
    logits = torch.randn(3, 5)
    expected = torch.cat([(logits[:, :3] / 2).softmax(-1), (logits[:, 3:] * 2).softmax(-1)], dim=-1)
    assert torch.equal(to_probabilities(logits, LabelMap.from_config(config)), expected)


def test_several_labels_have_one_temperature():
    config = tiny_config("spatio_temporal", problem_type="multi_label_classification", calibration=FIELDS)
    logits = torch.randn(3, 5)
    assert torch.equal(to_probabilities(logits, LabelMap.from_config(config)), (logits / 2).sigmoid())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperatures": [float("nan")]}, "`calibration.temperatures=nan` must be a number of at least 0.02"),
        ({"temperatures": [0.0]}, "must be a number of at least 0.02"),
        ({"temperatures": "2.0"}, "must be a list of numbers"),
        ({"temperatures": []}, "must be a list of numbers"),
        ({"temperatures": [1.0, 1.0]}, "has 2 temperatures, but there are 5 labels in 1 groups"),
        ({"num_files": -1}, "`calibration.num_files=-1` must be a whole number of at least 1"),
        ({"averaging": "votes"}, "`calibration.averaging='votes'` is not known"),
        ({"weights": 7}, "`calibration.weights=7` must be a fingerprint, as text"),
        ({"sigma": 1}, "with the fields temperatures, num_files"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match="calibration") as error:
        tiny_config("spatio_temporal", calibration={**FIELDS, **fields})
    assert message in str(error.value)


def test_a_calibration_without_a_field_is_incomplete():
    with pytest.raises(ValueError, match=r"`calibration` is incomplete: .*'averaging'"):
        tiny_config("spatio_temporal", calibration={"temperatures": [1.0], "num_files": 1, "num_units": 1})


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_labels": 7},
        {"id2label": dict(enumerate("vwxyz"))},
        {"label_groups": {"noun": 3, "verb": 2}},
        {"problem_type": "multi_label_classification"},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_other_labels_leave_it_out(overrides, tmp_path):
    calibrated().save_pretrained(tmp_path)
    assert ViViTConfig.from_pretrained(tmp_path).calibration is not None
    assert ViViTConfig.from_pretrained(tmp_path, **overrides).calibration is None
    assert ViViTForVideoClassification.from_pretrained(tmp_path, **overrides).config.calibration is None


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_training_leaves_it_out_when_the_model_is_saved(attention_type, tmp_path, caplog):
    model = calibrated(attention_type).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(make_clips(model.config), labels=torch.tensor([0, 1])).loss.backward()
    optimiser.step()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model.save_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert ViViTConfig.from_pretrained(tmp_path).calibration is None
    assert any("Left out the calibration" in record.message for record in caplog.records)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_it(dtype, tmp_path):
    calibrated().save_pretrained(tmp_path / "a")
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "a", dtype=dtype)
    model.save_pretrained(tmp_path / "b")
    assert ViViTConfig.from_pretrained(tmp_path / "b").calibration == model.config.calibration is not None


WITHOUT = """
import sys
from transformers import AutoConfig, AutoModelForVideoClassification
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForVideoClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "vivit_hf" not in sys.modules and type(model).__module__.startswith("transformers_modules")
model.save_pretrained(sys.argv[2])
print(config.calibration["temperatures"], AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True).calibration)
"""


def test_it_travels_without_the_package(tmp_path):
    calibrated().save_pretrained(tmp_path / "a")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "a"), str(tmp_path / "b")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.startswith("[2.0] {") and "'num_files': 40" in process.stdout
