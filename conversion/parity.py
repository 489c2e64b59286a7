"""
Source and result run against each other on a random clip.

A whole clip of 32 frames takes minutes on a small machine. So the embeddings are compared for all of its tokens, and
the layers, every one of them, on the tokens of its first and last time step only: attention takes any set of tokens.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import ViTModel

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel
from vivit_hf.conversion.weight_files import ConversionError
from vivit_hf.embeddings_vivit import resample_position_embeddings
from vivit_hf.frame_sampling import sample_frames_uniformly
from vivit_hf.initialisation.from_image import POSITION_INITS
from vivit_hf.modeling_vivit import ENCODERS, POOLINGS


TOLERANCE = 1e-4  # absolute in float32, and relative to the largest value where that is above 1


def random_clip(config: Any, seed: int = 0) -> torch.Tensor:
    """(1, frames, channels, height, width) in [-1, 1]."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, config.num_frames, config.num_channels, height, width, generator=generator) * 2 - 1


def chosen_steps(config: ViViTConfig) -> list[int]:
    """The first time step and the last."""
    return sorted({0, config.grid_size[0] - 1})


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> str:
    """
    The parity figure, in words.

    Raises:
        ConversionError: if anything differs by more than `TOLERANCE`.
    """
    worst = 0.0
    for name, expected in theirs.items():
        actual = ours[name]
        if actual.shape != expected.shape:
            raise ConversionError(
                f"parity: {name} are {tuple(actual.shape)} in the result and {tuple(expected.shape)} in the source."
            )
        difference = (actual - expected).abs().max().item()
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # so that NaN fails too
            raise ConversionError(
                f"parity: {name} of the result differ from the source's by {difference:.2e}, more than {limit:.0e} "
                f"({what}); nothing was written."
            )
        worst = max(worst, difference)
    return f"max abs difference {worst:.1e}: {what}"


@torch.no_grad()
def tokens_and_logits(model: ViViTForVideoClassification, clip: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Our tokens (1, time, space, hidden) of a whole clip as they enter the encoder, and logits from `chosen_steps`.

    Model 2's temporal encoder sees the outputs for these steps in turn, as many as there are time steps.
    """
    vivit, config = model.vivit, model.config
    tokens, class_token = vivit.embeddings(clip)
    chosen = tokens[:, chosen_steps(config)]
    if config.attention_type == "factorised_encoder":
        steps = vivit.encode_space(chosen, class_token)
        steps = steps[:, [index % steps.shape[1] for index in range(tokens.shape[1])]]  # (batch, time, hidden)
        pooled = steps.mean(dim=1) if vivit.temporal_encoder is None else vivit.encode_time(steps)[1]
    else:
        _, pooled = ENCODERS[config.attention_type](vivit, chosen, class_token, False)
    if vivit.pre_logits is not None:
        pooled = vivit.pre_logits(pooled).tanh()
    return {"tokens": tokens, "logits": model.classifier(pooled)}


# Image transformers


@dataclass
class ImageReference:
    """What an image transformer makes of a clip, for a ViViT of some variant that starts from it."""

    clip: torch.Tensor
    expected: dict[str, torch.Tensor]
    what: str


@torch.no_grad()
def image_reference(
    vit: ViTModel, config: ViViTConfig, *, tubelet_init: str, temporal_attention_init: str, position_init: str
) -> ImageReference:
    """Runs the ViT on the images that the ViViT's time steps must be equal to: see `step_images`."""
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
    """The same from the ViViT."""
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
    """Model 3 without what its attention over time adds."""
    hooks = [
        layer.attention_time.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        for layer in vivit.encoder.layer
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step_images(clip: torch.Tensor, config: ViViTConfig, tubelet_init: str) -> torch.Tensor:
    """
    For every time step the image (time, channels, height, width) that the inflated kernel sees in it.

    A kernel that is the image kernel times a weight per frame gives the image kernel's answer to the weighted sum of
    the frames: the central frame, the mean frame, or the rank-pooled one.
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
    """The ViT's tokens (time, 1 + space, hidden), position embeddings resized to the images by the ViT itself."""
    embeddings = vit.embeddings
    if config.frame_size == tuple(embeddings.image_size):
        return embeddings(images)
    patch_height, patch_width = embeddings.patch_embeddings.patch_size
    old_height, old_width = embeddings.image_size[0] // patch_height, embeddings.image_size[1] // patch_width
    if position_init == "tile" and old_height == old_width and isinstance(embeddings.patch_size, int):
        return embeddings(images, interpolate_pos_encoding=True)
    positions = resample_position_embeddings(  # what the ViT itself cannot do
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
    """Model 4 as masks on the ViT's own layers: half of the heads see their place, half of them their time step."""
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


def frozen(model: nn.Module) -> nn.Module:
    """In eval mode, without gradients."""
    return model.eval().requires_grad_(False)
