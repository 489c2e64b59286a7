"""Choose how to tell unknown videos, by energy or by the nearest training features, and from where on to say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..calibration_vivit import UNKNOWN_SCORES
from ..data.annotations import LabelledVideo
from ..data.labels import LabelMap, units_of
from .evaluation import Evaluation
from .label_sets import conformal_rank
from .prediction import VideoOutputs, VideoPrediction
from .unknown import distances, energies


NUM_KNOWN = 1000  # training videos whose features are kept


@dataclass(frozen=True)
class UnknownChoice:
    """
    A rule for unknown videos.

    `rule`: see `Calibration.unknown`.
    `known`: features of training videos, float16 (videos, hidden), if the rule needs them.
    `aurocs`: how well each score tells unknown videos from the others, if that was measured.
    `measured_on`: which videos counted as unknown there.
    `called`: the share of the unknown videos that the rule calls unknown, if there are any.
    """

    rule: dict[str, Any]
    known: torch.Tensor | None
    aurocs: dict[str, float]
    measured_on: str
    called: float | None

    @property
    def results(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        known = None if self.known is None else len(self.known)
        return {**self.rule, "aurocs": self.aurocs, "known_videos": known, "unknown_videos_called": self.called}

    @property
    def lines(self) -> list[str]:
        """The numbers, in words."""
        kept = "" if self.known is None else f", to the nearest of {len(self.known)} training videos"
        share = f"{self.rule['false_alarms']:.1%}"
        found = [f"unknown answer: by {self.rule['score']}{kept}, at {share} false alarms"]
        if self.aurocs:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in self.aurocs.items())
            found.append(f"  AUROC on {self.measured_on}: {scores}")
        if self.called is not None:
            found.append(f"  {self.called:.1%} of the unknown videos are called unknown")
        return found


def choose_known(videos: Sequence[LabelledVideo], count: int = NUM_KNOWN, seed: int = 0) -> list[LabelledVideo]:
    """Return at most `count` videos, as many of each class as possible, drawn at random."""
    of_class: dict[tuple[str, ...], list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(videos)):
        of_class.setdefault(videos[index].labels, []).append(int(index))
    turns = sorted((turn, index) for indices in of_class.values() for turn, index in enumerate(indices))
    return [videos[index] for index in sorted(index for _, index in turns[:count])]


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the probability that an unknown video has a higher score than a known one; equal scores count half."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, unknown, side="left") + np.searchsorted(ordered, unknown, side="right")
    return float(below.mean() / (2 * len(known)))


def choose_rule(
    found: Evaluation,
    score: str = "auto",
    false_alarms: float = 0.05,
    *,
    known: Sequence[VideoPrediction] | None = None,
    known_labels: Sequence[int] | None = None,
    unknown: Sequence[VideoPrediction] | None = None,
) -> UnknownChoice:
    """
    Choose a rule. Of the files of the evaluation, a share of `false_alarms` is called unknown at most.

    As in label sets, this holds for a new file on average over the draws of the files, and one file per group counts.

    Args:
        found: an evaluation with `outputs`.
        score: "energy", "neighbours", or "auto" for the one with the higher AUROC: on the unknown videos if there are
            any, otherwise with each class left out in turn, of the logits and of the known videos.
        known, known_labels: predictions with `outputs` of training videos, and the number of the label of each.
        unknown: the same of videos that show none of the labels.

    Raises:
        ValueError: if there are too few files for this rate, or too little is given to choose by.
    """
    files = [one.outputs for one in found.predictions if one.outputs is not None]
    bank, labels = _bank(known, known_labels)
    strange = [one.outputs for one in unknown or () if one.outputs is not None]
    scores = UNKNOWN_SCORES if bank is not None else ("energy",)
    if score != "auto" and score not in scores:
        raise ValueError("`neighbours` are those among training videos: give them with --known-data.")
    aurocs, measured_on = {}, ""
    if strange:
        measured_on = "the videos of --unknown-data"
        aurocs = {name: auroc(_scores(files, name, bank), _scores(strange, name, bank)) for name in scores}
    elif score == "auto" or (bank is not None and not (found.label_map.has_several or found.label_map.is_grouped)):
        measured_on = "classes that are left out in turn"
        targets = found.targets[found.is_readable]
        aurocs = {name: _left_out(files, targets, found.label_map, name, bank, labels) for name in scores}
    chosen = max(aurocs, key=aurocs.__getitem__) if score == "auto" else score
    units = units_of([one for one, is_read in zip(found.videos, found.is_readable, strict=True) if is_read])
    rng = np.random.default_rng(0)
    counted = [unit[rng.integers(len(unit))] for unit in units]
    rank = conformal_rank(len(units), 1 - false_alarms)
    single = _view_scores(files, found.label_map, chosen, bank)
    thresholds = [float(np.sort(one[counted])[rank - 1]) for one in (_scores(files, chosen, bank), single)]
    rule = {"score": chosen, "false_alarms": false_alarms}
    rule |= dict(zip(("threshold", "window_threshold"), thresholds, strict=True))
    called = float((_scores(strange, chosen, bank) > thresholds[0]).mean()) if strange else None
    return UnknownChoice(rule, bank if chosen == "neighbours" else None, aurocs, measured_on, called)


def _bank(
    known: Sequence[VideoPrediction] | None, labels: Sequence[int] | None
) -> tuple[torch.Tensor | None, np.ndarray]:
    """Return the features of the known videos that could be read, as they are stored, and their labels."""
    if known is None:
        return None, np.array([])
    read = [index for index, one in enumerate(known) if one.outputs is not None]
    if not read:
        raise ValueError(f"None of the videos of --known-data can be read: {known[0].error}")
    features = np.stack([known[index].outputs.features for index in read])  # type: ignore[union-attr]
    return torch.from_numpy(features).half(), np.array(labels if labels is not None else [])[read]


def _scores(files: Sequence[VideoOutputs], name: str, bank: torch.Tensor | None) -> np.ndarray:
    """Return the score of each file from all of its views, (files,)."""
    if name == "energy" or bank is None:
        return np.array([one.energy for one in files])
    return distances(torch.from_numpy(np.stack([one.features for one in files])), bank).numpy()


def _view_scores(
    files: Sequence[VideoOutputs], label_map: LabelMap, name: str, bank: torch.Tensor | None
) -> np.ndarray:
    """Return the score of each file from one view, (files,)."""
    if name == "energy" or bank is None:
        return energies(torch.from_numpy(np.stack([one.view_logits for one in files])), label_map).numpy()
    return distances(torch.from_numpy(np.stack([one.view_features for one in files])), bank).numpy()


def _left_out(
    files: Sequence[VideoOutputs],
    targets: np.ndarray,
    label_map: LabelMap,
    name: str,
    bank: torch.Tensor | None,
    labels: np.ndarray,
) -> float:
    """Return the mean AUROC over the classes that occur, each left out of the logits and of the known videos."""
    if label_map.has_several or label_map.is_grouped or len(label_map.names) < 3:
        raise ValueError(
            "Without videos that show none of the labels (--unknown-data), energy and neighbours are compared by "
            "leaving out a class in turn, which needs one label per video and at least three: choose one of the two."
        )
    found = []
    for index, left in enumerate(label_map.names):
        is_left = targets == index
        if not is_left.any() or is_left.all():
            continue
        rest = LabelMap({"": [one for one in label_map.names if one != left]})
        if name == "energy":
            logits = np.delete(np.stack([one.view_logits for one in files]), index, axis=1)
            scores = energies(torch.from_numpy(logits), rest).numpy()
        else:
            assert bank is not None
            scores = _view_scores(files, label_map, name, bank[torch.from_numpy(labels != index)])
        found.append(auroc(scores[~is_left], scores[is_left]))
    return float(np.mean(found))
