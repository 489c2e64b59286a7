"""Store a calibration in the config.json of a model's folder, and draw how reliable its probabilities are."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME

from ..calibration_vivit import KNOWN_FEATURES, Calibration, answer_fingerprint
from ..configuration_vivit import ViViTConfig
from ..data.labels import LabelMap
from ..data.whole_files import written_whole
from ..modeling_vivit import ViViTForVideoClassification
from .calibration import NUM_BINS, Reliability
from .stored_fields import read_fields, write_field


def check_folder(model: str) -> None:
    """Raise ValueError unless `model` is a folder with a classifier whose config.json can be written."""
    if not os.path.isdir(model):
        raise ValueError(
            f"--calibrate writes to the model's {CONFIG_NAME}, and {model} is not a folder: download it first, for "
            f"example with `hf download {model} --local-dir my_model`, and give --model my_model."
        )
    stored = read_fields(model)
    if stored.get("model_type") != ViViTConfig.model_type:
        raise ValueError(
            f"--calibrate writes to the configuration of a {ViViTConfig.model_type}, and that of {model} is for "
            f"{stored.get('model_type')!r}: convert it first with `vivit-hf convert transformers`."
        )
    if LabelMap.from_config(ViViTConfig.from_dict(stored)).is_regression:
        raise ValueError("The model is a regression: it has no probabilities to calibrate.")
    try:
        with tempfile.TemporaryFile(dir=model):
            pass
    except OSError as error:
        raise ValueError(
            f"--calibrate writes to {Path(model, CONFIG_NAME)}, and the folder cannot be written: "
            f"{error.strerror or error}. Copy it to another place and give that as --model."
        ) from None


def stored_fingerprint(folder: str) -> str | None:
    """Return the `answer_fingerprint` of the weights in a folder, whatever a loaded model has made of them."""
    return answer_fingerprint(ViViTForVideoClassification.from_pretrained(folder, dtype="auto"))


def store_calibration(
    folder: str | os.PathLike[str], calibration: Calibration, known: torch.Tensor | None = None
) -> None:
    """Write `calibration` into the config.json of a folder, where all else stays, and known features beside it."""
    if known is not None:
        with written_whole(Path(folder, KNOWN_FEATURES)) as unfinished:
            try:
                save_file({"features": known}, unfinished, {"weights": calibration.weights or "float16"})
            except SafetensorError as error:  # of the system, such as a full disk
                raise OSError(f"Cannot write {Path(folder, KNOWN_FEATURES)}: {error}") from error
            shutil.copymode(Path(folder, CONFIG_NAME), unfinished)  # safetensors allows the owner alone
    write_field(folder, "calibration", calibration.to_dict())


def draw_reliability(columns: dict[str, dict[str, Reliability]], path: Path, title: str) -> None:
    """
    Save a reliability diagram. Needs matplotlib.

    A row per group of labels; in each column, the share of right answers over their probability, as bars, with its
    difference from the mean probability in colours of its own, the diagonal where both are equal, and below it how
    many answers there are.

    Args:
        columns: by what to write over each column, such as "before", the reliability of each group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(next(iter(columns.values())))
    figure = Figure(figsize=(4.2 * len(columns), 4.6 * len(groups)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    # Two rows per group: the diagram, and a low one with the counts.
    grid: Any = figure.subplots(
        2 * len(groups), len(columns), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [4, 1] * len(groups)}
    )
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for row, group in enumerate(groups):
        for column, (name, of_groups) in enumerate(columns.items()):
            one = of_groups[group]
            counts, confidence, share = one.bins
            above, below = grid[2 * row][column], grid[2 * row + 1][column]
            bars = {"width": 1 / NUM_BINS, "align": "edge", "edgecolor": "white"}
            confidence = np.where(counts > 0, confidence, share)  # without answers there is no difference
            both = np.minimum(share, confidence)
            above.bar(edges[:-1], both, color="#4f46e5", label="right answers", **bars)
            more, fewer = np.maximum(share - confidence, 0), np.maximum(confidence - share, 0)
            above.bar(edges[:-1], more, bottom=both, color="#5eead4", label="more than the probability says", **bars)
            above.bar(edges[:-1], fewer, bottom=both, color="#fdba74", label="fewer than it says", **bars)
            above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
            above.set(xlim=(0, 1), ylim=(0, 1))
            above.set_title(f"{f'{group}, ' if group else ''}{name}: error {one.error:.3f}", fontsize=10)
            below.bar(edges[:-1], counts, color="grey", **bars)
            below.set_xlabel("probability")
            if column == 0:
                above.set_ylabel("share of right answers")
                below.set_ylabel("answers")
    grid[0][0].legend(loc="upper left", fontsize=8)
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png")
