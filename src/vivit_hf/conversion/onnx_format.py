"""Names, shapes, versions and metadata of exported ONNX models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import vivit_hf

from ..configuration_vivit import ViViTConfig
from ..video_processing_vivit import ViViTVideoProcessor
from .processors import value_range


MODEL_FILE, INT8_FILE, REPORT_FILE = "model.onnx", "model_int8.onnx", "report.json"
INPUT, OUTPUT = "pixel_values", "logits"
DEFAULT_OPSET = 20  # the first with a GELU operator
LEAST_OPSET = 18  # the oldest that torch exports to by itself
MOST_BYTES_IN_ONE_FILE = 2_000_000_000  # protobuf files, graph included, are limited to 2 GiB

Clip = Callable[[], torch.Tensor]  # loads one clip (1, frames, channels, height, width)


def clip_shape(config: ViViTConfig) -> tuple[int, ...]:
    return config.num_frames, config.num_channels, *config.frame_size


def input_shape(config: ViViTConfig) -> list[str | int]:
    return ["batch", *clip_shape(config)]


def describe_shape(shape: Sequence[str | int]) -> str:
    return f"({', '.join(map(str, shape))})"


def labels_by_index(config: ViViTConfig) -> dict[str, str]:
    return {str(index): str(config.id2label[index]) for index in range(config.num_labels)}


def name_of(source: str | Path) -> str:
    """Return the last part of a path, so that no local folders are published, or a Hub id unchanged."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def onnx_metadata(source: str, config: ViViTConfig, processor: ViViTVideoProcessor) -> dict[str, str]:
    """Return what the graph itself does not state, as text; numbers, lists and maps are JSON."""
    low, high = value_range(processor)
    shape = describe_shape(input_shape(config))
    metadata = {
        "model": name_of(source),
        "attention_type": config.attention_type,
        "expects": f"{INPUT} {shape} of float32: RGB, black {low:.6g} and white {high:.6g}",
        "num_frames": str(config.num_frames),
        "num_channels": str(config.num_channels),
        "image_size": json.dumps(list(config.frame_size)),
        "value_range": json.dumps([round(low, 6), round(high, 6)]),
        "id2label": json.dumps(labels_by_index(config), ensure_ascii=False),
        "vivit_hf_version": vivit_hf.__version__,
    }
    if config.problem_type is not None:
        metadata["problem_type"] = config.problem_type
    if config.label_groups is not None:
        metadata["label_groups"] = json.dumps(config.label_groups, ensure_ascii=False)
    return metadata
