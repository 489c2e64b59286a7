"""Scores: against hand-made numbers, and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vivit_hf.data.labels import LabelMap
from vivit_hf.inference.metrics import (
    classification_metrics,
    collapsed_class,
    describe_chance,
    is_near_chance,
    joint_ranks,
    mean_average_precision,
    ranks,
)


ONE = LabelMap({"": tuple("abcdefg")})
SEVERAL = LabelMap({"": tuple("abc")}, True)
GROUPED = LabelMap({"noun": ("pan", "lid", "tap"), "verb": ("open", "wash")})


def test_top_1_and_top_5():
    logits = np.array([[7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1.0]])
    assert classification_metrics(logits, np.array([0, 1, 2, 1]), ONE) == {
        "top1": 0.25,
        "top5": 0.75,
        "balanced_accuracy": pytest.approx(1 / 3),
        "majority_class_accuracy": 0.5,
        "samples": 4,
    }
    assert classification_metrics(logits, np.array([0, 1, -100, -100]), ONE) == {
        "top1": 0.5,
        "top5": 0.5,
        "balanced_accuracy": 0.5,
        "majority_class_accuracy": 0.5,
        "samples": 2,
    }


@pytest.mark.parametrize(("num_classes", "has_top5"), [(3, False), (5, False), (6, True)])
def test_scores_that_cannot_be_wrong_are_left_out(num_classes, has_top5):
    label_map = LabelMap({"": tuple("abcdefg"[:num_classes])})
    metrics = classification_metrics(np.eye(num_classes), np.zeros(num_classes, dtype=int), label_map)
    assert ("top5" in metrics) == has_top5


def test_balanced_accuracy_counts_classes_and_not_videos():
    labels = np.array([0] * 8 + [1, 2])
    metrics = classification_metrics(np.eye(3)[[0] * 9 + [2]], labels, LabelMap({"": tuple("abc")}))
    assert (metrics["top1"], metrics["majority_class_accuracy"]) == (0.9, 0.8)
    assert metrics["balanced_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("top1", "majority", "samples", "expected"),
    [
        (0.34, 0.32, 38, True),
        (0.5, 0.32, 38, False),
        (0.10, 0.5, 38, True),
        (0.5, 0.25, 4, True),  # two of four: chance in 26 %
        (1.0, 0.25, 4, False),
        (0.0030, 0.0025, 20_000, True),
        (0.0033, 0.0025, 20_000, False),
        (1.0, 1.0, 5, True),
        (float("nan"), float("nan"), 0, True),
    ],
)
def test_near_chance_is_what_the_most_frequent_class_could_score(top1, majority, samples, expected):
    assert is_near_chance(top1, majority, samples) == expected
    metrics = {"top1": top1, "majority_class_accuracy": majority, "samples": samples, "balanced_accuracy": 0.5}
    assert (describe_chance(metrics) is not None) == expected


def test_several_labels_have_no_chance_line():
    assert describe_chance({"map": 0.1, "samples": 3}) is None


def test_a_model_that_gives_no_numbers_has_no_score():
    logits = np.full((3, 7), np.nan)
    metrics = classification_metrics(logits, np.array([0, 0, 1]), ONE)
    assert (metrics["top1"], metrics["top5"], metrics["balanced_accuracy"]) == (0.0, 0.0, 0.0)
    constant = classification_metrics(np.zeros((4, 7)), np.array([0, 1, 2, 6]), ONE)
    assert (constant["top1"], constant["top5"]) == (0.25, 0.75)


def test_actions_are_pairs_by_the_product_of_the_softmaxes():
    logits = np.array([[2.0, 1.0, 0.0, 0.0, 0.5]])
    metrics = classification_metrics(logits, np.array([[1, 1]]), GROUPED)
    # p(noun) = .665 .245 .090, p(verb) = .378 .622; pairs: .414 .251 | .152 .092 | .056 .034; lid, wash: third
    tops = {name: value for name, value in metrics.items() if "top" in name}
    assert tops == {
        "noun_top1": 0.0,
        "verb_top1": 1.0,
        "action_top1": 0.0,
        "action_top5": 1.0,
        "top1": 0.0,
        "top5": 1.0,
    }
    assert metrics["noun_balanced_accuracy"] == 0.0 and metrics["samples"] == 1
    assert joint_ranks([logits[:, :3], logits[:, 3:]], np.array([[1, 1]])).tolist() == [2]


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), sizes=st.tuples(st.integers(2, 6), st.integers(2, 6)))
def test_joint_ranks_are_those_of_all_products(seed, sizes):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(3, size)) for size in sizes]
    labels = np.stack([rng.integers(size, size=3) for size in sizes], axis=1)
    softmax = [np.exp(part) / np.exp(part).sum(axis=1, keepdims=True) for part in parts]
    for row in range(3):
        products = np.outer(softmax[0][row], softmax[1][row])
        expected = (products > products[tuple(labels[row])] * (1 + 1e-12)).sum()
        assert joint_ranks(parts, labels)[row] == expected


def test_average_precision_by_hand():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0.0]])
    scores = np.array([[0.9, 0.2, 5], [0.8, 0.9, 5], [0.7, 0.8, 5], [0.1, 0.7, 5]])
    # First label: hits at ranks 1 and 3: (1 + 2/3) / 2; second: at 1 and 2: 1; the third does not occur.
    assert mean_average_precision(scores, labels) == pytest.approx((5 / 6 + 1) / 2)
    # Equal scores are one step: two of four.
    assert mean_average_precision(np.zeros((4, 3)), labels) == pytest.approx(0.5)
    ignored = np.concatenate([labels, np.full((1, 3), -100.0)])
    assert classification_metrics(np.concatenate([scores, scores[:1]]), ignored, SEVERAL) == {
        "map": pytest.approx(11 / 12),
        "samples": 4,
    }


def test_ranks_of_equal_scores_go_by_index():
    assert ranks(np.array([[1.0, 1.0, 0.0]] * 3), np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_collapse_is_seen_and_nothing_else():
    balanced = np.repeat([0, 1, 2, 3], 5)
    assert collapsed_class(np.full(20, 2), balanced) == 2
    assert collapsed_class(balanced, balanced) is None
    assert collapsed_class(np.full(20, 2), np.full(20, 2)) is None, "a model that is right has not collapsed"
    assert collapsed_class(np.full(4, 2), balanced[:4]) is None, "too few to tell"
