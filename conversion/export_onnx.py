"""
Exports a classifier to ONNX, in float32 and on request in int8, and measures what each of them differs by.

    python conversion/export_onnx.py --model DIR_OR_ID --output DIR --int8 --videos FOLDER

`pip install "vivit-hf[export]"` brings what it needs. The batch is free, frames and size are the model's: any other
clip is an error of the runtime. model.onnx is run against the model in PyTorch before anything is kept.
"""

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from conversion_tools import (
    beside_and_renamed,
    describe_processor,
    progress,
    run,
    value_range,
    warn,
)
from convert_transformers_vivit import load_ours
from onnxruntime.capi import onnxruntime_pybind11_state
from onnxruntime.quantization import QuantType, quantize_dynamic
from parity import compare, random_clip
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import VivitConfig

import vivit_hf
from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.conversion.weight_files import (
    ConversionError,
    check_weights,
    find_file,
    find_weights,
    has_processor,
    read_json,
)
from vivit_hf.data.labels import LabelMap
from vivit_hf.data.scan import find_videos
from vivit_hf.inference.views import to_probabilities
from vivit_hf.initialisation.model_processor import processor_for


MODEL_FILE, INT8_FILE, REPORT_FILE = "model.onnx", "model_int8.onnx", "report.json"
INPUT, OUTPUT = "pixel_values", "logits"
# The first with GELU as an operator of its own, and an old one as runtimes go.
DEFAULT_OPSET = 20
# What torch has operators for; below it converts, and leaves the file as it was where that fails.
LEAST_OPSET = 18
# A protobuf file ends at 2 GiB, graph and all.
MOST_BYTES_IN_ONE_FILE = 2_000_000_000
# One clip, and more than the two that the graph is made with: what holds for both holds for any batch.
BATCHES = (1, 3)

# onnxruntime has a class for every status code, and no base for them.
_KINDS = [kind for kind in vars(onnxruntime_pybind11_state).values() if isinstance(kind, type)]
_RUNTIME_ERRORS = tuple(kind for kind in _KINDS if issubclass(kind, Exception))

# A clip (1, frames, channels, height, width), read when it is its turn.
Clip = Callable[[], torch.Tensor]


@dataclass
class Agreement:
    """What int8 differs by from the model in float32, over all clips, each in a batch of its own."""

    top1_agreement: float
    max_abs_difference_of_probabilities: float
    mean_abs_difference_of_probabilities: float


@dataclass
class Export:
    """What was written; `report` is what report.json holds, `print` shows it."""

    output: str
    report: dict[str, Any]
    parity: str
    processor: str

    def print(self, console: Console | None = None) -> None:
        report, float32 = self.report, self.report["float32"]
        table = Table("", "", show_header=False)
        table.add_row("model", f"{report['attention_type']}, {len(report['id2label'])} labels, opset {report['opset']}")
        table.add_row("input", f"{INPUT} {_shape(report['input']['shape'])}, float32")
        table.add_row("processor", self.processor)
        table.add_row("clips", report["clips"]["description"])
        table.add_row("float32", f"{float32['file']}, {_megabytes(float32['bytes'])}, {self.parity}")
        if "int8" in report:
            int8 = report["int8"]
            table.add_row(
                "int8",
                f"{int8['file']}, {_megabytes(int8['bytes'])}, top-1 agreement {int8['top1_agreement']:.3f}, "
                f"probabilities differ by {int8['max_abs_difference_of_probabilities']:.1e} at most, by "
                f"{int8['mean_abs_difference_of_probabilities']:.1e} on average",
            )
        table.add_row("written to", self.output)
        (console or Console()).print(table)


def convert(args: argparse.Namespace) -> Export:
    _check_options(args)
    with progress(steps=4 + 2 * args.int8) as begin, beside_and_renamed(args.output) as folder:
        begin(f"reading {args.model}")
        model, processor = _load(args)
        config = model.config
        clips, description, files = _clips(args, config, processor)

        begin("running the model")
        expected = torch_logits(model, clips)

        begin("exporting")
        write_onnx(model, folder / MODEL_FILE, args.opset, _metadata(args.model, config, processor))
        num_parameters = model.num_parameters()
        del model  # room for the runtime's copy

        begin("running what was exported")
        logits = onnx_logits(folder / MODEL_FILE, clips, BATCHES)
        what = f"logits of {len(clips)} clips, in batches of {' and '.join(map(str, BATCHES))} = PyTorch's"
        parity = compare({OUTPUT: logits}, {OUTPUT: expected}, what)
        report = {
            "model": _name_of(args.model),
            "attention_type": config.attention_type,
            "opset": args.opset,
            "versions": _versions(),
            "input": {"name": INPUT, "dtype": "float32", "shape": _input_shape(config)},
            "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", config.num_labels]},
            "id2label": _labels(config),
            "clips": {"count": len(clips), "description": description, "files": files},
            "float32": {
                "file": MODEL_FILE,
                "bytes": _bytes(folder / MODEL_FILE),
                "max_abs_difference_of_logits": (logits - expected).abs().max().item(),
            },
        }
        if args.int8:
            begin("quantising")
            write_int8(folder / MODEL_FILE, folder / INT8_FILE, is_large=num_parameters > MOST_BYTES_IN_ONE_FILE)
            begin("running what was quantised")
            # Activations are scaled by what is in the batch, so that clips would depend on their neighbours.
            quantised = onnx_logits(folder / INT8_FILE, clips, (1,))
            agreement = measure_agreement(quantised, expected, LabelMap.from_config(config))
            report["int8"] = {"file": INT8_FILE, "bytes": _bytes(folder / INT8_FILE), **asdict(agreement)}
        _write_json(folder / "config.json", _settings(config))
        _write_json(folder / "preprocessor_config.json", _settings(processor))
        _write_json(folder / REPORT_FILE, report)
    return Export(args.output, report, parity, describe_processor(processor))


# What is exported, and the clips


def _check_options(args: argparse.Namespace) -> None:
    if args.opset < LEAST_OPSET:
        raise ConversionError(f"--opset {args.opset} is too old: torch exports from {LEAST_OPSET} on.")
    if args.num_clips_checked < sum(BATCHES):
        needed = f"{sum(BATCHES)} are needed, for batches of {' and '.join(map(str, BATCHES))}"
        raise ConversionError(f"--num-clips-checked {args.num_clips_checked} is too few: {needed}.")


def _load(args: argparse.Namespace) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    config_file = find_file(args.model, "config.json")
    if config_file is None:
        raise ConversionError(f"{args.model} has no config.json, which says what kind of model it is.")
    model_type = read_json(config_file).get("model_type")
    if model_type not in (ViViTConfig.model_type, VivitConfig.model_type):
        raise ConversionError(f"{args.model} is of type {model_type!r}; expected {ViViTConfig.model_type!r}.")
    check_weights(find_weights(args.model))
    model = load_ours(args.model, dtype=torch.float32, attn_implementation="sdpa")
    config = model.config
    if not config.num_labels:
        raise ConversionError(f"{args.model} has num_labels=0, and so no classifier; expected a model with labels.")
    if args.int8 and config.problem_type == "regression":
        raise ConversionError(
            f"{args.model} has problem_type='regression', and so no classes that int8 could agree on; leave --int8 out."
        )
    return model, _processor(args.model, config)


def _processor(source: str, config: ViViTConfig) -> ViViTVideoProcessor:
    if not has_processor(source):
        warn(f"{source} has no preprocessor_config.json; the processor gives the [-1, 1] that the official models take")
        return processor_for(config)
    processor = ViViTVideoProcessor.from_pretrained(source)
    if processor.num_frames != config.num_frames:
        raise ConversionError(
            f"{source}: preprocessor_config.json has num_frames={processor.num_frames}, but config.json has "
            f"{config.num_frames}: whoever runs the exported model would prepare clips that it refuses. Correct the "
            "former."
        )
    return processor


def _clips(
    args: argparse.Namespace, config: ViViTConfig, processor: ViViTVideoProcessor
) -> tuple[list[Clip], str, list[str]]:
    """The clips to check with, what they are in words, and their files."""
    if args.videos is None:
        clips = [partial(random_clip, config, seed) for seed in range(args.num_clips_checked)]
        return clips, f"{len(clips)} random ones, which say little about videos: see --videos", []
    videos = find_videos(args.videos)
    if len(videos) < sum(BATCHES):
        raise ConversionError(f"{args.videos} has {len(videos)} video files; expected {sum(BATCHES)} or more.")
    # Spread over the folder, since the first ones are often of one class.
    places = np.linspace(0, len(videos) - 1, min(args.num_clips_checked, len(videos))).round().astype(int)
    chosen = [videos[place] for place in places]
    names = [path.relative_to(args.videos).as_posix() for path in chosen]
    clips = [partial(_read_clip, path, config, processor) for path in chosen]
    return clips, f"one of each of {len(clips)} videos of the {len(videos)} in {_name_of(args.videos)}", names


def _read_clip(path: Path, config: ViViTConfig, processor: ViViTVideoProcessor) -> torch.Tensor:
    clip = processor(path, num_clips=1, num_crops=1, on_error="raise", generator=0)[INPUT]
    expected = (1, *_input_shape(config)[1:])
    if tuple(clip.shape) != expected:
        raise ConversionError(
            f"The processor makes a clip of {tuple(clip.shape)} of {path}, but the model takes {expected}; correct the "
            "`size` or `crop_size` in preprocessor_config.json."
        )
    return clip


def _input_shape(config: ViViTConfig) -> list[str | int]:
    return ["batch", config.num_frames, config.num_channels, *config.frame_size]


def _name_of(source: str | Path) -> str:
    """The last part of a path, which would tell of the machine that it was exported on; a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def _labels(config: ViViTConfig) -> dict[str, str]:
    return {str(index): str(config.id2label[index]) for index in range(config.num_labels)}


def _metadata(source: str, config: ViViTConfig, processor: ViViTVideoProcessor) -> dict[str, str]:
    """What the graph itself does not say; what is not plain text is JSON."""
    low, high = value_range(processor)
    metadata = {
        "model": _name_of(source),
        "attention_type": config.attention_type,
        "expects": f"{INPUT} {_shape(_input_shape(config))} of float32: RGB, black {low:.6g} and white {high:.6g}",
        "num_frames": str(config.num_frames),
        "num_channels": str(config.num_channels),
        "image_size": json.dumps(list(config.frame_size)),
        "value_range": json.dumps([round(low, 6), round(high, 6)]),
        "id2label": json.dumps(_labels(config), ensure_ascii=False),
        "vivit_hf_version": vivit_hf.__version__,
    }
    if config.problem_type is not None:
        metadata["problem_type"] = config.problem_type
    if config.label_groups is not None:
        metadata["label_groups"] = json.dumps(config.label_groups, ensure_ascii=False)
    return metadata


# Export


class _Logits(nn.Module):
    """A graph has tensors for outputs, and no `ImageClassifierOutput`."""

    def __init__(self, model: ViViTForVideoClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def write_onnx(
    model: ViViTForVideoClassification, path: Path, opset: int, metadata: dict[str, str] | None = None
) -> None:
    """
    Writes the graph from `pixel_values` (batch, frames, channels, height, width) to `logits` (batch, num_labels), both
    float32, with any batch; weights stand in `path` itself up to 2 GB, else in a file beside it.

    Args:
        model: in float32 and eval mode.
        opset: version of the ONNX operators, `LEAST_OPSET` or newer.
        metadata: goes into the file's `metadata_props`.

    Raises:
        ConversionError: if torch cannot export the model, or not to this opset.
    """
    clips = torch.zeros(2, *_input_shape(model.config)[1:])  # one would be taken for a constant
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                _Logits(model).eval(),
                (clips,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except RuntimeError as error:
        raise ConversionError(
            f"torch {torch.__version__} cannot export this model to opset {opset}; choose another --opset, such as "
            f"{DEFAULT_OPSET}, if that is what it says: {error.__cause__ or error}"
        ) from error
    graph = program.model
    if graph.opset_imports[""] != opset:
        raise ConversionError(
            f"torch {torch.__version__} cannot export to opset {opset}: it gives {graph.opset_imports['']}; choose "
            f"another --opset, such as {DEFAULT_OPSET}."
        )
    _strip(graph)
    graph.metadata_props.update(metadata or {})
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > MOST_BYTES_IN_ONE_FILE
    if is_large:
        program.save(path, external_data=True)
    proto = onnx.load(path, load_external_data=False) if is_large else program.model_proto
    # Weights have their shapes with them; the quantiser of onnxruntime 1.23 transposes a weight, but no second shape.
    weights = {weight.name for weight in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, path)
    _check(path)


def _strip(graph: Any) -> None:
    """Leaves out where in which source file each node comes from: as long as a small model, and full of local paths."""
    graph.graph.metadata_props.clear()
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    for node in graph.graph:
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def write_int8(source: Path, path: Path, is_large: bool = False) -> None:
    """
    Quantises the weights of matrix products, each output channel on its own scale; activations follow as they come.

    Weights are unsigned, as activations are: signed ones saturate on processors without VNNI, where the measured
    agreement would then not hold (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). The
    patch embedding, a hundredth of the weights, stays in float32, since its error is everybody's.

    Args:
        is_large: whether the weights are to stand in a file of their own.

    Raises:
        ConversionError: if the result is not a valid model.
    """
    nodes = onnx.load(source, load_external_data=False).graph.node
    patch_embedding = next(node.name for node in nodes if node.op_type == "MatMul")
    with _quietly():
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[patch_embedding],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=is_large,
        )
    _check(path)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(f"{path.name} is not a valid ONNX model; nothing was written: {error}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporter and quantiser warn of what is no concern of ours; only if they fail is it shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except Exception:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            warn(message)
        raise
    finally:
        logging.disable(disabled)


# Running both


@torch.no_grad()
def torch_logits(model: ViViTForVideoClassification, clips: Sequence[Clip]) -> torch.Tensor:
    """(clips, num_labels), float32."""
    return torch.cat([model(pixel_values=clip()).logits for clip in clips])


def onnx_logits(path: Path, clips: Sequence[Clip], batches: Sequence[int]) -> torch.Tensor:
    """
    (clips, num_labels), float32, from onnxruntime on the CPU: first one batch of each of these sizes, then the rest one
    by one.

    Raises:
        ConversionError: if the runtime does not take the file, or not these batches.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises says the same
    options.intra_op_num_threads = torch.get_num_threads()
    sizes = [*batches, *[1] * (len(clips) - sum(batches))]
    ends = np.cumsum(sizes)
    rows = []
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for start, end in zip(ends - sizes, ends, strict=True):
            pixel_values = torch.cat([clip() for clip in clips[start:end]]).numpy()
            rows += session.run([OUTPUT], {INPUT: pixel_values})
    except _RUNTIME_ERRORS as error:
        raise ConversionError(
            f"onnxruntime {onnxruntime.__version__} cannot run {path.name}; nothing was written. Another --opset may "
            f"help. It says: {error}"
        ) from error
    return torch.from_numpy(np.concatenate(rows))


def measure_agreement(actual: torch.Tensor, expected: torch.Tensor, label_map: LabelMap) -> Agreement:
    """
    Two models' logits (clips, num_labels) for the same clips, compared as classes and as probabilities.

    The top-1 agreement is the share of clips whose likeliest label is the same, in each of the groups if there are any.

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


# Beside the graph


def _settings(owner: ViViTConfig | ViViTVideoProcessor) -> dict[str, Any]:
    """The settings alone: `save_pretrained` would put source files beside them, for loading the model from there."""
    return {name: value for name, value in json.loads(owner.to_json_string()).items() if name != "auto_map"}


def _versions() -> dict[str, str]:
    others = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {"vivit_hf": vivit_hf.__version__, **{name: version(name) for name in others}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))  # with its external data


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _shape(shape: Sequence[str | int]) -> str:
    return f"({', '.join(map(str, shape))})"


def parse_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--model", required=True, help="Hub id or folder of a classifier, ours or transformers' Vivit")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--int8", action="store_true", help="also write an int8 model, and measure how far it agrees")
    parser.add_argument("--videos", metavar="FOLDER", help="check with clips of these videos, not with random ones")
    parser.add_argument("--num-clips-checked", type=int, default=16, metavar="N", help="clips to check with (16)")
    parser.add_argument(
        "--opset", type=int, default=DEFAULT_OPSET, help=f"version of the ONNX operators ({DEFAULT_OPSET})"
    )
    parser.set_defaults(push_to_hub=None)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(convert, parse_options(argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])), argv)


if __name__ == "__main__":
    sys.exit(main())
