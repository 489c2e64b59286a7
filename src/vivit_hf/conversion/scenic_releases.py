"""The ViViT models that google-research/scenic has released."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
