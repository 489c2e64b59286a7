"""Configurations and label names of the ViViT models that google-research/scenic has released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .command import warn
from .label_files import labels_from_hub, read_labels
from .weight_files import ConversionError, read_json


@dataclass(frozen=True)
class Release:
    """The official `config.model` of a released model, and the settings of its data set."""

    model_config: Mapping[str, Any]
    num_labels: int
    label_file: str | None = None  # in the Hub's data set of label files
    label_groups: Mapping[str, int] | None = None  # several heads in one output, in this order
    num_frames: int = 32
    image_size: int = 224
    frame_stride: int = 2
    datasets: tuple[str, ...] = ()


_BASE = {"num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
_LARGE = {"num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
_SHARED = {
    "patches": {"size": [16, 16, 2]},
    "classifier": "token",
    "representation_size": None,
    "temporal_encoding_config": {"method": "3d_conv", "kernel_init_method": "central_frame_initializer"},
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}


def _factorised_encoder(
    hidden_size: int, sizes: Mapping[str, int], temporal_layers: int, **others: Any
) -> dict[str, Any]:
    return {
        **_SHARED,
        "hidden_size": hidden_size,
        "attention_config": {"type": "factorized_encoder"},
        "spatial_transformer": dict(sizes),
        "temporal_transformer": {**sizes, "num_layers": temporal_layers},
        **others,
    }


_KINETICS_400: dict[str, Any] = {
    "num_labels": 400,
    "label_file": "kinetics400-id2label.json",
    "datasets": ("kinetics400",),
}
RELEASES = {
    "vivit-b-16x2-kinetics400": Release(
        {**_SHARED, **_BASE, "hidden_size": 768, "attention_config": {"type": "spacetime"}}, **_KINETICS_400
    ),
    "vivit-b-16x2-fe-kinetics400": Release(_factorised_encoder(768, _BASE, 4), **_KINETICS_400),
    "vivit-l-16x2-fe-kinetics400": Release(_factorised_encoder(1024, _LARGE, 24), **_KINETICS_400),
    "vivit-l-16x2-fe-kinetics600": Release(
        _factorised_encoder(1024, _LARGE, 24),
        num_labels=600,
        label_file="kinetics600-id2label.json",
        datasets=("kinetics600",),
    ),
    "vivit-l-16x2-fe-epic-kitchens": Release(
        _factorised_encoder(1024, _LARGE, 4, stochastic_droplayer_rate=0.2),
        num_labels=397,
        label_groups={"noun": 300, "verb": 97},
        frame_stride=1,
        datasets=("epic-kitchens-100",),
    ),
}


def find_labels(path: str | None, release: Release | None, num_labels: int) -> dict[int, str] | None:
    """
    Read label names from a file, or from the Hub for a released model; return None after a warning without either.

    Raises:
        ConversionError: if the number of names is not `num_labels`.
    """
    groups = dict(release.label_groups or {}) if release else {}
    file = path or (release.label_file if release else None)
    labels: dict[int, str] | None
    if path is not None:
        labels = _grouped_labels(path, groups) if groups else read_labels(path)
    else:
        labels = labels_from_hub(file) if file else None
        if labels is None:
            warn("the labels have no names, only numbers; give --labels FILE")
            labels = _prefixed({group: [f"LABEL_{n}" for n in range(size)] for group, size in groups.items()}) or None
    if labels is not None and len(labels) != num_labels:
        raise ConversionError(f"{file} names {len(labels)} labels, but the classifier has {num_labels} outputs.")
    return labels


def _grouped_labels(path: str, groups: Mapping[str, int]) -> dict[int, str]:
    """Read a JSON map from group to list of names, or one list of all names in the order of the groups."""
    stored = read_json(path) if path.endswith(".json") else None
    if not isinstance(stored, dict) or set(stored) != set(groups):
        names = list(read_labels(path).values())
        stored, start = {}, 0
        for group, size in groups.items():
            stored[group], start = names[start : start + size], start + size
        stored[group] += names[start:]  # extra names are reported below
    for group, size in groups.items():
        if len(stored[group]) != size:
            sizes = " and ".join(f"{size} of {group}" for group, size in groups.items())
            raise ConversionError(f"{path} names {len(stored[group])} of {group}; expected {sizes}, in this order.")
    return _prefixed({group: stored[group] for group in groups})


def _prefixed(groups: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """Prefix names with their group (`noun: pan`), so that a name in two groups is two labels."""
    names = [f"{group}: {name.removeprefix(f'{group}: ')}" for group, names in groups.items() for name in names]
    return dict(enumerate(names))
