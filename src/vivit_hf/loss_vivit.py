"""The loss of video classification, exact under gradient accumulation and data parallelism."""

from collections.abc import Sequence

import torch
from torch import nn


def infer_problem_type(labels: torch.Tensor, num_labels: int, has_groups: bool = False) -> str:
    """The `problem_type` that transformers infers: one output is a regression, whole numbers are classes."""
    if has_groups:
        return "single_label_classification"
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def video_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    num_items_in_batch: torch.Tensor | float | None = None,
    group_sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """
    Mean loss per example (single label) or per element (multi-label, regression), in float32 or wider.

    | `problem_type` | `labels` | loss |
    | --- | --- | --- |
    | single_label_classification | (batch,), whole numbers; -100 is left out | cross-entropy |
    | single_label_classification | (batch, num_labels), floats that sum to 1 | cross-entropy with soft labels |
    | multi_label_classification | (batch, num_labels), 0 to 1; -100 is left out | binary cross-entropy |
    | regression | (batch, num_labels), or (batch,) with one output | squared error |

    Args:
        logits: (batch, num_labels).
        num_items_in_batch: what to divide the sum by instead of this batch's own count: the label elements of all the
            batches of one optimiser step, the way `transformers.Trainer` counts them. For soft labels it counts
            num_labels elements per example, which is undone here.
        group_sizes: several classifications side by side in the logits (`ViViTConfig.label_groups`). Labels are then
            (batch, groups) whole numbers, each counted from 0 within its group, or (batch, num_labels) floats of which
            each group sums to 1; the loss is the mean over the groups, as in the official code.

    Raises:
        ValueError: if labels and logits do not fit together.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    soft = labels.is_floating_point()
    if problem_type == "single_label_classification":
        # One classification is one group.
        sizes = [logits.shape[1]] if group_sizes is None else list(group_sizes)
        if soft:
            labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
            targets = labels.split(sizes, dim=1)
            count = torch.tensor(logits.shape[0] * len(sizes), device=logits.device)
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * len(sizes) / logits.shape[1]
        else:
            shape = logits.shape[:1] if group_sizes is None else torch.Size((len(logits), len(sizes)))
            labels = _fit(labels, shape, logits, problem_type).long()
            targets = labels.reshape(-1, len(sizes)).unbind(dim=1)
            count = (labels != -100).sum()
        parts = zip(logits.split(sizes, dim=1), targets, strict=True)
        sums = [nn.functional.cross_entropy(*part, ignore_index=-100, reduction="sum") for part in parts]
        total = torch.stack(sums).sum()
    elif group_sizes is not None:
        raise ValueError(f"`problem_type={problem_type!r}` does not go with groups of labels: each has a single label.")
    elif problem_type == "multi_label_classification":
        labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
        counted = labels != -100
        targets = torch.where(counted, labels, 0.0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        total, count = (losses * counted).sum(), counted.sum()
    elif problem_type == "regression":
        labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
        total, count = (logits - labels).square().sum(), torch.tensor(labels.numel(), device=logits.device)
    else:
        raise ValueError(
            f"`problem_type={problem_type!r}` is not known; expected 'single_label_classification', "
            "'multi_label_classification' or 'regression'."
        )
    if num_items_in_batch is None:
        return total / count.clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        # 0 where no label of a step counts, since none of its files can be read: the loss is 0, not 0 / 0.
        num_items_in_batch = num_items_in_batch.to(total.device).clamp(min=1)
    return total / num_items_in_batch


def _fit(labels: torch.Tensor, shape: torch.Size, logits: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Labels in `shape`; a missing or extra last side of 1 is the only freedom, since broadcasting hides mistakes."""
    trimmed, expected = ([*s, 1] if len(s) == 1 else [*s] for s in (labels.shape, shape))
    if trimmed != expected:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} do not fit logits of shape "
            f"{tuple(logits.shape)} under {problem_type}; expected {tuple(shape)}."
        )
    return labels.reshape(shape)
