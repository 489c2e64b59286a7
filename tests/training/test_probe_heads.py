"""The heads of probes, against scikit-learn and on data that tell them apart."""

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from vivit_hf.training.probe_heads import HEADS, fit_attentive, fit_linear, fit_neighbours


PENALTIES = {"logisticregression__C": [0.1, 1.0, 10.0, 100.0, 1000.0]}


def steps_of(videos=60, steps=4, hidden=6, classes=3, noise=0.7, seed=0):
    """Steps with a class in every one of them, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(videos) % classes
    centres = rng.normal(size=(classes, 1, hidden))
    vectors = centres[labels] + noise * rng.normal(size=(videos, steps, hidden)) + 5
    return vectors.astype(np.float32), labels


def with_unit_rows():
    return FunctionTransformer(lambda x: x / np.sqrt(np.square(x).sum(axis=1).mean()))


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def folds_of(labels):
    return list(StratifiedKFold(3).split(labels, labels))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("hidden", [6, 50])  # more and fewer videos than features, if concatenated
@pytest.mark.parametrize("pooling", ["mean", "concatenate"])
def test_linear_heads_are_logistic_regression_with_the_best_penalty(pooling, hidden, classes):
    vectors, labels = steps_of(hidden=hidden, classes=classes, noise=3.0)
    folds = folds_of(labels)
    found = fit_linear(vectors, labels, folds, pooling)

    inputs = vectors.mean(axis=1) if pooling == "mean" else vectors.reshape(len(vectors), -1)
    inputs = with_unit_rows().fit_transform(StandardScaler().fit_transform(inputs.astype(np.float64)))
    regression = make_pipeline(LogisticRegression(max_iter=2000, tol=1e-8))
    expected = GridSearchCV(regression, PENALTIES, cv=folds, scoring="neg_log_loss").fit(inputs, labels)
    assert softmax(found.logits(vectors)) == pytest.approx(expected.predict_proba(inputs), abs=2e-3)
    assert (found.predict(vectors) == expected.predict(inputs)).all()


def test_neighbours_are_those_of_scikit_learn():
    data = load_wine()
    vectors, labels = data.data[:, None].astype(np.float32), data.target
    folds = folds_of(labels)
    found = fit_neighbours(vectors[::2], labels[::2], folds_of(labels[::2]), "mean")

    inputs = StandardScaler().fit(data.data[::2]).transform(data.data)
    classifier = KNeighborsClassifier(metric="cosine", weights="distance")
    counts = {"n_neighbors": [1, 3, 5, 10, 20]}
    expected = GridSearchCV(classifier, counts, cv=folds_of(labels[::2])).fit(inputs[::2], labels[::2])
    assert (found.predict(vectors) == expected.predict(inputs)).all() and folds


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_classes_that_every_step_shows(head):
    vectors, labels = steps_of(videos=90)
    fitted = HEADS[head](vectors[:60], labels[:60], folds_of(labels[:60]))
    assert (fitted.predict(vectors[60:]) == labels[60:]).mean() > 0.9


def test_attention_finds_the_step_that_tells_the_class():
    """One step of 16, marked by one feature, tells the class by two others; in the mean it drowns in the noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 2
    vectors = rng.normal(size=(240, 16, 12)).astype(np.float32)
    place = rng.integers(16, size=240)
    vectors[np.arange(240), place, 0] += 6
    vectors[np.arange(240), place, 1] += np.where(labels, 2, -2)
    train, test = slice(160), slice(160, None)
    folds = folds_of(labels[train])
    mean = fit_linear(vectors[train], labels[train], folds, "mean")
    attentive = fit_attentive(vectors[train], labels[train], folds)
    right = [(head.predict(vectors[test]) == labels[test]).mean() for head in (mean, attentive)]
    assert right[1] > 0.9 > right[0]


def test_without_inner_folds_a_default_is_used():
    vectors, labels = steps_of()
    for head in HEADS:
        assert (HEADS[head](vectors, labels, []).predict(vectors) == labels).mean() > 0.9


def test_a_constant_feature_changes_nothing():
    vectors, labels = steps_of()
    constant = np.full_like(vectors[..., :1], 1000.1)
    constant[::2] += 6e-5  # the last bit
    more = np.concatenate([vectors, constant], axis=2)
    folds = folds_of(labels)
    for name in ("linear, mean", "linear, ordered", "attentive"):
        first, second = (HEADS[name](steps, labels, folds) for steps in (vectors, more))
        assert second.logits(more) == pytest.approx(first.logits(vectors), abs=0.02)
