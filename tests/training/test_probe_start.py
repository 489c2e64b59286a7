"""The classifier that fine-tuning starts from, against scikit-learn and on data that tell its choices apart."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from vivit_hf.training.probe_heads import fit_linear
from vivit_hf.training.probe_start import _Transform, fit_classifier


HIDDEN = 12


def folds_of(labels):
    return list(StratifiedKFold(3).split(labels, labels))


def tokens_of(clips, seed, nuisance=0.0, appearance=0.0, noise=0.3, steps=4, classes=3):
    """Classes move along small directions; a few large ones vary within classes, at each step or in the whole clip."""
    centres = np.random.default_rng(7).normal(size=(classes, steps, HIDDEN))
    centres -= centres.mean(axis=1, keepdims=True)  # the mean over time tells nothing
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % classes
    large = np.random.default_rng(8).normal(size=(4, HIDDEN))
    tokens = centres[labels] + noise * rng.normal(size=(clips, steps, HIDDEN))
    tokens += nuisance * rng.normal(size=(clips, steps, 4)) @ large
    return tokens + appearance * rng.normal(size=(clips, 1, HIDDEN)) + 5, labels


def accuracy(fitted, tokens, labels):
    return (fitted.logits(tokens).argmax(axis=1) == labels).mean()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_logits_are_those_of_logistic_regression_on_the_transformed_tokens(classes):
    tokens, labels = tokens_of(60, 0, nuisance=1.0, classes=classes)
    fitted = fit_classifier(tokens, labels, folds_of(labels))
    weights = (fitted.of_mean, fitted.of_deviations)
    inputs = _Transform.fit(tokens, labels, fitted.shrinkage, weights)(tokens)
    inputs /= np.sqrt(np.square(inputs).sum(axis=1).mean())
    expected = LogisticRegression(C=fitted.penalty, max_iter=5000, tol=1e-8).fit(inputs, labels)
    logits = fitted.logits(tokens)
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found == pytest.approx(expected.predict_proba(inputs), abs=2e-3)


def test_whitened_tokens_have_the_covariance_of_discriminant_analysis():
    """Without shrinkage, the covariance within classes becomes the identity, as scikit-learn's solver makes it."""
    tokens, labels = tokens_of(300, 0, nuisance=2.0, steps=1)
    whitened = _Transform.fit(tokens, labels, 0.0, (1.0, 1.0))(tokens)
    reference = LinearDiscriminantAnalysis(store_covariance=True).fit(whitened, labels)
    assert reference.covariance_ == pytest.approx(np.eye(HIDDEN), abs=1e-8)


def test_large_variation_within_classes_is_whitened_away():
    train, test = tokens_of(24, 0, nuisance=3.0), tokens_of(300, 1, nuisance=3.0)
    fitted = fit_classifier(*train, folds_of(train[1]))
    ordered = fit_linear(*train, folds_of(train[1]), "concatenate")
    assert fitted.shrinkage < 1
    assert accuracy(fitted, *test) > accuracy(ordered, *test) + 0.1


def test_an_appearance_that_tells_nothing_loses_its_weight():
    train, test = tokens_of(24, 0, appearance=4.0), tokens_of(300, 1, appearance=4.0)
    fitted = fit_classifier(*train, folds_of(train[1]))
    assert fitted.of_mean < fitted.of_deviations
    assert accuracy(fitted, *test) > 0.95


def test_motion_that_tells_nothing_loses_its_weight():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    tokens = 4 * rng.normal(size=(90, 16, HIDDEN))
    tokens += np.eye(3, HIDDEN)[labels][:, None] * 3
    fitted = fit_classifier(tokens[:30], labels[:30], folds_of(labels[:30]))
    assert (fitted.of_mean, fitted.of_deviations) == (1.0, 0.0)
    assert accuracy(fitted, tokens[30:], labels[30:]) > 0.8


def test_without_folds_a_default_is_used():
    tokens, labels = tokens_of(30, 0)
    assert accuracy(fit_classifier(tokens, labels, []), tokens, labels) == 1


def test_one_vector_per_clip_has_no_time_to_weight():
    tokens, labels = tokens_of(60, 0, steps=1)
    rng = np.random.default_rng(0)
    tokens = np.eye(3, HIDDEN)[labels][:, None] * 3 + rng.normal(size=tokens.shape)
    fitted = fit_classifier(tokens, labels, folds_of(labels))
    assert (fitted.of_mean, fitted.of_deviations) == (1.0, 1.0) and fitted.weight.shape == (3, HIDDEN)


def test_tokens_that_never_vary_give_a_classifier_without_nan():
    tokens, labels = np.ones((6, 3, HIDDEN)), np.arange(6) % 2
    fitted = fit_classifier(tokens, labels, [])
    assert np.isfinite(fitted.weight).all() and np.isfinite(fitted.bias).all()
