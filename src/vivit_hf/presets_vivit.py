"""
Names that options accept, without imports that take time: presets and policies for short videos.

A preset has the fields of `ViViTConfig` for a size and variant of the paper (see `ViViTConfig.from_preset`).
"""

from typing import Any


SHORT_VIDEO_POLICIES = ("repeat_last", "loop", "mask", "error")  # see frame_sampling.py

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {"attention_type": "spatio_temporal"},
    "-fe": {"attention_type": "factorised_encoder", "num_temporal_layers": 4},
    "-fe-average-pool": {"attention_type": "factorised_encoder", "num_temporal_layers": 0},
    "-fsa": {"attention_type": "factorised_self_attention"},
    "-fdpa": {"attention_type": "factorised_dot_product_attention"},
}
PRESETS: dict[str, dict[str, Any]] = {
    f"vivit-{size}-16x2{suffix}": {**widths, **variant}
    for size, widths in (("b", _BASE), ("l", _LARGE))
    for suffix, variant in _VARIANTS.items()
}
PRESETS["vivit-l-16x2-fe-epic-kitchens"] = PRESETS["vivit-l-16x2-fe"]
PRESETS["vivit-l-16x2-fe-ssv2"] = {**PRESETS["vivit-l-16x2-fe"], "image_size": 256}
PRESETS["vivit-l-16x2-fe"] = {**PRESETS["vivit-l-16x2-fe"], "num_temporal_layers": 24}  # as trained on Kinetics
PRESETS["vivit-tiny"] = {
    "attention_type": "factorised_encoder",
    "num_frames": 16,
    "image_size": 64,
    "tubelet_size": (2, 16, 16),
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_temporal_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "initializer_range": 0.1,  # about 1 / sqrt(hidden_size); with the 0.02 of wide models it hardly learns
}
