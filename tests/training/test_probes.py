"""The scores of probes: folds, groups, splits and the refusal of data that cannot be divided."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vivit_hf.training import probe_heads
from vivit_hf.training.probe_data import LabelledFeatures
from vivit_hf.training.probes import inner_folds, make_folds, num_possible_folds, score_probes


def data_of(vectors, labels, groups=None, held_out=None):
    return LabelledFeatures(
        vectors=vectors.astype(np.float32),
        labels=np.asarray(labels),
        names=tuple("abcdefghij"[: max(labels) + 1]),
        groups=np.arange(len(labels)) if groups is None else np.asarray(groups),
        held_out=held_out,
        held_out_split=None if held_out is None else "test",
        without_features=(),
        without_label=(),
    )


@pytest.fixture(scope="module")
def wine():
    data = load_wine()
    return data_of(data.data[:, None], data.target)


def orders(videos=90, steps=6, hidden=8, seed=0):
    """Videos of two shapes of steps, A before B or B before A: their mean tells nothing."""
    rng = np.random.default_rng(seed)
    labels = np.arange(videos) % 2
    shapes = rng.normal(size=(2, hidden))
    kinds = np.repeat([[0, 1], [1, 0]], steps // 2, axis=1)[labels]  # (videos, steps)
    return data_of(shapes[kinds] + 0.5 * rng.normal(size=(videos, steps, hidden)), labels)


def by_head(report):
    return {score.head: score for score in report.scores}


def test_scores_are_those_of_scikit_learn(wine, monkeypatch):
    monkeypatch.setattr(probe_heads, "_NEIGHBOURS", (3,))
    found = by_head(score_probes(wine, num_folds=4, num_repeats=1, seed=7))["neighbours, mean"]
    folds = make_folds(wine.labels, wine.groups, 4, seed=7)
    inputs = wine.vectors[:, 0]
    pipeline = make_pipeline(StandardScaler(), KNeighborsClassifier(3, metric="cosine", weights="distance"))
    expected = cross_val_score(pipeline, inputs, wine.labels, cv=folds)
    assert found.accuracies == pytest.approx(expected)
    assert (found.accuracy, found.spread) == pytest.approx((expected.mean(), expected.std(ddof=1)))
    predicted = cross_val_predict(pipeline, inputs, wine.labels, cv=folds)
    assert found.balanced_accuracies == pytest.approx([balanced_accuracy_score(wine.labels, predicted)])


def test_linear_scores_on_known_data(wine):
    found = by_head(score_probes(wine, num_folds=5, num_repeats=2))["linear, mean"]
    folds = make_folds(wine.labels, wine.groups, 5, seed=0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = cross_val_score(pipeline, wine.vectors[:, 0], wine.labels, cv=folds).mean()
    assert expected > 0.95 and found.accuracy == pytest.approx(expected, abs=0.015)
    assert len(found.accuracies) == 10 and len(found.balanced_accuracies) == 2


def test_the_majority_class_stands_beside_the_scores(wine):
    report = score_probes(wine, num_repeats=1)
    assert report.majority_class == "b" and report.majority_class_accuracy == pytest.approx(71 / 178)


def test_only_ordered_heads_tell_order():
    scores = by_head(score_probes(orders(), num_folds=3, num_repeats=1))
    assert scores["linear, ordered"].accuracy > 0.95 and scores["neighbours, ordered"].accuracy > 0.9
    assert all(scores[head].accuracy < 0.65 for head in ("linear, mean", "neighbours, mean", "attentive"))


def test_one_vector_per_video_has_no_order(wine):
    assert [score.head for score in score_probes(wine, num_repeats=1).scores] == ["linear, mean", "neighbours, mean"]


def test_seeds_are_reproducible_and_differ():
    first, again, other = (score_probes(orders(), num_repeats=1, seed=seed) for seed in (0, 0, 1))
    assert [score.accuracies for score in first.scores] == [score.accuracies for score in again.scores]
    assert [score.accuracies for score in first.scores] != [score.accuracies for score in other.scores]


def test_the_best_head_is_the_most_accurate_one_of_those_asked_for():
    report = score_probes(orders(), num_folds=3, num_repeats=1)
    assert report.best().head == "linear, ordered"
    assert report.best(["neighbours, ordered", "neighbours, mean"]).head == "neighbours, ordered"


def test_annotated_splits_are_scored_once():
    data = orders()
    held_out = np.arange(90) >= 60
    report = score_probes(data_of(data.vectors, data.labels, held_out=held_out))
    assert report.num_folds == 1 and report.num_scored == 30
    assert "scored on the 30 test videos" in report.protocol
    assert all(len(score.accuracies) == 1 and score.spread is None for score in report.scores)


# Folds


@settings(max_examples=100)
@given(
    labels=st.lists(st.integers(0, 2), min_size=6, max_size=40),
    group_seed=st.integers(0, 1000),
    num_groups=st.integers(1, 12),
    num_folds=st.integers(2, 5),
)
def test_groups_are_never_divided(labels, group_seed, num_groups, num_folds):
    labels = np.unique(labels, return_inverse=True)[1]
    groups = np.random.default_rng(group_seed).integers(num_groups, size=len(labels))
    names = tuple("abc"[: labels.max() + 1])
    try:
        folds = make_folds(labels, groups, num_possible_folds(labels, groups, names, num_folds), seed=0)
    except ValueError:  # tested below
        return
    assert np.sort(np.concatenate([test for _, test in folds])).tolist() == list(range(len(labels)))
    for train, test in folds:
        assert len(test) and not set(groups[train]) & set(groups[test])
        assert sorted({*train, *test}) == list(range(len(labels)))
        assert set(labels[train]) == set(labels)
        for inner_train, inner_test in inner_folds(labels[train], groups[train], seed=0):
            assert not set(groups[train][inner_train]) & set(groups[train][inner_test])


def test_folds_are_stratified_without_groups():
    labels = np.repeat([0, 1], [40, 10])
    folds = make_folds(labels, np.arange(50), 5, seed=3)
    assert [np.bincount(labels[test]).tolist() for _, test in folds] == [[8, 2]] * 5


def test_a_rare_class_means_fewer_folds_and_the_report_says_so():
    labels = np.repeat([0, 1], [20, 3])
    vectors = np.random.default_rng(0).normal(size=(23, 1, 4)) + labels[:, None, None]
    report = score_probes(data_of(vectors, labels), num_folds=5, num_repeats=1)
    assert report.num_folds == 3 and "3 folds instead of 5: a class has only 3" in report.notes[0]


def test_two_videos_of_a_class_leave_no_inner_folds_and_the_report_says_so():
    labels = np.repeat([0, 1], [20, 2])
    vectors = np.random.default_rng(0).normal(size=(22, 1, 4)) + labels[:, None, None]
    report = score_probes(data_of(vectors, labels), num_folds=5, num_repeats=1)
    assert report.num_folds == 2 and "penalty and neighbours are not chosen by trying" in report.notes[1]


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 0, 0, 1], [0, 1, 2, 3], "The class 'b' has a single video"),
        ([0, 0, 1, 1], [0, 1, 2, 2], "The class 'b' has 2 videos, which all belong to one group"),
    ],
)
def test_a_class_that_cannot_be_divided_is_refused_by_name(labels, groups, message):
    vectors = np.random.default_rng(0).normal(size=(4, 1, 4))
    with pytest.raises(ValueError, match=message):
        score_probes(data_of(vectors, labels, groups))


def test_groups_that_make_stratification_impossible_are_refused():
    """Each class is in two of three groups, so that one side of two folds always lacks one."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    groups = np.array([0, 2, 0, 1, 1, 2])
    with pytest.raises(ValueError, match="3 groups cannot be divided into 2 folds whose training videos have all 3"):
        make_folds(labels, groups, 2, seed=0)


@pytest.mark.parametrize("numbers", [{"num_folds": 1}, {"num_repeats": 0}])
def test_too_few_folds_or_repeats_are_refused(wine, numbers):
    with pytest.raises(ValueError, match="at least 2 folds and 1 repeat"):
        score_probes(wine, **numbers)
