"""Plain models and their optimised twins."""

import io
import pickle

import torch
from tiny_models import case_config, make_model

from vivit_hf.inference import optimization, optimize
from vivit_hf.inference.onednn import is_plain_linear
from vivit_hf.inference.optimization import PackedLinear
from vivit_hf.modeling_vivit import ViViTMLP


ONEDNN_HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Two roundings in different places, in units of outputs around 1.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float64: 1e-10}


def optimised(model, machine):
    """Optimise a float32 model. Its weights are laid out on request, which `optimize` does in bfloat16 only."""
    report = optimize(model)
    if machine == "laid out":
        for module in list(model.modules()):
            if isinstance(module, (ViViTMLP, optimization.ViViTAttention)):
                for child in module.children():
                    if is_plain_linear(child):
                        PackedLinear.pack(child)
    return report


def through_pickle(model):
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    return pickle.loads(buffer.getvalue())


def assert_close(actual, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def faster_modules(model):
    return [module for module in model.modules() if type(module) in optimization._PLAIN]


def make_pair(case, machine):
    """A plain model and its optimised twin."""
    plain, twin = (make_model(case_config(case)) for _ in range(2))
    optimised(twin, machine)
    return plain, twin


def gradients_of(model, clips):
    model.zero_grad()
    logits = model(clips).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
