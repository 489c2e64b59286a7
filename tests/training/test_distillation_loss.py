"""The loss of distillation: divergences in labels, groups and several labels, against numbers by hand."""

import numpy as np
import pytest
import torch
from teachers import GROUPS, LABELS, SEVERAL, divergence

from vivit_hf.training.distillation import Distillation, distillation_loss


def binary(values):
    """The logits of the two outcomes whose softmax is the sigmoid of a logit."""
    return np.stack([values, np.zeros_like(values)], axis=-1)


def random_logits(num_labels, batch=4):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, batch, num_labels, generator=generator)


def test_the_loss_is_the_mean_divergence_times_the_square_of_the_temperature():
    logits, theirs = random_logits(3)
    expected = 4 * divergence(theirs.double().numpy() / 2, logits.double().numpy() / 2).mean()
    assert expected > 0.1
    for labels in (torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)):
        loss = distillation_loss(logits, theirs, labels, LABELS, temperature=2.0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_each_group_of_labels_has_its_own_divergence():
    logits, theirs = random_logits(5)
    ours, expected = logits.double().numpy(), theirs.double().numpy()
    parts = [divergence(expected[:, part], ours[:, part]) for part in (slice(2), slice(2, 5))]
    labels = torch.tensor([[0, 0], [1, 2], [0, 1], [1, 1]])
    loss = distillation_loss(logits, theirs, labels, GROUPS, temperature=1.0)
    assert loss.item() == pytest.approx(np.mean(parts), rel=1e-5)


def test_with_several_labels_per_video_each_label_is_a_divergence_of_its_sigmoid():
    logits, theirs = random_logits(3)
    expected = 9 * divergence(binary(theirs.double().numpy() / 3), binary(logits.double().numpy() / 3)).mean()
    loss = distillation_loss(logits, theirs, torch.ones(4, 3), SEVERAL, temperature=3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_ignored_examples_do_not_count():
    logits, theirs = random_logits(3)
    rows = [0, 3]
    expected = distillation_loss(logits[rows], theirs[rows], torch.tensor([0, 1]), LABELS, 2.0)
    loss = distillation_loss(logits, theirs, torch.tensor([0, -100, -100, 1]), LABELS, 2.0)
    torch.testing.assert_close(loss, expected)
    assert distillation_loss(logits, theirs, torch.full((4,), -100), LABELS, 2.0) == 0
    # A clip that stands in for an unreadable file has probabilities of zero.
    soft = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0.5, 0.5]])
    torch.testing.assert_close(distillation_loss(logits, theirs, soft, LABELS, 2.0), expected / 2)


@pytest.mark.parametrize("kind", ["single", "soft", "groups", "soft groups", "several"])
def test_the_batches_of_a_step_add_up_to_the_loss_of_the_whole(kind):
    label_map = {"single": LABELS, "soft": LABELS, "several": SEVERAL}.get(kind, GROUPS)
    logits, theirs = random_logits(len(label_map.names), batch=6)
    labels = {
        "single": torch.tensor([0, 1, -100, 2, 1, 1]),
        "groups": torch.tensor([[0, 1], [1, 2], [0, 0], [0, 1], [1, 2], [0, 0]]),
    }.get(kind, torch.rand(6, len(label_map.names)))
    whole = distillation_loss(logits, theirs, labels, label_map, 2.0)
    count = labels.ne(-100).sum()
    parts = [
        distillation_loss(logits[rows], theirs[rows], labels[rows], label_map, 2.0, count)
        for rows in (slice(4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_loss_is_a_weighted_sum():
    logits, theirs = random_logits(3)
    labels = torch.tensor([0, 1, 2, 0])
    soft = distillation_loss(logits, theirs, labels, LABELS, 2.0)
    distillation = Distillation(None, "teacher", temperature=2.0, weight=0.25)
    loss = distillation.loss(torch.tensor(8.0), logits, theirs, labels, LABELS)
    torch.testing.assert_close(loss, 6.0 + 0.25 * soft)
