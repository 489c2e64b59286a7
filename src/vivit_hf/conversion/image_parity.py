"""Compare a ViViT with the image ViT that it was initialised from."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configuration_vivit import ViViTConfig
from ..frame_sampling import sample_frames_uniformly
from ..initialisation.from_image import position_mode
from ..initialisation.image_models import ImageStructure, image_structure, image_weights
from ..modeling_vivit import POOLINGS, ViViTForVideoClassification, ViViTModel, resample_position_embeddings
from .parity import chosen_steps, random_clip


# The image that the ViT sees in place of a tubelet, by `tubelet_init`; see `step_images`.
_SEEN = {
    "central_frame": "the central frames",
    "filter_inflation": "the tubelets' mean frames",
    "approximate_rank_pooling": "the tubelets' rank-pooled frames",
}


@dataclass
class ImageReference:
    """Outputs of an image model that a ViViT initialised from it must reproduce on `clip`."""

    clip: torch.Tensor
    expected: dict[str, torch.Tensor]
    what: str
    silences_time: bool = False  # whether to run Model 3 without its temporal attention


@torch.no_grad()
def image_reference(
    vit: nn.Module, config: ViViTConfig, *, tubelet_init: str, temporal_attention_init: str, position_init: str
) -> ImageReference:
    """Run the image model ("ViT") on the images that correspond to the ViViT's time steps; see `step_images`."""
    clip, structure = random_clip(config).to(next(vit.parameters()).dtype), image_structure(vit.config)
    images = step_images(clip, config, tubelet_init)
    embedded = _embed(vit, structure, images, config, position_init)  # (time, prefix + space, hidden)
    prefix = _kept_prefix(embedded, structure, config)  # (time, kept prefix, hidden)
    patches = embedded[:, structure.num_prefix_tokens :]  # (time, space, hidden)
    chosen = torch.cat([prefix, patches], dim=1)[chosen_steps(config)]  # (steps, tokens, hidden)
    outputs, what = _OUTPUTS[config.attention_type](vit, config, chosen)
    silences_time = config.attention_type == "factorised_self_attention" and temporal_attention_init in (
        "copy",
        "random",
    )
    if silences_time:
        what += ", with the temporal attention silenced"
    seen = "the sampled frames" if config.embedding_type == "uniform_frame_sampling" else _SEEN[tubelet_init]
    expected = {"tokens": patches[None], "outputs": outputs}
    if prefix.shape[1]:
        expected["class and register tokens"] = prefix[:1]
    return ImageReference(clip, expected, f"{what}; the ViT saw {seen}", silences_time)


@torch.no_grad()
def image_outputs(model: ViViTForVideoClassification, reference: ImageReference) -> dict[str, torch.Tensor]:
    """Return the ViViT's outputs under the same names as `reference.expected`."""
    vivit, config = model.vivit, model.config
    tokens, prefix = vivit.embeddings(reference.clip)
    chosen = tokens[:, chosen_steps(config)]  # (1, steps, space, hidden)
    if config.attention_type == "spatio_temporal":
        steps = [vivit.encode_spatio_temporal(step.unsqueeze(1), prefix)[0] for step in chosen.unbind(1)]
        outputs = torch.cat(steps)  # (steps, prefix + space, hidden)
    elif config.attention_type == "factorised_encoder":
        outputs = vivit.encode_space(chosen, prefix)[0]  # (steps, hidden)
    else:
        with silent_temporal_attention(vivit) if reference.silences_time else contextlib.nullcontext():
            outputs, _ = vivit.encode_token_grid(chosen, None)
        outputs = outputs[0].unflatten(0, (chosen.shape[1], -1))  # (steps, space, hidden)
    result = {"tokens": tokens, "outputs": outputs}
    return result if prefix is None else {**result, "class and register tokens": prefix}


@contextlib.contextmanager
def silent_temporal_attention(vivit: ViViTModel) -> Iterator[None]:
    """Zero the outputs of Model 3's temporal attention."""
    attentions = [vivit.get_submodule(f"encoder.layer.{i}.attention_time") for i in range(len(vivit.encoder.layer))]
    hooks = [one.register_forward_hook(lambda module, args, output: torch.zeros_like(output)) for one in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step_images(clip: torch.Tensor, config: ViViTConfig, tubelet_init: str) -> torch.Tensor:
    """
    Return the image that the inflated kernel sees in each time step: (time, channels, height, width).

    An inflated kernel is the image kernel times a weight per frame. Its output for a tubelet is therefore the image
    kernel's output for the weighted sum of the frames: the central, mean or rank-pooled frame.
    """
    if config.embedding_type == "uniform_frame_sampling":
        return clip[0, sample_frames_uniformly(config.num_frames, config.num_sampled_frames).tolist()]
    length = config.tubelet_size[0]
    weights = [0.0] * length
    if tubelet_init == "central_frame":
        weights[length // 2] = 1.0
    elif tubelet_init == "filter_inflation":
        weights = [1 / length] * length
    else:  # Bilen et al., equation 3, over the number of frames as in the official code
        harmonic = [sum(1 / k for k in range(1, count + 1)) for count in range(length + 1)]
        weights = [
            (2 * (length - k + 1) - (length + 1) * (harmonic[length] - harmonic[k - 1])) / length
            for k in range(1, length + 1)
        ]
    time = config.grid_size[0]
    tubelets = clip[0, : time * length].unflatten(0, (time, length))  # (time, frames, channels, height, width)
    return (tubelets * torch.tensor(weights, dtype=clip.dtype).view(1, -1, 1, 1, 1)).sum(dim=1)


def _tower(vit: Any) -> Any:
    """Return the image tower of a model that may have two."""
    return getattr(vit, "vision_model", vit)


def _embed(
    vit: nn.Module, structure: ImageStructure, images: torch.Tensor, config: ViViTConfig, position_init: str
) -> torch.Tensor:
    """Return the ViT's tokens (time, prefix + space, hidden), with positions resized by the ViT if it can."""
    embeddings = _tower(vit).embeddings
    if config.frame_size == structure.image_size:
        return embeddings(images)
    is_square = len({*structure.image_size}) == len({*structure.patch_size}) == 1
    if position_init == "tile" and is_square:
        options = inspect.signature(embeddings.forward).parameters
        return embeddings(images, **{"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in options else {})
    weights = image_weights(vit).tensors  # the ViT cannot do this itself
    num_class_tokens = int(structure.has_class_token)
    positions = resample_position_embeddings(
        weights["embeddings.position_embeddings"],
        new_grid=(1, *config.grid_size[1:]),
        old_grid=(1, *structure.grid),
        num_prefix_tokens=num_class_tokens,
        mode=position_mode(structure, position_init),
    )
    projection = "embeddings.patch_embeddings.projection"
    kernel, bias = weights[f"{projection}.weight"], weights.get(f"{projection}.bias")
    patches = nn.functional.conv2d(images, kernel, bias, structure.patch_size).flatten(2).mT  # (time, space, hidden)
    tokens = [patches + positions[:, num_class_tokens:]]
    if structure.num_register_tokens:
        tokens.insert(0, weights["embeddings.register_tokens"].expand(len(images), -1, -1))
    if structure.has_class_token:
        class_token = weights["embeddings.cls_token"] + positions[:, :1]  # (1, 1, hidden)
        tokens.insert(0, class_token.expand(len(images), -1, -1))
    return torch.cat(tokens, dim=1)  # (time, prefix + space, hidden)


def _kept_prefix(embedded: torch.Tensor, structure: ImageStructure, config: ViViTConfig) -> torch.Tensor:
    """Return the class and register tokens that the ViViT has: (time, kept prefix, hidden)."""
    num_class_tokens = int(structure.has_class_token)
    first = 0 if config.pooling == "cls" else num_class_tokens
    return embedded[:, first : num_class_tokens + config.num_register_tokens]


def _layers(vit: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Run the ViT from its LayerNorm in front of the layers, if it has one, to the final one."""
    tower = _tower(vit)
    tokens = tower.pre_layrnorm(tokens) if hasattr(tower, "pre_layrnorm") else tokens
    encoder = getattr(tower, "encoder", tower)
    for layer in encoder.layer if hasattr(encoder, "layer") else encoder.layers:
        tokens = layer(tokens, mask)
    return tower.post_layernorm(tokens) if hasattr(tower, "post_layernorm") else tower.layernorm(tokens)


def _joint(vit: nn.Module, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    return _layers(vit, tokens), "all tokens of single tubelets = ViT"


def _spatial(vit: nn.Module, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    what = "class token" if config.pooling == "cls" else f"pooled ({config.pooling}) tokens"
    first = 0 if config.pooling == "cls" else config.num_register_tokens
    return POOLINGS[config.pooling](_layers(vit, tokens)[:, first:]), f"spatial encoder's {what} = ViT's"


def _spatial_stack(vit: nn.Module, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    return _layers(vit, tokens), "all tokens = ViT's layers without class token, step by step"


def _masked(vit: nn.Module, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Compute Model 4 with masks on the ViT's layers: half of the heads see their place, half their time step."""
    time, space = tokens.shape[:2]
    step = torch.arange(time).repeat_interleave(space)
    place = torch.arange(space).repeat(time)
    half = config.num_attention_heads // 2
    allowed = torch.stack([place[:, None] == place] * half + [step[:, None] == step] * half)
    mask = torch.zeros(1, *allowed.shape, dtype=tokens.dtype).masked_fill(~allowed, torch.finfo(tokens.dtype).min)
    outputs = _layers(vit, tokens.flatten(0, 1).unsqueeze(0), mask)  # (1, time * space, hidden)
    what = "all tokens = ViT's layers with half of the heads masked to a place, half to a time step"
    return outputs[0].unflatten(0, (time, space)), what


_OUTPUTS = {
    "spatio_temporal": _joint,
    "factorised_encoder": _spatial,
    "factorised_self_attention": _spatial_stack,
    "factorised_dot_product_attention": _masked,
}
