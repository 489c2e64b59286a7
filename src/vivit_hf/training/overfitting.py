"""Learning one batch by heart: the first test of a training that does not learn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.labels import LabelMap
from ..inference.clips import shown_masks


@dataclass
class OverfitReport:
    """The result of `overfit_one_batch`.

    `accuracy` is after `num_steps` steps, with several labels per video over all labels. `without_gradient` and
    `unmoved` name the trained parameters that had no gradient, and those that did not change.
    """

    accuracy: float
    num_steps: int
    first_loss: float
    last_loss: float
    without_gradient: list[str]
    unmoved: list[str]

    @property
    def is_reached(self) -> bool:
        return self.accuracy == 1.0

    def __str__(self) -> str:
        how = "learnt by heart" if self.is_reached else "NOT learnt"
        lines = [
            f"One batch was {how}: accuracy {self.accuracy:.1%} after {self.num_steps} steps, "
            f"loss {self.first_loss:.4f} -> {self.last_loss:.4f}."
        ]
        if self.is_reached:
            return lines[0]
        for reason, names in (("had no gradient", self.without_gradient), ("did not move", self.unmoved)):
            shown = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
            lines.append(f"{len(names)} trained parameters {reason}{': ' + shown if names else ''}.")
        lines.append(
            "Look at the batch (save_batch_picture): clips that look alike but have different labels cannot be told "
            "apart. Otherwise try another learning rate."
        )
        return "\n".join(lines)


def overfit_one_batch(
    model: Any,
    batch: dict[str, torch.Tensor],
    label_map: LabelMap,
    make_optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    groups: Sequence[dict[str, Any]],
    num_steps: int = 200,
) -> OverfitReport:
    """Train on one batch until every label is right, without dropout or stochastic depth. Changes the model.

    Args:
        model: a `ViViTForVideoClassification`.
        batch: `pixel_values` (batch, frames, channels, height, width), unmixed `labels` from `LabelMap.encode`, and
            `frame_mask` if clips may be short.
        make_optimizer: makes the optimiser from `groups`.
        groups: groups of parameters, see `parameter_groups`.
        num_steps: maximum number of steps.
    """
    model.eval()  # no randomness, so that the loss falls in every step
    names = ("pixel_values", "frame_mask", "steps", "labels")
    batch = {name: batch[name].to(model.device) for name in names if name in batch}
    if "frame_mask" in batch:
        batch["frame_mask"] = shown_masks(batch["frame_mask"], model.config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = make_optimizer(groups)
    losses: list[float] = []
    has_gradient: set[str] = set()
    for steps in range(num_steps + 1):
        with torch.enable_grad():
            outputs = model(**batch)
        losses.append(outputs.loss.item())
        accuracy = _accuracy(outputs.logits.detach(), batch["labels"], label_map)
        if accuracy == 1.0 or steps == num_steps:
            break
        optimizer.zero_grad()
        outputs.loss.backward()
        has_gradient |= {name for name, one in trained.items() if one.grad is not None and bool(one.grad.any())}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    unmoved = [name for name, parameter in trained.items() if torch.equal(parameter, before[name])] if steps else []
    missing = [name for name in trained if name not in has_gradient] if steps else []
    return OverfitReport(accuracy, steps, losses[0], losses[-1], missing, unmoved)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor, label_map: LabelMap) -> float:
    if label_map.has_several:
        return ((logits > 0) == (labels > 0.5)).float().mean().item()
    predictions = torch.stack([part.argmax(dim=1) for part in logits.split(label_map.sizes, dim=1)], dim=1)
    return (predictions == labels.reshape(predictions.shape)).float().mean().item()
