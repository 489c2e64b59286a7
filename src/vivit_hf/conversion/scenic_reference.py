"""
The forward pass of google-research/scenic `projects/vivit/model.py`, to check conversions against.

It was written from the paper and the official code, reads parameters by their official names, and deliberately shares
no code with the model. Shapes are given in the words batch, time, space, hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional


Params = Mapping[str, np.ndarray]
POOLINGS = {
    "token": lambda tokens: tokens[:, 0],
    "gap": lambda tokens: tokens.mean(dim=1),
    "gmp": lambda tokens: tokens.amax(dim=1),
    "gsp": lambda tokens: tokens.sum(dim=1),
}


def official_forward(
    params: Params,
    model_config: Mapping[str, Any],
    video: torch.Tensor,
    steps: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return all tokens (batch, time, space, hidden) as they enter the encoder, and the logits (batch, classes).

    Args:
        params: official arrays by their `/`-joined names.
        model_config: `config.model` of an official configuration.
        video: (batch, frames, height, width, channels).
        steps: time steps whose tokens go through the (spatial) encoder, to save time; None for all. Model 2's temporal
            encoder then gets their outputs in turn, repeated to the number of time steps.
        dtype: dtype of the computation.
    """
    weights = _Weights(params, dtype)
    kind = (model_config.get("attention_config") or {}).get("type", "spacetime")
    pool = POOLINGS[model_config.get("classifier", "gap")]
    has_token = model_config.get("classifier") == "token"
    grid = embed(weights, model_config, video.to(dtype))  # (batch, time, space, hidden)
    batch, time, space, hidden = grid.shape
    steps = list(range(time)) if steps is None else list(steps)

    is_factorised_encoder = kind == "factorized_encoder"
    encoder = "SpatialTransformer" if is_factorised_encoder else "Transformer"
    positions = weights(f"{encoder}/posembed_input/pos_embedding")
    grid = grid + positions[:, int(has_token) :].reshape(1, -1, space, hidden)
    chosen = grid[:, steps]
    token = None
    if has_token:
        token = weights(f"cls_{encoder}" if is_factorised_encoder else "cls") + positions[:, :1]

    if is_factorised_encoder:
        tokens = _prepend(token, chosen.reshape(-1, space, hidden))  # (batch * time, 1 + space, hidden)
        pooled = pool(transformer(weights, encoder, tokens, attend)).reshape(batch, len(steps), hidden)
        over_time = pooled[:, [index % len(steps) for index in range(time)]]  # (batch, time, hidden)
        if (model_config.get("attention_config") or {}).get("spatial_only_baseline"):
            features = over_time.mean(dim=1)
        else:
            encoder = "TemporalTransformer"
            over_time = _prepend(weights(f"cls_{encoder}") if has_token else None, over_time)
            over_time = over_time + weights(f"{encoder}/posembed_input/pos_embedding")
            features = pool(transformer(weights, encoder, over_time, attend))
    elif kind == "spacetime":
        tokens = _prepend(token, chosen.reshape(batch, -1, hidden))
        features = pool(transformer(weights, encoder, tokens, attend))
    elif kind == "factorized_dot_product_attention":
        features = pool(transformer(weights, encoder, chosen, attend_half_and_half).flatten(1, 2))
    elif kind == "factorized_self_attention_block":
        order = model_config["attention_config"].get("attention_order", "time_space").split("_")
        features = pool(transformer(weights, encoder, chosen, attend, order).flatten(1, 2))
    else:
        raise ValueError(f"The official model has no attention of type {kind!r}.")
    if model_config.get("representation_size") is not None:
        features = weights.dense(features, "pre_logits").tanh()
    return grid, weights.dense(features, "output_projection")


def embed(weights: _Weights, model_config: Mapping[str, Any], video: torch.Tensor) -> torch.Tensor:
    """(batch, frames, height, width, channels) -> (batch, time, space, hidden), without pixels that fill no patch."""
    kernel = weights("embedding/kernel")
    encoding = model_config["temporal_encoding_config"]
    if encoding["method"] == "temporal_sampling":
        frames, wanted = video.shape[1], encoding["n_sampled_frames"]
        indices = np.arange(frames / (wanted + 1), frames, frames / (wanted + 1))
        video = video[:, np.clip(np.round(indices).astype(int), 0, frames - 1)]
        kernel = kernel[None]
    kernel = kernel.permute(4, 3, 0, 1, 2)  # (hidden, channels, t, h, w)
    grid = functional.conv3d(video.movedim(-1, 1), kernel, weights("embedding/bias"), stride=kernel.shape[2:])
    return grid.flatten(3).permute(0, 2, 3, 1)  # (batch, hidden, time, rows, columns) -> (batch, time, space, hidden)


def transformer(
    weights: _Weights, encoder: str, tokens: torch.Tensor, attention: Any, order: Any = None
) -> torch.Tensor:
    """Apply all blocks and the last LayerNorm; with an `order`, blocks attend over one axis after the other."""
    index = 0
    while f"{encoder}/encoderblock_{index}/{'LayerNorm_mlp' if order else 'LayerNorm_0'}/scale" in weights.params:
        block = f"{encoder}/encoderblock_{index}/"
        if order:
            for axis in order:
                tokens = tokens + over_axis(weights, block, tokens, axis)
            norm, mlp = "LayerNorm_mlp", "MlpBlock"
        else:
            tokens = tokens + weights.attention(
                weights.layer_norm(tokens, f"{block}LayerNorm_0"), f"{block}MultiHeadDotProductAttention_0", attention
            )
            norm, mlp = "LayerNorm_1", "MlpBlock_0"
        hidden = weights.dense(weights.layer_norm(tokens, block + norm), f"{block}{mlp}/Dense_0")
        # flax's default is the tanh approximation
        tokens = tokens + weights.dense(functional.gelu(hidden, approximate="tanh"), f"{block}{mlp}/Dense_1")
        index += 1
    return weights.layer_norm(tokens, f"{encoder}/encoder_norm")


def over_axis(weights: _Weights, block: str, tokens: torch.Tensor, axis: str) -> torch.Tensor:
    """Attend in (batch, time, space, hidden) within one time step ("space") or within one place ("time")."""
    normed = weights.layer_norm(tokens, f"{block}LayerNorm_{axis}")
    normed = normed.transpose(1, 2) if axis == "time" else normed
    attended = weights.attention(normed, f"{block}MultiHeadDotProductAttention_{axis}", attend)
    return attended.transpose(1, 2) if axis == "time" else attended


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend over the axis before the heads: (..., tokens, heads, head_dim) each -> the same."""
    query, key, value = (one.transpose(-2, -3) for one in (query, key, value))  # (..., heads, tokens, head_dim)
    return functional.scaled_dot_product_attention(query, key, value).transpose(-2, -3)


def attend_half_and_half(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(batch, time, space, heads, head_dim) -> the same: half of the heads over time, the second half over space."""
    half = query.shape[-2] // 2
    over_time = [one[..., :half, :].transpose(1, 2) for one in (query, key, value)]
    over_space = [one[..., half:, :] for one in (query, key, value)]
    return torch.cat([attend(*over_time).transpose(1, 2), attend(*over_space)], dim=-2)


def _prepend(token: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if token is None else torch.cat([token.expand(len(tokens), 1, -1), tokens], dim=1)


class _Weights:
    """Official parameters by name, and the layers that use them."""

    def __init__(self, params: Params, dtype: torch.dtype):
        self.params = params
        self.dtype = dtype

    def __call__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.params[name])).to(self.dtype)

    def dense(self, values: torch.Tensor, name: str) -> torch.Tensor:
        return values @ self(f"{name}/kernel") + self(f"{name}/bias")

    def layer_norm(self, values: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(values, values.shape[-1:], self(f"{name}/scale"), self(f"{name}/bias"), eps=1e-6)

    def attention(self, values: torch.Tensor, name: str, attention: Any) -> torch.Tensor:
        """(..., tokens, hidden) -> the same; kernels (hidden, heads, head_dim), `out` (heads, head_dim, hidden)."""
        heads = []
        for projection in (f"{name}/query", f"{name}/key", f"{name}/value"):
            bias = self(f"{projection}/bias") if f"{projection}/bias" in self.params else 0.0
            heads.append(torch.einsum("...d,dnh->...nh", values, self(f"{projection}/kernel")) + bias)
        out = torch.einsum("...nh,nhd->...d", attention(*heads), self(f"{name}/out/kernel"))
        return out + self(f"{name}/out/bias")
