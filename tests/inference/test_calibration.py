"""Temperatures and calibration errors, against optimisers and formulas of other libraries."""

import numpy as np
import pytest
import torch

from vivit_hf.data import LabelMap
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import to_probabilities
from vivit_hf.inference.calibration import (
    FOLDS,
    Reliability,
    calibrate,
    divide,
    fit_temperatures,
    reliabilities,
)
from vivit_hf.inference.evaluation import Evaluation
from vivit_hf.inference.prediction import VideoPrediction


SEVEN = LabelMap({"": tuple("abcdefg")})
SEVERAL = LabelMap({"": tuple("abcdefg")}, has_several=True)
HEADS = LabelMap({"noun": tuple("abc"), "verb": tuple("wxyz")})


def draw(label_map, files=2000, temperature=2.5, seed=0):
    """Logits that are `temperature` times too large for labels drawn from their probabilities."""
    rng = np.random.default_rng(seed)
    true = 2 * rng.normal(size=(files, len(label_map.names)))
    probabilities = to_probabilities(torch.from_numpy(true), label_map).numpy()
    if label_map.has_several:
        return temperature * true, (rng.random(true.shape) < probabilities).astype(np.float32)
    parts = np.split(probabilities, np.cumsum(label_map.sizes)[:-1], axis=1)
    drawn = [[rng.choice(part.shape[1], p=row / row.sum()) for row in part] for part in parts]
    return temperature * true, np.array(drawn).T if label_map.is_grouped else np.array(drawn[0])


def evaluation(label_map, logits, targets, groups=None):
    videos = [
        LabelledVideo(f"{index}.mp4", (), f"{index}", (f"group={groups[index]}",) if groups is not None else ())
        for index in range(len(logits))
    ]
    predictions = [VideoPrediction(index, row.astype(np.float32)) for index, row in enumerate(logits)]
    return Evaluation(videos, label_map, targets, predictions, "views", 1)


def by_lbfgs(logits, targets):
    """The temperature that torch's optimiser finds for plain cross-entropy, as in the code of Guo et al."""
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([scale], lr=0.1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(torch.from_numpy(logits) / scale, torch.from_numpy(targets))
        value.backward()
        return value

    optimiser.step(loss)
    return scale.item()


def test_the_temperature_is_the_one_that_an_optimiser_finds():
    logits, targets = draw(SEVEN)
    (found,) = fit_temperatures(logits, targets, SEVEN)
    # Apart from labels that count for (files + 1) / (files + 2) instead of 1.
    assert found == pytest.approx(by_lbfgs(logits, targets), rel=0.02)
    assert found == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("label_map", [SEVEN, SEVERAL, HEADS], ids=["one label", "several labels", "two heads"])
def test_calibration_finds_the_temperature_of_each_head_and_reduces_the_error(label_map):
    logits, targets = draw(label_map)
    scales = np.repeat(np.array([1.0, 3.0])[: len(label_map.sizes)], label_map.sizes)
    report = calibrate(evaluation(label_map, logits * scales, targets), 4, 3, "probabilities", "weights")
    expected = [2.5, 7.5][: len(label_map.sizes)]
    assert report.calibration.temperatures == pytest.approx(expected, rel=0.06)
    for group in label_map.groups:
        assert report.before[group].error > 3 * report.after[group].error
        assert report.after[group].error < 2 * report.after[group].error_by_chance


def test_the_error_is_measured_with_temperatures_of_other_files():
    """In each fold, all files have one temperature: the one that fits the files of the others."""
    logits, targets = draw(SEVEN, files=200)
    report = calibrate(evaluation(SEVEN, logits, targets), 1, 1, "logits", "weights")
    folds = divide([[index] for index in range(200)], FOLDS)
    assert sorted(np.concatenate(folds)) == list(range(200))
    for fold in folds:
        rest = np.setdiff1d(np.arange(200), fold)
        (temperature,) = fit_temperatures(logits[rest].astype(np.float32).astype(float), targets[rest], SEVEN)
        expected = torch.from_numpy(logits[fold] / temperature).softmax(-1).amax(-1)
        assert report.after[""].confidence[fold] == pytest.approx(expected.numpy(), rel=1e-5)


def test_files_of_one_group_are_in_one_fold():
    groups = np.arange(120) // 6
    units = [list(np.flatnonzero(groups == group)) for group in range(20)]
    folds = divide(units, FOLDS)
    assert [len(fold) for fold in folds] == [24] * FOLDS
    for fold in folds:
        assert all((np.flatnonzero(groups == group)[:, None] == fold).any() for group in set(groups[fold]))
        assert len(fold) == sum((groups == group).sum() for group in set(groups[fold]))


def test_the_calibration_error_of_an_example_by_hand():
    """Two bins are used: 0.9 and 0.95 with one of two right, 0.5 twice with both right."""
    found = Reliability(np.array([0.94, 0.96, 0.5, 0.5]), np.array([True, False, True, True]))
    assert found.error == pytest.approx(0.5 * abs(0.95 - 0.5) + 0.5 * abs(0.5 - 1.0))


def test_the_error_by_chance_is_that_of_labels_drawn_from_the_probabilities():
    logits, targets = draw(SEVEN, files=300, temperature=1.0)
    errors = []
    for seed in range(40):
        again, labels = draw(SEVEN, files=300, temperature=1.0, seed=seed)
        probabilities = torch.from_numpy(again).softmax(-1).numpy()
        errors.append(reliabilities(probabilities, labels, SEVEN)[""].error)
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    found = reliabilities(probabilities, targets, SEVEN)[""].error_by_chance
    assert found == pytest.approx(np.mean(errors), rel=0.15)


def test_files_that_are_all_right_do_not_make_answers_certain():
    """20 files show an error rate of about 1 in 22, and not of 0."""
    targets = np.arange(20) % 7
    logits = 10 * np.eye(7)[targets]
    (temperature,) = fit_temperatures(logits, targets, SEVEN)
    assert float(torch.from_numpy(logits[0] / temperature).softmax(-1)[0]) == pytest.approx(21 / 22)


def test_answers_worse_than_chance_are_named():
    logits, targets = draw(SEVEN, files=100)
    report = calibrate(evaluation(SEVEN, -logits, targets), 1, 1, "logits", "weights")
    assert "the answers are no better than chance" in "\n".join(report.lines)


@pytest.mark.parametrize(("files", "groups", "there"), [(19, 19, "19 in 19"), (40, 4, "40 in 4")])
def test_too_few_files_are_refused_with_the_number_needed(files, groups, there):
    logits, targets = draw(SEVEN, files=files)
    found = evaluation(SEVEN, logits, targets, np.arange(files) % groups)
    with pytest.raises(ValueError, match=rf"at least 20 files .* at least 5 groups.* there are {there}"):
        calibrate(found, 1, 1, "logits", "weights")


def test_few_files_are_named():
    logits, targets = draw(SEVEN, files=50)
    assert "Only 50 files" in calibrate(evaluation(SEVEN, logits, targets), 1, 1, "logits", "w").lines[-1]
