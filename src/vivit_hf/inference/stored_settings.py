"""The setting of `vivit-hf tune` in the configuration of a model, and whether it holds for the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..modeling_vivit import ViViTForVideoClassification
from .fingerprints import loaded_fingerprint
from .onednn import has_bfloat16_units, has_vnni
from .quantisation import ActivationScale


@dataclass(frozen=True)
class OptimizationSetting:
    """
    What `optimize` is to do, in numbers that need no videos.

    `name`: its name in the table of `vivit-hf tune`.
    `dtype`: torch.float32 or torch.bfloat16.
    `merge_tokens`: see `optimize`; None leaves the model's own.
    `input_scales`: for int8, see `apply_scales`; None multiplies in `dtype`.
    `measured`: figures on the videos that the setting was chosen on, such as {"agreement": 0.995}.
    """

    name: str
    dtype: torch.dtype
    merge_tokens: int | list[int] | None = None
    input_scales: Mapping[str, ActivationScale | None] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> OptimizationSetting:
        """Read the field `optimization` of a configuration, which has checked it."""
        inputs = stored["int8_inputs"]
        scales = None
        if inputs is not None:
            scales = {layer: None if one is None else ActivationScale(*one) for layer, one in inputs.items()}
        return cls(
            stored["name"], getattr(torch, stored["dtype"]), stored["merge_tokens"], scales, dict(stored["measured"])
        )

    def to_dict(self, weights: str, device: torch.device) -> dict[str, Any]:
        """
        Return the field `optimization` of a configuration.

        Args:
            weights: the `loaded_fingerprint` of the model.
            device: the device that the setting was measured on.
        """
        inputs = None
        if self.input_scales is not None:
            inputs = {
                layer: None if one is None else [one.scale, one.zero_point] for layer, one in self.input_scales.items()
            }
        return {
            "name": self.name,
            "weights": weights,
            "device": device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "merge_tokens": self.merge_tokens,
            "int8_inputs": inputs,
            "measured": dict(self.measured),
        }


def stored_setting(model: Any) -> tuple[OptimizationSetting | None, str | None]:
    """
    Return the stored setting of a plain model, or None with the reason why it cannot be taken up.

    Both are None for a model without one. The weights are read for their fingerprint, about a second per gigabyte.
    """
    stored = model.config.optimization
    if stored is None:
        return None, None
    setting = OptimizationSetting.from_dict(stored)
    reason = _why_not(model, setting, stored)
    if reason is None:
        return setting, None
    return None, (
        f"The setting {setting.name!r} that `vivit-hf tune` stored is not used, because {reason}. The model runs exact "
        f"in {str(model.dtype).removeprefix('torch.')}; run `vivit-hf tune` again to choose a setting that fits."
    )


def _why_not(model: Any, setting: OptimizationSetting, stored: Mapping[str, Any]) -> str | None:
    """Return why a setting cannot be taken up; None if it can."""
    if not isinstance(model, ViViTForVideoClassification):
        return f"it was chosen for the answers of a classifier, and this is a {type(model).__name__}"
    if model.training:
        return "the model is in training mode"
    if model.device.type != stored["device"]:
        return f"it was measured on the device {stored['device']!r}, and the model is on {model.device.type!r}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"it was measured in float32 and bfloat16, and the model is in {str(model.dtype).removeprefix('torch.')}"
    if model.device.type == "cpu" and setting.input_scales is not None and not has_vnni():
        return "int8 needs a CPU with AVX-512 VNNI, which this one has not"
    if model.device.type == "cpu" and setting.dtype == torch.bfloat16 and not has_bfloat16_units():
        return "this CPU has no bfloat16 units, without which bfloat16 is slow"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "some weights are offloaded, so that they cannot be compared with those that it was measured with"
    if loaded_fingerprint(model) != stored["weights"]:
        return "the weights or their configuration have changed since, and its agreement is that of the earlier ones"
    return None


def describe_stored(config: ViViTConfig) -> str | None:
    """Describe the stored setting of a configuration in a line; None without one."""
    if config.optimization is None:
        return None
    setting = OptimizationSetting.from_dict(config.optimization)
    parts = [str(setting.dtype).removeprefix("torch.")]
    parts += ["int8 products"] if setting.input_scales is not None else []
    if setting.merge_tokens is not None:
        count = setting.merge_tokens
        parts.append(
            f"{counted(count, 'token')} merged per layer" if isinstance(count, int) else f"tokens merged: {count}"
        )
    text = f"{setting.name} ({', '.join(parts)})"
    found = setting.measured
    if {"speed", "agreement", "clips"} <= found.keys():
        text += f", {found['speed']:.2f} times as fast as the plain model on the {config.optimization['device']}"
        text += f", with the same answer for {found['agreement']:.1%} of {found['clips']:g} clips"
    return text
