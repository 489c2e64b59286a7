"""The settings of `optimize` that `vivit-hf tune` tries on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration_vivit import ViViTConfig
from .onednn import has_bfloat16_units, has_vnni
from .token_merging import decreasing_schedule, merging_config, tokens_of_layers


PLAIN = "plain"  # the model as it is, in float32: what all others are compared with
EXACT = "exact"  # optimised in float32
# Shares of the tokens that are merged by the last layer.
_SHARES = (0.2, 0.4, 0.7)


@dataclass(frozen=True)
class Candidate:
    """A way to run a model: the arguments of `optimize`, and a name for them."""

    name: str
    dtype: torch.dtype = torch.float32
    merge_tokens: int | list[int] | None = None
    int8: bool = False


def list_candidates(
    config: ViViTConfig, device: torch.device, rates: Sequence[int] = ()
) -> tuple[list[Candidate], list[str]]:
    """
    Return the settings to try, and notes about what this machine or model cannot have.

    Settings other than `EXACT` are in bfloat16 if the device has units for it.

    Args:
        rates: tokens to merge per layer; by default a few that suit the number of tokens.

    Raises:
        ValueError: for rates that the model cannot have.
    """
    notes = []
    has_bfloat16 = _has_bfloat16(device)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float32
    found = [Candidate(EXACT)]
    if has_bfloat16:
        found.append(Candidate("bfloat16", dtype))
    else:
        notes.append("bfloat16: this device has no units for it.")
    merging = [Candidate(name, dtype, schedule) for name, schedule in _schedules(config, rates).items()]
    if not merging:
        notes.append("Token merging: Models 3 and 4 need all tokens.")
    if device.type == "cpu" and has_vnni():
        found.append(Candidate("int8", dtype, int8=True))
        found += merging
        found += [Candidate(f"int8-{one.name}", dtype, one.merge_tokens, int8=True) for one in merging]
    else:
        notes.append(
            "int8: it needs a CPU with AVX-512 VNNI."
            if device.type == "cpu"
            else "int8: on a GPU it pays in compiled models alone, and none is compiled here."
        )
        found += merging
    return found, notes


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and has_bfloat16_units()


def _schedules(config: ViViTConfig, rates: Sequence[int]) -> dict[str, int | list[int]]:
    """Return values of `merge_tokens` by name, the mildest first."""
    if config.is_token_grid and not rates:
        return {}
    tokens, layers = tokens_of_layers(config)[0], config.num_hidden_layers
    found: dict[str, int | list[int]] = {}
    for count in sorted({*rates} or {max(1, round(share * tokens / layers)) for share in _SHARES}):
        found[f"merging-{count}"] = count
        found[f"merging-{count}-decreasing"] = decreasing_schedule(count, layers)
    for schedule in found.values():
        merging_config(config, schedule)
    return found
