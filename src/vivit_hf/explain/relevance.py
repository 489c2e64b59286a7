"""
Attention rollout, and attention weighted by the gradient of one class, for all four variants.

Both compute how much each token of the clip contributes to the pooled output. Relevance starts at the output and is
passed back through the attention of each layer, as a vector: no matrices are multiplied with each other, and attention
over time and over space (Models 2, 3 and 4) is never expanded to a matrix of all tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.labels import LabelMap, to_probabilities
from ..inference.finite_outputs import check_finite
from ..inference.optimization import optimized
from ..modeling_vivit import check_pixel_values, visible_steps


class Sublayer(NamedTuple):
    """
    The parallel dot products of a sub-layer, each with whether it attends over time, and the module that merges tokens
    behind them.
    """

    products: list[tuple[nn.Module, bool]]
    merging: nn.Module | None = None


class Merged(NamedTuple):
    """Where tokens merged: the place of each token's successor, int64, and its share in it, (sequences, tokens)."""

    successors: torch.Tensor
    shares: torch.Tensor

    def pass_on(self, relevance: torch.Tensor) -> torch.Tensor:
        """Return relevance of merged tokens (sequences, remaining) from that of their copies (sequences, tokens)."""
        successors = self.successors.to(relevance.device)
        merged = relevance.new_zeros(len(relevance), int(successors.max()) + 1)
        return merged.scatter_add(1, successors, relevance)

    def pass_back(self, relevance: torch.Tensor) -> torch.Tensor:
        """Return the relevance of tokens (sequences, tokens) from that of the merged ones (sequences, remaining)."""
        shares = self.shares.to(relevance.device)
        return relevance.gather(1, self.successors.to(relevance.device)) * shares


class Recorded(dict[nn.Module, torch.Tensor]):
    """
    The attention of each dot product for one clip, averaged over heads: (sequences, tokens, tokens).

    `visible`: the time steps that take part, bool (time,).
    """

    def __init__(self, visible: torch.Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.merged: dict[nn.Module | None, Merged] = {}


@dataclass
class Relevance:
    """
    The share of every token of a clip in the output, never negative, and 0 for masked time steps.

    `space`: float32 (batch, time, height, width) in tokens; it sums to 1 for each clip.
    `time`: float32 (batch, time), the sum of `space` over height and width.
    """

    space: torch.Tensor
    time: torch.Tensor


def attention_rollout(model: Any, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> Relevance:
    """
    Compute attention rollout: how much the pooled output attends to each token, whatever the class.

    Each sub-layer with attention A, averaged over its heads, counts as 0.5 I + 0.5 A, because of its residual
    connection. The map is the class token's row of their product or, if tokens are pooled without one, the mean row.

    - Model 1: the joint attention.
    - Model 2: rollout in the temporal encoder gives the share of each time step (without that encoder, the pooling over
      time alone does: equal shares, or those of `temporal_pooling="attention"`); rollout in the spatial encoder spreads
      it over the positions of the step.
    - Model 3: attention over space and over time are separate sub-layers, in the configured order.
    - Model 4: half of the heads attend over time and half over space, so A is the mean of both.

    Where tokens merge (`merge_tokens`), a merged token passes its relevance on to its tokens by their shares in it,
    which are those of their numbers of patches.

    Clips are processed one at a time, and only the mean over the heads is kept of each layer. ViViT-B/16x2 on 32 frames
    with joint attention (12 layers, 3,137 tokens) takes 1.5 GB beside its weights in float32, 0.5 GB of it for these
    means; Model 3 takes 0.4 GB.

    Args:
        model: a `ViViTModel` or `ViViTForVideoClassification`, with any attention implementation, on any device.
        pixel_values: (batch, frames, channels, height, width), floats as the model takes them.
        frame_mask: the visible frames, bool (batch, frames); None for all.

    Returns:
        The relevance, on the device of `pixel_values`.

    Raises:
        TypeError: if the model is not a ViViT.
        ValueError: if the model does not accept `pixel_values` or `frame_mask`.
        NonFiniteError: if its attention is not finite.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3.
    """
    backbone = backbone_for(model, pixel_values)
    space = pixel_values.new_empty(len(pixel_values), *backbone.config.grid_size, dtype=torch.float32)
    with evaluating(model), optimized(model):
        for index in range(len(pixel_values)):
            clip, mask = _one_clip(pixel_values, frame_mask, index)
            visible = _visible_of(backbone, mask)
            with torch.no_grad(), _recording(model, backbone, _keep_mean, visible) as recorded:
                backbone(clip.to(model.device), frame_mask=mask, output_attentions=True)
                relevance = _rollout(backbone, recorded)
                check_finite(relevance.sum(), model, clip)
                space[index] = _shares(relevance, visible)
    return Relevance(space, space.sum(dim=(2, 3)))


def gradient_relevance(
    model: Any,
    pixel_values: torch.Tensor,
    class_index: int | Sequence[int] | torch.Tensor | None = None,
    frame_mask: torch.Tensor | None = None,
) -> Relevance:
    """
    Compute attention weighted by gradients: how much each token supports one class.

    A sub-layer with attention A counts as I + mean over heads of max(0, A * gradient of the class's logit for A). As in
    `attention_rollout`, the map is the class token's row of their product or the mean row, without the share that
    residual connections alone give each token. In Model 2, the relevance of the time steps continues into the spatial
    encoder.

    Parameters, their `.grad`, `requires_grad` and the training mode are unchanged. Clips are processed one at a time,
    with the attention of all heads and layers in memory: ViViT-B/16x2 on 32 frames with joint attention takes 8.5 GB
    beside its weights in float32, 5.7 GB of it attention; Models 2 to 4 take 2 to 4 GB.

    Args:
        model: a `ViViTForVideoClassification`, with any attention implementation, on any device.
        pixel_values: (batch, frames, channels, height, width), floats as the model takes them.
        class_index: the class, one for all clips or (batch,), as an index into the logits (with `label_groups`, of all
            groups). None uses the most likely class of each clip.
        frame_mask: the visible frames, bool (batch, frames); None for all.

    Returns:
        The relevance, on the device of `pixel_values`; equal shares if no token supports the class.

    Raises:
        TypeError: if the model is not a ViViT, or has no classifier.
        ValueError: if the model does not accept `pixel_values` or `frame_mask`, or a class does not exist.
        NonFiniteError: if the logits or the gradients are not finite.

    Source: Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", ICCV 2021, equations 5 and 6.
    """
    backbone = backbone_for(model, pixel_values)
    if model is backbone or not model.config.num_labels:
        raise TypeError(
            "There are no classes to explain: expected a ViViTForVideoClassification with labels, but got "
            f"{type(model).__name__}{' with num_labels=0' * (model is not backbone)}. `attention_rollout` does without."
        )
    classes = _class_indices(class_index, len(pixel_values), model.config.num_labels)
    label_map = LabelMap.from_config(model.config)
    space = pixel_values.new_empty(len(pixel_values), *backbone.config.grid_size, dtype=torch.float32)
    for index in range(len(pixel_values)):
        clip, mask = _one_clip(pixel_values, frame_mask, index)
        visible = _visible_of(backbone, mask)
        recording = _recording(model, backbone, _keep_gradient, visible)
        # Enable gradients even if the caller has disabled them. They flow to the clip, since every parameter may be
        # frozen.
        with torch.inference_mode(False), torch.enable_grad(), recording as recorded:
            leaf = clip.clone().to(model.device).requires_grad_()
            logits = model(leaf, frame_mask=mask, output_attentions=True, return_dict=True).logits[0]
            check_finite(logits, model, clip)
            chosen = classes[index]
            if chosen is None:
                chosen = int(to_probabilities(logits.detach(), label_map).argmax())
            torch.autograd.grad(logits[chosen], leaf)
        with torch.no_grad():
            relevance = _gradient_rule(backbone, recorded)
            check_finite(relevance.sum(), model, clip)
            space[index] = _shares(relevance, visible)
    return Relevance(space, space.sum(dim=(2, 3)))


def backbone_for(model: Any, pixel_values: Any) -> Any:
    """Return the `ViViTModel` inside a model, after checking `pixel_values` for it."""
    # By its name: models loaded from the Hub with their own code have other classes.
    backbone: Any = getattr(model, "base_model", None)
    if getattr(getattr(backbone, "config", None), "model_type", None) != "vivit_hf" or not hasattr(backbone, "encoder"):
        raise TypeError(f"Expected a ViViTModel or ViViTForVideoClassification of this package, got {type(model)}.")
    check_pixel_values(pixel_values, backbone.config, any_size=False)
    return backbone


def _one_clip(
    pixel_values: torch.Tensor, frame_mask: torch.Tensor | None, index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a batch of one clip, and its mask."""
    one = slice(index, index + 1)
    return pixel_values[one].detach(), None if frame_mask is None else frame_mask[one]


def _visible_of(backbone: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the time steps of a clip that take part, bool (time,), by its mask (1, frames)."""
    if mask is None:
        return torch.ones(backbone.config.grid_size[0], dtype=torch.bool)
    return visible_steps(mask.cpu(), backbone.config)[0]


def _class_indices(class_index: Any, batch: int, num_labels: int) -> Sequence[int | None]:
    if class_index is None:
        return [None] * batch
    indices = np.asarray(class_index.cpu() if isinstance(class_index, torch.Tensor) else class_index)
    is_in_range = indices.dtype.kind in "iu" and bool(((indices >= 0) & (indices < num_labels)).all())
    if not is_in_range or indices.shape not in ((), (batch,)):
        raise ValueError(
            f"`class_index={class_index!r}` must be one whole number from 0 to {num_labels - 1}, or one for each of "
            f"the {batch} clips."
        )
    return np.broadcast_to(indices, batch).tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recording(
    model: Any, backbone: Any, keep: Callable[[Recorded, nn.Module, torch.Tensor], None], visible: torch.Tensor
) -> Iterator[Recorded]:
    """Record what `keep` extracts from the attention of every dot product, in evaluation mode."""
    recorded = Recorded(visible)

    def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        context, weights = output
        keep(recorded, module, weights)
        return context, None  # transformers' recorder, the next hook, keeps nothing

    def pooler_hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        tokens, *visible = inputs
        recorded[module] = module.weights(tokens.detach(), *visible).detach()  # type: ignore[operator]

    def merging_hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, merged_sizes, successors = output
        if successors is not None:
            sizes = torch.ones_like(successors) if inputs[2] is None else inputs[2]
            recorded.merged[module] = Merged(successors, sizes / merged_sizes.gather(1, successors))

    encoders = [backbone.encoder] + [backbone.temporal_encoder] * (backbone.temporal_encoder is not None)
    sublayers = [sublayer for encoder in encoders for sublayer in _sublayers(encoder)]
    modules = [module for sublayer in sublayers for module, _ in sublayer.products]
    handles = [module.register_forward_hook(hook, prepend=True) for module in modules]
    mergings = [sublayer.merging for sublayer in sublayers if sublayer.merging is not None]
    handles += [module.register_forward_hook(merging_hook) for module in mergings]
    if (pooler := getattr(backbone, "temporal_pooler", None)) is not None:  # the code of older releases has none
        handles.append(pooler.register_forward_hook(pooler_hook))
    try:
        with evaluating(model):
            yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _keep_mean(recorded: Recorded, module: nn.Module, weights: torch.Tensor) -> None:
    recorded[module] = weights.mean(dim=1, dtype=torch.float32)


def _keep_gradient(recorded: Recorded, module: nn.Module, weights: torch.Tensor) -> None:
    """Weight the attention by its gradient as soon as that is computed, so that no gradient is kept."""
    values = weights.detach()

    def weigh(gradient: torch.Tensor) -> None:
        recorded[module] = (gradient.float() * values).clamp_min_(0).mean(dim=1)

    weights.register_hook(weigh)


def _sublayers(encoder: Any) -> list[Sublayer]:
    """Return the attention sub-layers of an encoder in the order of computation."""
    sublayers: list[Sublayer] = []
    for layer in encoder.layer:
        if hasattr(layer, "attention_space"):  # Model 3
            both = [Sublayer([(layer.attention_space.dot_product, False)])]
            both.append(Sublayer([(layer.attention_time.dot_product, True)]))
            sublayers += reversed(both) if layer.time_first else both
        elif hasattr(layer.attention, "spatial_dot_product"):  # Model 4
            products = [(layer.attention.dot_product, True), (layer.attention.spatial_dot_product, False)]
            sublayers.append(Sublayer(products))
        else:  # only here tokens can merge; the code of older releases has no `merging`
            sublayers.append(Sublayer([(layer.attention.dot_product, False)], getattr(layer, "merging", None)))
    return sublayers


def _pass_back(
    encoder: Any, recorded: Recorded, relevance: torch.Tensor, kept: float, passed: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pass relevance from the output of an encoder back to its input.

    Return all of it, and the part that went through attention at least once. Relevance is (sequences, tokens), or
    (time, space) in Models 3 and 4.
    """
    sublayers = _sublayers(encoder)
    merged = [recorded.merged.get(sublayer.merging) for sublayer in sublayers]
    for one in merged:
        relevance = relevance if one is None else one.pass_on(relevance)  # the output has copies of merged tokens
    attended = torch.zeros_like(relevance)
    for sublayer, one in zip(reversed(sublayers), reversed(merged), strict=True):
        if one is not None:
            relevance, attended = one.pass_back(relevance), one.pass_back(attended)
        received = torch.zeros_like(relevance)
        for module, is_temporal in sublayer.products:
            along = relevance.T if is_temporal else relevance
            # Attention is (query, key): the relevance of a query goes to its keys.
            part = torch.einsum("sqk,sq->sk", recorded[module], along.to(recorded[module].device))
            received += (part.T if is_temporal else part).to(relevance.device) / len(sublayer.products)
        relevance = kept * relevance + passed * received
        attended += passed * received
    return relevance, attended


def _pooled(pooling: str, shares: torch.Tensor, visible: torch.Tensor, num_registers: int = 0) -> torch.Tensor:
    """
    Spread the shares of the pooled outputs (sequences,) over the pooled tokens: (sequences, prefix + tokens).

    Args:
        visible: the tokens that are pooled unless there is a class token, bool (tokens,).
    """
    registers = shares.new_zeros(len(shares), num_registers)
    if pooling != "cls":
        even = visible.to(shares) / visible.sum().to(shares)  # (tokens,)
        return torch.cat([registers, shares[:, None] * even], dim=1)
    return torch.cat([shares[:, None], registers, shares.new_zeros(len(shares), len(visible))], dim=1)


def _start(backbone: Any, recorded: Recorded, kept: float, passed: float) -> torch.Tensor:
    """Return the relevance of the (spatial) encoder's output: (sequences, tokens), Models 3 and 4: (time, space)."""
    config = backbone.config
    time, height, width = config.grid_size
    space = height * width
    registers = getattr(config, "num_register_tokens", 0)  # the code of older releases has none
    whole = torch.ones(1, device=next(iter(recorded.values())).device)
    visible = recorded.visible.repeat_interleave(space)  # (time * space,)
    if config.is_token_grid:
        return _pooled("mean", whole, visible).reshape(time, space)
    if config.attention_type == "spatio_temporal":
        return _pooled(config.pooling, whole, visible, registers)
    has_encoder = backbone.temporal_encoder is not None
    pooler: Any = getattr(backbone, "temporal_pooler", None)
    steps = recorded.get(pooler)  # (1, time)
    if steps is None:
        pooling = getattr(config, "pooling_over_time", config.pooling if has_encoder else "mean")
        steps = _pooled(pooling, whole, recorded.visible)  # (1, [1 +] time)
    if has_encoder:
        steps, _ = _pass_back(backbone.temporal_encoder, recorded, steps, kept, passed)
    return _pooled(config.pooling, steps[0, -time:], torch.ones(space, dtype=torch.bool), registers)


def _rollout(backbone: Any, recorded: Recorded) -> torch.Tensor:
    """Return relevance (time, height, width) that does not sum to 1 yet."""
    start = _start(backbone, recorded, 0.5, 0.5)
    grid = backbone.config.grid_size
    relevance = _pass_back(backbone.encoder, recorded, start, 0.5, 0.5)[0]
    if backbone.config.attention_type == "factorised_encoder":
        # Relevance left at the prefix tokens of a step belongs to no position, so all positions share it.
        places = relevance[:, -grid[1] * grid[2] :]
        all_places = places.sum(dim=1, keepdim=True).clamp_min(torch.finfo(places.dtype).tiny)
        return (start.sum(dim=1, keepdim=True) * places / all_places).reshape(grid)
    return relevance.reshape(-1)[-grid[0] * grid[1] * grid[2] :].reshape(grid)


def _gradient_rule(backbone: Any, recorded: Recorded) -> torch.Tensor:
    """Return relevance (time, height, width) that does not sum to 1 yet."""
    grid = backbone.config.grid_size
    attended = _pass_back(backbone.encoder, recorded, _start(backbone, recorded, 1, 1), 1, 1)[1]
    if backbone.config.attention_type == "spatio_temporal":
        return attended[0, -grid[0] * grid[1] * grid[2] :].reshape(grid)
    return attended[:, -grid[1] * grid[2] :].reshape(grid)


def _shares(relevance: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return shares that sum to 1 from relevance (time, height, width): equal ones of visible steps without any."""
    total = relevance.sum()
    if total > 0:
        return relevance / total
    even = torch.ones_like(relevance) * visible[:, None, None].to(relevance)
    return even / even.sum()
