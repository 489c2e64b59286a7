"""
What labelled files have taught about the answers of a model: `ViViTConfig.calibration`.

The logits of a model stay plain. What turns them into probabilities divides them by the temperature first: the
commands, pipelines and `vivit_hf.data.labels.to_probabilities`. `vivit-hf evaluate --calibrate` writes the field.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers.utils import logging

from .limits_vivit import check_choice, check_positive_integer, check_positive_number, check_value


logger = logging.get_logger(__name__)

# Beyond these, a temperature would only say that the files were too few, or no better than chance.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.02, 50.0
AVERAGINGS = ("probabilities", "logits")


@dataclass(frozen=True)
class Calibration:
    """
    The fields of `ViViTConfig.calibration`.

    `temperatures`: one per group of labels (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    `num_files`: the number of files that these values come from.
    `num_clips`, `num_crops`, `averaging`: the views per file and how they were averaged.
    `weights`: the `answer_fingerprint` of the model; None if it is stored in float16.

    Raises ValueError for values that no calibration can have.
    """

    temperatures: tuple[float, ...]
    num_files: int
    num_clips: int
    num_crops: int
    averaging: str
    weights: str | None = None

    def __post_init__(self) -> None:
        _check_list("calibration.temperatures", self.temperatures)
        for value in self.temperatures:
            check_positive_number("calibration.temperatures", value, LEAST_TEMPERATURE, MOST_TEMPERATURE)
        for name in ("num_files", "num_clips", "num_crops"):
            check_positive_integer(f"calibration.{name}", getattr(self, name))
        check_choice("calibration.averaging", self.averaging, AVERAGINGS)
        is_text = self.weights is None or isinstance(self.weights, str)
        check_value("calibration.weights", self.weights, is_text, "a fingerprint, as text")

    @classmethod
    def of(cls, config: Any) -> "Calibration | None":
        """Return the calibration of a configuration, None without one."""
        stored = getattr(config, "calibration", None)  # only our configurations have the field
        return None if stored is None else cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }


def _check_list(name: str, value: Any) -> None:
    check_value(name, value, isinstance(value, (list, tuple)) and len(value) > 0, "a list of numbers")


def check_calibration(name: str, value: Any) -> dict[str, Any]:
    """Return `value` as JSON has it; raise ValueError unless it has the fields of `Calibration`."""
    known = [one.name for one in fields(Calibration)]
    is_good = isinstance(value, Mapping) and set(value) <= set(known)
    check_value(
        name, value, is_good, f"what `vivit-hf evaluate --calibrate` writes, with the fields {', '.join(known)}"
    )
    try:
        return Calibration(**value).to_dict()
    except TypeError as error:  # a field is missing
        raise ValueError(f"`{name}` is incomplete: {error}. Run `vivit-hf evaluate --calibrate` again.") from None


def check_calibration_of(config: Any) -> None:
    """Raise ValueError for a calibration of other labels than those of the configuration."""
    calibration = Calibration.of(config)
    if calibration is None:
        return
    groups = 1 if config.label_groups is None else len(config.label_groups)
    if len(calibration.temperatures) != groups or not config.num_labels:
        raise ValueError(
            f"`calibration` has {len(calibration.temperatures)} temperatures, but there are {config.num_labels} labels "
            f"in {groups} groups: set `calibration=None`, or run `vivit-hf evaluate --calibrate` again."
        )


def answer_fingerprint(model: Any, state_dict: Mapping[str, Any] | None = None) -> str | None:
    """
    Return a digest of the classifier and of every LayerNorm, rounded to bfloat16, which training changes.

    None if it cannot be compared: for float16, whose rounding is another one, and without the data of the weights.

    Args:
        state_dict: weights to use in place of the model's, such as those gathered from several processes.
    """
    named = dict(model.named_parameters() if state_dict is None else state_dict)
    digest = hashlib.sha256()
    for name in sorted(named):
        if name.startswith("classifier.") or "layernorm" in name:
            weight = named[name].detach()
            if weight.is_meta or weight.dtype == torch.float16:
                return None
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def drop_stale_calibration(model: Any, state_dict: Mapping[str, Any] | None = None) -> None:
    """Set the calibration of a model to None, with a warning, if the weights are not those that it was made with."""
    calibration = Calibration.of(model.config)
    if calibration is None:
        return
    if (found := answer_fingerprint(model, state_dict)) not in (None, calibration.weights):
        model.config.calibration = None
        logger.warning(
            "Left out the calibration: the weights were trained further since (%s, now %s). Run `vivit-hf evaluate "
            "--calibrate` again.",
            *(calibration.weights, found),
        )
