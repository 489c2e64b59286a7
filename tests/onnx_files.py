"""Run exported ONNX files, read what is stored in them, and compute what int8 files should."""

import onnx
import onnxruntime
import torch


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # of the errors that are asked for here, too
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation without VNNI
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path, clips):
    (logits,) = session(path).run(None, {"pixel_values": clips.numpy()})
    return torch.from_numpy(logits)


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def rounding_logits(model, scales, clips):
    """The logits of a model whose linear layers round their inputs and weights, in float64, and multiply these."""
    layers, handles = dict(model.named_modules()), []
    for name, scale in scales.items():
        weight = layers[name].weight
        steps = weight.double().abs().amax(dim=1, keepdim=True) / 127
        weight_used = (weight.double() / steps).round() * steps

        def product(layer, inputs, output, scale=scale, rounded=weight_used):
            numbers = (inputs[0].double() / scale.scale).round() + scale.zero_point
            tokens = (numbers.clamp(0, 255) - scale.zero_point) * scale.scale
            return (tokens @ rounded.T + layer.bias.double()).float()

        handles.append(layers[name].register_forward_hook(product))
    logits = model(clips).logits
    for handle in handles:
        handle.remove()
    return logits
