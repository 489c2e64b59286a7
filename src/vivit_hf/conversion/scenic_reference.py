"""
The forward pass of google-research/scenic `projects/vivit/model.py` in numpy, to check conversions against.

It was written from the paper and the official code, reads parameters by their official names, and deliberately shares
no code with the model. Shapes are given in the words batch, time, space, hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Params = Mapping[str, np.ndarray]
POOLINGS = {
    "token": lambda tokens: tokens[:, 0],
    "gap": lambda tokens: tokens.mean(axis=1),
    "gmp": lambda tokens: tokens.max(axis=1),
    "gsp": lambda tokens: tokens.sum(axis=1),
}


def official_forward(
    params: Params,
    model_config: Mapping[str, Any],
    video: np.ndarray,
    steps: Sequence[int] | None = None,
    dtype: type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
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
    grid = embed(weights, model_config, video.astype(dtype))  # (batch, time, space, hidden)
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
            features = over_time.mean(axis=1)
        else:
            encoder = "TemporalTransformer"
            over_time = _prepend(weights(f"cls_{encoder}") if has_token else None, over_time)
            over_time = over_time + weights(f"{encoder}/posembed_input/pos_embedding")
            features = pool(transformer(weights, encoder, over_time, attend))
    elif kind == "spacetime":
        tokens = _prepend(token, chosen.reshape(batch, -1, hidden))
        features = pool(transformer(weights, encoder, tokens, attend))
    elif kind == "factorized_dot_product_attention":
        features = pool(_flat(transformer(weights, encoder, chosen, attend_half_and_half)))
    elif kind == "factorized_self_attention_block":
        order = model_config["attention_config"].get("attention_order", "time_space").split("_")
        features = pool(_flat(transformer(weights, encoder, chosen, attend, order)))
    else:
        raise ValueError(f"The official model has no attention of type {kind!r}.")
    if model_config.get("representation_size") is not None:
        features = np.tanh(weights.dense(features, "pre_logits"))
    return grid, weights.dense(features, "output_projection")


def embed(weights: _Weights, model_config: Mapping[str, Any], video: np.ndarray) -> np.ndarray:
    """(batch, frames, height, width, channels) -> (batch, time, space, hidden), without pixels that fill no patch."""
    kernel = weights("embedding/kernel")
    encoding = model_config["temporal_encoding_config"]
    if encoding["method"] == "temporal_sampling":
        frames, wanted = video.shape[1], encoding["n_sampled_frames"]
        indices = np.arange(frames / (wanted + 1), frames, frames / (wanted + 1))
        video = video[:, np.clip(np.round(indices).astype(int), 0, frames - 1)]
        kernel = kernel[None]
    (t, h, w), hidden = kernel.shape[:3], kernel.shape[-1]
    batch, frames, height, width, channels = video.shape
    time, rows, columns = frames // t, height // h, width // w
    patches = video[:, : time * t, : rows * h, : columns * w]
    patches = patches.reshape(batch, time, t, rows, h, columns, w, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    patches = patches.reshape(batch, time, rows * columns, -1)  # (batch, time, space, patch)
    return patches @ kernel.reshape(-1, hidden) + weights("embedding/bias")


def transformer(weights: _Weights, encoder: str, tokens: np.ndarray, attention: Any, order: Any = None) -> np.ndarray:
    """Apply all blocks and the last LayerNorm; with an `order`, blocks attend over one axis after the other."""
    index = 0
    while f"{encoder}/encoderblock_{index}/{'LayerNorm_mlp' if order else 'LayerNorm_0'}/scale" in weights.params:
        block = f"{encoder}/encoderblock_{index}/"
        if order:
            for axis in order:
                attended = over_axis(weights, block, tokens, axis)
                tokens = tokens + attended
            norm, mlp = "LayerNorm_mlp", "MlpBlock"
        else:
            tokens = tokens + weights.attention(
                weights.layer_norm(tokens, f"{block}LayerNorm_0"), f"{block}MultiHeadDotProductAttention_0", attention
            )
            norm, mlp = "LayerNorm_1", "MlpBlock_0"
        hidden = gelu(weights.dense(weights.layer_norm(tokens, block + norm), f"{block}{mlp}/Dense_0"))
        tokens = tokens + weights.dense(hidden, f"{block}{mlp}/Dense_1")
        index += 1
    return weights.layer_norm(tokens, f"{encoder}/encoder_norm")


def over_axis(weights: _Weights, block: str, tokens: np.ndarray, axis: str) -> np.ndarray:
    """Attend in (batch, time, space, hidden) within one time step ("space") or within one place ("time")."""
    normed = weights.layer_norm(tokens, f"{block}LayerNorm_{axis}")
    normed = normed.swapaxes(1, 2) if axis == "time" else normed
    attended = weights.attention(normed, f"{block}MultiHeadDotProductAttention_{axis}", attend)
    return attended.swapaxes(1, 2) if axis == "time" else attended


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attend over the axis before the heads: (..., tokens, heads, head_dim) each -> the same."""
    query, key, value = (array.swapaxes(-2, -3) for array in (query, key, value))  # (..., heads, tokens, head_dim)
    scores = (query / np.sqrt(query.shape[-1]).astype(query.dtype)) @ key.swapaxes(-1, -2)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return ((scores / scores.sum(axis=-1, keepdims=True)) @ value).swapaxes(-2, -3)


def attend_half_and_half(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(batch, time, space, heads, head_dim) -> the same: half of the heads over time, the second half over space."""
    half = query.shape[-2] // 2
    over_time = [array[..., :half, :].swapaxes(1, 2) for array in (query, key, value)]
    over_space = [array[..., half:, :] for array in (query, key, value)]
    return np.concatenate([attend(*over_time).swapaxes(1, 2), attend(*over_space)], axis=-2)


def gelu(values: np.ndarray) -> np.ndarray:
    """Return the tanh approximation of GELU, flax's default."""
    inner = np.sqrt(2 / np.pi).astype(values.dtype) * (values + 0.044715 * values**3)
    return 0.5 * values * (1 + np.tanh(inner))


def _prepend(token: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
    if token is None:
        return tokens
    return np.concatenate([np.broadcast_to(token, (len(tokens), 1, token.shape[-1])), tokens], axis=1)


def _flat(grid: np.ndarray) -> np.ndarray:
    return grid.reshape(grid.shape[0], -1, grid.shape[-1])  # (batch, time, space, hidden) -> (batch, tokens, hidden)


class _Weights:
    """Official parameters by name, and the layers that use them."""

    def __init__(self, params: Params, dtype: type):
        self.params = params
        self.dtype = dtype

    def __call__(self, name: str) -> np.ndarray:
        return np.asarray(self.params[name], dtype=self.dtype)

    def dense(self, values: np.ndarray, name: str) -> np.ndarray:
        return values @ self(f"{name}/kernel") + self(f"{name}/bias")

    def layer_norm(self, values: np.ndarray, name: str) -> np.ndarray:
        centred = values - values.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-6).astype(self.dtype) * self(f"{name}/scale") + self(f"{name}/bias")

    def attention(self, values: np.ndarray, name: str, attention: Any) -> np.ndarray:
        """(..., tokens, hidden) -> the same; kernels (hidden, heads, head_dim), `out` (heads, head_dim, hidden)."""
        heads = []
        for projection in ("query", "key", "value"):
            kernel = self(f"{name}/{projection}/kernel")
            projected = values @ kernel.reshape(len(kernel), -1)
            heads.append(projected.reshape(*values.shape[:-1], *kernel.shape[1:]) + self._bias(f"{name}/{projection}"))
        out = self(f"{name}/out/kernel")
        context = attention(*heads)
        return context.reshape(*values.shape[:-1], -1) @ out.reshape(-1, out.shape[-1]) + self(f"{name}/out/bias")

    def _bias(self, name: str) -> np.ndarray | float:
        return self(f"{name}/bias") if f"{name}/bias" in self.params else 0.0
