"""The table of `vivit-hf tune`, the choice from it, and the place of the chosen setting beside the model."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import CONFIG_NAME

from ..configuration_vivit import ViViTConfig
from ..data.labels import LabelMap, to_probabilities
from ..data.whole_files import written_whole
from ..video_processing_vivit import ViViTVideoProcessor
from .agreement import compare_answers, margins
from .metrics import classification_metrics
from .optimization import restore
from .stored_fields import read_fields
from .tuning import TuningRun
from .tuning_candidates import EXACT, PLAIN


CONFIDENCE = 0.95
_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class TunedRow:
    """
    The figures of a setting.

    `clips_per_second`, `speed`: without decoding; `speed` is that over the plain model. Medians over the rounds.
    `megabytes`: of the weights and, at their peak, the tensors of a batch.
    `agreement`, `largest_change`, `mean_change`: see `Agreement`.
    `accuracy`: top-1, of all groups at once, or with several labels per video the mean average precision; None without
    labels.
    `error`: why the setting cannot be used; the other figures are then NaN.
    """

    name: str
    clips_per_second: float
    speed: float
    megabytes: float
    agreement: float
    largest_change: float
    mean_change: float
    accuracy: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class TuningResults:
    """The rows, the plain model first, and the `margins` of the plain model, float (clips,)."""

    rows: tuple[TunedRow, ...]
    margins: torch.Tensor

    @property
    def margin_quantiles(self) -> dict[float, float]:
        """The margin below which a share of the clips is, by the share."""
        values = torch.quantile(self.margins, torch.tensor(_QUANTILES))
        return dict(zip(_QUANTILES, values.tolist(), strict=True))

    def choose(self, min_agreement: float, name: str | None = None) -> TunedRow:
        """
        Return the fastest row that agrees with the plain model for at least a share of the clips, or the named one.

        Raises:
            ValueError: if the named one cannot be used.
        """
        usable = [row for row in self.rows if row.error is None and row.name != PLAIN]
        if name is not None:
            found = [row for row in usable if row.name == name]
            if not found:
                reason = next((row.error for row in self.rows if row.name == name), None)
                raise ValueError(f"{name!r} cannot be chosen: {reason}")
            return found[0]
        # The exact model is always among them: its outputs differ by rounding alone.
        fitting = [row for row in usable if row.agreement >= min_agreement or row.name == EXACT]
        return max(fitting, key=lambda row: row.speed)


def tuning_results(run: TuningRun, targets: Sequence[Any] | None = None) -> TuningResults:
    """
    Return the results of a finished run.

    Args:
        targets: the labels of the run's videos, encoded by `LabelMap.encode`.
    """
    label_map = LabelMap.from_config(run.model.config)
    plain = to_probabilities(run.logits(PLAIN), label_map)
    of_clips = None
    if targets is not None:
        of_clips = torch.stack([targets[index] for index in run.found_clips["videos"]]).numpy()
    rows = []
    for name in (PLAIN, *run.candidates):
        prepared = run.prepared(name)
        if prepared.error is not None:
            rows.append(_failed(name, prepared.error))
            continue
        logits = run.logits(name)
        if not logits.isfinite().all():
            rows.append(_failed(name, "its scores contain NaN or infinite numbers"))
            continue
        found = compare_answers(plain, to_probabilities(logits, label_map), label_map)
        rate, speed = run.speeds(name)
        accuracy = None if of_clips is None else _accuracy(logits.numpy(), of_clips, label_map)
        figures = (rate, speed, prepared.megabytes, found.top1, found.largest_change, found.mean_change)
        rows.append(TunedRow(name, *figures, accuracy))
    return TuningResults(tuple(rows), margins(plain, label_map))


def _failed(name: str, error: str) -> TunedRow:
    unknown = float("nan")
    return TunedRow(name, unknown, unknown, unknown, unknown, unknown, unknown, error=error)


def _accuracy(logits: np.ndarray, targets: np.ndarray, label_map: LabelMap) -> float:
    metrics = classification_metrics(logits, targets, label_map)
    return metrics["map" if label_map.has_several else "top1"]


def least_agreement(num_clips: int) -> float:
    """Return the agreement that full agreement on so many clips shows with a confidence of 95 %."""
    return (1 - CONFIDENCE) ** (1 / num_clips)


def needed_clips(agreement: float) -> int:
    """Return how many clips must all agree to show an agreement below 1 with a confidence of 95 %."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(agreement))


def save_results(results: TuningResults, path: Path, **more: Any) -> None:
    """Write the rows and the margins as JSON, with further fields."""
    rows = [{name: value for name, value in asdict(row).items() if value == value} for row in results.rows]
    found = {"rows": rows, "margins": [round(value, 6) for value in results.margins.tolist()], **more}
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# The place of the setting


def setting_to_store(run: TuningRun, results: TuningResults, row: TunedRow) -> dict[str, Any] | None:
    """Return the field `optimization` of the configuration for a row; None for the exact model, which needs none."""
    if row.name == EXACT:
        return None
    figures = {name: value for name, value in asdict(row).items() if isinstance(value, float)}
    figures = {name: float(f"{value:.6g}") for name, value in figures.items()} | {"clips": len(results.margins)}
    setting = run.prepared(row.name).setting
    assert setting is not None
    return {**setting.to_dict(run.weights, run.model.device), "measured": figures}


def check_place(model: str, output: Path | None, is_dry_run: bool) -> Path:
    """
    Return the folder that the measurements and the setting go to; it is created.

    Args:
        model: a folder or Hub id.
        output: the folder for a copy of the model; None stores the setting beside the model itself.
        is_dry_run: only measure.

    Raises:
        ValueError: if nothing can be written there; the message names the way out.
    """
    place = Path(model) if output is None else output
    way_out = "give --output FOLDER, for the measurements and a copy of the model with the setting"
    if output is None and not place.is_dir():
        raise ValueError(f"{model} is no folder, so that nothing can be written beside the model: {way_out}.")
    if output is None and not is_dry_run:
        _check_config(place, way_out)
    if output is not None and (output / CONFIG_NAME).exists() and not (output / "tuning" / "run.json").exists():
        raise ValueError(f"--output {output} holds another model: give a new folder.")
    try:
        (place / "tuning").mkdir(parents=True, exist_ok=True)
        for folder in (place / "tuning",) if is_dry_run else (place / "tuning", place):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        other = way_out if output is None else "give another --output"
        raise ValueError(f"{place} cannot be written to ({error.strerror}): {other}.") from error
    return place


def _check_config(folder: Path, way_out: str) -> None:
    kind = read_fields(folder).get("model_type")
    if kind != ViViTConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, whose {CONFIG_NAME} cannot keep it: {way_out}.")


def store_copy(
    folder: Path,
    model: Any,
    processor: ViViTVideoProcessor,
    dtype: torch.dtype,
    setting: dict[str, Any] | None,
) -> None:
    """
    Save a model with a setting, and its processor; config.json comes last, so that the copy is whole or no model.

    Args:
        model: the model of a run; it is cast.
        dtype: the dtype that it is stored in.
    """
    restore(model)
    model.config.optimization = setting
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=folder) as temporary:
        model.to(dtype).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, folder / path.name)
