"""Label sets: finite-sample coverage against the beta-binomial distribution of scipy, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.stats import betabinom
from tiny_models import tiny_config

from vivit_hf.data import LabelMap
from vivit_hf.inference.label_sets import (
    check_sets,
    conformal_rank,
    fit_sets,
    in_sets,
    label_set,
    least_probabilities,
)


HEADS = LabelMap({"noun": tuple("abcde"), "verb": tuple("wxyz")})
TEN = LabelMap({"": tuple("abcdefghij")})
SPLITS = 20


def softmax(logits):
    return torch.from_numpy(logits).softmax(-1).numpy()


def drawn(rng, files, labels=10, sure=1.5, wrong=2.0):
    """Logits that are too sure: labels are drawn from flatter probabilities than those of the logits."""
    logits = sure * rng.normal(size=(files, labels))
    labels = [rng.choice(labels, p=row) for row in softmax(logits / wrong)]
    return logits, np.array(labels)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_coverage_of_twenty_random_splits_lies_above_the_lower_bound(coverage):
    """The covered files of a split follow a beta-binomial distribution; the bound is its quantile of 1 in 10,000."""
    rng = np.random.default_rng(0)
    logits, targets = drawn(rng, 600)
    probabilities, covered = softmax(logits), []
    for _ in range(SPLITS):
        order = rng.permutation(600)
        known, new = order[:200], order[200:]
        least = least_probabilities(probabilities[known, targets[known]], coverage)
        found = in_sets(probabilities[new], least)
        assert found.any(axis=1).all()
        covered.append(found[np.arange(400), targets[new]].sum())
    rank = conformal_rank(200, coverage)
    assert min(covered) >= betabinom(400, rank, 201 - rank).ppf(1e-4)
    assert np.mean(covered) / 400 == pytest.approx(coverage, abs=0.03)  # neither more than asked for


def test_plain_sums_of_probability_would_not_cover():
    """The model of the test above is too sure: sets up to a summed probability of 0.9 hold the label less often."""
    logits, targets = drawn(np.random.default_rng(0), 600)
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, axis=1)
    before = np.take_along_axis(probabilities, order, axis=1).cumsum(axis=1) - np.take_along_axis(
        probabilities, order, axis=1
    )
    rank = (order == targets[:, None]).argmax(axis=1)
    assert (before[np.arange(600), rank] < 0.9).mean() < 0.87


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_files_of_new_groups_are_covered(coverage):
    """
    Groups of 12 files, half of which are hard altogether. One file per group counts, so the guarantee is for a file of
    a new group; with all files it would be computed as if there were twelve times as many.
    """
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(400), 12)
    hard = rng.random(400) < 0.5
    logits = 3 * rng.normal(size=(4800, 10))
    flat = np.where(hard[groups], 8.0, 1.0)[:, None]
    targets = np.array([rng.choice(10, p=row) for row in softmax(logits / flat)])
    covered = []
    for split in range(SPLITS):
        order = rng.permutation(400)
        known, new = order[:50], order[50:]
        files = np.flatnonzero(np.isin(groups, known))
        units = [list(np.flatnonzero(groups[files] == group)) for group in known]
        sets = fit_sets(logits[files], targets[files], units, TEN, seed=split)
        one_of_each = [rng.choice(np.flatnonzero(groups == group)) for group in new]
        found = in_sets(softmax(logits[one_of_each]), sets[f"{coverage:g}"][0])
        covered.append(found[np.arange(350), targets[one_of_each]].sum())
    rank = conformal_rank(50, coverage)
    assert min(covered) >= betabinom(350, rank, 51 - rank).ppf(1e-4)


@pytest.mark.parametrize(
    ("files", "coverage", "rank"), [(9, 0.9, 9), (19, 0.95, 19), (99, 0.99, 99), (100, 0.9, 91), (4, 0.8, 4)]
)
def test_the_rank_is_the_finite_sample_one(files, coverage, rank):
    assert conformal_rank(files, coverage) == rank


@pytest.mark.parametrize(("files", "coverage", "least"), [(8, 0.9, 9), (18, 0.95, 19), (98, 0.99, 99), (3, 0.8, 4)])
def test_too_few_files_are_refused_with_the_least_number(files, coverage, least):
    with pytest.raises(ValueError, match=rf"needs at least {least} labelled files or groups of files, got {files}"):
        conformal_rank(files, coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 90])
def test_a_coverage_is_a_probability(coverage):
    with pytest.raises(ValueError, match="must be a probability between 0 and 1"):
        conformal_rank(1000, coverage)


def test_a_set_is_never_empty():
    found = in_sets(np.array([[0.4, 0.35, 0.25], [0.9, 0.06, 0.04]]), 0.5)
    assert found.tolist() == [[True, False, False], [True, False, False]]


FIELDS = {"num_files": 40, "num_units": 30, "num_clips": 4, "num_crops": 3, "averaging": "probabilities"}
VIEWS = {"num_clips": 4, "num_crops": 3}


def config_of(label_map=TEN, **calibration):
    given = {**FIELDS, "temperatures": [2.0] * len(label_map.groups), **calibration}
    return tiny_config("spatio_temporal", **label_map.config_fields(), calibration=given)


def test_each_head_has_a_set_and_scores_are_calibrated():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -2.0, 3.0, 2.9, 2.8, -4.0])
    found = label_set(logits, config_of(HEADS, sets={"0.9": [0.2, 0.3]}), 0.9)
    plain = [softmax(logits[:5]), softmax(logits[5:])]
    expected = [*(("noun", "abcde"[k]) for k in range(5) if plain[0][k] >= 0.2)]
    expected += [*(("verb", "wxyz"[k]) for k in range(4) if plain[1][k] >= 0.3)]
    assert [(group, name) for group, name, _ in found] == expected and len(expected) >= 4
    assert found[0][2] == pytest.approx(softmax(logits[:5] / 2)[0])


@pytest.mark.parametrize(
    ("config", "coverage", "views", "message"),
    [
        (config_of(), 0.9, VIEWS, "need a calibrated model"),
        (config_of(sets={"0.9": [0.2]}), 0.95, VIEWS, r"`coverage=0.95` is not stored; the model has 0.9"),
        (config_of(sets={"0.9": [0.2]}), 0.99, VIEWS, "needs at least 99 labelled files or groups of files, got 30"),
        (config_of(sets={"0.9": [0.2]}), 0.93, VIEWS, r"`coverage=0.93` is not stored"),
        (config_of(sets={"0.9": [0.2]}), 0.9, {"num_clips": 1, "num_crops": 1}, "take the same views"),
        (tiny_config("spatio_temporal", num_labels=1), 0.9, VIEWS, "this is a regression"),
        (
            tiny_config("spatio_temporal", problem_type="multi_label_classification"),
            0.9,
            VIEWS,
            "multi-label model, which has thresholds instead",
        ),
    ],
)
def test_what_has_no_sets_is_named(config, coverage, views, message):
    with pytest.raises(ValueError, match=message):
        check_sets(config, coverage, views)


@pytest.mark.parametrize(
    "sets", [{"0.9": [0.2, 0.3]}, {"0.9": [1.2]}, {"0.9": 0.2}, {"nine": [0.2]}, {"0.9": [float("nan")]}, [0.9]]
)
def test_stored_sets_are_checked(sets):
    with pytest.raises(ValueError, match=r"calibration"):
        config_of(sets=sets)
