"""`vivit-hf export`: export a classifier to ONNX, and compare the result with PyTorch."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import VivitConfig

import vivit_hf

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..data.labels import LabelMap, to_probabilities
from ..inference.agreement import compare_answers
from ..inference.clips import check_takes_masks
from ..inference.token_merging import describe_merging, merging_config, set_merging
from ..initialisation.model_processor import describe_processor, processor_for
from ..initialisation.weight_files import ConversionError, read_config
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from . import onnx_int8, onnx_models
from .convert_transformers import load_ours
from .export_clips import BATCHES, ClipSet, choose_clips
from .onnx_models import INPUT, LEAST_OPSET, MASK, MOST_BYTES_IN_ONE_FILE, OUTPUT, Clip, describe_shape, input_shape
from .parity import compare
from .results import read_processor, whole_folder
from .terminal import print_table, progress


MODEL_FILE, INT8_FILE, REPORT_FILE = "model.onnx", "model_int8.onnx", "report.json"


@dataclass
class Export:
    """Summary of an export; `report` is the content of report.json."""

    output: str
    report: dict[str, Any]
    parity: str
    processor: str

    def print(self) -> None:
        report = self.report
        labels = counted(len(report["id2label"]), "label")
        rows = [
            ("model", f"{report['attention_type']}, {labels}, opset {report['opset']}"),
            ("input", f"{INPUT} {describe_shape(report['input']['shape'])}, float32"),
            *[("", f"{MASK} {describe_shape(mask['shape'])}, bool") for mask in [report.get("mask")] if mask],
            ("processor", self.processor),
            ("clips", report["clips"]["description"]),
            ("float32", f"{_describe_file(report['float32'])}, {self.parity}"),
        ]
        if merging := report.get("merging"):
            rows.append(("merging", f"{merging['description']}: {_describe_agreement(merging)}"))
        if calibration := report.get("int8_calibration"):
            rows.append(("int8 calibration", calibration["description"]))
        if int8 := report.get("int8"):
            rows.append(("int8", f"{_describe_file(int8)}, {_describe_agreement(int8)}"))
            if kept := int8.get("float32_layers"):
                rows.append(("not in int8", f"{', '.join(kept)}: one scale does not suit their activations"))
        print_table(*rows, ("written to", self.output))


def _describe_file(part: dict[str, Any]) -> str:
    return f"{part['file']}, {part['bytes'] / 1e6:,.1f} MB"


def _describe_agreement(part: dict[str, Any]) -> str:
    return (
        f"top-1 agreement {part['top1_agreement']:.3f}, probabilities differ by "
        f"{part['max_abs_difference_of_probabilities']:.1e} at most, by "
        f"{part['mean_abs_difference_of_probabilities']:.1e} on average"
    )


def convert(args: argparse.Namespace) -> Export:
    """Export a classifier; keep the result only if it computes what PyTorch computes."""
    _check_options(args)
    is_merging = args.merge_tokens is not None
    with progress(steps=4 + is_merging + 2 * args.int8) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.model}")
        model, processor = _load(args)
        config, is_masked = model.config, processor.short_video_policy == "mask"
        clips, calibration = choose_clips(args, config, processor)
        report = _report(args, config, clips, calibration)
        if is_masked:
            report["mask"] = {"name": MASK, "dtype": "bool", "shape": onnx_models.mask_shape(config)}

        begin("running the model")
        given = expected = torch_logits(model, clips.clips)
        label_map = LabelMap.from_config(config)
        if is_merging:
            begin("merging tokens")
            report["merging"] = _merge_tokens(model, args.merge_tokens)
            expected = torch_logits(model, clips.clips)
            report["merging"] |= measure_agreement(expected, given, label_map)

        begin("exporting")
        metadata = onnx_models.onnx_metadata(args.model, config, processor)
        path = folder / MODEL_FILE
        onnx_models.write_onnx(model, path, args.opset, metadata, is_masked)
        if args.int8:
            begin("quantising")
            facts = _quantise(model, calibration, path, folder / INT8_FILE)
        del model  # free memory for onnxruntime's copy

        begin("running the ONNX model")
        logits = onnx_models.onnx_logits(path, clips.clips, BATCHES)
        parity = _check_parity(logits, expected, is_merging=any(config.merging_schedule))
        difference = (logits - expected).abs().max().item()
        report["float32"] = {**_facts_of_file(path), "max_abs_difference_of_logits": difference}
        if args.int8:
            begin("running the int8 model")
            # One clip at a time: scales at run time depend on the other clips in a batch.
            quantised = onnx_models.onnx_logits(folder / INT8_FILE, clips.clips, (1,))
            agreement = measure_agreement(quantised, given, label_map)
            report["int8"] = {**_facts_of_file(folder / INT8_FILE), **facts, **agreement}
        _write_json(folder / "config.json", _settings(config))
        _write_json(folder / "preprocessor_config.json", _settings(processor))
        _write_json(folder / REPORT_FILE, report)
    return Export(args.output, report, parity, describe_processor(processor))


def _merge_tokens(model: ViViTForVideoClassification, number: int | list[int]) -> dict[str, Any]:
    """Let a model merge tokens from here on, and return facts about it for the report."""
    merging = merging_config(model.config, number)
    set_merging(model.vivit.encoder, merging)
    model.config.merge_tokens = merging.merge_tokens
    return {"merge_tokens": merging.merging_schedule, "description": describe_merging(merging)}


def _check_parity(logits: torch.Tensor, expected: torch.Tensor, is_merging: bool) -> str:
    """
    Describe the agreement of the exported model's logits with PyTorch's; ConversionError if there is none.

    Rounding decides which of two equally similar tokens is merged, and so changes the logits of a clip now and then.
    Where tokens merge, the closer half of the clips in a batch, and of the others, has to agree.
    """
    places, which = torch.arange(len(logits)), f"{len(logits)} clips"
    if is_merging and logits.isfinite().all():
        differences = (logits - expected).abs().amax(dim=1)  # (clips,)
        in_batch = (places >= BATCHES[0]) & (places < sum(BATCHES))
        groups = [group[differences[group].argsort()] for group in (places[in_batch], places[~in_batch])]
        places = torch.cat([group[: -(-len(group) // 2)] for group in groups])
        which = f"the {len(places)} of {which} that differ least (most: {differences.max():.1e})"
    what = f"logits of {which}, in batches of {' and '.join(map(str, BATCHES))} = PyTorch's"
    return compare({OUTPUT: logits[places]}, {OUTPUT: expected[places]}, what)


def _quantise(
    model: ViViTForVideoClassification, calibration: ClipSet | None, path: Path, int8_path: Path
) -> dict[str, Any]:
    """Write the int8 model of an ONNX model, and return facts about it for the report."""
    is_large = model.num_parameters() > MOST_BYTES_IN_ONE_FILE
    if calibration is None:
        onnx_int8.write_dynamic_int8(path, int8_path, is_large)
        return {"scales": "at run time"}
    scales, kept = onnx_int8.static_scales(model, [clip()[INPUT] for clip in calibration.clips])
    onnx_int8.write_static_int8(path, int8_path, scales, is_large)
    return {"scales": "fixed", "float32_layers": kept}


# The model


def _check_options(args: argparse.Namespace) -> None:
    if args.opset < LEAST_OPSET:
        raise ConversionError(f"--opset {args.opset} is too old; torch exports to {LEAST_OPSET} or newer.")
    if args.num_clips_checked < sum(BATCHES):
        needed = f"{sum(BATCHES)} are needed, for batches of {' and '.join(map(str, BATCHES))}"
        raise ConversionError(f"--num-clips-checked {args.num_clips_checked} is too few: {needed}.")
    if args.calibration is not None and not args.int8:
        raise ConversionError("--calibration requires --int8, whose activations it scales.")


def _load(args: argparse.Namespace) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    model_type = read_config(args.model).get("model_type")
    if model_type not in (ViViTConfig.model_type, VivitConfig.model_type):
        raise ConversionError(f"{args.model} is of type {model_type!r}; expected {ViViTConfig.model_type!r}.")
    model = load_ours(args.model, dtype=torch.float32, attn_implementation="sdpa")
    config = model.config
    if not config.num_labels:
        raise ConversionError(f"{args.model} has no classifier (num_labels=0); expected a model with labels.")
    asked = {"--int8": args.int8, "--merge-tokens": args.merge_tokens is not None}
    for option in (name for name, is_asked in asked.items() if is_asked):
        if LabelMap.from_config(config).is_regression:
            raise ConversionError(
                f"{args.model} has problem_type='regression', and so no classes whose agreement {option} could "
                f"measure; leave {option} out."
            )
    processor = _processor_of(args.model, config)
    merging = config if args.merge_tokens is None else merging_config(config, args.merge_tokens)
    try:
        check_takes_masks(model, processor, merging.merging_schedule)
    except ValueError as error:
        raise ConversionError(f"{args.model}: {error}") from None
    return model, processor


def _processor_of(source: str, config: ViViTConfig) -> ViViTVideoProcessor:
    if (processor := read_processor(source)) is None:
        return processor_for(config)
    if processor.num_frames != config.num_frames:
        raise ConversionError(
            f"{source}: preprocessor_config.json has num_frames={processor.num_frames}, but config.json has "
            f"{config.num_frames}, so the exported model would refuse the processor's clips; correct the former."
        )
    return processor


# Comparison and report


@torch.no_grad()
def torch_logits(model: ViViTForVideoClassification, clips: Sequence[Clip]) -> torch.Tensor:
    """Return the logits (clips, num_labels), float32, that PyTorch computes."""
    return torch.cat([model(**clip()).logits for clip in clips])


def measure_agreement(actual: torch.Tensor, expected: torch.Tensor, label_map: LabelMap) -> dict[str, float]:
    """
    Compare two models' logits (clips, num_labels) for the same clips as answers and as probabilities, see `Agreement`.

    Raises:
        ConversionError: if a logit is not finite.
    """
    if not actual.isfinite().all():
        raise ConversionError(
            "A faster model gives logits that are not finite; nothing was written. Leave --int8 and --merge-tokens out."
        )
    plain, other = (to_probabilities(logits, label_map) for logits in (expected, actual))
    agreement = compare_answers(plain, other, label_map)
    return {
        "top1_agreement": agreement.top1,
        "max_abs_difference_of_probabilities": agreement.largest_change,
        "mean_abs_difference_of_probabilities": agreement.mean_change,
    }


def _report(
    args: argparse.Namespace, config: ViViTConfig, clips: ClipSet, calibration: ClipSet | None
) -> dict[str, Any]:
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    report = {
        "model": onnx_models.name_of(args.model),
        "attention_type": config.attention_type,
        "opset": args.opset,
        "versions": {"vivit_hf": vivit_hf.__version__, **{name: version(name) for name in packages}},
        "input": {"name": INPUT, "dtype": "float32", "shape": input_shape(config)},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", config.num_labels]},
        "id2label": onnx_models.labels_by_index(config),
    }
    for name, chosen in (("clips", clips), ("int8_calibration", calibration)):
        if chosen is not None:
            report[name] = {"count": len(chosen.clips), "description": chosen.description, "files": chosen.files}
    return report


def _facts_of_file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": onnx_models.size_of(path)}


def _settings(owner: ViViTConfig | ViViTVideoProcessor) -> dict[str, Any]:
    """
    Return the settings without `auto_map`, which refers to source files that `save_pretrained` would add, and without
    `optimization`, which is for PyTorch.
    """
    left_out = ("auto_map", "optimization")
    return {name: value for name, value in json.loads(owner.to_json_string()).items() if name not in left_out}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
