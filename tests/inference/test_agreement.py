"""How answers are compared with those of the plain model, by numbers that are worked out by hand."""

import pytest
import torch

from vivit_hf.data import LabelMap
from vivit_hf.inference.agreement import compare_answers, margins


ONE = LabelMap({"": ("a", "b", "c")})
GROUPS = LabelMap({"noun": ("a", "b"), "verb": ("c", "d", "e")})
SEVERAL = LabelMap({"": ("a", "b", "c")}, has_several=True)


def test_one_label_agrees_if_the_likeliest_is_the_same():
    plain = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.4, 0.35, 0.25]])
    other = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.35, 0.4, 0.25]])
    found = compare_answers(plain, other, ONE)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.largest_change == pytest.approx(0.1) and found.mean_change == pytest.approx(0.5 / 9)
    torch.testing.assert_close(margins(plain, ONE), torch.tensor([0.2, 0.4, 0.05]))


def test_groups_agree_if_every_one_does():
    plain = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.2], [0.6, 0.4, 0.1, 0.8, 0.1]])
    other = torch.tensor([[0.8, 0.2, 0.3, 0.5, 0.2], [0.7, 0.3, 0.1, 0.7, 0.2]])
    assert compare_answers(plain, other, GROUPS).top1 == 0.5
    torch.testing.assert_close(margins(plain, GROUPS), torch.tensor([0.2, 0.2]))


def test_several_labels_agree_if_the_same_ones_hold():
    plain = torch.tensor([[0.9, 0.1, 0.55], [0.2, 0.3, 0.1]])
    other = torch.tensor([[0.7, 0.2, 0.45], [0.4, 0.1, 0.2]])
    assert compare_answers(plain, other, SEVERAL).top1 == 0.5
    torch.testing.assert_close(margins(plain, SEVERAL), torch.tensor([0.05, 0.2]))


def test_labels_with_thresholds_of_their_own_are_given_from_them_on():
    label_map = LabelMap({"": ("a", "b", "c")}, has_several=True, thresholds=(0.8, 0.1, 0.5))
    plain, other = torch.tensor([[0.9, 0.05, 0.55]]), torch.tensor([[0.7, 0.05, 0.55]])
    assert compare_answers(plain, other, label_map).top1 == 0
    torch.testing.assert_close(margins(plain, label_map), torch.tensor([0.05]))
    assert compare_answers(plain, torch.tensor([[0.85, 0.05, 0.9]]), label_map).top1 == 1


def test_a_group_of_a_single_label_is_certain():
    label_map = LabelMap({"noun": ("a",), "verb": ("b", "c")})
    torch.testing.assert_close(margins(torch.tensor([[1.0, 0.7, 0.3]]), label_map), torch.tensor([0.4]))


def test_nan_disagrees():
    plain = torch.tensor([[0.5, 0.3, 0.2]])
    assert compare_answers(plain, torch.full((1, 3), torch.nan), ONE).top1 == 0
