"""
What labelled files have taught about the answers of a model: `ViViTConfig.calibration`.

The logits of a model stay plain. What turns them into probabilities divides them by the temperature first: the
commands, pipelines and `vivit_hf.data.labels.to_probabilities`. `vivit-hf evaluate --calibrate` writes the field.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file, logging

from .limits_vivit import (
    check_choice,
    check_positive_integer,
    check_positive_number,
    check_probability,
    check_value,
    is_number,
)


logger = logging.get_logger(__name__)

# Beyond these, a temperature would only say that the files were too few, or no better than chance.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.02, 50.0
COVERAGES = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
UNKNOWN_SCORES = ("energy", "neighbours")
KNOWN_FEATURES = "known_features.safetensors"  # beside the weights
MOST_KNOWN = 100_000
AVERAGINGS = ("probabilities", "logits")


@dataclass(frozen=True)
class Calibration:
    """
    The fields of `ViViTConfig.calibration`.

    `temperatures`: one per group of labels (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    `num_files`, `num_units`: the number of files that these values come from, and of groups of files among them.
    `num_clips`, `num_crops`, `averaging`: the views per file and how they were averaged.
    `weights`: the `answer_fingerprint` of the model; None if it is stored in float16.
    `sets`: one label per file: by coverage, such as "0.9", the plain probability from which on a label belongs to the
        label set, one per group of labels.
    `thresholds`: several labels per file: the calibrated probability from which on a label is given, one per label.
    `unknown`: when to answer "none of these": the "score" ("energy" or "neighbours"), and from where on, so that a
        share of "false_alarms" of files that show one of the labels is called so: the "threshold" for all views of a
        file and the "window_threshold" for a single one. See `vivit_hf.inference.unknown`.

    Raises ValueError for values that no calibration can have.
    """

    temperatures: tuple[float, ...]
    num_files: int
    num_units: int
    num_clips: int
    num_crops: int
    averaging: str
    weights: str | None = None
    sets: dict[str, list[float]] | None = None
    thresholds: tuple[float, ...] | None = None
    unknown: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_list("calibration.temperatures", self.temperatures)
        for value in self.temperatures:
            check_positive_number("calibration.temperatures", value, LEAST_TEMPERATURE, MOST_TEMPERATURE)
        for name in ("num_files", "num_units", "num_clips", "num_crops"):
            check_positive_integer(f"calibration.{name}", getattr(self, name))
        check_choice("calibration.averaging", self.averaging, AVERAGINGS)
        is_text = self.weights is None or isinstance(self.weights, str)
        check_value("calibration.weights", self.weights, is_text, "a fingerprint, as text")
        self._check_sets()
        self._check_unknown()
        if self.thresholds is not None:
            _check_probabilities("calibration.thresholds", self.thresholds)

    def _check_sets(self) -> None:
        if self.sets is None:
            return
        check_value("calibration.sets", self.sets, isinstance(self.sets, Mapping), "lists of probabilities by coverage")
        for coverage, values in self.sets.items():
            is_known = coverage in [f"{one:g}" for one in COVERAGES]
            check_value("calibration.sets", coverage, is_known, f"for a coverage of {', '.join(map(str, COVERAGES))}")
            _check_probabilities(f"calibration.sets[{coverage!r}]", values)
            check_value("calibration.sets", values, len(values) == len(self.temperatures), "one number per group")

    def _check_unknown(self) -> None:
        if self.unknown is None:
            return
        names = ["false_alarms", "score", "threshold", "window_threshold"]
        is_good = isinstance(self.unknown, Mapping) and sorted(map(str, self.unknown)) == names
        check_value("calibration.unknown", self.unknown, is_good, f"an object with the fields {', '.join(names)}")
        check_choice("calibration.unknown.score", self.unknown["score"], UNKNOWN_SCORES)
        for name in ("threshold", "window_threshold"):
            value = self.unknown[name]
            is_good = is_number(value) and math.isfinite(value)
            check_value(f"calibration.unknown.{name}", value, is_good, "a finite number")
        check_probability("calibration.unknown.false_alarms", self.unknown["false_alarms"])

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


def _check_probabilities(name: str, values: Any) -> None:
    _check_list(name, values)
    for value in values:
        check_value(name, value, is_number(value) and 0 <= value <= 1, "probabilities")


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
    num_thresholds = None if calibration.thresholds is None else len(calibration.thresholds)
    is_multi_label = config.problem_type == "multi_label_classification"
    if num_thresholds not in (None, config.num_labels) or (is_multi_label and calibration.sets is not None):
        raise ValueError(
            f"`calibration` has {num_thresholds} thresholds and {'no' if calibration.sets is None else 'some'} sets, "
            f"which do not fit the {config.num_labels} labels of problem_type={config.problem_type!r}: set "
            "`calibration=None`, or run `vivit-hf evaluate --calibrate` again."
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


# Known features


def find_known_features(model: Any) -> Path | None:
    """Return the file with the known features beside the weights that a model comes from, None if there is none."""
    source = model.name_or_path or ""
    if os.path.isdir(source):
        path = Path(source, KNOWN_FEATURES)
        return path if path.is_file() else None
    if not source:
        return None
    try:
        found = cached_file(
            source,
            KNOWN_FEATURES,
            revision=getattr(model.config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def read_known_features(path: Path, calibration: Calibration, hidden: int) -> torch.Tensor:
    """
    Read the known features, floats (videos, hidden).

    Raises:
        ValueError: if the file is damaged, belongs to other weights, or has features of another size.
    """
    again = "Write it again with `vivit-hf evaluate --calibrate`."
    try:
        with safe_open(path, framework="pt") as file:
            weights = (file.metadata() or {}).get("weights")
            shape = file.get_slice("features").get_shape()
            is_good = len(shape) == 2 and shape[1] == hidden and 0 < shape[0] <= MOST_KNOWN
            check_value(str(path), list(shape), is_good, f"at most {MOST_KNOWN:,} features of {hidden} numbers")
            features = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}. {again}") from error
    if weights != (calibration.weights or "float16"):
        raise ValueError(f"{path} belongs to other weights than the calibration in config.json. {again}")
    if not (features.is_floating_point() and features.isfinite().all()):
        raise ValueError(f"{path} contains features that are not finite numbers. {again}")
    return features


def carried_features(model: Any) -> Path | None:
    """Return the known features to save with a model; if they are lost, leave out the unknown answer with a warning."""
    calibration = Calibration.of(model.config)
    if calibration is None or calibration.unknown is None or calibration.unknown["score"] != "neighbours":
        return None
    if (found := find_known_features(model)) is None:
        model.config.calibration = {name: value for name, value in calibration.to_dict().items() if name != "unknown"}
        logger.warning(
            "Left out the unknown answer: %s is not beside the weights of %r any more.",
            KNOWN_FEATURES,
            model.name_or_path,
        )
    return found


def copy_features(source: Path | None, folder: str | os.PathLike[str]) -> None:
    """Copy known features into the folder of a saved model."""
    target = Path(folder, KNOWN_FEATURES)
    if source is not None and not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
