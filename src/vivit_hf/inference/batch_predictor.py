"""Classify the videos of tables, for engines that call a function on parts of a table in many processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch

from ..calibration_vivit import AVERAGINGS, Calibration
from ..data.labels import LabelMap
from ..limits_vivit import check_choice, check_positive_integer
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import is_video_source
from .fingerprints import hub_commit
from .finite_outputs import check_finite
from .optimization import OptimizationReport, optimize
from .prediction import predict_each
from .shards import answer_fields, answer_row


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BatchPredictor:
    """
    Add the labels of videos to a table: a function for Spark's `mapInPandas` and Ray Data's `map_batches`.

        schema = f"video string, {BatchPredictor.SPARK_COLUMNS}"
        rows.mapInPandas(BatchPredictor("my_vivit"), schema)                                            # Spark

        settings = {"fn_constructor_kwargs": {"model": "my_vivit"}, "batch_format": "pyarrow"}
        rows.map_batches(BatchPredictor, **settings, batch_size=64, concurrency=2)                      # Ray Data

    It returns the columns of its input and those of the shards of `vivit-hf classify-dataset`, with the same values:
    `labels` and `scores` (best first), `unknown` (whether the answer is "none of these"; null for a model without a
    rule for that) and `error` (why a video has no labels). A column of videos in memory is left out. The model is
    loaded by the first call in each process.

    Args:
        model: folder, which all machines must have, or Hub id of a fine-tuned ViViT.
        video_column: the column with paths, addresses, the bytes of files, or {"path", "bytes"}.
        top_k: labels per video, and per group of labels.
        num_clips, num_crops: views per video.
        batch_size: clips that the model sees at a time.
        num_workers: processes that decode, for each caller; 0 decodes in the calling process.
        dtype: "float32", "bfloat16" or "float16"; leaves out the setting that `vivit-hf tune` stored. By default this
            setting is used, and without one float32.
        device: such as "cuda:1"; a GPU if there is one by default.
        revision: commit of a Hub id, by default the current one when the object is made.
        allow_private_addresses: also download from this machine and the local network.

    Raises:
        ValueError: for a number below 1, or a dtype that is not known.
        OSError: if there is neither such a folder nor such a model on the Hub.
    """

    model: str
    video_column: str = "video"
    top_k: int = 5
    num_clips: int = 1
    num_crops: int = 1
    batch_size: int = 16
    num_workers: int = 0
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    allow_private_addresses: bool = False

    SPARK_COLUMNS = "labels array<string>, scores array<float>, unknown boolean, error string"

    def __post_init__(self) -> None:
        for name in ("top_k", "num_clips", "num_crops", "batch_size"):
            check_positive_integer(name, getattr(self, name))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        if self.revision is None:
            object.__setattr__(self, "revision", hub_commit(self.model))

    def __call__(self, batch: Any) -> Any:
        """
        Return a table with the answers for a table of videos.

        Args:
            batch: a `pandas.DataFrame`, whose answer is one; a `pyarrow.Table` or a dictionary of NumPy columns, whose
                answer is a `pyarrow.Table`, as the types of its columns do not depend on the values; or an iterator of
                these, as Spark gives, whose answer is an iterator.

        Raises:
            OSError, ValueError: if the model cannot be loaded, or does not fit its processor or the views.
            KeyError: if the table has no such column.
        """
        import pandas  # type: ignore[import-untyped]
        import pyarrow  # type: ignore[import-untyped]

        if isinstance(batch, Iterator):
            return map(self, batch)
        if isinstance(batch, pandas.DataFrame):
            answers = self._answers(batch[self.video_column].tolist(), list(batch))
            kept = batch.drop(columns=self.video_column) if _in_memory(batch[self.video_column]) else batch
            return kept.assign(**{name: pandas.Series(values, kept.index, object) for name, values in answers.items()})
        table = pyarrow.table(dict(batch)) if isinstance(batch, Mapping) else batch
        videos = table[self.video_column].to_pylist()
        answers = self._answers(videos, table.column_names)
        if _in_memory(videos):
            table = table.drop_columns(self.video_column)
        for name, kind in answer_fields():
            table = table.append_column(name, pyarrow.array(answers[name], kind))
        return table

    def _answers(self, videos: list[Any], columns: list[str]) -> dict[str, list[Any]]:
        """Return the values of each column of `answer_row`."""
        taken = sorted({name for name, _ in answer_fields()} & set(columns))
        if taken:
            raise ValueError(
                f"The table has a column {taken[0]!r} already: rename it, since the answers are called so."
            )
        model, processor, averaging = _loaded(
            self.model, self.revision, self.dtype, self.device, self.allow_private_addresses
        )
        label_map = LabelMap.from_config(model.config)
        found = predict_each(
            model,
            processor,
            [one if is_video_source(one) else partial(_no_video, one, self.video_column) for one in videos],
            num_clips=self.num_clips,
            num_crops=self.num_crops,
            averaging=averaging,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        rows = [answer_row(one, label_map, self.top_k) for one in found]
        return {name: [row[name] for row in rows] for name, _ in answer_fields()}


def load_classifier(
    model: str, *, revision: str | None, dtype: str | None, device: Any
) -> tuple[ViViTForVideoClassification, OptimizationReport]:
    """
    Return a classifier on its device, in eval mode and optimised, and what was done to it.

    Args:
        dtype: see `BatchPredictor`.

    Raises:
        OSError: if it cannot be loaded.
        ValueError: if the setting that `vivit-hf tune` stored cannot be used here: answers of machines must not mix.
        NonFiniteError: if its scores for a clip of zeros are NaN or infinite: its weights are damaged.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    number_format = getattr(torch, dtype or "float32")
    loaded = ViViTForVideoClassification.from_pretrained(model, dtype=number_format, **options)
    report = optimize(loaded.to(device).eval(), stored=dtype is None)
    if report.note is not None:
        raise ValueError(f"{report.note} Or give --dtype float32, in Python dtype='float32'.")
    config = loaded.config
    clip = torch.zeros(1, config.num_frames, config.num_channels, *config.frame_size, device=device, dtype=loaded.dtype)
    with torch.inference_mode():
        check_finite(loaded(pixel_values=clip).logits, loaded)
    return loaded, report


def stored_averaging(config: Any) -> str:
    """Return how a model's views are averaged: as when it was calibrated, or else "probabilities"."""
    calibration = Calibration.of(config)
    return AVERAGINGS[0] if calibration is None else calibration.averaging


@lru_cache(maxsize=1)  # Spark sends the predictor again with every task
def _loaded(
    model: str, revision: str | None, dtype: str | None, device: str | None, allow_private_addresses: bool
) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor, str]:
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    limits = {"allow_private_addresses": allow_private_addresses}
    processor = ViViTVideoProcessor.from_pretrained(model, video_limits=limits, **options)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    classifier, _ = load_classifier(model, revision=revision, dtype=dtype, device=place)
    return classifier, processor, stored_averaging(classifier.config)


def _in_memory(videos: Any) -> bool:
    return any(isinstance(one, (bytes, bytearray, memoryview, dict)) for one in videos)


def _no_video(value: Any, column: str) -> NoReturn:
    raise ValueError(f"Expected a path, an address or the bytes of a video in column {column!r}, got {value!r}.")
