"""Explain one clip: the frames that the model saw, its labels, and the relevance of every token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.labels import LabelMap, to_probabilities
from ..frame_sampling import sample_frames_uniformly
from ..inference.finite_outputs import check_finite
from ..limits_vivit import check_choice, check_positive_integer
from ..modeling_vivit import nearest_visible_frames, visible_steps
from ..video_processing_vivit import ViViTVideoProcessor
from .pixels import to_uint8
from .relevance import Relevance, attention_rollout, backbone_for, evaluating, gradient_relevance


METHODS = ("rollout", "gradient")


@dataclass
class Explanation:
    """
    One clip, its predicted labels, and the relevance of its tokens. Masked time steps are left out.

    `frames`: uint8 RGB (time * tubelet time, height, width, 3): the sampled frames, cropped to whole patches. Masked
        frames of visible steps show the frame that the model saw in their place.
    `relevance`: for a batch of one, on the CPU.
    `labels`: the most likely labels with their probabilities (in a regression its values), best first; empty for a
    model without a classifier.
    `method`: "rollout" or "gradient".
    `target`: the label that `relevance` explains; None for rollout, which does not depend on a class.
    `frame_numbers`: the number of each frame among the sampled ones, int64; equal for a frame that is shown twice. None
        if they are all shown.
    """

    frames: np.ndarray
    relevance: Relevance
    labels: list[tuple[str, float]]
    method: str
    target: str | None = None
    frame_numbers: np.ndarray | None = None


def explain_clip(
    model: Any,
    processor: ViViTVideoProcessor,
    pixel_values: torch.Tensor,
    method: str = "rollout",
    class_index: int | None = None,
    top_k: int = 5,
    frame_mask: torch.Tensor | None = None,
) -> Explanation:
    """
    Explain the prediction for one clip. `save_explanation` draws the result.

    Args:
        model: a `ViViTForVideoClassification`; for rollout also a `ViViTModel`, which has no labels.
        processor: the one that made `pixel_values`, used to undo its normalisation.
        pixel_values: one clip, ([1,] frames, channels, height, width).
        method: "rollout" (see `attention_rollout`) or "gradient" (see `gradient_relevance`).
        class_index: for "gradient", the class to explain; by default the most likely one.
        top_k: labels to return.
        frame_mask: the visible frames of the clip, bool ([1,] frames), as the processor gives them with
            short_video_policy="mask"; None for all.

    Raises:
        TypeError, ValueError: see those functions; ValueError also for an unknown method, several clips, a
            `class_index` with rollout, or a `top_k` below 1.
    """
    check_choice("method", method, METHODS)
    if method == "rollout" and class_index is not None:
        raise ValueError(
            f"Rollout does not depend on a class: leave out class_index={class_index!r}, or use method='gradient'."
        )
    check_positive_integer("top_k", top_k)
    if isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 4:
        pixel_values = pixel_values[None]
    if frame_mask is not None and frame_mask.ndim == 1:
        frame_mask = frame_mask[None]
    backbone = backbone_for(model, pixel_values)
    if len(pixel_values) != 1:
        raise ValueError(f"`explain_clip` takes one clip, got {len(pixel_values)}; call it with pixel_values[i].")
    names: list[str] = []
    labels: list[tuple[str, float]] = []
    best = 0
    if model is not backbone and model.config.num_labels:
        label_map = LabelMap.from_config(model.config)
        names = label_map.names
        with torch.no_grad(), evaluating(model):
            clip = pixel_values.to(model.device)
            logits = model(clip, frame_mask=frame_mask, return_dict=True).logits[0].float().cpu()
        check_finite(logits, model, pixel_values)
        scores = to_probabilities(logits, label_map)
        top = scores.topk(min(top_k, len(names)))
        labels = [(names[index], score) for index, score in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        best = int(top.indices[0])
    target = None
    if method == "rollout":
        relevance = attention_rollout(model, pixel_values, frame_mask)
    else:
        class_index = best if class_index is None else class_index
        relevance = gradient_relevance(model, pixel_values, class_index, frame_mask)
        target = names[class_index]
    relevance = Relevance(relevance.space.cpu(), relevance.time.cpu())
    frames, numbers = _seen_frames(backbone.config, processor, pixel_values), None
    if frame_mask is not None and not frame_mask.all():
        steps = visible_steps(frame_mask.cpu(), backbone.config)[0]  # (time,)
        numbers = _frame_numbers(backbone.config, frame_mask.cpu())
        numbers = numbers[steps.repeat_interleave(backbone.config.tubelet_size[0]).numpy()]
        frames = frames[numbers]
        relevance = Relevance(relevance.space[:, steps], relevance.time[:, steps])
    return Explanation(frames, relevance, labels, method, target, numbers)


def _seen_frames(config: Any, processor: ViViTVideoProcessor, pixel_values: torch.Tensor) -> np.ndarray:
    """Return the frames that the tokens cover, uint8 (time * tubelet time, height, width, 3)."""
    clip = pixel_values[0].detach().float().cpu()
    if config.embedding_type == "uniform_frame_sampling":
        clip = clip[sample_frames_uniformly(len(clip), config.num_sampled_frames).tolist()]
    time, rows, columns = (size * patch for size, patch in zip(config.grid_size, config.tubelet_size, strict=True))
    return to_uint8(clip[:time, :, :rows, :columns], processor)


def _frame_numbers(config: Any, frame_mask: torch.Tensor) -> np.ndarray:
    """Return the frame that is shown in the place of each of those of `_seen_frames`, int64 (frames,)."""
    time, patch_frames = config.grid_size[0], config.tubelet_size[0]
    if config.embedding_type == "uniform_frame_sampling":
        return np.arange(time)  # a step is a sampled frame, so that frames of visible steps are visible
    return nearest_visible_frames(frame_mask)[0, : time * patch_frames].numpy()
