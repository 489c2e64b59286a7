"""
Measure what settings of `optimize` cost and save on a user's clips.

Every video is decoded once, and its clips stay in memory. The settings take turns, a batch of clips at a time, so that
whatever else the machine does falls on all of them; speeds are compared within a turn. A run keeps what it has measured
in a folder, and goes on there if it was killed:

    run.json                    what the measurements depend on: weights, videos, machine, versions
    clips.json                  the video of every clip, and why others could not be read
    setting-NAME.json           a setting with its int8 scales and its memory
    round-0000.safetensors      seconds and logits of every setting on a batch

Each file is written whole or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import __version__
from ..data.escaping import counted
from ..data.video_identity import known_identity
from ..data.whole_files import as_utf8, written_whole
from ..modeling_vivit import check_pixel_values
from ..video_processing_vivit import ViViTVideoProcessor
from .clips import check_takes_masks, shown_masks
from .fingerprints import loaded_fingerprint, processor_fingerprint
from .finite_outputs import check_finite
from .onednn import has_bfloat16_units, has_vnni
from .optimization import PackedLinear, optimize, optimize_as, restore
from .quantisation import QuantisedLinear
from .shards import OtherRunError, changes
from .stored_settings import OptimizationSetting
from .tensor_memory import peak_of_tensors
from .tuning_candidates import PLAIN, Candidate
from .view_batches import Views, load_views


CALIBRATION_CLIPS = 16
LEAST_ROUNDS = 5  # a few clips are measured again and again, for the sake of the seconds
_Item = TypeVar("_Item")


def evenly_spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """Return at most so many items, spread evenly over all."""
    count = min(most, len(items))
    return [items[place * len(items) // count] for place in range(count)]


@dataclass(frozen=True)
class Prepared:
    """
    A candidate that is ready to run.

    `setting`: what to apply; None for the plain model and after an error.
    `megabytes`: of the weights and, at their peak, the tensors of a batch.
    `error`: why it cannot run, else None.
    """

    setting: OptimizationSetting | None
    megabytes: float
    error: str | None = None


@dataclass(frozen=True)
class Measurement:
    """
    A setting on one batch.

    `seconds`: of the setting, and of the plain model in the same turn.
    `logits`: (clips, num_labels), float32.
    """

    seconds: tuple[float, float]
    logits: torch.Tensor


class TuningRun:
    """
    The measurements of a model's candidates on videos, in a folder.

    Args:
        folder: for the files of the run.
        name: the folder or Hub id of the model.
        model: a plain `ViViTForVideoClassification` in float32 and eval mode, on the device to measure on.
        processor: makes its clips.
        videos: inputs of the processor.
        candidates: see `list_candidates`.
        num_clips: clips per video.
        batch_size: clips that the model sees at a time.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        model: Any,
        processor: ViViTVideoProcessor,
        videos: Sequence[Any],
        candidates: Sequence[Candidate],
        *,
        num_clips: int = 1,
        batch_size: int = 8,
    ):
        self.folder, self.name, self.model, self.processor = folder, name, model, processor
        self.videos, self.candidates = videos, {one.name: one for one in candidates}
        self.num_clips, self.batch_size = num_clips, batch_size
        self.clips: list[torch.Tensor] = []  # (frames, channels, height, width), uint8 as decoded
        self.masks: list[torch.Tensor] = []  # bool (frames,), if the processor masks the ends of short videos
        self._models = {torch.float32: model}
        self._warm: set[tuple[str, int]] = set()  # settings and batch sizes that have run in this process

    # What the run depends on

    @cached_property
    def weights(self) -> str:
        """The `loaded_fingerprint` of the model."""
        return loaded_fingerprint(self.model)

    @cached_property
    def settings(self) -> dict[str, Any]:
        listed = "\n".join(json.dumps(known_identity(video)) for video in self.videos)
        device = self.model.device
        units = ", bfloat16 units" * has_bfloat16_units() + ", VNNI" * has_vnni()
        threads = counted(torch.get_num_threads(), "thread")
        machine = f"CPU with {torch.backends.cpu.get_cpu_capability()}{units}, {threads}"
        return {
            "model": as_utf8(self.name),
            "weights": self.weights,
            "processor": processor_fingerprint(self.processor),
            "videos": hashlib.sha256(listed.encode()).hexdigest(),
            "num_clips": self.num_clips,
            "batch_size": self.batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine,
            "vivit_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def start(self, overwrite: bool) -> None:
        """
        Prepare the folder, and keep what was measured for the same settings.

        Raises:
            OtherRunError: if it holds another run, or other files, and `overwrite` is False.
        """
        path = self.folder / "run.json"
        for unfinished in self.folder.glob(".*.unfinished"):  # of a process that was killed
            unfinished.unlink()
        found = "run.json is missing" if self.folder.is_dir() and any(self.folder.iterdir()) else None
        if path.exists():
            found = changes(json.loads(path.read_text(encoding="utf-8")), self.settings)
            if found and overwrite:
                shutil.rmtree(self.folder)
                found = None
        if found:
            raise OtherRunError.at(self.folder, found)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_json("run.json", self.settings)

    # Clips

    @property
    def num_bytes(self) -> int:
        """Bytes of the clips in memory."""
        return sum(clip.nbytes for clip in self.clips)

    @property
    def found_clips(self) -> dict[str, Any]:
        """The index of the video of every clip, "videos", and the reasons of those that have none, "errors"."""
        return self._read_json("clips.json") or {"videos": [], "errors": {}}

    def decode(self, num_workers: int) -> Iterator[Views]:
        """
        Decode the clips of all videos into memory; yield each video.

        Raises:
            ValueError: if no video can be read, or other videos than before the run was interrupted.
        """
        found: dict[str, Any] = {"videos": [], "errors": {}}
        views = {"num_clips": self.num_clips, "num_crops": 1, "batch_size": self.num_clips, "num_workers": num_workers}
        loader = load_views(self.videos, self.processor, **views, do_rescale=False, do_normalize=False)
        for items in loader:
            for one in items:
                error = one.error or self._why_unusable(one.pixel_values)
                if error is None:
                    # Copied, because processes that decode lend their memory.
                    self.clips += [clip.clone() for clip in one.pixel_values]
                    self.masks += [] if one.frame_mask is None else [mask.clone() for mask in one.frame_mask]
                    found["videos"] += [one.index] * len(one.pixel_values)
                else:
                    found["errors"][str(one.index)] = error
                yield one
        if not self.clips:
            raise ValueError(f"None of the videos can be read: {next(iter(found['errors'].values()))}")
        before = self._read_json("clips.json")
        if before is not None and before["videos"] != found["videos"]:
            raise OtherRunError.at(self.folder, "other videos could be read")
        self._write_json("clips.json", found)

    def _why_unusable(self, clips: torch.Tensor) -> str | None:
        try:
            check_pixel_values(clips[:1].float(), self.model.config, any_size=False)
        except ValueError as error:
            return str(error)
        return None

    def _pixel_values(self, places: Sequence[int]) -> torch.Tensor:
        """Return clips as the processor makes them, (clips, frames, channels, height, width), on the device."""
        clips = torch.stack([self.clips[place] for place in places]).to(self.model.device)
        is_scaled = self.processor.do_rescale or self.processor.do_normalize
        return self.processor.rescale_and_normalize(clips) if is_scaled else clips

    def _inputs(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model for clips, on the device."""
        inputs = {"pixel_values": self._pixel_values(places)}
        if self.masks:
            masks = torch.stack([self.masks[place] for place in places])
            inputs["frame_mask"] = shown_masks(masks, self.model.config).to(self.model.device)
        return inputs

    # Settings

    def prepare(self) -> Iterator[str]:
        """Calibrate what needs it, and measure the memory of every candidate; yield each name."""
        for name in (PLAIN, *self.candidates):
            if self._read_json(f"setting-{name}.json") is None:
                self._write_json(f"setting-{name}.json", self._prepare(name))
            yield name

    def prepared(self, name: str) -> Prepared:
        """Return a candidate that `prepare` has yielded."""
        stored = self._read_json(f"setting-{name}.json")
        setting = None if stored["setting"] is None else OptimizationSetting.from_dict(stored["setting"])
        return Prepared(setting, stored["megabytes"], stored["error"])

    def _prepare(self, name: str) -> dict[str, Any]:
        stored = None
        if name == PLAIN:
            restore(self.model)
            model = self.model
        else:
            one = self.candidates[name]
            model = self._model_in(one.dtype)
            calibration = None
            if one.int8:
                places = evenly_spread(range(len(self.clips)), CALIBRATION_CLIPS)
                calibration = [self._pixel_values([place]) for place in places]
            try:
                options: dict[str, Any] = {"int8": one.int8, "merge_tokens": one.merge_tokens}
                report = optimize(model, **options, calibration=calibration, stored=False)
                check_takes_masks(model, self.processor)
            except ValueError as error:
                return {"setting": None, "megabytes": 0.0, "error": str(error)}
            scales = None if report.quantisation is None else report.quantisation.input_scales
            setting = OptimizationSetting(name, one.dtype, one.merge_tokens, scales)
            stored = setting.to_dict(self.weights, self.model.device)
        inputs = _cast(self._inputs(self._places(0)), model.dtype)
        with torch.inference_mode():
            grown = peak_of_tensors(model.device, lambda: model(**inputs))
        return {"setting": stored, "megabytes": held_megabytes(model) + grown, "error": None}

    def _model_in(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            restore(self.model)
            self._models[dtype] = copy.deepcopy(self.model).to(dtype)
        return self._models[dtype]

    # Rounds

    @property
    def num_rounds(self) -> int:
        return max(LEAST_ROUNDS, self._num_batches)

    @property
    def _num_batches(self) -> int:
        return -(-len(self.found_clips["videos"]) // self.batch_size)

    def _places(self, number: int) -> range:
        """Return the clips of a round."""
        start = number % self._num_batches * self.batch_size
        return range(start, min(start + self.batch_size, len(self.found_clips["videos"])))

    def is_finished(self) -> bool:
        """Return whether all is measured, so that no video needs to be decoded."""
        names = (PLAIN, *self.candidates)
        if not self.found_clips["videos"] or any(self._read_json(f"setting-{name}.json") is None for name in names):
            return False
        return not any(self._missing(self.read_round(number)) for number in range(self.num_rounds))

    def _missing(self, found: dict[str, Measurement]) -> list[str]:
        return [one for one in (PLAIN, *self.candidates) if one not in found and self.prepared(one).error is None]

    def measure(self) -> Iterator[str]:
        """
        Run every setting on every clip, in turns; yield the name after each batch of a setting, measured before or now.

        Raises:
            NonFiniteError: if the plain model computes NaN or infinite numbers.
        """
        for number in range(self.num_rounds):
            found = self.read_round(number)
            missing = self._missing(found)
            yield from [name for name in (PLAIN, *self.candidates) if name not in missing]
            if not missing:
                continue
            inputs = self._inputs(self._places(number))
            plain = self._timed(PLAIN, inputs)  # also if it was measured before: speeds are those of one turn
            check_finite(plain[1], self.model, inputs["pixel_values"])
            found[PLAIN] = Measurement((plain[0], plain[0]), plain[1])
            for name in missing:
                if name != PLAIN:
                    seconds, logits = self._timed(name, inputs)
                    found[name] = Measurement((seconds, plain[0]), logits)
                yield name
            self._write_round(number, found)

    def _timed(self, name: str, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Return the seconds of a setting for a batch, and its logits in float32 on the CPU."""
        setting = self.prepared(name).setting
        if setting is None:
            restore(self.model)
            model = self.model
        else:
            model = self._model_in(setting.dtype)
            optimize_as(model, setting)
        inputs = _cast(inputs, model.dtype)
        size = len(inputs["pixel_values"])
        with torch.inference_mode():
            if (name, size) not in self._warm:  # kernels are chosen and compiled at the first call
                model(**inputs)
                self._warm.add((name, size))
            _wait_for(model.device)
            start = time.perf_counter()
            logits = model(**inputs, return_dict=True).logits
            _wait_for(model.device)
            seconds = time.perf_counter() - start
        return seconds, logits.float().cpu()

    def read_round(self, number: int) -> dict[str, Measurement]:
        """Return what was measured in a round, by name; a file that cannot be read is empty."""
        try:
            tensors = load_file(self._round(number))
        except (OSError, SafetensorError):
            return {}
        names = [name.removesuffix("/seconds") for name in tensors if name.endswith("/seconds")]
        pairs = {name: tensors[f"{name}/seconds"].tolist() for name in names}
        return {name: Measurement((own, plain), tensors[f"{name}/logits"]) for name, (own, plain) in pairs.items()}

    def _write_round(self, number: int, found: dict[str, Measurement]) -> None:
        tensors = {f"{name}/logits": one.logits.contiguous() for name, one in found.items()}
        tensors |= {f"{name}/seconds": torch.tensor(one.seconds, dtype=torch.float64) for name, one in found.items()}
        with written_whole(self._round(number)) as unfinished:
            save_file(tensors, unfinished)
            shutil.copymode(self.folder / "run.json", unfinished)  # safetensors allows the owner alone

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    # Results

    def logits(self, name: str) -> torch.Tensor:
        """Return the logits of a setting for every clip, float32 (clips, num_labels)."""
        return torch.cat([self.read_round(number)[name].logits for number in range(self._num_batches)])

    def speeds(self, name: str) -> tuple[float, float]:
        """Return the clips per second of a setting, and its speed over the plain model: medians over the rounds."""
        rates, ratios = [], []
        for number in range(self.num_rounds):
            own, plain = self.read_round(number)[name].seconds
            rates.append(len(self._places(number)) / own)
            ratios.append(plain / own)
        return statistics.median(rates), statistics.median(ratios)

    def _read_json(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write_json(self, name: str, value: Any) -> None:
        with written_whole(self.folder / name) as unfinished:
            unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def held_megabytes(model: torch.nn.Module) -> float:
    """Return the megabytes of a model's weights, those in the layouts of oneDNN included."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            tensors.append(module._packed)
        elif isinstance(module, QuantisedLinear):
            tensors += module._weight
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def _cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
