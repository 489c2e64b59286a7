"""Turn the head of a probe and the frozen model behind its features into a normal ViViT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..hub.model_card import write_model_card
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .probe_data import LabelledFeatures
from .probe_heads import LinearHead
from .probes import ProbeReport, fit_probe


def save_probe(
    folder: Path,
    name: str,
    encoder: ViViTForVideoClassification,
    processor: ViViTVideoProcessor,
    settings: Mapping[str, Any],
    data: LabelledFeatures,
    report: ProbeReport,
    seed: int = 0,
) -> str:
    """
    Fit the most accurate of the `possible_heads`, and save it as a model with processor, card and probe.json.

    Args:
        folder: an existing folder.
        name: the name of the model on its card.
        encoder, processor: those that computed the features.
        settings: see `Features`.
        data, report, seed: see `score_probes`.

    Returns:
        The name of the head.
    """
    score = report.best(possible_heads(settings, encoder.config))
    head = fit_probe(score.head, data, seed)
    if not isinstance(head, LinearHead):
        raise TypeError(f"A {type(head).__name__} has no weights for a model; expected a linear head.")
    model = model_with_head(encoder, head, data.names, settings)
    text = (
        f"The frozen model with a probe as its classifier ({score.head}): accuracy {score.accuracy:.4f}, balanced "
        f"accuracy {score.balanced_accuracy:.4f}. Always answering the most frequent class: "
        f"{report.majority_class_accuracy:.4f}. Measured on {report.protocol}."
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_card(folder, model, repo_id=name, base_model=settings["model"], report=text)
    results = {
        "written": score.head,
        **report.to_dict(),
        "videos_per_class": dict(zip(data.names, np.bincount(data.labels).tolist(), strict=True)),
        "without_features": data.without_features,
        "without_label": data.without_label,
        "features": dict(settings),
        "seed": seed,
    }
    (folder / "probe.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return score.head


def possible_heads(settings: Mapping[str, Any], config: ViViTConfig) -> tuple[str, ...]:
    """
    Return the names of the heads that can become part of a ViViT.

    Args:
        settings: see `Features`.
        config: the configuration of the model that computed the features.

    Raises:
        ValueError: if the features are means over tokens that the model does not pool, so that no head can.
    """
    if settings["kind"] == "video":
        return ("linear, mean",)
    if config.attention_type != "factorised_encoder":
        if config.pooling != "mean":
            raise ValueError(
                f"A model with attention_type={config.attention_type!r} and pooling={config.pooling!r} does not pool "
                "the tokens behind features per step, so no head can become part of it: compute features per video, or "
                "leave the output out."
            )
        return ("linear, mean",)
    if settings["views"]["num_clips"] > 1:  # one clip has not all of the steps
        return ("linear, mean",)
    return ("linear, mean", "linear, ordered", "attentive")


@torch.no_grad()
def model_with_head(
    encoder: ViViTForVideoClassification, head: LinearHead, names: Sequence[str], settings: Mapping[str, Any]
) -> ViViTForVideoClassification:
    """
    Return a model whose logits are those of the head on the encoder's features.

    With features per video it is the encoder with another classifier. With features per step it pools the steps as the
    head does; of Model 2 it keeps the spatial encoder alone.

    Args:
        encoder: the model that computed the features.
        head: one of `possible_heads`.
        names: the names of the classes.
        settings: see `Features`.

    Raises:
        ValueError: if weights of the encoder are missing, or the head does not fit it.
    """
    fields = {**encoder.config.to_dict(), **_changes(encoder.config, head, settings)}
    for name in ("id2label", "label2id", "num_labels", "architectures", "dtype", "calibration", "optimization"):
        fields.pop(name, None)
    model = ViViTForVideoClassification(ViViTConfig(**fields, id2label=dict(enumerate(names)))).eval()
    values = {name: value for name, value in encoder.state_dict().items() if not name.startswith("classifier.")}
    values["classifier.weight"], values["classifier.bias"] = _tensor(head.weight), _tensor(head.bias)
    if head.query is not None:
        # The model divides scores by the square root of the width.
        values["vivit.temporal_pooler.query"] = _tensor(head.query * np.sqrt(len(head.query)))
    for name, parameter in model.state_dict().items():
        if name not in values or values[name].shape != parameter.shape:
            found = tuple(values[name].shape) if name in values else "none"
            raise ValueError(f"The probe's model needs {name} of {tuple(parameter.shape)}, but got {found}.")
        parameter.copy_(values[name])
    return model


def _changes(config: ViViTConfig, head: LinearHead, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the configuration that differ from those of the encoder, besides the labels."""
    changes: dict[str, Any] = {"label_groups": None, "problem_type": "single_label_classification"}
    if settings["kind"] == "step":
        changes["representation_size"] = None  # of the pooled output, which the steps precede
        if config.attention_type == "factorised_encoder":
            changes |= {"num_temporal_layers": 0, "temporal_pooling": head.pooling}
    return changes


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).float()
