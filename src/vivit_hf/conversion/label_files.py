"""Read label names from files and from the Hub's data set of label files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig

from .command import one_line, warn
from .weight_files import ConversionError, read_json


LABEL_FILES_REPOSITORY = "huggingface/label-files"


def read_labels(path: str | Path) -> dict[int, str]:
    """
    Read label names from a JSON list, a JSON map of index to name, or a text file with one name per line.

    Raises:
        ConversionError: if the indices are not 0, 1, 2, ...
    """
    if str(path).endswith(".json"):
        labels = read_json(path)
        labels = dict(enumerate(labels)) if isinstance(labels, list) else _indexed(labels, path)
    else:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        labels = dict(enumerate(line.strip() for line in lines if line.strip()))
    if sorted(labels) != list(range(len(labels))):
        raise ConversionError(f"{path}: the label indices must be 0 to {len(labels) - 1} without a gap.")
    return {index: str(labels[index]) for index in sorted(labels)}


def _indexed(labels: Any, path: str | Path) -> dict[int, Any]:
    try:
        return {int(index): label for index, label in labels.items()}
    except (AttributeError, ValueError) as error:
        raise ConversionError(f"{path} is neither a list of labels nor a map from index to label.") from error


def labels_from_hub(file_name: str) -> dict[int, str] | None:
    """Read labels from the Hub's data set of label files; return None after a warning if that fails."""
    try:
        path = hf_hub_download(LABEL_FILES_REPOSITORY, file_name, repo_type="dataset")
    except (OSError, ValueError) as error:
        warn(f"no {file_name} from {LABEL_FILES_REPOSITORY} ({one_line(error)[:200]})")
        return None
    return read_labels(path)


def set_labels(config: PretrainedConfig, labels: Mapping[int, str]) -> None:
    config.id2label = dict(labels)
    config.label2id = {label: index for index, label in labels.items()}
