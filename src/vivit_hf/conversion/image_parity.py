"""Compare a ViViT with the image ViT that it was initialised from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import ViTModel

from ..configuration_vivit import ViViTConfig
from ..frame_sampling import sample_frames_uniformly
from ..initialisation.from_image import POSITION_INITS
from ..modeling_vivit import POOLINGS, ViViTForVideoClassification, ViViTModel, resample_position_embeddings
from .parity import chosen_steps, random_clip


@dataclass
class ImageReference:
    """Outputs of an image ViT that a ViViT initialised from it must reproduce on `clip`."""

    clip: torch.Tensor
    expected: dict[str, torch.Tensor]
    what: str


@torch.no_grad()
def image_reference(
    vit: ViTModel, config: ViViTConfig, *, tubelet_init: str, temporal_attention_init: str, position_init: str
) -> ImageReference:
    """Run the ViT on the images that correspond to the ViViT's time steps; see `step_images`."""
    clip = random_clip(config)
    embedded = _embed(vit, step_images(clip, config, tubelet_init), config, position_init)  # (time, 1 + space, hidden)
    has_class_token = config.pooling == "cls"
    chosen = embedded[chosen_steps(config), 0 if has_class_token else 1 :]  # (steps, tokens, hidden)
    outputs, what = _OUTPUTS[config.attention_type](vit, config, chosen)
    if config.attention_type == "factorised_self_attention" and temporal_attention_init in ("copy", "random"):
        what += ", with the temporal attention silenced"
    seen = {
        "central_frame": "the central frames",
        "filter_inflation": "the tubelets' mean frames",
        "approximate_rank_pooling": "the tubelets' rank-pooled frames",
    }[tubelet_init]
    seen = "the sampled frames" if config.embedding_type == "uniform_frame_sampling" else seen
    expected = {"tokens": embedded[None, :, 1:], "outputs": outputs}
    if has_class_token:
        expected["class token"] = embedded[:1, :1]
    return ImageReference(clip, expected, f"{what}; the ViT saw {seen}")


@torch.no_grad()
def image_outputs(model: ViViTForVideoClassification, reference: ImageReference) -> dict[str, torch.Tensor]:
    """Return the ViViT's outputs under the same names as `reference.expected`."""
    vivit, config = model.vivit, model.config
    tokens, class_token = vivit.embeddings(reference.clip)
    chosen = tokens[:, chosen_steps(config)]  # (1, steps, space, hidden)
    if config.attention_type == "spatio_temporal":
        steps = [vivit.encode_spatio_temporal(step.unsqueeze(1), class_token)[0] for step in chosen.unbind(1)]
        outputs = torch.cat(steps)  # (steps, 1 + space, hidden)
    elif config.attention_type == "factorised_encoder":
        outputs = vivit.encode_space(chosen, class_token)[0]  # (steps, hidden)
    else:
        with silent_temporal_attention(vivit) if "silenced" in reference.what else contextlib.nullcontext():
            outputs, _ = vivit.encode_token_grid(chosen, None)
        outputs = outputs[0].unflatten(0, (chosen.shape[1], -1))  # (steps, space, hidden)
    result = {"tokens": tokens, "outputs": outputs}
    return result if class_token is None else {**result, "class token": class_token}


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
    return (tubelets * torch.tensor(weights).view(1, -1, 1, 1, 1)).sum(dim=1)


def _embed(vit: ViTModel, images: torch.Tensor, config: ViViTConfig, position_init: str) -> torch.Tensor:
    """Return the ViT's tokens (time, 1 + space, hidden), with position embeddings resized by the ViT if it can."""
    embeddings = vit.embeddings
    if config.frame_size == tuple(embeddings.image_size):
        return embeddings(images)
    patch_height, patch_width = embeddings.patch_embeddings.patch_size
    old_height, old_width = embeddings.image_size[0] // patch_height, embeddings.image_size[1] // patch_width
    if position_init == "tile" and old_height == old_width and isinstance(embeddings.patch_size, int):
        return embeddings(images, interpolate_pos_encoding=True)
    positions = resample_position_embeddings(  # the ViT cannot do this itself
        embeddings.position_embeddings,
        new_grid=(1, *config.grid_size[1:]),
        old_grid=(1, old_height, old_width),
        num_prefix_tokens=1,
        mode=POSITION_INITS[position_init],
    )
    tokens = embeddings.patch_embeddings(images)
    return torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + positions


def _layers(vit: ViTModel, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    for layer in vit.layers:
        tokens = layer(tokens, mask)
    return vit.layernorm(tokens)


def _joint(vit: ViTModel, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    return _layers(vit, tokens), "all tokens of single tubelets = ViT"


def _spatial(vit: ViTModel, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    what = "class token" if config.pooling == "cls" else f"pooled ({config.pooling}) tokens"
    return POOLINGS[config.pooling](_layers(vit, tokens)), f"spatial encoder's {what} = ViT's"


def _spatial_stack(vit: ViTModel, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    return _layers(vit, tokens), "all tokens = ViT's layers without class token, step by step"


def _masked(vit: ViTModel, config: ViViTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Compute Model 4 with masks on the ViT's layers: half of the heads see their place, half their time step."""
    time, space = tokens.shape[:2]
    step = torch.arange(time).repeat_interleave(space)
    place = torch.arange(space).repeat(time)
    half = config.num_attention_heads // 2
    allowed = torch.stack([place[:, None] == place] * half + [step[:, None] == step] * half)
    mask = torch.zeros(1, *allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    outputs = _layers(vit, tokens.flatten(0, 1).unsqueeze(0), mask)  # (1, time * space, hidden)
    what = "all tokens = ViT's layers with half of the heads masked to a place, half to a time step"
    return outputs[0].unflatten(0, (time, space)), what


_OUTPUTS = {
    "spatio_temporal": _joint,
    "factorised_encoder": _spatial,
    "factorised_self_attention": _spatial_stack,
    "factorised_dot_product_attention": _masked,
}
