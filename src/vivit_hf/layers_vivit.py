"""
The layers of ViViT (section 3.3): attention over all tokens, over space, over time, and the transformer layers around.

One layer class for each kind of attention; all of them map (batch, ..., hidden) to (batch, ..., hidden).
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vivit import ViViTConfig
from .fast_paths_vivit import attention_implementation, linear, linear_with_activation


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention, written out. Query, key, value (batch, heads, tokens, head_dim) ->
    context (batch, tokens, heads, head_dim), weights (batch, heads, tokens, tokens).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ViViTDotProductAttention(nn.Module):
    """
    Dot-product attention among the tokens of each sequence, through transformers' attention interface.

    This module and its subclasses are what `output_attentions` records; asking for the weights runs the eager path,
    whatever the implementation, since no other gives them.
    """

    is_causal = False

    def __init__(self, config: ViViTConfig, head_dim: int):
        super().__init__()
        self.config = config
        self.scaling = head_dim**-0.5

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Query, key, value and context (batch, tokens, heads, head_dim), weights (batch, heads, tokens, tokens).
        """
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attention: Callable = eager_attention_forward
        if not (output_attentions or self.config.output_attentions):
            name = attention_implementation(self.config._attn_implementation, query, key, dropout > 0)
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attention(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            scaling=self.scaling,
            dropout=dropout,
        )


class ViViTSpatialDotProductAttention(ViViTDotProductAttention):
    """Attention within each time step; context as the query, weights (batch * time, heads, space, space)."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = query.shape[:2]
        # (batch, time, space, heads, head_dim) -> (batch * time, space, heads, head_dim)
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        context, weights = super().forward(query, key, value, output_attentions)
        return context.unflatten(0, grid), weights


class ViViTTemporalDotProductAttention(ViViTDotProductAttention):
    """Attention through time at each place; context as the query, weights (batch * space, heads, time, time)."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if output_attentions or self.config.output_attentions:
            # The recorded weights must be the ones that the context comes from, for gradients with respect to them.
            grid = query.shape[0], query.shape[2]
            # (batch, time, space, heads, head_dim) -> (batch * space, time, heads, head_dim)
            query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
            context, weights = super().forward(query, key, value, output_attentions)
            return context.unflatten(0, grid).transpose(1, 2), weights
        places = query.shape[2:4]
        # Each place is as good as a head of its own: no copy of the grid is needed to bring time next to head_dim.
        # (batch, time, space, heads, head_dim) -> (batch, time, space * heads, head_dim)
        query, key, value = (tensor.flatten(2, 3) for tensor in (query, key, value))
        context, _ = super().forward(query, key, value)
        return context.unflatten(2, places), None


class ViViTAttention(nn.Module):
    """Multi-head self-attention along the axis that `dot_product` attends over."""

    def __init__(self, config: ViViTConfig, dot_product: type[ViViTDotProductAttention], num_heads: int | None = None):
        super().__init__()
        self.num_heads = num_heads or config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dot_product = dot_product(config, self.head_dim)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, num_queries: int | None = None
    ) -> torch.Tensor:
        """
        (batch, ..., hidden) -> (batch, ..., hidden), the middle being what `dot_product` takes; with `num_queries`
        only for the first so many tokens, which attend to all, (batch, num_queries, hidden).
        """
        queries = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        heads = (self.num_heads, self.head_dim)
        projections = ((self.q_proj, queries), (self.k_proj, hidden_states), (self.v_proj, hidden_states))
        # (batch, ..., hidden) -> (batch, ..., heads, head_dim)
        query, key, value = (linear(projection, tokens).unflatten(-1, heads) for projection, tokens in projections)
        return linear(self.o_proj, self.attend(query, key, value, output_attentions).flatten(-2))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool
    ) -> torch.Tensor:
        """Query, key, value and context (batch, ..., heads, head_dim)."""
        return self.dot_product(query, key, value, output_attentions)[0]


class ViViTFactorisedDotProductAttention(ViViTAttention):
    """Half of the heads attend over time, half over space, side by side (section 3.3.4)."""

    def __init__(self, config: ViViTConfig):
        super().__init__(config, ViViTTemporalDotProductAttention)
        self.spatial_dot_product = ViViTSpatialDotProductAttention(config, self.head_dim)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool
    ) -> torch.Tensor:
        """Query, key, value and context (batch, time, space, heads, head_dim)."""
        over_time, over_space = zip(*(tensor.chunk(2, dim=-2) for tensor in (query, key, value)), strict=True)
        temporal, _ = self.dot_product(*over_time, output_attentions)
        spatial, _ = self.spatial_dot_product(*over_space, output_attentions)
        return torch.cat([temporal, spatial], dim=-2)


class ViViTMLP(nn.Module):
    def __init__(self, config: ViViTConfig, intermediate_size: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, intermediate_size or config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(self.fc1.out_features, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = linear_with_activation(self.fc1, self.activation, hidden_states)
        return self.dropout(linear(self.fc2, self.dropout(inner)))


class ViViTDropPath(nn.Module):
    """
    Stochastic depth: drops a residual branch per example, and divides by the probability of keeping it.

    The division, which the official code leaves out, makes training and evaluation agree in expectation.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = branch.new_empty(branch.shape[:1] + (1,) * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ViViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer over (batch, tokens, hidden): Models 1 and 2 (equations 4 and 5)."""

    def __init__(self, config: ViViTConfig, drop_path_rate: float = 0.0, temporal: bool = False):
        super().__init__()
        num_heads = config.temporal_num_attention_heads if temporal else None
        intermediate_size = config.temporal_intermediate_size if temporal else None
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = self.build_attention(config, num_heads)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViViTMLP(config, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViViTDropPath(drop_path_rate)

    def build_attention(self, config: ViViTConfig, num_heads: int | None) -> ViViTAttention:
        return ViViTAttention(config, ViViTDotProductAttention, num_heads)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, num_tokens: int | None = None
    ) -> torch.Tensor:
        """
        (batch, tokens, hidden) -> (batch, tokens, hidden); with `num_tokens`, which only Models 1 and 2 pass, the
        first so many of them, as they are beside all others.
        """
        attended = self.dropout(self.attention(self.layernorm_before(hidden_states), output_attentions, num_tokens))
        if num_tokens is not None:
            hidden_states = hidden_states[:, :num_tokens]
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class ViViTFactorisedSelfAttentionLayer(GradientCheckpointingLayer):
    """Model 3: attention over space, attention over time, MLP, each with its residual (section 3.3.3, equation 7)."""

    def __init__(self, config: ViViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.layernorm_space = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_space = ViViTAttention(config, ViViTSpatialDotProductAttention)
        self.layernorm_time = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_time = ViViTAttention(config, ViViTTemporalDotProductAttention)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViViTDropPath(drop_path_rate)
        self.time_first = config.attention_order == "time_space"

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> torch.Tensor:
        """(batch, time, space, hidden) -> (batch, time, space, hidden)."""
        attentions = [(self.layernorm_space, self.attention_space), (self.layernorm_time, self.attention_time)]
        for layernorm, attention in reversed(attentions) if self.time_first else attentions:
            attended = self.dropout(attention(layernorm(hidden_states), output_attentions))
            hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class ViViTFactorisedDotProductAttentionLayer(ViViTLayer):
    """Model 4: a plain layer whose heads divide time and space among them (section 3.3.4)."""

    def build_attention(self, config: ViViTConfig, num_heads: int | None) -> ViViTAttention:
        return ViViTFactorisedDotProductAttention(config)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "spatio_temporal": ViViTLayer,
    "factorised_encoder": ViViTLayer,
    "factorised_self_attention": ViViTFactorisedSelfAttentionLayer,
    "factorised_dot_product_attention": ViViTFactorisedDotProductAttentionLayer,
}


class ViViTEncoder(nn.Module):
    """A stack of layers; stochastic depth grows linearly from the first to the last."""

    def __init__(self, config: ViViTConfig, make_layer: Callable[..., nn.Module], num_layers: int):
        super().__init__()
        rates = [config.drop_path_rate * index / max(num_layers - 1, 1) for index in range(num_layers)]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer = nn.ModuleList([make_layer(config, rate) for rate in rates])

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, num_tokens: int | None = None
    ) -> torch.Tensor:
        """The tokens behind every layer in turn; with `num_tokens`, the last layer only gives the first so many."""
        hidden_states = self.dropout(hidden_states)
        *layers, last = self.layer
        for layer in layers:
            hidden_states = layer(hidden_states, output_attentions)
        if num_tokens is None:
            return last(hidden_states, output_attentions)
        return last(hidden_states, output_attentions, num_tokens)
