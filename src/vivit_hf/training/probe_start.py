"""
Fit a linear classifier to stored tokens before training goes on from it (LP-FT: Kumar et al., "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", ICLR 2022).

With a handful of clips per class, most of what differs between tokens is not the class: it is the person, the place and
the light. Their variation within classes is known from the training clips, and is the same at all time steps. So before
logistic regression

- tokens are whitened by their covariance within classes, as in linear discriminant analysis, shrunk towards a
  multiple of the identity; and
- their mean over time, which has the appearance, is weighted against their deviations from it, which have the motion.

Cross-validation on the training videos chooses the strength of both. Both are linear and become part of the weights.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.labels import units_of
from ..explain.relevance import evaluating
from ..inference.clips import shown_masks
from ..modeling_vivit import mask_steps
from .clips import Tensors
from .feature_cache import CachedClips
from .probe_heads import DEFAULT_PENALTY, Fold, choose_penalty, logistic_regression, norm_of, span
from .probes import inner_folds


_SHRINKAGES = (1.0, 0.1)  # 1: no whitening
# Weights of the mean over time and of the deviations from it; the first and second are the mean and the ordered probe.
_TIME_WEIGHTS = ((1.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.25, 1.0))


@dataclass(frozen=True)
class _Transform:
    """A linear map of tokens (clips, time, hidden) before logistic regression."""

    mean: np.ndarray  # (hidden,)
    whitening: np.ndarray  # (hidden, hidden), symmetric
    over_time: np.ndarray  # (time, time), symmetric

    @classmethod
    def fit(cls, tokens: np.ndarray, labels: np.ndarray, shrinkage: float, weights: tuple[float, float]) -> _Transform:
        """Tokens (clips, time, hidden); those of masked steps, all zeros, are no part of mean and covariance."""
        time = tokens.shape[1]
        average = np.full((time, time), 1 / time)
        of_mean, of_deviations = weights
        over_time = of_mean * average + of_deviations * (np.eye(time) - average)
        known = np.where(tokens.any(axis=2, keepdims=True), tokens, np.nan)
        mean = np.nanmean(known, axis=(0, 1))
        return cls(mean, _whitening(known, labels, shrinkage), over_time)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """(clips, time, hidden) -> (clips, time * hidden)."""
        mapped = self.over_time @ ((tokens - self.mean) @ self.whitening)  # (clips, time, hidden)
        return mapped.reshape(len(tokens), -1)  # (clips, time * hidden)

    def fold(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights (classes, time * hidden) and biases that do the same to tokens without the transform."""
        time, hidden = len(self.over_time), len(self.mean)
        folded = self.over_time @ weight.reshape(-1, time, hidden) @ self.whitening  # (classes, time, hidden)
        return folded.reshape(len(weight), -1), bias - folded.sum(axis=1) @ self.mean


def _whitening(tokens: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """
    Return the inverse square root of the covariance within classes, shared by all time steps, (hidden, hidden).

    Tokens of masked steps are NaN.
    """
    hidden = tokens.shape[2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # a class without a clip so long
        of_classes = [tokens[labels == label] for label in set(labels)]
        centred = np.concatenate([clips - np.nanmean(clips, axis=0) for clips in of_classes])
    rows = centred.reshape(-1, hidden)  # (clips * time, hidden)
    rows = rows[~np.isnan(rows).any(axis=1)]
    covariance = rows.T @ rows / len(rows)
    scale = np.trace(covariance) / hidden
    if shrinkage == 1 or not scale:
        return np.eye(hidden)
    values, vectors = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * scale * np.eye(hidden))
    return (vectors / np.sqrt(values)) @ vectors.T


@dataclass(frozen=True)
class FittedClassifier:
    """
    A linear classifier of tokens, and the choices that led to it.

    `weight`, `bias`: float64 (classes, time * hidden), in the order of time, and (classes,).
    `shrinkage`: 1 for tokens that are not whitened, else the share of the identity in their covariance.
    `of_mean`, `of_deviations`: the weights of the mean over time and of the deviations from it.
    `penalty`: the inverse strength of the penalty.
    """

    weight: np.ndarray
    bias: np.ndarray
    shrinkage: float
    of_mean: float
    of_deviations: float
    penalty: float

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(clips, time, hidden) -> float64 (clips, classes)."""
        return tokens.reshape(len(tokens), -1) @ self.weight.T + self.bias


def fit_classifier(tokens: np.ndarray, labels: np.ndarray, folds: Sequence[Fold]) -> FittedClassifier:
    """
    Fit a linear classifier of clips.

    Args:
        tokens: float (clips, time, hidden); several clips may be views of one video.
        labels: class indices, int64 (clips,); every class occurs.
        folds: folds of the clips, with all views of a video on one side. The smallest log loss on them chooses
            whitening, weights and penalty; without folds, these are defaults.
    """
    tokens = tokens.astype(np.float64)
    time_weights = _TIME_WEIGHTS if tokens.shape[1] > 1 else _TIME_WEIGHTS[1:2]
    penalty, choice = DEFAULT_PENALTY, (_SHRINKAGES[-1], _TIME_WEIGHTS[1])
    if folds:
        _, penalty, choice = min(
            (*choose_penalty([_part(tokens, labels, *fold, *choice) for fold in folds]), choice)
            for choice in itertools.product(_SHRINKAGES, time_weights)
        )
    transform = _Transform.fit(tokens, labels, *choice)
    weight, bias, _ = logistic_regression(transform(tokens), labels, (), penalty)
    shrinkage, weights = choice
    return FittedClassifier(*transform.fold(weight, bias), shrinkage, *weights, penalty)


def _part(
    tokens: np.ndarray, labels: np.ndarray, train: np.ndarray, held_out: np.ndarray, *choice: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training inputs, labels, held-out inputs and labels; the inputs in the span of the training inputs."""
    transform = _Transform.fit(tokens[train], labels[train], *choice)
    inputs, others = transform(tokens[train]), transform(tokens[held_out])
    scale = norm_of(inputs)
    coordinates, project = span(inputs / scale)
    basis = project(np.eye(coordinates.shape[1]))  # (coordinates, time * hidden)
    return coordinates, labels[train], others / scale @ basis.T, labels[held_out]


@torch.no_grad()
def start_from_probe(model: Any, clips: CachedClips, seed: int) -> str:
    """
    Fit the classifier of a Model 2 to the stored tokens of all views, as the temporal encoder passes them on now.

    Args:
        model: a `ViViTForVideoClassification` with one label per video.
        clips: its training clips; those of one file or group stay together in the folds.
        seed: the seed of the folds.

    Returns:
        A description of what was fitted.

    Raises:
        ValueError: if fewer than two classes have clips that can be read.
    """
    stored, indices = clips.stored_views()
    classes, labels = np.unique([int(clips.targets[index]) for index in indices], return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"--classifier_init probe: {len(indices)} clips of {len(classes)} classes can be read, expected two."
        )
    tokens = _pooled(model, stored)
    fitted = fit_classifier(tokens, labels, _folds(clips, indices, labels, seed))
    logits = fitted.logits(tokens)
    # A class without a clip gets the smallest logit there is.
    weight = np.zeros((model.config.num_labels, fitted.weight.shape[1]))
    bias = np.full(model.config.num_labels, logits.min())
    weight[classes], bias[classes] = fitted.weight, fitted.bias
    model.classifier.weight.copy_(torch.from_numpy(weight))
    model.classifier.bias.copy_(torch.from_numpy(bias))
    right = (logits.argmax(axis=1) == labels).mean()
    whitened = "not whitened" if fitted.shrinkage == 1 else f"whitened with shrinkage {fitted.shrinkage:g}"
    return (
        f"The classifier starts from logistic regression on {len(indices)} clips, {right:.0%} of them right: tokens "
        f"{whitened}, weight {fitted.of_mean:g} of their mean over time and {fitted.of_deviations:g} of the deviations "
        f"from it, C {fitted.penalty:g}."
    )


def _pooled(model: Any, stored: Tensors) -> np.ndarray:
    """
    Return the inputs of the classifier, (clips, time, hidden), for the tokens and masks of `CachedClips.stored_views`.

    Time is 1 unless they are concatenated steps; masked ones are zeros.
    """
    parameter, found = model.classifier.weight, []
    parts = [tensor.split(64) for tensor in stored.values()]
    with evaluating(model):
        for part in zip(*parts, strict=True):
            tensors = dict(zip(stored, part, strict=True))
            steps, visible = tensors["steps"].to(parameter), None
            if "frame_mask" in tensors:
                steps, visible = mask_steps(steps, shown_masks(tensors["frame_mask"], model.config), model.config)
            _, pooled = model.vivit.encode_time(steps, visible, output_last_hidden_state=False)
            found.append(model.vivit.represent(pooled).float().cpu())
    keeps_order = model.config.pooling_over_time == "concatenate" and model.vivit.pre_logits is None
    return torch.cat(found).unflatten(1, (stored["steps"].shape[1] if keeps_order else 1, -1)).numpy()


def _folds(clips: CachedClips, indices: Sequence[int], labels: np.ndarray, seed: int) -> list[Fold]:
    """Return folds of the clips of these videos."""
    videos, first, places = np.unique(indices, return_index=True, return_inverse=True)
    groups = np.empty(len(videos), dtype=np.int64)
    for number, unit in enumerate(units_of([clips.videos[index] for index in videos])):
        groups[unit] = number
    return [
        (np.flatnonzero(np.isin(places, train)), np.flatnonzero(np.isin(places, held_out)))
        for train, held_out in inner_folds(labels[first], groups, seed)
    ]
