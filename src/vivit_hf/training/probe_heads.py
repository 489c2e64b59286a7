"""
The heads of probes: small classifiers on stored features of a frozen model.

| head | input | classifier |
| --- | --- | --- |
| linear, mean | mean of the steps | logistic regression |
| linear, ordered | steps concatenated in order | logistic regression |
| neighbours, mean | mean of the steps | nearest neighbours by cosine distance |
| neighbours, ordered | steps concatenated in order | nearest neighbours by cosine distance |
| attentive | steps weighted by their softmax similarity to a learned query | linear, trained together with the query |

Inputs are standardised. The strength of the L2 penalty and the number of neighbours are chosen by cross-validation on
the given folds of the training videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ..conversion.terminal import needs_extra


with needs_extra("probe"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier

# Inverse strengths of the penalty, as scikit-learn's C, on inputs whose squared norm is 1 on average.
_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
DEFAULT_PENALTY = 10.0
_NEIGHBOURS = (1, 3, 5, 10, 20)
_ATTENTIVE_STEPS = 20
_LEAST_VARIATION = 1e-3  # standard deviation over mean; a float32 feature that varies less is mostly rounding error

Fold = tuple[np.ndarray, np.ndarray]  # indices of training and held-out videos


class Head(Protocol):
    """A classifier of feature vectors."""

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """(videos, steps, hidden) -> class indices, int64 (videos,)."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """
    A linear classifier of pooled steps, in terms of the features as stored: standardisation is part of the weights.

    `pooling`: "mean", "concatenate" (in the order of time) or "attention".
    `weight`, `bias`: float64 (classes, hidden), or (classes, steps * hidden) if concatenated; and (classes,).
    `query`: float64 (hidden,), only with attention: the weights of the steps are softmax(steps @ query).
    """

    pooling: str
    weight: np.ndarray
    bias: np.ndarray
    query: np.ndarray | None = None

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """(videos, steps, hidden) -> float64 (videos, classes)."""
        if self.query is None:
            return _pooled(vectors, self.pooling) @ self.weight.T + self.bias
        scores = vectors @ self.query  # (videos, steps)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("vs,vsh->vh", weights, vectors) @ self.weight.T + self.bias

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        return self.logits(vectors).argmax(axis=1)


@dataclass(frozen=True)
class NeighboursHead:
    """Nearest neighbours by cosine distance between standardised inputs, weighted by their inverse distance."""

    pooling: str
    mean: np.ndarray
    std: np.ndarray
    directions: np.ndarray  # float64 (training videos, features), each of norm 1
    classifier: KNeighborsClassifier

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        directions = _directions((_pooled(vectors, self.pooling) - self.mean) / self.std)
        return self.classifier.predict(_distances(directions, self.directions))


def fit_linear(vectors: np.ndarray, labels: np.ndarray, inner_folds: Sequence[Fold], pooling: str) -> LinearHead:
    """
    Fit logistic regression on pooled steps.

    Args:
        vectors: float (videos, steps, hidden).
        labels: class indices, int64 (videos,); every class occurs.
        inner_folds: choose the penalty with the smallest log loss. Without folds it is a default.
        pooling: "mean" or "concatenate".
    """
    inputs = _pooled(vectors, pooling)
    mean, std = _statistics(inputs)
    weight, bias, _ = logistic_regression((inputs - mean) / std, labels, inner_folds)
    weight = weight / std
    return LinearHead(pooling, weight, bias - weight @ mean)


def fit_attentive(vectors: np.ndarray, labels: np.ndarray, inner_folds: Sequence[Fold]) -> LinearHead:
    """
    Fit a query over the steps and a linear classifier of the steps that it weights.

    A query of zero weights all steps equally, so training starts from logistic regression on their mean. A fixed number
    of L-BFGS steps on all videos then fits both, under the penalty that was chosen for the mean. For the arguments see
    `fit_linear`.
    """
    mean, std = _statistics(vectors.reshape(-1, vectors.shape[2]))  # (videos * steps, hidden)
    standardised = (vectors - mean) / std
    length = np.sqrt(np.square(standardised).sum(axis=2).mean()) or 1.0
    standardised, scale = standardised / length, std * length
    start_weight, start_bias, penalty = logistic_regression(standardised.mean(axis=1), labels, inner_folds)

    steps = torch.from_numpy(standardised.astype(np.float32))
    targets = torch.from_numpy(labels)
    query = torch.zeros(steps.shape[2], requires_grad=True)
    weight = torch.from_numpy(np.ascontiguousarray(start_weight, dtype=np.float32)).requires_grad_()
    bias = torch.from_numpy(start_bias.astype(np.float32)).requires_grad_()
    optimiser = torch.optim.LBFGS([query, weight, bias], max_iter=_ATTENTIVE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        weights = (steps @ query).softmax(dim=1)  # (videos, steps)
        pooled = (weights[:, None] @ steps)[:, 0]  # (videos, hidden)
        fit = torch.nn.functional.cross_entropy(torch.nn.functional.linear(pooled, weight, bias), targets)
        total = fit + (weight.square().sum() + query.square().sum()) / (2 * penalty * len(targets))
        total.backward()
        return total

    optimiser.step(loss)
    fitted = [one.detach().double().numpy() for one in (query, weight, bias)]
    weight_of_stored = fitted[1] / scale
    return LinearHead("attention", weight_of_stored, fitted[2] - weight_of_stored @ mean, fitted[0] / scale)


def fit_neighbours(
    vectors: np.ndarray, labels: np.ndarray, inner_folds: Sequence[Fold], pooling: str
) -> NeighboursHead:
    """
    Fit nearest neighbours on pooled steps; the inner folds choose their number. For the arguments see `fit_linear`.
    """
    inputs = _pooled(vectors, pooling)
    mean, std = _statistics(inputs)
    directions = _directions((inputs - mean) / std)
    distances = _distances(directions, directions)
    classifier = KNeighborsClassifier(1, metric="precomputed", weights="distance")
    if inner_folds:
        smallest = min(len(train) for train, _ in inner_folds)
        counts = [count for count in _NEIGHBOURS if count <= smallest]
        search = GridSearchCV(classifier, {"n_neighbors": counts}, cv=inner_folds)
        classifier = search.fit(distances, labels).best_estimator_
    return NeighboursHead(pooling, mean, std, directions, classifier.fit(distances, labels))


Fit = Callable[[np.ndarray, np.ndarray, Sequence[Fold]], Head]

# Between heads of equal accuracy the first one wins.
HEADS: dict[str, Fit] = {
    "linear, mean": partial(fit_linear, pooling="mean"),
    "linear, ordered": partial(fit_linear, pooling="concatenate"),
    "attentive": fit_attentive,
    "neighbours, mean": partial(fit_neighbours, pooling="mean"),
    "neighbours, ordered": partial(fit_neighbours, pooling="concatenate"),
}
# With one vector per video, the others are the same as these.
SINGLE_STEP_HEADS = ("linear, mean", "neighbours, mean")


def _pooled(vectors: np.ndarray, pooling: str) -> np.ndarray:
    """(videos, steps, hidden) -> float64 (videos, hidden), or (videos, steps * hidden) if concatenated."""
    if pooling == "mean":
        return vectors.mean(axis=1, dtype=np.float64)
    return vectors.reshape(len(vectors), -1).astype(np.float64)  # (videos, steps * hidden)


def _statistics(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each feature, float64 (features,); never 0, see `_LEAST_VARIATION`."""
    mean, std = inputs.mean(axis=0, dtype=np.float64), inputs.std(axis=0, dtype=np.float64)
    std = np.maximum(std, _LEAST_VARIATION * np.abs(mean))
    return mean, np.where(std == 0, 1.0, std)


def _directions(inputs: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(inputs, axis=1, keepdims=True)
    return inputs / np.where(norms == 0, 1.0, norms)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return cosine distances between rows of norm 1, never negative."""
    return (1 - first @ second.T).clip(min=0)


def logistic_regression(
    inputs: np.ndarray, labels: np.ndarray, inner_folds: Sequence[Fold], penalty: float | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """
    Return weights (classes, features), biases (classes,) and the inverse penalty, for inputs of any scale.

    Without a `penalty` the folds choose it.
    """
    scale = norm_of(inputs)
    coordinates, project = span(inputs / scale)
    penalty = penalty or _best_penalty(coordinates, labels, inner_folds)
    model = LogisticRegression(C=penalty, max_iter=1000, tol=1e-5).fit(coordinates, labels)
    weight, bias = project(model.coef_) / scale, model.intercept_
    if len(weight) == 1:  # for two classes scikit-learn gives the difference between their logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias, penalty


def norm_of(inputs: np.ndarray) -> float:
    """Return the root mean square of the norms of the rows; 1 if all are zero."""
    return float(np.sqrt(np.square(inputs).sum(axis=1).mean())) or 1.0


def span(inputs: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """
    Return coordinates of the rows in an orthonormal basis of their span, and a function from weights in it to weights
    of the inputs.

    With fewer videos than features this leaves logistic regression with an L2 penalty unchanged, and is much faster.
    """
    if len(inputs) >= inputs.shape[1] or not inputs.any():
        return inputs, lambda weight: weight
    values, vectors = np.linalg.eigh(inputs @ inputs.T)
    kept = values > 1e-10 * values[-1]
    lengths, vectors = np.sqrt(values[kept]), vectors[:, kept]
    return vectors * lengths, lambda weight: (weight / lengths) @ vectors.T @ inputs


def _best_penalty(inputs: np.ndarray, labels: np.ndarray, inner_folds: Sequence[Fold]) -> float:
    if not inner_folds:
        return DEFAULT_PENALTY
    return choose_penalty([(inputs[fit], labels[fit], inputs[out], labels[out]) for fit, out in inner_folds])[1]


def choose_penalty(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """
    Return the smallest log loss of held-out inputs, summed over the parts, and the inverse penalty that has it.

    Args:
        parts: training inputs and labels, and held-out inputs and labels. The squared norm of training inputs is 1 on
            average.
    """
    models = [LogisticRegression(max_iter=100, warm_start=True) for _ in parts]
    losses: list[float] = []
    for penalty in _PENALTIES:
        losses.append(0.0)
        for model, (inputs, labels, held_out, correct) in zip(models, parts, strict=True):
            model.set_params(C=penalty).fit(inputs.astype(np.float32), labels)
            probabilities = model.predict_proba(held_out.astype(np.float32))
            losses[-1] += log_loss(correct, probabilities, labels=model.classes_, normalize=False)
        if len(losses) > 1 and losses[-1] > losses[-2]:  # from here on the model fits noise, ever more slowly
            break
    best = int(np.argmin(losses))
    return losses[best], _PENALTIES[best]
