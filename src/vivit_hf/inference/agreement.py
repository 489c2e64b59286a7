"""How far the answers of a faster model agree with those of the plain one, and how certain the plain ones are."""

from dataclasses import dataclass

import torch

from ..data.labels import LabelMap


THRESHOLD = 0.5  # of a probability, from which on a label of several is given, unless it has a threshold of its own


@dataclass(frozen=True)
class Agreement:
    """
    How two models agree on the same clips.

    `top1`: the share of the clips with the same answer: the same most likely label, in every group; with several labels
    per video, the same labels at their thresholds, by default 0.5.
    `largest_change`, `mean_change`: of a probability, in absolute numbers.
    """

    top1: float
    largest_change: float
    mean_change: float


def compare_answers(plain: torch.Tensor, other: torch.Tensor, label_map: LabelMap) -> Agreement:
    """
    Compare probabilities with those of the plain model.

    Args:
        plain, other: probabilities (clips, num_labels), see `to_probabilities`. A clip with NaN in `other` disagrees.
    """
    changes = (other - plain).abs()
    is_same = (_answers(plain, label_map) == _answers(other, label_map)).all(dim=1) & other.isfinite().all(dim=1)
    return Agreement(float(is_same.float().mean()), float(changes.max()), float(changes.mean()))


def _answers(probabilities: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """Return the most likely label of each group, (clips, groups), or which of several labels hold, (clips, labels)."""
    if label_map.has_several:
        return probabilities >= _thresholds(label_map)
    return torch.stack([part.argmax(dim=1) for part in probabilities.split(label_map.sizes, dim=1)], dim=1)


def margins(probabilities: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """
    Return how much a probability must change until the answer for a clip does, roughly, float (clips,).

    That is the difference between the two highest probabilities, in the group where it is smallest; with several labels
    per video, the distance from its threshold of the label that is closest to it.

    Args:
        probabilities: (clips, num_labels), see `to_probabilities`.
    """
    if label_map.has_several:
        return (probabilities - _thresholds(label_map)).abs().min(dim=1).values
    pairs = [part.topk(2, dim=1).values for part in probabilities.split(label_map.sizes, dim=1) if part.shape[1] > 1]
    return torch.stack([pair[:, 0] - pair[:, 1] for pair in pairs], dim=1).min(dim=1).values


def _thresholds(label_map: LabelMap) -> torch.Tensor:
    """Return the probability from which on each of several labels is given, (labels,)."""
    return torch.tensor([*label_map.thresholds] or [THRESHOLD] * len(label_map.names))
