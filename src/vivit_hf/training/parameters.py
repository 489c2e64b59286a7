"""Which parameters are trained, and with which learning rate and weight decay."""

import re
from typing import Any

import torch

from ..limits_vivit import check_choice


FREEZINGS = ("none", "spatial", "all_but_head")
_TEMPORAL = re.compile(
    r"(^|\.)(temporal_embeddings|temporal_encoder|temporal_layernorm|temporal_pooler|attention_time|layernorm_time)\."
)
_LAYER = re.compile(r"(?:^|\.)(encoder|temporal_encoder)\.layer\.(\d+)\.")


def part_of(name: str) -> str:
    """Return the part of a model that a parameter belongs to: embeddings, encoder, temporal, classifier or decoder."""
    if head := re.search(r"(^|\.)(classifier|decoder)\.", name):
        return head[2]
    if _TEMPORAL.search(name):
        return "temporal"
    return "embeddings" if re.search(r"(^|\.)(embeddings|pre_layernorm)\.", name) else "encoder"


def freeze(model: torch.nn.Module, what: str) -> list[str]:
    """Exclude parameters from training, and return their names.

    Args:
        model: a `ViViTForVideoClassification`.
        what: "spatial" freezes everything that comes from an image transformer; the classifier and Model 2's temporal
            encoder, or Model 3's temporal attention and position embeddings, are trained. "all_but_head" trains the
            classifier alone. "none" trains everything.

    Raises:
        ValueError: for "spatial" if space and time share their parameters (Models 1 and 4, average pooling).
    """
    check_choice("freeze", what, FREEZINGS)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    trained = {"none": set(parts.values()), "spatial": {"temporal", "classifier"}, "all_but_head": {"classifier"}}[what]
    if what == "spatial" and "temporal" not in parts.values():
        raise ValueError(
            "freeze='spatial' leaves no temporal parameters to train: only Models 2 and 3 have parameters of their own "
            "for time. Use 'all_but_head', or LoRA."
        )
    # Model 3 has no temporal embeddings: it tells time steps apart by the position embeddings of its tokens.
    keeps_positions = what == "spatial" and not any(".temporal_" in f".{name}" for name in parts)
    for name, parameter in model.named_parameters():
        is_position = keeps_positions and name.endswith("position_embeddings")
        parameter.requires_grad_(parts[name] in trained or is_position)
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def frozen_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the largest modules that have parameters, none of which is trained; without those inside of them."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    if not flags or all(flags):
        return []
    return [module for child in model.children() for module in frozen_modules(child)] if any(flags) else [model]


def untrained_modules(model: Any) -> list[str]:
    """Return the modules that ignore the order of frames since they were initialised from an image ViT.

    These are the embeddings if their position embeddings are the same at every time step, and the temporal modules if
    their LayerNorms still have their initial values. A model cannot learn the order of frames if they are frozen, or
    trained by low-rank updates alone. The names are those that peft's `modules_to_save` takes.
    """
    embeddings, names = model.vivit.embeddings, []
    positions = embeddings.position_embeddings.detach()[:, embeddings.num_prefix_tokens :]
    positions = positions.unflatten(1, (embeddings.grid[0], -1))  # (1, time, space, hidden)
    if embeddings.grid[0] > 1 and torch.allclose(positions, positions[:, :1].expand_as(positions), atol=1e-6):
        names.append("vivit.embeddings")
    for norm_name, others in (
        ("temporal_layernorm", ["temporal_embeddings", "temporal_encoder"]),  # Model 2
        ("layernorm_time", ["attention_time"]),  # Model 3
    ):
        norms = [module for name, module in model.named_modules() if name.endswith(f".{norm_name}")]
        if norms and all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in norms):
            names += [*others, norm_name]
    pooler = model.vivit.temporal_pooler
    if pooler is not None and not pooler.query.any():  # a plain mean so far
        names.append("temporal_pooler")
    return names


def depths(model: torch.nn.Module) -> dict[str, int]:
    """Return the depth of each parameter: 0 for the classifier and final norms, and 1 more for each layer below."""
    places = {}
    for name, _ in model.named_parameters():
        match = _LAYER.search(name.replace(".modules_to_save.default.", "."))  # peft trains a copy of the module
        if match:
            places[name] = (1 if match[1] == "encoder" else 2, int(match[2]))
        elif part_of(name) == "embeddings":
            places[name] = (0, 0)
        elif "temporal_embeddings" in name or re.search(r"(^|\.)vivit\.layernorm\.", name):
            places[name] = (2, 0)  # between Model 2's encoders; at the end without a temporal encoder
        else:
            places[name] = (3, 0)
    if not any(place[0] == 2 and ".layer." in name for name, place in places.items()):  # no temporal encoder
        places = {name: (3, 0) if place[0] == 2 else place for name, place in places.items()}
    order = sorted({*places.values(), (3, 0)}, reverse=True)
    return {name: order.index(place) for name, place in places.items()}


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return the parameter groups for an optimiser, without frozen parameters.

    The learning rate is learning_rate * layer_decay ** depth (see `depths`). Biases, norms, class and register tokens
    and position embeddings have no weight decay.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay={layer_decay!r}` must be above 0 and at most 1.")
    depth_of = depths(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tokens = ("cls_token", "mask_token", "register_tokens", "position_embeddings")
        decays = parameter.ndim > 1 and not name.endswith(tokens)
        depth = depth_of[name] if layer_decay != 1 else 0
        rates = {"lr": learning_rate * layer_decay**depth, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((depth, decays), {"params": [], **rates})["params"].append(parameter)
    if not groups:
        raise ValueError("No parameter is left to train.")
    return [groups[key] for key in sorted(groups)]


def gradient_norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient norm of each part of the model (see `part_of`) and of the whole as "total": tensors ()."""
    norms: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad.detach().float())
            norms.setdefault(part_of(name), []).append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    result = {part: torch.stack(values).norm() for part, values in norms.items()}
    return {**result, "total": torch.stack(list(result.values())).norm()} if result else {}
