"""`vivit-hf export`: export a classifier to ONNX, and compare the result with PyTorch."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import VivitConfig

import vivit_hf

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..data.labels import LabelMap, to_probabilities
from ..data.scan import find_videos
from ..initialisation.model_processor import describe_processor, processor_for
from ..initialisation.weight_files import ConversionError, read_config
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from . import onnx_models
from .convert_transformers import load_ours
from .onnx_models import INPUT, LEAST_OPSET, MOST_BYTES_IN_ONE_FILE, OUTPUT, Clip, describe_shape, input_shape
from .parity import clip_shape, compare, random_clip
from .results import read_processor, whole_folder
from .terminal import print_table, progress


MODEL_FILE, INT8_FILE, REPORT_FILE = "model.onnx", "model_int8.onnx", "report.json"
BATCHES = (1, 3)  # one clip, and more than the two clips that the graph is traced with


@dataclass
class Agreement:
    """Differences between the int8 model and the float32 one over all clips, each run in a batch of its own."""

    top1_agreement: float
    max_abs_difference_of_probabilities: float
    mean_abs_difference_of_probabilities: float


@dataclass
class Export:
    """Summary of an export; `report` is the content of report.json."""

    output: str
    report: dict[str, Any]
    parity: str
    processor: str

    def print(self) -> None:
        report, float32 = self.report, self.report["float32"]
        labels = counted(len(report["id2label"]), "label")
        rows = [
            ("model", f"{report['attention_type']}, {labels}, opset {report['opset']}"),
            ("input", f"{INPUT} {describe_shape(report['input']['shape'])}, float32"),
            ("processor", self.processor),
            ("clips", report["clips"]["description"]),
            ("float32", f"{float32['file']}, {float32['bytes'] / 1e6:,.1f} MB, {self.parity}"),
        ]
        if int8 := report.get("int8"):
            rows.append(
                (
                    "int8",
                    f"{int8['file']}, {int8['bytes'] / 1e6:,.1f} MB, top-1 agreement {int8['top1_agreement']:.3f}, "
                    f"probabilities differ by {int8['max_abs_difference_of_probabilities']:.1e} at most, by "
                    f"{int8['mean_abs_difference_of_probabilities']:.1e} on average",
                )
            )
        print_table(*rows, ("written to", self.output))


def convert(args: argparse.Namespace) -> Export:
    """Export a classifier; keep the result only if it computes what PyTorch computes."""
    _check_options(args)
    with progress(steps=4 + 2 * args.int8) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.model}")
        model, processor = _load(args)
        config = model.config
        clips, described_clips = _choose_clips(args, config, processor)

        begin("running the model")
        expected = torch_logits(model, clips)

        begin("exporting")
        metadata = onnx_models.onnx_metadata(args.model, config, processor)
        onnx_models.write_onnx(model, folder / MODEL_FILE, args.opset, metadata)
        num_parameters = model.num_parameters()
        del model  # free memory for onnxruntime's copy

        begin("running the ONNX model")
        logits = onnx_models.onnx_logits(folder / MODEL_FILE, clips, BATCHES)
        what = f"logits of {len(clips)} clips, in batches of {' and '.join(map(str, BATCHES))} = PyTorch's"
        parity = compare({OUTPUT: logits}, {OUTPUT: expected}, what)
        report = _report(args, config)
        report["clips"] = described_clips
        report["float32"] = {
            "file": MODEL_FILE,
            "bytes": onnx_models.size_of(folder / MODEL_FILE),
            "max_abs_difference_of_logits": (logits - expected).abs().max().item(),
        }
        if args.int8:
            begin("quantising")
            is_large = num_parameters > MOST_BYTES_IN_ONE_FILE
            onnx_models.write_int8(folder / MODEL_FILE, folder / INT8_FILE, is_large)
            begin("running the int8 model")
            # One clip at a time: the scale of quantised activations depends on the other clips in a batch.
            quantised = onnx_models.onnx_logits(folder / INT8_FILE, clips, (1,))
            agreement = measure_agreement(quantised, expected, LabelMap.from_config(config))
            size = onnx_models.size_of(folder / INT8_FILE)
            report["int8"] = {"file": INT8_FILE, "bytes": size, **asdict(agreement)}
        _write_json(folder / "config.json", _settings(config))
        _write_json(folder / "preprocessor_config.json", _settings(processor))
        _write_json(folder / REPORT_FILE, report)
    return Export(args.output, report, parity, describe_processor(processor))


# Model and clips


def _check_options(args: argparse.Namespace) -> None:
    if args.opset < LEAST_OPSET:
        raise ConversionError(f"--opset {args.opset} is too old; torch exports to {LEAST_OPSET} or newer.")
    if args.num_clips_checked < sum(BATCHES):
        needed = f"{sum(BATCHES)} are needed, for batches of {' and '.join(map(str, BATCHES))}"
        raise ConversionError(f"--num-clips-checked {args.num_clips_checked} is too few: {needed}.")


def _load(args: argparse.Namespace) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    model_type = read_config(args.model).get("model_type")
    if model_type not in (ViViTConfig.model_type, VivitConfig.model_type):
        raise ConversionError(f"{args.model} is of type {model_type!r}; expected {ViViTConfig.model_type!r}.")
    model = load_ours(args.model, dtype=torch.float32, attn_implementation="sdpa")
    config = model.config
    if not config.num_labels:
        raise ConversionError(f"{args.model} has no classifier (num_labels=0); expected a model with labels.")
    if args.int8 and config.problem_type == "regression":
        raise ConversionError(
            f"{args.model} has problem_type='regression', and so no classes whose agreement --int8 could measure; "
            "leave --int8 out."
        )
    return model, _processor_of(args.model, config)


def _processor_of(source: str, config: ViViTConfig) -> ViViTVideoProcessor:
    if (processor := read_processor(source)) is None:
        return processor_for(config)
    if processor.num_frames != config.num_frames:
        raise ConversionError(
            f"{source}: preprocessor_config.json has num_frames={processor.num_frames}, but config.json has "
            f"{config.num_frames}, so the exported model would refuse the processor's clips; correct the former."
        )
    return processor


def _choose_clips(
    args: argparse.Namespace, config: ViViTConfig, processor: ViViTVideoProcessor
) -> tuple[list[Clip], dict[str, Any]]:
    """Return the clips to check with, and their description for the report."""
    if args.videos is None:
        clips: list[Clip] = [partial(random_clip, config, seed) for seed in range(args.num_clips_checked)]
        description = f"{len(clips)} random ones, which say little about videos: see --videos"
        return clips, {"count": len(clips), "description": description, "files": []}
    videos = find_videos(args.videos)
    if len(videos) < sum(BATCHES):
        raise ConversionError(f"{args.videos} has {len(videos)} video files; expected {sum(BATCHES)} or more.")
    # Spread the choice over the folder, because neighbours often have the same class.
    places = np.linspace(0, len(videos) - 1, min(args.num_clips_checked, len(videos))).round().astype(int)
    chosen = [videos[place] for place in places]
    files = [path.relative_to(args.videos).as_posix() for path in chosen]
    clips = [partial(_read_clip, path, config, processor) for path in chosen]
    description = f"one of each of {len(clips)} videos of the {len(videos)} in {onnx_models.name_of(args.videos)}"
    return clips, {"count": len(clips), "description": description, "files": files}


def _read_clip(path: Path, config: ViViTConfig, processor: ViViTVideoProcessor) -> torch.Tensor:
    clip = processor(path, num_clips=1, num_crops=1, on_error="raise", generator=0)[INPUT]
    expected = (1, *clip_shape(config))
    if tuple(clip.shape) != expected:
        raise ConversionError(
            f"The processor makes a clip of {tuple(clip.shape)} from {path}, but the model takes {expected}; correct "
            "`size` or `crop_size` in preprocessor_config.json."
        )
    return clip


# Comparison and report


@torch.no_grad()
def torch_logits(model: ViViTForVideoClassification, clips: Sequence[Clip]) -> torch.Tensor:
    """Return the logits (clips, num_labels), float32, that PyTorch computes."""
    return torch.cat([model(pixel_values=clip()).logits for clip in clips])


def measure_agreement(actual: torch.Tensor, expected: torch.Tensor, label_map: LabelMap) -> Agreement:
    """
    Compare two models' logits (clips, num_labels) for the same clips as classes and as probabilities.

    The top-1 agreement is the share of clips for which both have the same likeliest label, in every group of labels.

    Raises:
        ConversionError: if a logit is not finite.
    """
    if not actual.isfinite().all():
        raise ConversionError("The int8 model gives logits that are not finite; nothing was written. Leave --int8 out.")
    probabilities = [to_probabilities(logits, label_map) for logits in (actual, expected)]
    difference = (probabilities[0] - probabilities[1]).abs()
    groups = zip(*(one.split(label_map.sizes, dim=-1) for one in probabilities), strict=True)
    same = torch.stack([one.argmax(dim=-1) == other.argmax(dim=-1) for one, other in groups])  # (groups, clips)
    agreed = same.all(dim=0).double().mean()
    return Agreement(agreed.item(), difference.max().item(), difference.mean().item())


def _report(args: argparse.Namespace, config: ViViTConfig) -> dict[str, Any]:
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {
        "model": onnx_models.name_of(args.model),
        "attention_type": config.attention_type,
        "opset": args.opset,
        "versions": {"vivit_hf": vivit_hf.__version__, **{name: version(name) for name in packages}},
        "input": {"name": INPUT, "dtype": "float32", "shape": input_shape(config)},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", config.num_labels]},
        "id2label": onnx_models.labels_by_index(config),
    }


def _settings(owner: ViViTConfig | ViViTVideoProcessor) -> dict[str, Any]:
    """Return the settings without `auto_map`, which refers to source files that `save_pretrained` would add."""
    return {name: value for name, value in json.loads(owner.to_json_string()).items() if name != "auto_map"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
