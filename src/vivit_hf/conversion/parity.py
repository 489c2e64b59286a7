"""
Compare the outputs of source and result on a random clip.

Running a whole clip of 32 frames takes minutes on a small machine. The embeddings are therefore compared for all of its
tokens, but the layers only on the tokens of the first and last time step, which attention allows.
"""

from typing import TypeVar

import torch
from torch import nn

from ..configuration_vivit import ViViTConfig
from ..initialisation.weight_files import ConversionError
from ..modeling_vivit import ENCODERS, ViViTForVideoClassification


TOLERANCE = 1e-4  # in float32; absolute, or relative to the largest value if that is above 1

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clip_shape(config: ViViTConfig) -> tuple[int, ...]:
    """Return (frames, channels, height, width)."""
    return config.num_frames, config.num_channels, *config.frame_size


def random_clip(config: ViViTConfig, seed: int = 0) -> torch.Tensor:
    """Return a clip (1, frames, channels, height, width) with values in [-1, 1]."""
    return torch.rand(1, *clip_shape(config), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def chosen_steps(config: ViViTConfig) -> list[int]:
    """Return the indices of the first and last time step."""
    return sorted({0, config.grid_size[0] - 1})


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> str:
    """
    Describe in words by how much two sets of outputs differ.

    Raises:
        ConversionError: if any output differs by more than `TOLERANCE`.
    """
    worst = 0.0
    for name, expected in theirs.items():
        actual = ours[name]
        if actual.shape != expected.shape:
            raise ConversionError(
                f"parity: {name} are {tuple(actual.shape)} in the result, but {tuple(expected.shape)} in the source."
            )
        difference = (actual - expected).abs().max().item()
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # also catches NaN
            raise ConversionError(
                f"parity: {name} of the result differ from the source's by {difference:.2e}, more than {limit:.0e} "
                f"({what}); nothing was written."
            )
        worst = max(worst, difference)
    return f"max abs difference {worst:.1e}: {what}"


@torch.no_grad()
def tokens_and_logits(model: ViViTForVideoClassification, clip: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Return the tokens (1, time, space, hidden) of a clip as they enter the encoder, and logits from `chosen_steps`.

    Model 2's temporal encoder gets the outputs for these steps in turn, repeated to the number of time steps.
    """
    vivit, config = model.vivit, model.config
    tokens, class_token = vivit.embeddings(clip)
    chosen = tokens[:, chosen_steps(config)]
    if config.attention_type == "factorised_encoder":
        steps = vivit.encode_space(chosen, class_token)
        steps = steps[:, [index % steps.shape[1] for index in range(tokens.shape[1])]]  # (batch, time, hidden)
        _, pooled = vivit.encode_time(steps)
    else:
        _, pooled = ENCODERS[config.attention_type](vivit, chosen, class_token)
    return {"tokens": tokens, "logits": model.classifier(vivit.represent(pooled))}


def frozen(model: ModuleT) -> ModuleT:
    """Return the model in eval mode, with gradients disabled."""
    return model.eval().requires_grad_(False)
