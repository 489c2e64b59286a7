"""Quantise an ONNX model to int8: with fixed scales of activations from a calibration, or with scales of each batch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..inference.quantisation import (
    LARGEST_ERROR,
    ActivationScale,
    linear_layers,
    output_error,
    quantised_weight,
    sampled_inputs,
)
from ..initialisation.weight_files import ConversionError
from ..modeling_vivit import ViViTForVideoClassification
from .onnx_models import check_model, quietly
from .terminal import needs_extra


with needs_extra("export"):
    import onnx
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic


@torch.no_grad()
def static_scales(
    model: ViViTForVideoClassification, clips: Iterable[torch.Tensor]
) -> tuple[dict[str, ActivationScale], list[str]]:
    """
    Fit the scales of the inputs of the linear layers in attention and MLPs, as `optimize(model, int8=True)` does.

    Args:
        model: on the CPU and in eval mode.
        clips: pixel values (batch, frames, channels, height, width) of the kind that the model will see.

    Returns:
        The scales by the name of the layer, and the names of the layers that one scale does not suit: their output
        would be off by more than `LARGEST_ERROR`.

    Raises:
        NonFiniteError: if the model computes NaN or infinite numbers on these clips.
    """
    layers, scales, kept = linear_layers(model), {}, []
    for name, tokens in sampled_inputs(model, layers, clips).items():
        scale = ActivationScale.fitted(tokens)
        if output_error(layers[name], tokens, scale) > LARGEST_ERROR:
            kept.append(name)
        else:
            scales[name] = scale
    return scales, kept


def write_static_int8(source: Path, path: Path, scales: Mapping[str, ActivationScale], is_large: bool = False) -> None:
    """
    Quantise the matrix products of linear layers, with one fixed scale for each one's uint8 input.

    Weights are int8, with one scale per output channel. Every quantised tensor is followed by its dequantisation (the
    format QDQ), and runtimes fuse both with the product. Signed weights are what the fast kernels for VNNI take;
    onnxruntime may saturate sums of them on x86 processors without it (docs/export.md).

    Args:
        source: a graph of `write_onnx`, whose matrix products have the names of their layers.
        scales: of the layers to quantise, by name.
        is_large: whether to write the weights to a file of their own.

    Raises:
        ConversionError: if a layer is not in the graph, or if the result is not a valid model.
    """
    proto = onnx.load(source)
    if missing := sorted(set(scales) - {node.name for node in proto.graph.node}):
        raise ConversionError(
            f"{source.name} has no matrix product named {missing[0]}; nothing was written. Leave --calibration out."
        )
    stored = {weight.name: weight for weight in proto.graph.initializer}
    new = _NewNodes()
    for node in proto.graph.node:
        if node.name in scales:
            node.input[:] = [
                new.rounded_input(node.input[0], scales[node.name]),
                new.rounded_weight(stored[node.input[1]]),
            ]
        new.nodes.append(node)
    proto.graph.ClearField("node")
    proto.graph.node.extend(new.nodes)
    used = {name for node in new.nodes for name in node.input}
    kept = [weight for weight in stored.values() if weight.name in used]
    proto.graph.ClearField("initializer")
    proto.graph.initializer.extend([*kept, *new.constants])
    onnx.save(proto, path, save_as_external_data=is_large, location=f"{path.name}.data")
    check_model(path)


class _NewNodes:
    """The nodes of a graph whose products are being quantised, in order, and the constants that they need."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        # By what they round: queries, keys and values share their input, and equal weights are stored once.
        self._outputs: dict[Any, str] = {}

    def rounded_input(self, name: str, scale: ActivationScale) -> str:
        """Add the rounding of a tensor, and return the name of the result."""
        if (name, scale) not in self._outputs:
            prefix = self._outputs[name, scale] = f"{name}_rounded_{len(self._outputs)}"
            parameters = self._add_parameters(prefix, np.float32(scale.scale), np.uint8(scale.zero_point))
            numbers = f"{prefix}_uint8"
            self.nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [numbers]))
            self.nodes.append(helper.make_node("DequantizeLinear", [numbers, *parameters], [prefix]))
        return self._outputs[name, scale]

    def rounded_weight(self, weight: Any) -> str:
        """Add the dequantisation of a weight (in, out), and return the name of the result."""
        if weight.name not in self._outputs:
            prefix = self._outputs[weight.name] = f"{weight.name}_rounded"
            whole, scales = quantised_weight(torch.from_numpy(numpy_helper.to_array(weight).T.copy()))  # (out, in)
            parameters = self._add_parameters(prefix, scales.numpy(), np.zeros(len(scales), np.int8))
            numbers = f"{prefix}_int8"
            self.constants.append(numpy_helper.from_array(whole.numpy().T.copy(), numbers))  # (in, out)
            self.nodes.append(helper.make_node("DequantizeLinear", [numbers, *parameters], [prefix], axis=1))
        return self._outputs[weight.name]

    def _add_parameters(self, prefix: str, scale: Any, zero_point: Any) -> list[str]:
        names = [f"{prefix}_scale", f"{prefix}_zero_point"]
        self.constants += map(numpy_helper.from_array, map(np.asarray, (scale, zero_point)), names)
        return names


def write_dynamic_int8(source: Path, path: Path, is_large: bool = False) -> None:
    """
    Quantise the weights of matrix products per output channel; activations are quantised at run time.

    Weights are unsigned, as activations are: signed ones saturate on processors without VNNI, where the measured
    agreement would then not hold (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). The
    patch embedding, a hundredth of the weights, stays in float32, because its error affects every layer.

    Args:
        is_large: whether to write the weights to a file of their own.

    Raises:
        ConversionError: if the result is not a valid model.
    """
    nodes = onnx.load(source, load_external_data=False).graph.node
    patch_embedding = next(node.name for node in nodes if node.op_type == "MatMul")
    with quietly():
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[patch_embedding],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=is_large,
        )
    check_model(path)
