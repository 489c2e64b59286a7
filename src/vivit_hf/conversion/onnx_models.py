"""Write the ONNX model of a classifier, describe it, and run ONNX models in onnxruntime."""

import ast
import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vivit_hf

from ..calibration_vivit import Calibration
from ..configuration_vivit import ViViTConfig
from ..initialisation.model_processor import value_range
from ..initialisation.weight_files import ConversionError
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .command import DEFAULT_OPSET
from .parity import clip_shape
from .terminal import needs_extra, warn


with needs_extra("export"):
    import onnx
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state


INPUT, MASK, OUTPUT = "pixel_values", "frame_mask", "logits"
LEAST_OPSET = 18  # the oldest that torch exports to by itself
MOST_BYTES_IN_ONE_FILE = 2_000_000_000  # protobuf files, graph included, are limited to 2 GiB

# Loads the inputs of one clip: INPUT (1, frames, channels, height, width), and MASK, bool (1, frames), if there is one.
Clip = Callable[[], dict[str, torch.Tensor]]

# onnxruntime has an error class for every status code, but no common base class.
_KINDS = [kind for kind in vars(onnxruntime_pybind11_state).values() if isinstance(kind, type)]
_RUNTIME_ERRORS = tuple(kind for kind in _KINDS if issubclass(kind, Exception))


class _Logits(nn.Module):
    """Return plain logits, as ONNX graphs have no `ImageClassifierOutput`."""

    def __init__(self, model: ViViTForVideoClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, frame_mask=frame_mask).logits


def write_onnx(
    model: ViViTForVideoClassification,
    path: Path,
    opset: int,
    metadata: dict[str, str] | None = None,
    takes_masks: bool = False,
) -> None:
    """
    Write the graph from `pixel_values` (batch, frames, channels, height, width) to `logits` (batch, num_labels).

    Both are float32, and the batch size is free. With masks, `frame_mask`, bool (batch, frames), is a second input.
    Matrix products of linear layers have the names of the layers. Weights beyond 2 GB go into a second file beside
    `path`.

    Args:
        model: in float32 and eval mode.
        opset: version of the ONNX operators, `LEAST_OPSET` or newer.
        metadata: written to the file's `metadata_props`.
        takes_masks: whether the graph has the input `frame_mask`.

    Raises:
        ConversionError: if torch cannot export the model to this opset.
    """
    inputs = {INPUT: torch.zeros(2, *clip_shape(model.config))}  # a batch of 1 would become a constant
    if takes_masks:
        inputs[MASK] = torch.ones(2, model.config.num_frames, dtype=torch.bool)
    batch = torch.export.Dim("batch")  # one for all inputs: they have the same
    try:
        with quietly(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                verbose=False,
            )
    except RuntimeError as error:
        raise ConversionError(
            f"torch {torch.__version__} cannot export this model to opset {opset}. If the opset is the reason, choose "
            f"another --opset, such as {DEFAULT_OPSET}: {error.__cause__ or error}"
        ) from error
    graph = program.model
    if graph.opset_imports[""] != opset:
        raise ConversionError(
            f"torch {torch.__version__} cannot export to opset {opset}: the result has {graph.opset_imports['']}; "
            f"choose another --opset, such as {DEFAULT_OPSET}."
        )
    _name_products(graph, model)
    _strip(graph)
    graph.metadata_props.update(metadata or {})
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > MOST_BYTES_IN_ONE_FILE
    if is_large:
        program.save(path, external_data=True)
    proto = onnx.load(path, load_external_data=False) if is_large else program.model_proto
    # Drop the shapes of weights from `value_info`: the quantiser of onnxruntime 1.23 transposes weights, but not these.
    weights = {weight.name for weight in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, path)
    check_model(path)


def _name_products(graph: Any, model: nn.Module) -> None:
    """Name the matrix products of linear layers after their layer, by which `write_static_int8` finds them."""
    layers = {f"model.{name}": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for node in graph.graph:
        if node.op_type == "MatMul":
            *_, scope, _ = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
            node.name = layers.get(scope, node.name)


def _strip(graph: Any) -> None:
    """Remove the source locations of nodes, which show local paths and take as much space as a small model."""
    graph.graph.metadata_props.clear()
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    for node in graph.graph:
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def check_model(path: Path) -> None:
    """Raise a ConversionError if a file is not a valid ONNX model."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(f"{path.name} is not a valid ONNX model; nothing was written: {error}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide the warnings of exporter and quantiser unless they fail."""
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


def onnx_logits(path: Path, clips: Sequence[Clip], batches: Sequence[int]) -> torch.Tensor:
    """
    Return the logits (clips, num_labels), float32, that onnxruntime computes on the CPU.

    Args:
        batches: sizes of the first batches; the remaining clips are run one by one.

    Raises:
        ConversionError: if onnxruntime cannot load the file or run these batches.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the raised errors have the same messages
    options.intra_op_num_threads = torch.get_num_threads()
    sizes = [*batches, *[1] * (len(clips) - sum(batches))]
    ends = np.cumsum(sizes)
    rows = []
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for start, end in zip(ends - sizes, ends, strict=True):
            loaded = [clip() for clip in clips[start:end]]
            inputs = {name: torch.cat([one[name] for one in loaded]).numpy() for name in loaded[0]}
            rows += session.run([OUTPUT], inputs)
    except _RUNTIME_ERRORS as error:
        raise ConversionError(
            f"onnxruntime {onnxruntime.__version__} cannot run {path.name}; nothing was written. Another --opset may "
            f"help. Its message: {error}"
        ) from error
    return torch.from_numpy(np.concatenate(rows))


def size_of(path: Path) -> int:
    """Return the size of a model in bytes, including the file of external weights."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def input_shape(config: ViViTConfig) -> list[str | int]:
    return ["batch", *clip_shape(config)]


def describe_shape(shape: Sequence[str | int]) -> str:
    return f"({', '.join(map(str, shape))})"


def mask_shape(config: ViViTConfig) -> list[str | int]:
    return ["batch", config.num_frames]


def labels_by_index(config: ViViTConfig) -> dict[str, str]:
    return {str(index): str(config.id2label[index]) for index in range(config.num_labels)}


def name_of(source: str | Path) -> str:
    """Return the last part of a path, so that no local folders are published, or a Hub id unchanged."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def onnx_metadata(source: str, config: ViViTConfig, processor: ViViTVideoProcessor) -> dict[str, str]:
    """Return the metadata of the file: settings that the graph does not hold, as text; lists and maps are JSON."""
    low, high = value_range(processor)
    shape = describe_shape(input_shape(config))
    metadata = {
        "model": name_of(source),
        "attention_type": config.attention_type,
        "expects": f"{INPUT} {shape} of float32: RGB, black {low:.6g} and white {high:.6g}",
        "num_frames": str(config.num_frames),
        "num_channels": str(config.num_channels),
        "image_size": json.dumps(list(config.frame_size)),
        "value_range": json.dumps([round(low, 6), round(high, 6)]),
        "id2label": json.dumps(labels_by_index(config), ensure_ascii=False),
        "vivit_hf_version": vivit_hf.__version__,
    }
    if processor.short_video_policy == "mask":
        mask = describe_shape(mask_shape(config))
        metadata["expects_mask"] = f"{MASK} {mask} of bool: true where a frame is visible, and not past the video's end"
    if config.problem_type is not None:
        metadata["problem_type"] = config.problem_type
    if config.label_groups is not None:
        metadata["label_groups"] = json.dumps(config.label_groups, ensure_ascii=False)
    if config.merge_tokens is not None:
        metadata["merge_tokens"] = json.dumps(config.merging_schedule)
    if (calibration := Calibration.of(config)) is not None:
        metadata["temperatures"] = json.dumps(calibration.temperatures)
        if calibration.thresholds is not None:
            metadata["thresholds"] = json.dumps(calibration.thresholds)
    return metadata
