"""
The unknown answer, "none of these": how unlike the training videos a clip is, and from where on to say so.

Two scores, both larger for stranger clips:

- "energy": minus the log of the summed exponentials of the logits (Liu et al., "Energy-based Out-of-distribution
  Detection", NeurIPS 2020), summed over groups of labels; with several labels per video, minus the summed softplus
  (Wang et al., "Can multi-label classification networks know what they don't know?", NeurIPS 2021).
- "neighbours": the distance of the normalised features to the nearest ones among those of training videos (Sun et al.,
  "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022), which lie beside the weights.

The scores of several views are averaged as energies, or the distance is that of their mean features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize, softplus
from transformers.utils import logging

from ..calibration_vivit import (
    KNOWN_FEATURES,
    Calibration,
    answer_fingerprint,
    find_known_features,
    read_known_features,
)
from ..data.labels import LabelMap


logger = logging.get_logger(__name__)

UNKNOWN = "none of these"
NEIGHBOURS = 1  # the nearest one


def energies(logits: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """Return the energy of logits (..., num_labels), (...)."""
    logits = logits.float()
    if label_map.has_several:
        return -softplus(logits).sum(dim=-1)
    return -torch.stack([part.logsumexp(dim=-1) for part in logits.split(label_map.sizes, dim=-1)]).sum(dim=0)


def distances(features: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the distance (...) of features (..., hidden) to the nearest of `known` (videos, hidden), normalised."""
    flat = normalize(features.float().flatten(0, -2), dim=-1)
    similarity = flat @ normalize(known.float(), dim=-1).T
    nearest = similarity.topk(min(NEIGHBOURS, known.shape[0]), dim=-1).values[:, -1]
    return (2 - 2 * nearest).clamp(min=0).sqrt().unflatten(0, features.shape[:-1])


@contextmanager
def classifier_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the features that the classifier is given, (clips, hidden) per call."""
    seen: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


@dataclass(frozen=True)
class UnknownRule:
    """
    When to answer "none of these".

    `threshold`, `window_threshold`: for several views of a video, and for one view.
    `known`: features of training videos, floats (videos, hidden); None for energies.
    """

    label_map: LabelMap
    threshold: float
    window_threshold: float
    known: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any) -> "UnknownRule | None":
        """
        Return the rule of a model, None without one. If its known features are missing, a warning says so.

        Raises:
            ValueError: if the known features are damaged or belong to other weights.
        """
        calibration = Calibration.of(model.config)
        if calibration is None or calibration.unknown is None:
            return None
        rule = calibration.unknown
        known = None
        if rule["score"] == "neighbours":
            path = find_known_features(model)
            if path is None:
                logger.warning_once(
                    f"{KNOWN_FEATURES} is not beside the weights of {model.name_or_path}: videos that are unlike the "
                    "training videos get a label instead of 'none of these'."
                )
                return None
            if answer_fingerprint(model) not in (None, calibration.weights):
                raise ValueError(
                    f"The calibration in the config.json of {model.name_or_path} belongs to other weights: run "
                    "`vivit-hf evaluate --calibrate` again, or set `calibration` to null there."
                )
            known = read_known_features(path, calibration, model.classifier.in_features)
            known = known.to(model.device)
        thresholds = rule["threshold"], rule["window_threshold"]
        return cls(LabelMap.from_config(model.config), *thresholds, known)

    def scores(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """
        Return how strange videos are, float32 (videos,).

        Args:
            logits, features: of the views, (videos, views, num_labels) and (videos, views, hidden).
        """
        if self.known is None:
            return energies(logits, self.label_map).mean(dim=1)
        return distances(features.float().mean(dim=1), self.known)

    def is_unknown(self, score: float, num_views: int) -> bool:
        """Return whether a video with this score, from this many views, is unknown."""
        return score > (self.threshold if num_views > 1 else self.window_threshold)
