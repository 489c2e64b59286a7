"""Thresholds of multi-label models, against every possible threshold and scikit-learn's F1 score."""

import numpy as np
import pytest
from sklearn.metrics import f1_score
from test_calibration import SEVERAL, draw, evaluation
from tiny_models import tiny_config

from vivit_hf.data import LabelMap
from vivit_hf.inference.calibration import calibrate
from vivit_hf.inference.label_thresholds import best_thresholds, macro_f1


def files(seed=0, count=80):
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, 5)) < [0.05, 0.2, 0.5, 0.8, 0.3]).astype(float)
    probabilities = np.round(np.clip(0.3 * targets + 0.7 * rng.random((count, 5)) * 0.6, 0, 1), 2)  # with ties
    return probabilities, targets


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed):
    probabilities, targets = files(seed)
    found = best_thresholds(probabilities, targets)
    for label in range(5):
        of_found = f1_score(targets[:, label], probabilities[:, label] >= found[label])
        others = [f1_score(targets[:, label], probabilities[:, label] >= one) for one in np.linspace(0, 1, 201)]
        assert of_found >= max(others) - 1e-12


def test_macro_f1_is_that_of_scikit_learn():
    probabilities, targets = files()
    expected = f1_score(targets, probabilities >= 0.4, average="macro")
    assert macro_f1(probabilities >= 0.4, targets) == pytest.approx(expected)


def test_a_label_without_files_has_one_half_and_is_named():
    logits, targets = draw(SEVERAL, files=150)
    targets[:, 2] = 0
    report = calibrate(evaluation(SEVERAL, logits - 2, targets), 1, 1, "logits", "weights")
    assert report.calibration.thresholds[2] == 0.5 and report.calibration.sets is None
    assert "1 labels have no file and the threshold 0.5: c" in report.lines


def test_thresholds_help_a_model_that_says_too_little():
    logits, targets = draw(SEVERAL, files=600, temperature=1.0)
    report = calibrate(evaluation(SEVERAL, logits - 3, targets), 1, 1, "logits", "weights")
    assert report.scores["f1_at_thresholds"] > report.scores["f1_at_half"] + 0.02


def test_labels_below_their_threshold_are_not_given():
    fields = {"num_files": 40, "num_units": 30, "num_clips": 4, "num_crops": 3, "averaging": "probabilities"}
    calibration = {**fields, "temperatures": [1.0], "thresholds": [0.1, 0.5, 0.9, 0.2, 0.5]}
    config = tiny_config(
        "spatio_temporal",
        id2label=dict(enumerate("abcde")),
        problem_type="multi_label_classification",
        calibration=calibration,
    )
    label_map = LabelMap.from_config(config)
    assert [name for _, name, _ in label_map.ranked(np.array([0.2, 0.4, 0.8, 0.3, 0.6]), 5)] == ["e", "d", "a"]
    assert label_map.ranked(np.zeros(5), 5) == []
    config.calibration = {**calibration, "thresholds": [0.1] * 4}
    with pytest.raises(ValueError, match="4 thresholds and no sets, which do not fit the 5 labels"):
        config.check()
