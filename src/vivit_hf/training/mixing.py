"""Batches of clips: soft labels, label smoothing, mixup and cutmix.

Mixup (Zhang et al., 2018) follows the official code: one weight per batch, drawn from Beta(alpha, alpha), mixes the
batch with the same batch in reverse order. Cutmix (Yun et al., 2019) pastes one box of the reversed batch into all
frames of the batch. Random numbers depend only on the seed, the epoch and the examples in the batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from ..data.labels import IGNORED, LabelMap


_MIXING = 0x6D6978  # separates these random numbers from those of the augmentation


def refuse_frame_mask(columns: Iterable[str], who: str) -> None:
    """Raise ValueError if there is a column `frame_mask`, which would be dropped here without a word."""
    if "frame_mask" in columns:
        raise ValueError(
            f"{who} does not take `frame_mask`: leave short clips out or fill them (`short_video_policy` of "
            "ViViTVideoProcessor)."
        )


def soft_labels(labels: torch.Tensor, sizes: Sequence[int], smoothing: float = 0.0) -> torch.Tensor:
    """Return class probabilities for class indices.

    Args:
        labels: int64 (batch,), or (batch, groups) for several groups; -100 is ignored.
        sizes: classes per group.
        smoothing: the share that is spread evenly over all classes of a group, including the true one.

    Returns:
        float32 (batch, sum of sizes); each group of each row sums to 1, or to 0 if its label is ignored.
    """
    parts = []
    for column, size in zip(labels.reshape(len(labels), len(sizes)).T, sizes, strict=True):
        one_hot = torch.nn.functional.one_hot(column.clamp(min=0), size).float()
        counted = (column != IGNORED).float()[:, None]
        parts.append(((1 - smoothing) * one_hot + smoothing / size) * counted)
    return torch.cat(parts, dim=1)


def mixup(clips: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each example with its counterpart in the reversed batch: weight * x + (1 - weight) * reversed x."""
    return tuple(weight * values + (1 - weight) * values.flip(0) for values in (clips, labels))  # type: ignore


def cutmix_box(height: int, width: int, weight: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of a random box with 1 - weight of the area, clipped to the frame."""
    side = (1 - weight) ** 0.5
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = int(generator.integers(height)), int(generator.integers(width))
    return (
        max(0, row - half_height),
        min(height, row + half_height),
        max(0, column - half_width),
        min(width, column + half_width),
    )


def cutmix(
    clips: torch.Tensor, labels: torch.Tensor, box: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste the box from the reversed batch into all frames, and mix the labels, (batch, classes), by its area."""
    top, bottom, left, right = box
    mixed = clips.clone()
    mixed[..., top:bottom, left:right] = clips.flip(0)[..., top:bottom, left:right]
    area = (bottom - top) * (right - left) / (clips.shape[-2] * clips.shape[-1])
    return mixed, mixup(labels, labels, 1 - area)[0]


def _of_one_size(clips: Sequence[torch.Tensor], labels: torch.Tensor, value: int = 0) -> list[torch.Tensor]:
    """Resize blank clips, whose labels are ignored, to the size of the other clips, and fill them with a value."""
    counts = (labels != IGNORED).reshape(len(labels), -1).all(dim=1).tolist()
    size = next((clip.shape for clip, is_counted in zip(clips, counts, strict=True) if is_counted), clips[0].shape)
    return [clip if is_counted else clip.new_full(size, value) for clip, is_counted in zip(clips, counts, strict=True)]


@dataclass(eq=False)
class ClipCollator:
    """Collate items of `VideoClips` into a batch, and mix it.

    Args:
        label_map: the labels of the data set.
        label_smoothing: share of the labels that is spread over all classes.
        mixup_alpha, cutmix_alpha: alpha of the Beta distribution of the weight; 0 turns the mixing off. With both, each
            batch gets one or the other.
        class_weights: float (num_labels,), factors of the loss of each class; they become part of the labels.
        seed: seed of the mixing.

    A batch has `pixel_values` (batch, frames, channels, height, width) and `labels` as the model takes them. If the
    items name their files, it also has `damaged_files`, a list of (file, reason), and `files`, the name of each video,
    or "one + other" if clips are mixed; a plain `Trainer` drops these before it collates. Items with views, for
    evaluation, are not mixed: `pixel_values` (batch, views, frames, channels, height, width) and labels as
    `LabelMap.encode` returns them. Items of `CachedClips` have `steps` in place of `pixel_values`: mixup then mixes
    tokens, and cutmix, which needs pixels, is refused.

    If the items have `frame_mask`, so has the batch, bool (batch, [views,] frames). Where clips of different lengths
    are mixed, a frame is visible if it is in one of the two, and the shorter clip adds its last visible frame to the
    rest of the longer one. The weights of the labels are those of the pixels, whatever the lengths.
    """

    label_map: LabelMap
    _: KW_ONLY
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    class_weights: torch.Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing={self.label_smoothing!r}` must be at least 0 and below 1.")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if (alpha := getattr(self, name)) < 0:
                raise ValueError(f"`{name}={alpha!r}` must not be negative; 0 leaves it out.")
        if self.label_map.has_several and self.class_weights is not None:
            raise ValueError("Class weights require one label per video: leave them out with several labels.")

    @property
    def is_soft(self) -> bool:
        """Return whether labels are probabilities instead of class indices."""
        return bool(self.label_smoothing or self.mixup_alpha or self.cutmix_alpha) or self.class_weights is not None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.stack([item["labels"] for item in items])
        name = "steps" if "steps" in items[0] else "pixel_values"
        clips = torch.stack(_of_one_size([item[name] for item in items], labels))
        batch: dict[str, Any] = {}
        if "frame_mask" in items[0]:
            batch["frame_mask"] = torch.stack(_of_one_size([item["frame_mask"] for item in items], labels, True))
        if any("damaged_files" in item for item in items):
            batch["damaged_files"] = [file for item in items for file in item.get("damaged_files", ())]
        if clips.ndim == (4 if name == "steps" else 6):  # views, for evaluation
            return {name: clips, "labels": labels, **batch}
        if name == "steps" and self.cutmix_alpha:
            raise ValueError(f"`cutmix_alpha={self.cutmix_alpha}` mixes pixels, which stored tokens do not have.")
        if any("file" in item for item in items):
            batch["files"] = [item.get("file", "") for item in items]
        if self.is_soft:
            labels = self._soft(labels)
        if (self.mixup_alpha or self.cutmix_alpha) and len(items) > 1:
            clips, labels = self._mixed(clips, labels, items)
            if "frame_mask" in batch:
                batch["frame_mask"] = batch["frame_mask"] | batch["frame_mask"].flip(0)
            if "files" in batch:
                batch["files"] = [
                    f"{one} + {other}" for one, other in zip(batch["files"], reversed(batch["files"]), strict=True)
                ]
        if self.class_weights is not None:
            labels = labels * self.class_weights
        return {name: clips, "labels": labels, **batch}

    def _soft(self, labels: torch.Tensor) -> torch.Tensor:
        if self.label_map.has_several:  # each label is a binary classification
            smoothed = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            return torch.where(labels == IGNORED, labels, smoothed)
        return soft_labels(labels, self.label_map.sizes, self.label_smoothing)

    def _mixed(
        self, clips: torch.Tensor, labels: torch.Tensor, items: Sequence[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = (self.seed, _MIXING, int(items[0]["epoch"]), *(int(item["index"]) for item in items))
        generator = np.random.default_rng(np.random.SeedSequence(key))
        is_mixup = not self.cutmix_alpha or (bool(self.mixup_alpha) and generator.random() < 0.5)
        alpha = self.mixup_alpha if is_mixup else self.cutmix_alpha
        weight = float(generator.beta(alpha, alpha))
        if is_mixup:
            return mixup(clips, labels, max(weight, 1 - weight))
        box = cutmix_box(clips.shape[-2], clips.shape[-1], weight, generator)
        return cutmix(clips, labels, box)
