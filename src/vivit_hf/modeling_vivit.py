"""
ViViT in PyTorch (Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, arXiv:2103.15691).

Shapes are written in the words batch, time, space, hidden. A clip becomes a grid of time x space tokens
(space = height x width, in patches), ordered by time, then height, then width.

| `attention_type` | tokens between layers |
| --- | --- |
| `spatio_temporal` (Model 1) | (batch, 1 + time * space, hidden) |
| `factorised_encoder` (Model 2) | (batch * time, 1 + space, hidden), then (batch, 1 + time, hidden) |
| `factorised_self_attention` (Model 3) | (batch, time, space, hidden) |
| `factorised_dot_product_attention` (Model 4) | (batch, time, space, hidden) |
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_vivit import ViViTConfig
from .frame_sampling import sample_frames_uniformly
from .limits_vivit import check_choice
from .loading_vivit import CheckpointMixin
from .model_files import AutoClassMixin


Grid = tuple[int, int, int]  # (time, height, width) in tokens

POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens.mean(dim=1),
    "max": lambda tokens: tokens.amax(dim=1),
    "sum": lambda tokens: tokens.sum(dim=1),
    "concatenate": lambda tokens: tokens.flatten(1),  # over time alone, where the number of tokens is fixed
}


def pool_tokens(tokens: torch.Tensor, pooling: str, visible: torch.Tensor | None = None) -> torch.Tensor:
    """
    Pool the visible tokens: (batch, tokens, hidden), visible, bool (batch, tokens) or None for all -> (batch, hidden).

    "concatenate" keeps the places of the others, as zeros: (batch, tokens * hidden).
    """
    if visible is not None and pooling != "cls":
        tokens = tokens.masked_fill(~visible.unsqueeze(-1), -math.inf if pooling == "max" else 0)
        if pooling == "mean":
            number = visible.sum(dim=1, keepdim=True, dtype=torch.promote_types(tokens.dtype, torch.float32))
            return tokens.mean(dim=1) * (visible.shape[1] / number).to(tokens.dtype)
    return POOLINGS[pooling](tokens)


# Inputs


def check_pixel_values(pixel_values: torch.Tensor, config: ViViTConfig, any_size: bool) -> None:
    """Raise ValueError unless the clips have the model's size or, with `any_size`, at least one whole patch."""
    check_values(pixel_values, config)
    _, frames, _, height, width = pixel_values.shape
    actual, expected = (frames, height, width), (config.num_frames, *config.frame_size)
    if any_size:
        if any(side < patch for side, patch in zip(actual, config.tubelet_size, strict=True)):
            raise ValueError(
                f"A clip of {actual} (frames, height, width) has no whole patch of {tuple(config.tubelet_size)}. Use a "
                "longer or larger clip."
            )
    elif actual != expected:
        raise ValueError(
            f"The model expects clips of {expected} (frames, height, width), but got {actual}. Resize the clip, pass "
            "`interpolate_pos_encoding=True`, or change the model with `resize_position_embeddings`."
        )


def check_values(pixel_values: torch.Tensor, config: ViViTConfig) -> None:
    """Raise ValueError unless these are float clips with the model's channels, of any size."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 5:
        got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(f"`pixel_values` must be (batch, frames, channels, height, width), but got {got}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` of {pixel_values.dtype} look like raw frames; the model expects floats in [-1, 1]. Use "
            "ViViTVideoProcessor, which returns them."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError(f"`pixel_values` of shape {tuple(pixel_values.shape)} hold no clip; expected at least one.")
    channels = pixel_values.shape[2]
    if channels != config.num_channels:
        raise ValueError(
            f"`pixel_values` of shape {tuple(pixel_values.shape)} have {channels} channels in the third place, but the "
            f"model expects {config.num_channels}: (batch, frames, channels, height, width)."
        )


def check_frame_size(frames: torch.Tensor, config: ViViTConfig) -> None:
    """Raise ValueError unless (..., height, width) is the model's frame size."""
    size = tuple(frames.shape[-2:])
    if size != config.frame_size:
        raise ValueError(
            f"The model expects frames of {config.frame_size} (height, width), but got {size}. Resize the frames, or "
            "change the model with `resize_position_embeddings`."
        )


def becomes_graph() -> bool:
    """Return whether the call is compiled, exported or traced; a graph has no branches that depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def mask_frames(
    pixel_values: torch.Tensor, frame_mask: torch.Tensor, config: ViViTConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Turn a mask of frames into a mask of time steps, and let masked frames show visible ones.

    A step with a visible frame is visible. Its masked frames show the nearest earlier visible frame of the clip or, if
    there is none, the next. So do the frames of masked steps, which no result depends on. With tubelets of 2 frames:

        frames        a b   c d   e f   g h
        frame_mask    0 1   1 0   0 1   0 0      True (1) where visible
        shown         b b   c c   c f   f f
        steps          1     1     1     0

    Uniform frame sampling samples first, so that the steps are the sampled frames:

        frames        a b c d e f g h
        sampled           c d   f g
        frame_mask    1 1 1 1 1 0 0 0
        steps             1 1   0 0

    Frames that the model leaves out (the last ones if they do not fill a tubelet) make no step visible.

    Args:
        pixel_values: (batch, frames, channels, height, width).
        frame_mask: bool (batch, frames), True where visible.

    Returns:
        The clips that the model sees, in the shape given, and the visible steps, bool (batch, time); None if all are
        visible. In a graph (see `becomes_graph`) they are never None, and a clip with nothing visible is NaN.

    Raises:
        ValueError: for a mask of another kind or shape, and for clips without a visible step.
    """
    batch, frames = pixel_values.shape[:2]
    _check_frame_mask(frame_mask, batch, frames)
    frame_mask = frame_mask.to(pixel_values.device)
    steps = visible_steps(frame_mask, config)
    pixel_values = pixel_values[_rows(batch, frame_mask.device), nearest_visible_frames(frame_mask)]
    is_empty = ~steps.any(dim=1)
    if becomes_graph():  # with its steps visible, the NaN of an empty clip reaches every output
        return pixel_values.masked_fill(is_empty[:, None, None, None, None], math.nan), steps | is_empty[:, None]
    _check_not_empty(is_empty)
    return pixel_values, None if steps.all() else steps


def visible_steps(frame_mask: torch.Tensor, config: ViViTConfig) -> torch.Tensor:
    """Return the time steps with a visible frame, see `mask_frames`: bool (batch, frames) -> bool (batch, time)."""
    taken = frame_mask
    if config.embedding_type == "uniform_frame_sampling":
        taken = taken[:, _sampled_frames(len(taken.unbind(1)), config.num_sampled_frames)]
    patch_frames = config.tubelet_size[0]
    time = taken.shape[1] // patch_frames
    return taken[:, : time * patch_frames].unflatten(1, (time, patch_frames)).any(dim=2)  # (batch, time)


def _check_not_empty(is_empty: torch.Tensor) -> None:
    """Raise ValueError for clips without a visible time step, where `is_empty`, bool (batch,)."""
    if is_empty.any():
        numbers = is_empty.nonzero().flatten().tolist()
        raise ValueError(
            f"`frame_mask` leaves no visible time step in the clips {numbers} of {len(is_empty)}; expected at least "
            "one visible frame among those that the model takes. Leave these clips out."
        )


def mask_steps(
    steps: torch.Tensor, frame_mask: torch.Tensor, config: ViViTConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Do for steps between Model 2's encoders, (batch, time, hidden), what `mask_frames` does for pixels.

    Returns:
        The steps with zeros where they are masked, as Model 2 has them, and the visible ones, bool (batch, time); None
        if all are visible. In a graph, they are never None, and a clip with nothing visible is NaN.

    Raises:
        ValueError: for a mask of another kind, shape or number of steps, and for clips without a visible step.
    """
    batch, time = steps.shape[:2]
    _check_frame_mask(frame_mask, batch, None)
    frame_mask = frame_mask.to(steps.device)
    visible = visible_steps(frame_mask, config)
    if visible.shape[1] != time:
        raise ValueError(
            f"`frame_mask` of shape {tuple(frame_mask.shape)} has {visible.shape[1]} time steps, but `steps` of shape "
            f"{tuple(steps.shape)} have {time}: pass the mask of the frames that the steps were encoded from."
        )
    is_empty = ~visible.any(dim=1)
    steps = steps.masked_fill(~visible[:, :, None], 0)
    if becomes_graph():
        return steps.masked_fill(is_empty[:, None, None], math.nan), visible | is_empty[:, None]
    _check_not_empty(is_empty)
    return steps, None if visible.all() else visible


def _rows(batch: int, device: torch.device) -> torch.Tensor:
    """Return the number of each clip, int64 (batch, 1), to index clips with one index of frames each."""
    return torch.arange(batch, device=device)[:, None]


def nearest_visible_frames(frame_mask: torch.Tensor) -> torch.Tensor:
    """
    Return the frame to show in the place of each: itself if it is visible, else the nearest earlier visible one, else
    the next.

    bool (batch, frames) -> int64 (batch, frames).
    """
    numbers = torch.arange(frame_mask.shape[1], device=frame_mask.device)
    # (batch, frames, frames) -> (batch, frames); -1 if neither the frame nor an earlier one is visible
    earlier = torch.where(frame_mask[:, None] & (numbers <= numbers[:, None]), numbers, -1).amax(dim=2)
    first = frame_mask.int().argmax(dim=1, keepdim=True)  # onnxruntime 1.19 has it for int32, not for int64
    return torch.where(earlier < 0, first, earlier)


def _check_frame_mask(frame_mask: Any, batch: int, frames: int | None) -> None:
    """Raise ValueError unless a mask is bool (batch, frames); for steps, `frames` is None, and their number is free."""
    is_tensor = isinstance(frame_mask, torch.Tensor)
    if not is_tensor or frame_mask.dtype != torch.bool or not _has_shape(frame_mask, batch, frames):
        got = f"{frame_mask.dtype} {tuple(frame_mask.shape)}" if is_tensor else type(frame_mask).__name__
        expected = f"({batch}, {'frames' if frames is None else frames})"
        raise ValueError(
            f"`frame_mask` must be a bool tensor (batch, frames) = {expected}, True where a frame is visible, but got "
            f"{got}."
        )


def _has_shape(frame_mask: torch.Tensor, batch: int, frames: int | None) -> bool:
    # Not `len`, which fixes the batch size of a graph.
    return frame_mask.ndim == 2 and frame_mask.shape[0] == batch and frames in (None, frame_mask.shape[1])


def mask_tokens(attention_mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
    """
    Check a mask over the tokens (batch, tokens, hidden) of Model 1, as transformers' Vivit takes it.

    Args:
        attention_mask: (batch, tokens), 1 or True where a token is visible, 0 or False elsewhere; or, for each query,
            (batch, 1, tokens, tokens), bool like the other, or floats that are added to the scores.

    Returns:
        bool (batch, tokens), None if all are visible; a mask per query unchanged.

    Raises:
        ValueError: for a mask of another shape, and for clips without a visible token.
    """
    batch, number = tokens.shape[:2]
    shapes = (batch, number), (batch, 1, number, number)
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
    if shape not in shapes:
        raise ValueError(
            f"`attention_mask` must be a tensor (batch, tokens) = {shapes[0]} or (batch, 1, tokens, tokens) = "
            f"{shapes[1]}, but got {shape}. The tokens are the class token, register tokens and the grid."
        )
    attention_mask = attention_mask.to(tokens.device)
    if attention_mask.ndim == 4:
        return attention_mask
    visible = attention_mask.bool()
    if becomes_graph():
        return visible
    if not visible.any(dim=1).all():
        raise ValueError("`attention_mask` masks all tokens of a clip; expected at least one visible token.")
    return None if visible.all() else visible


def spread_mask(visible: torch.Tensor | None, tokens: torch.Tensor, space: int = 1) -> torch.Tensor | None:
    """
    Return the visible tokens among the tokens (batch, prefix + time * space, hidden) of visible steps, bool (batch,
    time): bool (batch, prefix + time * space), where prefix tokens are visible. None stays None.
    """
    if visible is None:
        return None
    visible = visible.repeat_interleave(space, dim=1)  # (batch, time * space)
    return nn.functional.pad(visible, (tokens.shape[1] - visible.shape[1], 0), value=True)


def shorten(tokens: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Leave out the time steps that no clip of a batch shows.

    Tokens (batch, time, space, hidden), visible (batch, time) -> the same with fewer steps; None in place of `visible`
    if all of them are visible then.
    """
    kept = visible.any(dim=0)  # (time,)
    visible = visible[:, kept]
    return tokens[:, kept], None if visible.all() else visible


def _check_takes_attention_mask(config: ViViTConfig, has_frame_mask: bool) -> None:
    """Raise ValueError unless the model is Model 1, without another mask."""
    if has_frame_mask or config.attention_type != "spatio_temporal":
        raise ValueError(
            "`attention_mask` masks tokens of Model 1 (`attention_type='spatio_temporal'`), without a `frame_mask`, "
            f"but got `attention_type={config.attention_type!r}` and {'a' if has_frame_mask else 'no'} `frame_mask`. "
            "Use `frame_mask` alone."
        )


def _check_has_steps(config: ViViTConfig) -> None:
    """Raise ValueError unless the model is Model 2."""
    if config.attention_type != "factorised_encoder":
        raise ValueError(
            "Steps are the tokens between the two encoders of Model 2 (`attention_type='factorised_encoder'`); a model "
            f"with `attention_type={config.attention_type!r}` takes `pixel_values`."
        )


class ViViTKwargs(TransformersKwargs, total=False):  # type: ignore[call-arg]
    """
    The options of a call, which travel from the model to its attention as keyword arguments.

    output_last_hidden_state: False if only the pooled output is needed, so that an optimised model (see
        `vivit_hf.inference.optimize`) may leave out the tokens that are not pooled. The plain model ignores it.
    """

    output_last_hidden_state: bool | None


# Some wrappers in transformers pass `return_dict` on.
_KNOWN_ARGUMENTS = frozenset({*ViViTKwargs.__annotations__, "return_dict"})


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for unknown arguments; None counts as not given (peft passes `input_ids=None`)."""
    for name, value in kwargs.items():
        if value is not None and name not in _KNOWN_ARGUMENTS:
            raise TypeError(
                f"forward() got an unexpected argument {name!r}. A ViViT takes `pixel_values`, `frame_mask`, "
                "`interpolate_pos_encoding`, `attention_mask` (Model 1), `labels` and `steps` (with a classifier), "
                "`bool_masked_pos` (in pretraining), and the arguments that transformers passes to every model."
            )


# Embeddings

POSITION_MODES = ("bicubic", "antialiased_bicubic", "align_corners_linear")


def resample_position_embeddings(
    position_embeddings: torch.Tensor,
    new_grid: Grid,
    old_grid: Grid,
    num_prefix_tokens: int = 0,
    mode: str = "bicubic",
) -> torch.Tensor:
    """
    Interpolate learned position embeddings from one (time, height, width) grid to another.

    Height and width are resampled together, then time. The sides need not be square. Axes that keep their length are
    left untouched; equal grids return the same tensor.

    Args:
        position_embeddings: (1, num_prefix_tokens + time * height * width, hidden), tokens in the order time, height,
            width; any floating dtype (the interpolation runs in at least float32).
        new_grid, old_grid: (time, height, width) in tokens.
        num_prefix_tokens: leading tokens without a place in the grid (a class token), returned unchanged.
        mode: "bicubic" (linear in time), as in most image transformers; "antialiased_bicubic", as in DINOv2 with
            registers; or "align_corners_linear": linear in all three axes with aligned corners, as in the official
            code.

    Returns:
        (1, num_prefix_tokens + new time * new height * new width, hidden), same dtype and device.

    Raises:
        ValueError: if the tensor does not fit `old_grid`, or the mode is unknown.
    """
    time, height, width = old_grid
    expected = num_prefix_tokens + time * height * width
    if position_embeddings.ndim != 3 or position_embeddings.shape[1] != expected:
        raise ValueError(
            f"Position embeddings of shape {tuple(position_embeddings.shape)} do not hold {num_prefix_tokens} prefix "
            f"tokens and a (time, height, width) grid of {old_grid}; expected (1, {expected}, hidden)."
        )
    check_choice("mode", mode, POSITION_MODES)
    if tuple(new_grid) == tuple(old_grid):
        return position_embeddings
    align = mode == "align_corners_linear"

    hidden = position_embeddings.shape[-1]
    dtype = position_embeddings.dtype
    prefix = position_embeddings[:, :num_prefix_tokens]
    grid = position_embeddings[:, num_prefix_tokens:].to(torch.promote_types(dtype, torch.float32))
    new_time, new_height, new_width = new_grid
    if (new_height, new_width) != (height, width):
        spatial = "bilinear" if align else "bicubic"
        grid = grid.reshape(time, height, width, hidden).permute(0, 3, 1, 2)  # (time, hidden, height, width)
        antialias, size = mode == "antialiased_bicubic", (new_height, new_width)
        grid = nn.functional.interpolate(grid, size, mode=spatial, align_corners=align, antialias=antialias)
        grid = grid.permute(0, 2, 3, 1)  # (time, height, width, hidden)
    if new_time != time:
        grid = grid.reshape(time, -1).T[None]  # (1, height * width * hidden, time)
        grid = nn.functional.interpolate(grid, new_time, mode="linear", align_corners=align)
        grid = grid[0].T  # (time, height * width * hidden)
    grid = grid.reshape(1, new_time * new_height * new_width, hidden).to(dtype)
    return torch.cat([prefix, grid], dim=1)


class ViViTTubeletProjection(nn.Conv3d):
    """A 3D convolution whose stride equals its kernel, computed as one matrix product over the patches."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, frames, height, width) -> (batch, hidden, time, height, width), in tokens."""
        (kt, kh, kw), (batch, channels, frames, height, width) = self.kernel_size, pixel_values.shape
        time, rows, columns = frames // kt, height // kh, width // kw
        patches = pixel_values[:, :, : time * kt, : rows * kh, : columns * kw]  # the official VALID padding
        patches = patches.reshape(batch, channels, time, kt, rows, kh, columns, kw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (batch, time, height, width, patch)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class ViViTPatchProjection(nn.Conv2d):
    """A 2D convolution whose stride equals its kernel, computed as one matrix product over the patches."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, hidden, height, width), in tokens."""
        (kh, kw), (batch, channels, height, width) = self.kernel_size, pixel_values.shape
        rows, columns = height // kh, width // kw
        patches = pixel_values[:, :, : rows * kh, : columns * kw]
        patches = patches.reshape(batch, channels, rows, kh, columns, kw)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (batch, height, width, patch)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@torch.compiler.assume_constant_result
def _sampled_frames(num_frames: int, num_sampled_frames: int) -> list[int]:
    return sample_frames_uniformly(num_frames, num_sampled_frames).tolist()


class ViViTUniformFrameEmbeddings(nn.Module):
    """Uniform frame sampling: 2D patches of equally spaced frames (section 3.2, figure 2)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        patch = tuple(config.tubelet_size[1:])
        self.config = config
        sizes = config.num_channels, config.hidden_size, patch
        self.projection = ViViTPatchProjection(*sizes, stride=patch, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, time, height, width, hidden)."""
        frames = len(pixel_values.unbind(1))  # a plain number even when compiling or tracing makes `shape` symbolic
        pixel_values = pixel_values[:, _sampled_frames(frames, self.config.num_sampled_frames)]
        batch, time = pixel_values.shape[:2]
        patches = self.projection(pixel_values.flatten(0, 1))  # (batch * time, hidden, height, width)
        return patches.permute(0, 2, 3, 1).unflatten(0, (batch, time))  # (batch, time, height, width, hidden)


class ViViTTubeletEmbeddings(nn.Module):
    """Tubelet embedding: non-overlapping spatio-temporal patches of the whole clip (section 3.2, figure 3)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        patch: tuple[int, int, int] = tuple(config.tubelet_size)
        sizes = config.num_channels, config.hidden_size, patch
        self.projection = ViViTTubeletProjection(*sizes, stride=patch, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, time, height, width, hidden)."""
        patches = self.projection(pixel_values.transpose(1, 2))  # (batch, hidden, time, height, width)
        return patches.permute(0, 2, 3, 4, 1)  # (batch, time, height, width, hidden)


def take_places(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(batch, time, space, hidden), places (batch, n) -> (batch, time, n, hidden)."""
    return tokens.gather(2, places[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3]))


def take_patches(pixel_values: torch.Tensor, places: torch.Tensor, config: ViViTConfig) -> torch.Tensor:
    """
    Cut out the patches at the given places of the space and lay them side by side, in a clip that is one patch high.

    (batch, frames, channels, height, width), places (batch, n) ->
    (batch, frames, channels, patch height, n * patch width).
    """
    _, patch_height, patch_width = config.tubelet_size
    batch, frames, channels, height, width = pixel_values.shape
    rows, columns = height // patch_height, width // patch_width
    patches = pixel_values[..., : rows * patch_height, : columns * patch_width]
    patches = patches.reshape(batch, frames, channels, rows, patch_height, columns, patch_width)
    clips = torch.arange(batch, device=places.device)[:, None]
    # (batch, n, frames, channels, patch height, patch width)
    patches = patches.permute(0, 3, 5, 1, 2, 4, 6)[clips, places // columns, places % columns]
    return patches.permute(0, 2, 3, 4, 1, 5).flatten(4)


PATCH_EMBEDDINGS = {"tubelet": ViViTTubeletEmbeddings, "uniform_frame_sampling": ViViTUniformFrameEmbeddings}


class ViViTPositions(nn.Module):
    """Learned position embeddings of a token grid and, if there is one, of the class token before it."""

    def __init__(self, config: ViViTConfig, has_class_token: bool):
        super().__init__()
        self.config = config
        self.num_prefix_tokens = int(has_class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if has_class_token else None
        self.grid = self.position_grid(config.grid_size)
        num_positions = self.num_prefix_tokens + math.prod(self.grid)
        self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))

    def position_grid(self, grid: Grid) -> Grid:
        """Return the part of a (time, height, width) token grid that the position embeddings cover, here all of it."""
        return grid

    def positions(self, grid: Grid) -> torch.Tensor:
        """Return the position embeddings for a (time, height, width) token grid: (1, prefix + positions, hidden)."""
        return resample_position_embeddings(
            self.position_embeddings, self.position_grid(grid), self.grid, self.num_prefix_tokens
        )

    def resize(self, grid: Grid) -> None:
        """Interpolate the position embeddings to a new (time, height, width) token grid, permanently."""
        old = self.position_embeddings
        if old.is_meta:
            raise ValueError(
                "The position embeddings are offloaded and cannot be resized. Load the model without a `device_map` "
                "that offloads them, resize and save it, and load the saved model."
            )
        self.position_embeddings = nn.Parameter(self.positions(grid).detach(), requires_grad=old.requires_grad)
        self.grid = self.position_grid(grid)


class ViViTEmbeddings(ViViTPositions):
    """
    Embed a clip as tokens with position embeddings, and return the prefix tokens: the class token (if `pooling="cls"`)
    and the register tokens.

    The position embeddings cover the class token and the whole grid. In Model 2, whose spatial encoder takes one time
    step at a time, they cover the class token and the space of one step. Register tokens have none.
    """

    def __init__(self, config: ViViTConfig):
        super().__init__(config, has_class_token=config.pooling == "cls")
        self.patch_embeddings = PATCH_EMBEDDINGS[config.embedding_type](config)
        self.register_tokens = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))

    def position_grid(self, grid: Grid) -> Grid:
        return (1, *grid[1:]) if self.config.attention_type == "factorised_encoder" else grid

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        (batch, frames, channels, height, width) -> tokens (batch, time, space, hidden), prefix tokens
        (1, prefix, hidden) or None.

        `visible`, int64 (batch, n), restricts the embedding to these places of the space: (batch, time, n, hidden).
        """
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        grid = None
        if visible is not None:
            grid = self.config.grid_size_of(pixel_values.shape[1], *pixel_values.shape[3:])
            pixel_values = take_patches(pixel_values, visible, self.config)
        pixel_values = pixel_values.to(self.position_embeddings.dtype)
        tokens = self.patch_embeddings(pixel_values)  # (batch, time, height, width, hidden)
        grid = grid or tuple(tokens.shape[1:4])
        positions = self.positions(grid)
        tokens = tokens.flatten(2, 3)  # (batch, time, space, hidden)
        class_token = None if self.cls_token is None else self.cls_token + positions[:, :1]  # (1, 1, hidden)
        prefix = [token for token in (class_token, self.register_tokens) if token is not None]
        # (1, time * space, hidden) -> (1, time, space, hidden), with time = 1 in Model 2
        positions = positions[:, self.num_prefix_tokens :].unflatten(1, (-1, grid[1] * grid[2]))
        if visible is not None:
            positions = take_places(positions.expand(len(visible), -1, -1, -1), visible)
        return tokens + positions, torch.cat(prefix, dim=1) if prefix else None


class ViViTTemporalEmbeddings(ViViTPositions):
    """Class token and position embeddings over time for the temporal encoder of Model 2 (section 3.3.2)."""

    def __init__(self, config: ViViTConfig):
        super().__init__(config, has_class_token=config.pooling_over_time == "cls")

    def position_grid(self, grid: Grid) -> Grid:
        return (grid[0], 1, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time, hidden) -> (batch, 1 + time, hidden), or (batch, time, hidden) without a class token."""
        return _prepend(tokens, self.cls_token) + self.positions((tokens.shape[1], 1, 1))


def _prepend(tokens: torch.Tensor, prefix_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, hidden), (1, prefix, hidden) -> (batch, prefix + tokens, hidden); no-op without a prefix."""
    if prefix_tokens is None:
        return tokens
    return torch.cat([prefix_tokens.expand(tokens.shape[0], -1, -1), tokens], dim=1)


# Attention


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
    Softmax attention, written out. Query, key, value (batch, heads, tokens, head_dim), `attention_mask` added to the
    scores -> context (batch, tokens, heads, head_dim), weights (batch, heads, tokens, tokens).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# Attention implementations that add a bias to the scores; "blockwise" comes from `vivit_hf.inference.optimize`.
BIASED_ATTENTION = ("eager", "sdpa", "blockwise")


def attention_bias(
    query: torch.Tensor, sizes: torch.Tensor | None, attention_mask: torch.Tensor | None, implementation: str
) -> torch.Tensor | None:
    """
    Return the bias that weighs keys by their sizes or masks them; None without both.

    Args:
        query: (batch, queries, heads, head_dim); the bias has its dtype.
        sizes: see `proportional_attention_bias`; never with a mask.
        attention_mask: see `ViViTDotProductAttention.forward`.

    Returns:
        (batch, 1, 1 or queries, tokens).

    Raises:
        ValueError: for an attention implementation that adds no bias to the scores.
    """
    if sizes is not None:
        bias = proportional_attention_bias(sizes, query.dtype)
    elif attention_mask is not None:
        bias = attention_mask[:, None, None] if attention_mask.ndim == 2 else attention_mask
        if not bias.is_floating_point():
            lowest = torch.finfo(query.dtype).min  # not -inf, which is NaN in a row without any visible key
            bias = query.new_zeros(bias.shape).masked_fill(~bias.bool(), lowest)
        bias = bias.to(query.dtype)
    else:
        return None
    if implementation not in BIASED_ATTENTION:
        raise ValueError(
            f"`attn_implementation={implementation!r}` cannot add the bias to the attention scores that masks and "
            "merged tokens need. Call `model.set_attn_implementation('sdpa')`, or use the model without a mask and "
            "without `merge_tokens`."
        )
    return bias


class ViViTDotProductAttention(nn.Module):
    """
    Dot-product attention among the tokens of each sequence, through transformers' attention interface.

    `output_attentions` records the second output of this module and its subclasses. Recording runs the eager
    implementation, whichever is configured, because the others return no weights.
    """

    is_causal = False

    def __init__(self, config: ViViTConfig, head_dim: int):
        super().__init__()
        self.config = config
        self.scaling = head_dim**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Query, key, value and context (batch, tokens, heads, head_dim), weights (batch, heads, tokens, tokens).

        With `sizes`, int64 (batch, tokens), a key counts once for each patch that its token stands for.
        `attention_mask`, bool (batch, tokens) or (batch, 1, tokens, tokens), is True for keys that take part; floats
        (batch, 1, tokens, tokens) are added to the scores.
        """
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        bias = attention_bias(query, sizes, attention_mask, implementation)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(
            self,
            query.transpose(1, 2),  # (batch, heads, tokens, head_dim)
            key.transpose(1, 2),
            value.transpose(1, 2),
            bias,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )


class ViViTSpatialDotProductAttention(ViViTDotProductAttention):
    """Attention over space within each time step; weights (batch * time, heads, space, space)."""

    def forward(  # type: ignore[override]  # tokens of a grid all have the same size
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Query, key, value and context (batch, time, space, heads, head_dim).

        The mask of time steps is not applied: within a step, either all tokens are visible or none.
        """
        batch, time = query.shape[:2]
        # (batch, time, space, heads, head_dim) -> (batch * time, space, heads, head_dim)
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        context, weights = super().forward(query, key, value, **kwargs)
        return context.unflatten(0, (batch, time)), weights  # (batch, time, space, heads, head_dim)


class ViViTTemporalDotProductAttention(ViViTDotProductAttention):
    """Attention over time at each place of the space; weights (batch * space, heads, time, time)."""

    def forward(  # type: ignore[override]  # as above
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Query, key, value and context (batch, time, space, heads, head_dim); `attention_mask`, bool (batch, time), is
        True for time steps that take part.
        """
        batch, space = query.shape[0], query.shape[2]
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(space, dim=0)  # (batch * space, time)
        # (batch, time, space, heads, head_dim) -> (batch * space, time, heads, head_dim)
        query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        context, weights = super().forward(query, key, value, attention_mask=attention_mask, **kwargs)
        return context.unflatten(0, (batch, space)).transpose(1, 2), weights  # (batch, time, space, heads, head_dim)


class ViViTAttention(nn.Module):
    """Multi-head self-attention along the axis that `dot_product` attends over."""

    def __init__(
        self,
        config: ViViTConfig,
        dot_product: type[ViViTDotProductAttention],
        num_heads: int | None = None,
        hidden_size: int | None = None,
    ):
        super().__init__()
        hidden = hidden_size or config.hidden_size
        self.num_heads = num_heads or config.num_attention_heads
        self.head_dim = hidden // self.num_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, hidden, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, hidden, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden, hidden)
        self.dot_product = dot_product(config, self.head_dim)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ViViTKwargs]) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden); `dot_product` determines the axes in between."""
        context = self.attend(*self.project(hidden_states), **kwargs)
        return self.o_proj(context.flatten(-2))  # (batch, ..., hidden)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, ..., hidden) -> query, key and value, (batch, ..., heads, head_dim)."""
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).unflatten(-1, heads)  # (batch, ..., heads, head_dim)
        key = self.k_proj(hidden_states).unflatten(-1, heads)
        value = self.v_proj(hidden_states).unflatten(-1, heads)
        return query, key, value

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Unpack[ViViTKwargs]
    ) -> torch.Tensor:
        """Query, key, value and context (batch, ..., heads, head_dim)."""
        return self.dot_product(query, key, value, **kwargs)[0]


class ViViTFactorisedDotProductAttention(ViViTAttention):
    """Half of the heads attend over time, the other half over space (section 3.3.4)."""

    def __init__(self, config: ViViTConfig):
        super().__init__(config, ViViTTemporalDotProductAttention)
        self.spatial_dot_product = ViViTSpatialDotProductAttention(config, self.head_dim)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Unpack[ViViTKwargs]
    ) -> torch.Tensor:
        """Query, key, value and context (batch, time, space, heads, head_dim)."""
        # Each half is (batch, time, space, heads / 2, head_dim).
        over_time, over_space = zip(*(tensor.chunk(2, dim=-2) for tensor in (query, key, value)), strict=True)
        temporal, _ = self.dot_product(*over_time, **kwargs)
        spatial, _ = self.spatial_dot_product(*over_space, **kwargs)
        return torch.cat([temporal, spatial], dim=-2)  # (batch, time, space, heads, head_dim)


# Token merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023)


def proportional_attention_bias(sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Return the bias of proportional attention (section 3): the logarithm of each token's number of patches.

    sizes (batch, tokens) -> (batch, 1, 1, tokens) in `dtype`.
    """
    return sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None]


def take_tokens(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, hidden), places (batch, n) -> (batch, n, hidden)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def match_tokens(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Match similar tokens (bipartite soft matching, section 3): the first, third, ... tokens form set A, the others set
    B, and each token of A is matched with the token of B whose key is most similar.

    Args:
        key: (batch, tokens, heads, head_dim). The mean over the heads is compared, by cosine similarity.

    Returns:
        The places in A by descending similarity to their match, and the place in B of each token's match, both int64
        (batch, tokens in A).
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    key = nn.functional.normalize(key.detach().to(dtype).mean(dim=2), dim=-1)  # (batch, tokens, head_dim)
    similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)  # (batch, tokens in A, tokens in B)
    best, matches = similarity.max(dim=-1)
    return best.argsort(dim=1, descending=True), matches


class ViViTTokenMerging(nn.Module):
    """
    In each sequence, merge the tokens with the most similar matches into these matches (section 3).

    A merged token is the mean of its tokens, weighted by the number of patches that each stands for. The prefix, which
    is the class token and the registers, is never merged.

    num_merged: number of tokens to merge into others, at most half of the tokens after the prefix.
    """

    def __init__(self, num_prefix_tokens: int, num_merged: int):
        super().__init__()
        self.num_prefix_tokens, self.num_merged = num_prefix_tokens, num_merged

    def forward(
        self, hidden_states: torch.Tensor, key: torch.Tensor, sizes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, tokens, hidden).
            key: the keys of these tokens in the attention before, (batch, tokens, heads, head_dim).
            sizes: the number of patches that each token stands for, int64 (batch, tokens); None if all are 1.

        Returns:
            The remaining tokens, (batch, remaining, hidden): the prefix, the rest of set A, and set B; their sizes,
            int64 (batch, remaining); and the place among them of each token or of the token it was merged into, int64
            (batch, tokens). If nothing is merged, hidden states and sizes are returned unchanged, and the places are
            None.
        """
        prefix = self.num_prefix_tokens
        num_merged = min(self.num_merged, (hidden_states.shape[1] - prefix) // 2)
        if num_merged == 0:
            return hidden_states, sizes, None
        if sizes is None:
            sizes = torch.ones(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
        order, matches = match_tokens(key[:, prefix:])
        merged, kept = order[:, :num_merged], order[:, num_merged:].sort(dim=1).values
        targets = prefix + kept.shape[1] + matches.gather(1, merged)  # (batch, merged), places in the result
        numbers = torch.arange(hidden_states.shape[1], device=merged.device)
        merged, first, second = prefix + 2 * merged, prefix + 2 * kept, numbers[prefix + 1 :: 2]
        parts = [numbers[:prefix].expand(kept.shape[0], -1), first, second.expand(kept.shape[0], -1)]
        remaining = torch.cat(parts, dim=1)  # (batch, remaining), places in the sequence

        old_sizes, merged_sizes = sizes.gather(1, remaining), sizes.gather(1, merged)
        sizes = old_sizes.scatter_add(1, targets, merged_sizes)  # (batch, remaining)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        shares = (old_sizes.to(dtype) / sizes).to(hidden_states.dtype).unsqueeze(-1)  # (batch, remaining, 1)
        merged_shares = (merged_sizes.to(dtype) / sizes.gather(1, targets)).to(hidden_states.dtype).unsqueeze(-1)
        added = take_tokens(hidden_states, merged) * merged_shares  # (batch, merged, hidden)
        result = take_tokens(hidden_states, remaining) * shares  # (batch, remaining, hidden)
        result = result.scatter_add_(1, targets.unsqueeze(-1).expand_as(added), added)

        successors = torch.cat([numbers[: remaining.shape[1]].expand_as(remaining), targets], dim=1)
        successors = torch.empty_like(successors).scatter(1, torch.cat([remaining, merged], dim=1), successors)
        return result, sizes, successors

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}, num_merged={self.num_merged}"


# Layers


class ViViTMLP(nn.Module):
    """MLP of a layer: a wider hidden layer with the activation `hidden_act`, and dropout after both linear layers."""

    def __init__(self, config: ViViTConfig, intermediate_size: int | None = None, hidden_size: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size or config.hidden_size, intermediate_size or config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(self.fc1.out_features, self.fc1.in_features)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden)."""
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class ViViTDropPath(nn.Module):
    """
    Stochastic depth: drop the residual branch of some sequences, and divide the others by the probability of keeping.

    A sequence is a clip, or a time step in Model 2's spatial encoder. The official code does not divide; with the
    division, training and evaluation agree in expectation.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(sequences, ..., hidden) -> (sequences, ..., hidden)."""
        if not self.training or self.rate == 0:
            return branch
        keep = branch.new_empty(branch.shape[:1] + (1,) * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ViViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer over a sequence of tokens: Models 1 and 2 (section 3.1, equations 2 and 3)."""

    def __init__(
        self,
        config: ViViTConfig,
        drop_path_rate: float = 0.0,
        num_heads: int | None = None,
        intermediate_size: int | None = None,
        hidden_size: int | None = None,
    ):
        super().__init__()
        hidden = hidden_size or config.hidden_size
        self.layernorm_before = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.attention = self.build_attention(config, num_heads, hidden)
        self.layernorm_after = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.mlp = ViViTMLP(config, intermediate_size, hidden)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViViTDropPath(drop_path_rate)

    def build_attention(self, config: ViViTConfig, num_heads: int | None, hidden_size: int) -> ViViTAttention:
        return ViViTAttention(config, ViViTDotProductAttention, num_heads, hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ViViTKwargs]) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, tokens, hidden); in Model 4, both are (batch, time, space, hidden)."""
        attended = self.dropout(self.attention(self.layernorm_before(hidden_states), **kwargs))
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class ViViTMergingLayer(ViViTLayer):
    """A `ViViTLayer` that merges tokens between its attention and its MLP."""

    def __init__(self, config: ViViTConfig, drop_path_rate: float = 0.0, num_merged: int = 0):
        super().__init__(config, drop_path_rate)
        self.merging = ViViTTokenMerging(config.num_prefix_tokens, num_merged)

    def forward(  # type: ignore[override]  # only a `ViViTMergingEncoder` calls it
        self, hidden_states: torch.Tensor, sizes: torch.Tensor | None = None, **kwargs: Unpack[ViViTKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(batch, tokens, hidden), sizes (batch, tokens) -> what `ViViTTokenMerging` returns."""
        query, key, value = self.attention.project(self.layernorm_before(hidden_states))
        context = self.attention.attend(query, key, value, sizes=sizes, **kwargs)  # (batch, tokens, heads, head_dim)
        attended = self.attention.o_proj(context.flatten(-2))  # (batch, tokens, hidden)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        hidden_states, sizes, successors = self.merging(hidden_states, key, sizes)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states))), sizes, successors


class ViViTFactorisedSelfAttentionLayer(GradientCheckpointingLayer):
    """Model 3: attention over space, over time, and an MLP, each with a residual (section 3.3.3, equations 4 to 6)."""

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

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ViViTKwargs]) -> torch.Tensor:
        """(batch, time, space, hidden) -> (batch, time, space, hidden)."""
        attentions = [(self.layernorm_space, self.attention_space), (self.layernorm_time, self.attention_time)]
        for layernorm, attention in reversed(attentions) if self.time_first else attentions:
            attended = self.dropout(attention(layernorm(hidden_states), **kwargs))
            hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class ViViTFactorisedDotProductAttentionLayer(ViViTLayer):
    """Model 4: a `ViViTLayer` with half of its heads over time and half over space (section 3.3.4)."""

    def build_attention(self, config: ViViTConfig, num_heads: int | None, hidden_size: int) -> ViViTAttention:
        return ViViTFactorisedDotProductAttention(config)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "spatio_temporal": ViViTLayer,
    "factorised_encoder": ViViTLayer,
    "factorised_self_attention": ViViTFactorisedSelfAttentionLayer,
    "factorised_dot_product_attention": ViViTFactorisedDotProductAttentionLayer,
}


class ViViTEncoder(nn.Module):
    """A stack of layers; the rate of stochastic depth grows linearly from the first to the last."""

    def __init__(self, config: ViViTConfig, make_layer: Callable[..., nn.Module], num_layers: int):
        super().__init__()
        rates = [config.drop_path_rate * index / max(num_layers - 1, 1) for index in range(num_layers)]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer = nn.ModuleList([make_layer(config, rate) for rate in rates])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ViViTKwargs]) -> torch.Tensor:
        """(batch, ..., hidden) -> (batch, ..., hidden), in the shape that the layers take."""
        hidden_states = self.dropout(hidden_states)
        for layer in self.layer:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class ViViTMergingEncoder(ViViTEncoder):
    """
    A stack of layers that merge tokens: Model 1, and the spatial encoder of Model 2.

    The output has every token again, merged tokens as copies of their mean, so that pooling weighs a mean by its size.
    """

    def __init__(self, config: ViViTConfig):
        super().__init__(config, ViViTMergingLayer, config.num_hidden_layers)
        self.set_schedule(config.num_prefix_tokens, config.merging_schedule)

    @property
    def schedule(self) -> list[int]:
        """Number of tokens to merge in each layer."""
        return [layer.merging.num_merged for layer in self.layer]  # type: ignore[misc, union-attr]

    def set_schedule(self, num_prefix_tokens: int, schedule: Sequence[int]) -> None:
        """Set the number of tokens to merge in each layer, and of the prefix tokens that are never merged."""
        for layer, num_merged in zip(self.layer, schedule, strict=True):
            layer.merging = ViViTTokenMerging(num_prefix_tokens, num_merged)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[ViViTKwargs]
    ) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, tokens, hidden). Raises ValueError for a mask while tokens merge."""
        if attention_mask is not None:
            if any(self.schedule):
                raise ValueError(
                    "Masked tokens would merge into visible ones: Model 1 with `merge_tokens` takes neither "
                    "`frame_mask` nor `attention_mask`. Call `vivit_hf.inference.restore(model)` if "
                    "`optimize(merge_tokens=...)` set it, or load the model with `merge_tokens=None`."
                )
            kwargs["attention_mask"] = attention_mask
        hidden_states = self.dropout(hidden_states)
        sizes = places = None
        for layer in self.layer:
            hidden_states, sizes, successors = layer(hidden_states, sizes, **kwargs)
            if successors is not None:
                places = successors if places is None else successors.gather(1, places)
        # Without sizes, nothing was merged or an optimised last layer returned the class token alone.
        return hidden_states if sizes is None or places is None else take_tokens(hidden_states, places)


class ViViTAttentionPooling(nn.Module):
    """
    Pool tokens by a mean, weighted by the softmax of their scaled dot products with a learned query.

    The query is initialised to zero, so the pooling starts as the plain mean.
    """

    def __init__(self, config: ViViTConfig):
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.hidden_size))

    def weights(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """
        (batch, tokens, hidden) -> weights (batch, tokens), float32 or wider; each row sums to 1, and tokens that are
        not `visible`, bool (batch, tokens), weigh 0.
        """
        scores = (tokens * self.query).sum(dim=-1) * self.query.shape[0] ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, hidden)."""
        return (self.weights(tokens, visible).to(tokens.dtype).unsqueeze(-1) * tokens).sum(dim=1)


# Models


class ViViTPreTrainedModel(AutoClassMixin, CheckpointMixin, PreTrainedModel):
    """Loading, saving and initialisation of all ViViT models."""

    config: ViViTConfig
    config_class = ViViTConfig
    base_model_prefix = "vivit"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "ViViTEmbeddings",
        "ViViTTemporalEmbeddings",
        "ViViTLayer",
        "ViViTMergingLayer",
        "ViViTFactorisedSelfAttentionLayer",
        "ViViTFactorisedDotProductAttentionLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        # The temporal embeddings are the input of Model 2's second encoder.
        "hidden_states": [ViViTLayer, ViViTFactorisedSelfAttentionLayer, ViViTTemporalEmbeddings],
        "attentions": ViViTDotProductAttention,
    }

    def post_init(self) -> None:
        super().post_init()
        # accelerate's FSDP raises an error for a class name if the model has no such module.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViViTPositions):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
            if getattr(module, "register_tokens", None) is not None:  # equal register tokens would stay equal
                init.normal_(module.register_tokens, std=self.config.initializer_range)
        elif isinstance(module, ViViTAttentionPooling):
            init.zeros_(module.query)
        elif isinstance(module, ViViTDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    @torch.no_grad()
    def resize_position_embeddings(
        self,
        num_frames: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_sampled_frames: int | None = None,
    ) -> None:
        """
        Interpolate the position embeddings to clips of another length or size, and update the configuration.

        Args:
            num_frames: new number of frames in a clip; unchanged if None.
            image_size: new frame size in pixels, one number or (height, width); unchanged if None.
            num_sampled_frames: new number of frames that uniform frame sampling takes; unchanged if None.

        Raises:
            ValueError: if the configuration would be invalid with the new sizes, the weights are offloaded, or the
                number of time steps would change in a model with `temporal_pooling="concatenate"`.
        """
        sizes = {"num_frames": num_frames, "image_size": image_size, "num_sampled_frames": num_sampled_frames}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        new_config = ViViTConfig.from_dict(self.config.to_dict(), **sizes)
        if new_config.pooled_size != self.config.pooled_size:
            raise ValueError(
                f"`temporal_pooling='concatenate'` fixes the number of time steps: the weights behind it take "
                f"{self.config.grid_size[0]}, and the new sizes give {new_config.grid_size[0]}. Keep the number of "
                "steps, or train a model with another `temporal_pooling`."
            )
        model = self.base_model
        for embeddings in (model.embeddings, model.temporal_embeddings):
            if embeddings is not None:
                embeddings.resize(new_config.grid_size)
        for name in sizes:
            setattr(self.config, name, getattr(new_config, name))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.patch_embeddings


class ViViTModel(ViViTPreTrainedModel):
    """
    ViViT without a classifier, for features.

    | variant | `last_hidden_state` | `pooler_output` |
    | --- | --- | --- |
    | Model 1 | (batch, 1 + time * space, hidden), class token first; no 1 unless `pooling="cls"` | (batch, hidden) |
    | Model 2 | the temporal encoder's (batch, 1 + time, hidden), likewise over time | (batch, hidden) |
    | Model 2, `num_temporal_layers=0` | one pooled token per time step: (batch, time, hidden) | (batch, hidden) |
    | Model 2, `temporal_pooling="concatenate"` | (batch, time, hidden) | (batch, time * hidden) |
    | Models 3, 4 | (batch, time * space, hidden) | (batch, hidden) |

    Register tokens (`num_register_tokens`) follow the class token in Model 1 and in Model 2's spatial encoder.

    `last_hidden_state` is the output of the final LayerNorm. `pooler_output` is its pooling, followed by a dense layer
    and tanh if `representation_size` is set: (batch, representation_size).

    `hidden_states` are the input of the first layer and the output of every layer, before the final LayerNorm: in
    Model 2 those of the spatial encoder, (batch * time, 1 + space, hidden), then those of the temporal one,
    (batch, 1 + time, hidden); in Models 3 and 4 (batch, time, space, hidden). If `output_hidden_states` is an index,
    count from the front: transformers resolves negative indices without Model 2's second encoder. With `merge_tokens`,
    hidden states and attentions have the tokens that each layer computes.

    `attentions` are in the order of computation. Model 1: (batch, heads, tokens, tokens) per layer. Model 2: the same
    with batch * time, then the temporal encoder's. Model 3: per layer, (batch * space, heads, time, time) over time and
    (batch * time, heads, space, space) over space, in the order of `attention_order`. Model 4: per layer, the same two
    in the order time, space, each with half of the heads. They are available with every attention implementation.

    With `frame_mask`, clips of different lengths share a batch: masked time steps change no output of visible ones. At
    the tokens of masked steps, `last_hidden_state` and `hidden_states` are arbitrary finite numbers. The spatial
    encoder of Model 2 skips masked steps unless hidden states or attentions are requested, or the model is compiled,
    exported or traced: graphs encode and mask them.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        config.check()
        self.embeddings = ViViTEmbeddings(config)
        self.pre_layernorm = None
        if config.pre_layernorm:
            self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.merge_tokens is None:
            self.encoder = ViViTEncoder(config, LAYERS[config.attention_type], config.num_hidden_layers)
        else:
            self.encoder = ViViTMergingEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_embeddings: Any = None
        self.temporal_encoder: Any = None
        self.temporal_layernorm: Any = None
        self.temporal_pooler: Any = None
        if config.attention_type == "factorised_encoder" and config.num_temporal_layers:
            self.temporal_embeddings = ViViTTemporalEmbeddings(config)
            make_layer = functools.partial(
                ViViTLayer,
                num_heads=config.temporal_num_attention_heads,
                intermediate_size=config.temporal_intermediate_size,
            )
            self.temporal_encoder = ViViTEncoder(config, make_layer, config.num_temporal_layers)
            self.temporal_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.temporal_pooling == "attention":
            self.temporal_pooler = ViViTAttentionPooling(config)
        self.pre_logits = None
        if config.representation_size is not None:
            self.pre_logits = nn.Linear(config.pooled_size, config.representation_size)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        frame_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), floats in [-1, 1] as `ViViTVideoProcessor` returns
                them; cast to the dtype of the weights.
            interpolate_pos_encoding: whether to accept clips of another length or size than configured, by
                interpolating the position embeddings for this call.
            frame_mask: the visible frames of each clip, bool (batch, frames). Outputs are those of a model that is as
                short as the visible time steps and has their position embeddings, not interpolated. With tubelets of 2
                frames (see `mask_frames`):

                    frames        a b   c d   e f   g h
                    frame_mask    0 1   1 0   0 1   0 0      True (1) where visible
                    shown         b b   c c   c f   f f      the nearest earlier visible frame, or else the next
                    steps          1     1     1     0       a step with a visible frame is visible

            attention_mask: Model 1, in place of `frame_mask`: the visible tokens, (batch, tokens), as transformers'
                Vivit takes them (see `mask_tokens`). Pooling leaves masked tokens out, too.
            output_hidden_states, output_attentions, return_dict: as everywhere in transformers.

        Raises:
            ValueError: if the clips do not have the expected shape; the message gives both shapes. For masks of another
                shape, without anything visible, or that the model or its attention implementation cannot take.
            TypeError: for an unknown argument.
        """
        _check_arguments(kwargs)
        if pixel_values is None:
            raise ValueError("`pixel_values` is missing; expected (batch, frames, channels, height, width).")
        masks: dict[str, torch.Tensor | None] = {}
        if attention_mask is not None:
            _check_takes_attention_mask(self.config, frame_mask is not None)
            masks["attention_mask"] = attention_mask
        if frame_mask is not None:
            check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
            pixel_values, masks["visible"] = mask_frames(pixel_values, frame_mask, self.config)
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.setdefault(name, getattr(self.config, name))
        tokens, prefix_tokens = self.embeddings(pixel_values, interpolate_pos_encoding)  # (batch, time, space, hidden)
        encode_variant = ENCODERS[self.config.attention_type]
        if (visible := masks.get("visible")) is not None and self._may_shorten(**kwargs):
            tokens, masks["visible"] = shorten(tokens, visible)
        last_hidden_state, pooled = encode_variant(self, tokens, prefix_tokens, **masks, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=self.represent(pooled))

    def _may_shorten(self, **kwargs: Unpack[ViViTKwargs]) -> bool:
        """
        Return whether to leave out time steps that no clip of the batch shows. Shapes of outputs and graphs do not
        depend on the mask, and Model 2 skips masked steps clip by clip.
        """
        records = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        is_pooled = kwargs.get("output_last_hidden_state") is False and not records
        return is_pooled and self.config.attention_type != "factorised_encoder" and not becomes_graph()

    # In the methods below, `visible` is a mask of time steps, bool (batch, time), or None if all are visible.

    def encode_spatio_temporal(
        self,
        tokens: torch.Tensor,
        prefix_tokens: torch.Tensor | None,
        visible: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 1 (section 3.3.1): every token attends to every other."""
        space = tokens.shape[2]
        tokens = tokens.flatten(1, 2)  # (batch, time * space, hidden)
        tokens = _prepend(tokens, prefix_tokens)  # (batch, prefix + time * space, hidden)
        mask = spread_mask(visible, tokens, space) if attention_mask is None else mask_tokens(attention_mask, tokens)
        tokens = self.encode(tokens, attention_mask=mask, **kwargs)
        return tokens, self.pool(tokens, None if mask is None or mask.ndim == 4 else mask)

    def encode_factorised_encoder(
        self,
        tokens: torch.Tensor,
        prefix_tokens: torch.Tensor | None,
        visible: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 2 (section 3.3.2): an encoder over the space of each time step, then one over time."""
        return self.encode_time(self.encode_space(tokens, prefix_tokens, visible, **kwargs), visible, **kwargs)

    def encode_space(
        self,
        tokens: torch.Tensor,
        prefix_tokens: torch.Tensor | None,
        visible: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> torch.Tensor:
        """
        Model 2's spatial encoder: (batch, time, space, hidden) -> a pooled token per step, (batch, time, hidden).

        Masked steps are skipped, and their tokens are zeros. They are encoded like the others in a graph, and for
        hidden states and attentions, whose shapes do not depend on the mask.
        """
        batch, time = tokens.shape[:2]
        records = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if visible is not None and not records and not becomes_graph():
            # (visible steps, 1, space, hidden) -> (visible steps, prefix + space, hidden)
            encoded = self.pool(self.encode_frames(tokens[visible].unsqueeze(1), prefix_tokens, **kwargs))
            return encoded.new_zeros(batch, time, encoded.shape[-1]).index_put((visible,), encoded)
        tokens = self.encode_frames(tokens, prefix_tokens, **kwargs)  # (batch * time, prefix + space, hidden)
        return self.pool(tokens).unflatten(0, (batch, time))  # (batch, time, hidden)

    def encode_frames(
        self, tokens: torch.Tensor, prefix_tokens: torch.Tensor | None, **kwargs: Unpack[ViViTKwargs]
    ) -> torch.Tensor:
        """Model 2's spatial encoder: (batch, time, space, hidden) -> (batch * time, prefix + space, hidden)."""
        tokens = tokens.flatten(0, 1)  # (batch * time, space, hidden)
        tokens = _prepend(tokens, prefix_tokens)  # (batch * time, prefix + space, hidden)
        return self.encode(tokens, **kwargs)

    def encode_time(
        self, steps: torch.Tensor, visible: torch.Tensor | None = None, **kwargs: Unpack[ViViTKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 2's temporal encoder: (batch, time, hidden) -> (batch, 1 + time, hidden), pooled (batch, hidden)."""
        if self.temporal_encoder is None:
            return steps, self.pool_time(steps, visible)  # by default the paper's average-pool baseline
        tokens = self.temporal_embeddings(steps)  # (batch, 1 + time, hidden)
        visible = spread_mask(visible, tokens)  # (batch, 1 + time)
        tokens = self.temporal_layernorm(self.temporal_encoder(tokens, attention_mask=visible, **kwargs))
        return tokens, self.pool_time(tokens, visible)

    def pool_time(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """
        Model 2: (batch, [1 +] time, hidden), visible (batch, [1 +] time) -> (batch, hidden), or by "concatenate"
        (batch, time * hidden), zeros for masked steps.
        """
        if self.temporal_pooler is not None:
            return self.temporal_pooler(tokens, visible)
        pooling = self.config.pooling_over_time
        if pooling == "concatenate" and tokens.shape[1] != self.config.grid_size[0]:
            raise ValueError(
                f"`temporal_pooling='concatenate'` fixes the number of time steps: the model takes "
                f"{self.config.grid_size[0]}, but got {tokens.shape[1]}."
            )
        return pool_tokens(tokens, pooling, visible)

    def encode_steps(self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Model 2: encode a clip of any whole number of tubelets, (batch, frames, channels, height, width), as one token
        per time step, (batch, time, hidden).

        Steps do not depend on each other, so they can be cached and recombined (`classify_steps`). With `frame_mask`,
        bool (batch, frames), masked steps are not encoded: they repeat the nearest earlier visible step or, if there is
        none, the next.

        Raises:
            ValueError: if the model is not Model 2, or if the frames do not have the configured size or are fewer than
                one tubelet; for a mask that `forward` refuses.
        """
        _check_has_steps(self.config)
        check_frame_size(pixel_values, self.config)
        visible = None
        if frame_mask is not None:
            pixel_values, visible = mask_frames(pixel_values, frame_mask, self.config)
        tokens, prefix_tokens = self.embeddings(pixel_values, interpolate_pos_encoding=True)
        steps = self.encode_space(tokens, prefix_tokens, visible)
        return steps if visible is None else steps[_rows(len(steps), steps.device), nearest_visible_frames(visible)]

    def encode_token_grid(
        self,
        tokens: torch.Tensor,
        prefix_tokens: torch.Tensor | None,
        visible: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Models 3 and 4 (sections 3.3.3 and 3.3.4): the layers keep the grid, so there are no prefix tokens."""
        space = tokens.shape[2]
        tokens = self.encode(tokens, attention_mask=visible, **kwargs)  # (batch, time, space, hidden)
        tokens = tokens.flatten(1, 2)  # (batch, time * space, hidden)
        return tokens, self.pool(tokens, spread_mask(visible, tokens, space))

    def encode(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the (spatial) encoder with the LayerNorms before and after it; the shape is that of its layers."""
        if self.pre_layernorm is not None:
            tokens = self.pre_layernorm(tokens)
        return self.layernorm(self.encoder(tokens, **kwargs))

    def pool(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """
        (batch, tokens, hidden) -> (batch, hidden): pool the class token, or all tokens but the registers, of those that
        are `visible`, bool (batch, tokens).
        """
        first = 0 if self.config.pooling == "cls" else self.config.num_register_tokens
        return pool_tokens(tokens[:, first:], self.config.pooling, None if visible is None else visible[:, first:])

    def represent(self, pooled: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) -> (batch, representation_size) by a dense layer and tanh; unchanged if the size is None."""
        return pooled if self.pre_logits is None else self.pre_logits(pooled).tanh()


ENCODERS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "spatio_temporal": ViViTModel.encode_spatio_temporal,
    "factorised_encoder": ViViTModel.encode_factorised_encoder,
    "factorised_self_attention": ViViTModel.encode_token_grid,
    "factorised_dot_product_attention": ViViTModel.encode_token_grid,
}


class ViViTForVideoClassification(ViViTPreTrainedModel):
    """ViViT with a linear classifier on its pooled output. With `num_labels=0`, the logits are the pooled output."""

    _auto_class = "AutoModelForVideoClassification"

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vivit = ViViTModel(config)
        features = config.representation_size or config.pooled_size
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        steps: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), floats in [-1, 1].
            labels: under `problem_type="single_label_classification"` classes, int64 (batch,), or class probabilities,
                floats (batch, num_labels), as mixup produces them; under `"multi_label_classification"` floats 0 and 1
                (batch, num_labels); under `"regression"` floats (batch, num_labels). With `label_groups` one class per
                group, int64 (batch, groups), or class probabilities per group. See `video_classification_loss`.
            interpolate_pos_encoding: as in `ViViTModel`.
            num_items_in_batch: label elements in all batches of one optimiser step, as `Trainer` counts them, so that
                accumulated gradients equal those of the whole batch.
            steps: Model 2, in place of `pixel_values`: (batch, time, hidden), as `vivit.encode_steps` returns them.
            frame_mask, attention_mask: as in `ViViTModel`. With `steps`, `frame_mask` is that of the frames that they
                were encoded from, and there is no `attention_mask`.

        Returns:
            `loss` if there are labels, `logits` (batch, num_labels), `hidden_states` and `attentions` on request (not
            with `steps`).

        Raises:
            ValueError: if `steps` come with `pixel_values` or `attention_mask`, have another shape, or the model is not
                Model 2.
            ValueError: for clips and masks that `ViViTModel` refuses.
            ValueError: if `labels` do not fit the logits, or the model has no classifier (`num_labels=0`).
            TypeError: for an unknown argument.
        """
        kwargs["output_last_hidden_state"] = False
        if steps is None:
            masks = {"frame_mask": frame_mask, "attention_mask": attention_mask}
            outputs = self.vivit(pixel_values, interpolate_pos_encoding, return_dict=True, **masks, **kwargs)
            logits = self.classifier(outputs.pooler_output)
        else:
            _check_arguments(kwargs)
            if pixel_values is not None:
                raise ValueError("Both `pixel_values` and `steps` were given; expected one of them.")
            if attention_mask is not None:
                raise ValueError("`steps` take no `attention_mask`, as they are encoded already: use `frame_mask`.")
            visible = None
            if frame_mask is not None:
                steps, visible = mask_steps(steps, frame_mask, self.config)
            outputs, logits = BaseModelOutputWithPooling(), self.classify_steps(steps, visible)
        loss, groups = None, self.config.label_groups
        if labels is not None:
            if not self.config.num_labels:
                raise ValueError("`labels` need a classifier, but `num_labels=0`; load the model with `num_labels`.")
            if self.config.problem_type is None:  # kept, as in transformers: pipelines choose the activation by it
                self.config.problem_type = infer_problem_type(labels, self.config.num_labels, groups is not None)
            sizes = None if groups is None else tuple(groups.values())
            loss = video_classification_loss(logits, labels, self.config.problem_type, num_items_in_batch, sizes)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def classify_steps(self, steps: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """
        Model 2: (batch, time, hidden), as `vivit.encode_steps` returns them -> logits (batch, num_labels).

        Args:
            visible: the time steps that take part, bool (batch, time), at least one per row; None for all.

        Raises:
            ValueError: if the model is not Model 2, or `steps` have another shape.
        """
        _check_has_steps(self.config)
        if steps.ndim != 3 or steps.shape[2] != self.config.hidden_size:
            raise ValueError(f"`steps` must be (batch, time, {self.config.hidden_size}), got {tuple(steps.shape)}.")
        _, pooled = self.vivit.encode_time(steps.to(self.dtype), visible, output_last_hidden_state=False)
        return self.classifier(self.vivit.represent(pooled))

    def split_logits(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split logits (..., num_labels) by the names of `label_groups`, (..., size of the group) each."""
        if self.config.label_groups is None:
            raise ValueError(
                "This model has one group of labels, so there is nothing to split (`config.label_groups`)."
            )
        groups = self.config.label_groups
        return dict(zip(groups, logits.split(list(groups.values()), dim=-1), strict=True))


# Masked pretraining


def random_tube_masks(
    batch: int,
    space: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """
    Draw the places of the space to mask in all time steps (Tong et al., "VideoMAE", NeurIPS 2022, section 3.2).

    In each clip, `int(mask_ratio * space)` places are masked, as in the official code, but at least one, and at least
    one stays visible.

    Returns:
        bool (batch, space), True where masked.

    Raises:
        ValueError: if a time step has fewer than two places.
    """
    if space < 2:
        raise ValueError(
            f"A time step must have at least two tubelets, a masked and a visible one, but got {space}: use smaller "
            "tubelets or larger frames."
        )
    num_masked = min(max(int(mask_ratio * space), 1), space - 1)
    return torch.rand(batch, space, generator=generator, device=device).argsort(dim=1) < num_masked


def split_places(bool_masked_pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the visible and the masked places of masks (batch, space), each ascending: int64 (batch, number of places).

    Raises:
        ValueError: unless all clips have the same number of masked places, with at least one place of each kind.
    """
    counts = bool_masked_pos.sum(dim=1).tolist()
    space = bool_masked_pos.shape[1]
    if len(set(counts)) != 1 or not 0 < counts[0] < space:
        raise ValueError(
            f"`bool_masked_pos` masks {sorted(set(counts))} of {space} places; expected the same number in every clip, "
            f"from 1 to {space - 1}."
        )
    places = bool_masked_pos.to(torch.uint8).argsort(dim=1, stable=True)  # False comes first
    visible, masked = places.split([space - counts[0], counts[0]], dim=1)
    return visible, masked


def patch_pixels(pixel_values: torch.Tensor, config: ViViTConfig) -> torch.Tensor:
    """
    Cut clips into the patches that become tokens.

    (batch, frames, channels, height, width) -> (batch, time, space, pixels, channels), the pixels of a patch in the
    order time, height, width.
    """
    if config.embedding_type == "uniform_frame_sampling":
        pixel_values = pixel_values[:, _sampled_frames(pixel_values.shape[1], config.num_sampled_frames)]
    (batch, frames, channels, height, width), (kt, kh, kw) = pixel_values.shape, config.tubelet_size
    time, rows, columns = frames // kt, height // kh, width // kw
    patches = pixel_values[:, : time * kt, :, : rows * kh, : columns * kw]
    patches = patches.reshape(batch, time, kt, channels, rows, kh, columns, kw)
    patches = patches.permute(0, 1, 4, 6, 2, 5, 7, 3)  # (batch, time, height, width, kt, kh, kw, channels)
    return patches.flatten(4, 6).flatten(2, 3)  # (batch, time, space, pixels, channels)


def normalise_patches(patches: torch.Tensor) -> torch.Tensor:
    """
    Subtract the mean of each patch and channel, and divide by the standard deviation, as VideoMAE does.

    (..., pixels, channels) -> (..., pixels, channels).
    """
    variance, mean = torch.var_mean(patches, dim=-2, keepdim=True)
    return (patches - mean) / (variance.sqrt() + 1e-6)


def sine_cosine_positions(num_positions: int, hidden_size: int, like: torch.Tensor) -> torch.Tensor:
    """
    Return fixed position embeddings (Vaswani et al., 2017, section 3.5), as in VideoMAE's decoder.

    Returns:
        (num_positions, hidden_size), with the dtype and device of `like`.
    """
    channels = torch.arange(hidden_size, device=like.device)
    places = torch.arange(num_positions, device=like.device)
    angles = places[:, None] / 10_000 ** (2 * (channels // 2) / hidden_size)  # (positions, hidden)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).to(like.dtype)


class ViViTDecoder(nn.Module):
    """A few narrow layers that predict the pixels of masked tubelets (Tong et al., 2022, section 3.3)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        hidden, num_layers, num_heads = config.decoder_sizes
        inner = max(1, config.intermediate_size * hidden // config.hidden_size)
        self.embedding = nn.Linear(config.hidden_size, hidden)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden))
        layers = [ViViTLayer(config, 0.0, num_heads, inner, hidden) for _ in range(num_layers)]
        self.layer = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.projection = nn.Linear(hidden, math.prod(config.tubelet_size) * config.num_channels)

    def forward(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        masked: torch.Tensor,
        time: int,
        **kwargs: Unpack[ViViTKwargs],
    ) -> torch.Tensor:
        """
        Args:
            tokens: the encoder's output, one sequence per clip in Model 1, one per time step in Model 2:
                (sequences, context + visible tokens, hidden). The context consists of tokens without a place: the class
                token and the registers in Model 1, the temporal encoder's output for the step in Model 2.
            visible, masked: the places of the space, int64 (batch, number of places).
            time: the number of time steps of a clip.

        Returns:
            (sequences, masked tokens, pixels of a patch * channels).
        """
        space, per_clip = visible.shape[1] + masked.shape[1], len(tokens) // len(visible)
        tokens = self.embedding(tokens)  # (sequences, context + visible tokens, decoder hidden)
        positions = sine_cosine_positions(time // per_clip * space, tokens.shape[-1], like=tokens)
        positions = positions.unflatten(0, (-1, space))  # (time, space, decoder hidden), with time = 1 in Model 2
        seen, unseen = (
            # (time, batch, places, decoder hidden) -> (sequences, time * places, decoder hidden)
            positions[:, places].transpose(0, 1).flatten(1, 2).repeat_interleave(per_clip, dim=0)
            for places in (visible, masked)
        )
        context = tokens.shape[1] - seen.shape[1]
        tokens = torch.cat([tokens[:, :context], tokens[:, context:] + seen, self.mask_token + unseen], dim=1)
        for layer in self.layer:
            tokens = layer(tokens, **kwargs)  # (sequences, context + visible + masked tokens, decoder hidden)
        return self.projection(self.layernorm(tokens[:, -unseen.shape[1] :]))


def _encode_visible_spatio_temporal(
    vivit: ViViTModel, tokens: torch.Tensor, prefix_tokens: torch.Tensor | None, **kwargs: Unpack[ViViTKwargs]
) -> torch.Tensor:
    """Model 1: (batch, time, visible, hidden) -> (batch, prefix + time * visible, hidden)."""
    return vivit.encode_spatio_temporal(tokens, prefix_tokens, **kwargs)[0]


def _encode_visible_factorised_encoder(
    vivit: ViViTModel, tokens: torch.Tensor, prefix_tokens: torch.Tensor | None, **kwargs: Unpack[ViViTKwargs]
) -> torch.Tensor:
    """
    Model 2: (batch, time, visible, hidden) -> (batch * time, 1 + visible, hidden).

    The first token is the temporal encoder's output for the step, the only connection to the other steps.
    """
    batch, time, visible, _ = tokens.shape
    frames = vivit.encode_frames(tokens, prefix_tokens, **kwargs)  # (batch * time, prefix + visible, hidden)
    steps = vivit.pool(frames).unflatten(0, (batch, time))  # (batch, time, hidden)
    steps = vivit.encode_time(steps, **kwargs)[0][:, -time:]  # (batch, time, hidden), without the class token
    return torch.cat([steps.flatten(0, 1).unsqueeze(1), frames[:, -visible:]], dim=1)


VISIBLE_ENCODERS: dict[str, Callable[..., torch.Tensor]] = {
    "spatio_temporal": _encode_visible_spatio_temporal,
    "factorised_encoder": _encode_visible_factorised_encoder,
}


@dataclass
class ViViTForPreTrainingOutput(ModelOutput):
    """
    The output of `ViViTForPreTraining`.

    loss: mean squared error over the normalised pixels of all masked tubelets, ().
    logits: the predicted normalised pixels, (batch, time, masked places, pixels of a tubelet * channels). The masked
        places are in ascending order, the pixels of a tubelet in the order time, height, width, channels.
    bool_masked_pos: the masks, bool (batch, space), True where masked.
    hidden_states, attentions: on request, those of the encoders as in `ViViTModel`, then those of the decoder.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    bool_masked_pos: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ViViTForPreTraining(ViViTPreTrainedModel):
    """
    ViViT with a decoder for masked pretraining on videos without labels: Models 1 and 2.

    A mask hides the same places in all time steps (tube masking, Tong et al., "VideoMAE", NeurIPS 2022). The encoder
    sees only the visible tubelets, and the decoder predicts the normalised pixels of the others. In Model 2 the decoder
    takes one time step at a time: its visible tokens and the temporal encoder's output for it, so both encoders learn.
    """

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which `Trainer` then averages over batches

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        if config.attention_type not in VISIBLE_ENCODERS:
            raise ValueError(
                f"Pretraining with tube masks does not work with `attention_type={config.attention_type!r}`: Models 3 "
                "and 4 attend over time at one place, and a tube hides a place at all times. Use one of "
                f"{', '.join(map(repr, VISIBLE_ENCODERS))}."
            )
        if math.prod(config.tubelet_size) < 2 or math.prod(config.grid_size[1:]) < 2:
            raise ValueError(
                f"`tubelet_size={tuple(config.tubelet_size)}` on frames of {config.frame_size} pixels: a time step has "
                "a single tubelet, or a tubelet a single pixel. Expected at least two of both."
            )
        self.vivit = ViViTModel(config)
        self.decoder = ViViTDecoder(config)
        for unused in (self.vivit.temporal_pooler, self.vivit.pre_logits):
            # Pretraining uses neither the learned pooling nor the layer after it. If they had gradients, processes that
            # train together would wait for them.
            if unused is not None:
                unused.requires_grad_(False)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        frame_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ViViTKwargs],
    ) -> ViViTForPreTrainingOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), floats in [-1, 1].
            bool_masked_pos: the places to mask in all time steps, bool (batch, space), True where masked, with the same
                number in every clip. By default they are drawn at random, as many as `config.mask_ratio` gives.
            interpolate_pos_encoding: as in `ViViTModel`.
            frame_mask: not supported, and an error, so that `Trainer` does not drop the column of a data set.

        Raises:
            ValueError: for clips or masks of another shape, for masks that differ in their number of places, and for a
                `frame_mask`.
            TypeError: for an unknown argument.
        """
        _check_arguments(kwargs)
        if frame_mask is not None:
            raise ValueError(
                "Pretraining takes no `frame_mask`: tube masks hide the same places in all time steps of a clip. Leave "
                "short clips out, or fill them with their own frames (`short_video_policy` of ViViTVideoProcessor)."
            )
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.setdefault(name, getattr(self.config, name))
        batch, frames, _, height, width = pixel_values.shape
        time, rows, columns = self.config.grid_size_of(frames, height, width)
        space = rows * columns
        if bool_masked_pos is None:
            bool_masked_pos = random_tube_masks(batch, space, self.config.mask_ratio, device=pixel_values.device)
        if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != (batch, space):
            raise ValueError(
                f"`bool_masked_pos` must be bool (batch, space) = {(batch, space)}, one mask for all time steps, but "
                f"got {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}."
            )
        visible, masked = split_places(bool_masked_pos)
        # (batch, time, visible, hidden)
        tokens, prefix_tokens = self.vivit.embeddings(pixel_values, interpolate_pos_encoding, visible)
        encode_visible = VISIBLE_ENCODERS[self.config.attention_type]
        # (sequences, context + visible tokens, hidden)
        tokens = encode_visible(self.vivit, tokens, prefix_tokens, **kwargs)
        logits = self.decoder(tokens, visible, masked, time, **kwargs)
        logits = logits.reshape(batch, time, masked.shape[1], -1)  # (batch, time, masked, patch)

        patches = patch_pixels(pixel_values, self.config)  # (batch, time, space, pixels, channels)
        targets = take_places(patches.flatten(3), masked).unflatten(3, patches.shape[3:])
        targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
        loss = nn.functional.mse_loss(logits.to(targets.dtype), normalise_patches(targets).flatten(3))
        return ViViTForPreTrainingOutput(loss=loss, logits=logits, bool_masked_pos=bool_masked_pos)


# Loss


def infer_problem_type(labels: torch.Tensor, num_labels: int, has_groups: bool = False) -> str:
    """Infer `problem_type` as transformers does: regression if there is one output, classes if labels are integers."""
    if has_groups:
        return "single_label_classification"
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def video_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    num_items_in_batch: torch.Tensor | float | None = None,
    group_sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """
    Return the mean loss per example (single label) or per element (multi-label, regression), in float32 or wider.

    | `problem_type` | `labels` | loss |
    | --- | --- | --- |
    | single_label_classification | (batch,), whole numbers; -100 is ignored | cross-entropy |
    | single_label_classification | (batch, num_labels), floats that sum to 1 | cross-entropy with soft labels |
    | multi_label_classification | (batch, num_labels), 0 to 1; -100 is ignored | binary cross-entropy |
    | regression | (batch, num_labels), or (batch,) with one output | squared error |

    Args:
        logits: (batch, num_labels).
        num_items_in_batch: number to divide the sum of losses by, instead of the count of this batch: the label
            elements of all batches of one optimiser step, as `transformers.Trainer` counts them. It counts num_labels
            elements per example with soft labels, which is corrected here.
        group_sizes: sizes of several classifications side by side in the logits (`ViViTConfig.label_groups`). Labels
            are then (batch, groups) whole numbers, each counted from 0 within its group, or (batch, num_labels) floats
            that sum to 1 in each group. The loss is the mean over the groups, as in the official code.

    Raises:
        ValueError: if the shapes of labels and logits do not match, or `problem_type` is unknown or does not allow
            groups.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    soft = labels.is_floating_point()
    if problem_type == "single_label_classification":
        # A single classification is one group.
        sizes = [logits.shape[1]] if group_sizes is None else list(group_sizes)
        if soft:
            labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
            targets = labels.split(sizes, dim=1)
            count = torch.tensor(logits.shape[0] * len(sizes), device=logits.device)
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * len(sizes) / logits.shape[1]
        else:
            shape = logits.shape[:1] if group_sizes is None else torch.Size((len(logits), len(sizes)))
            labels = _fit(labels, shape, logits, problem_type).long()
            targets = labels.reshape(-1, len(sizes)).unbind(dim=1)
            count = (labels != -100).sum()
        parts = zip(logits.split(sizes, dim=1), targets, strict=True)
        sums = [nn.functional.cross_entropy(*part, ignore_index=-100, reduction="sum") for part in parts]
        total = torch.stack(sums).sum()
    elif group_sizes is not None:
        raise ValueError(
            f"`problem_type={problem_type!r}` does not work with groups of labels, each of which needs "
            "'single_label_classification'."
        )
    elif problem_type == "multi_label_classification":
        labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
        counted = labels != -100
        targets = torch.where(counted, labels, 0.0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        total, count = (losses * counted).sum(), counted.sum()
    elif problem_type == "regression":
        labels = _fit(labels, logits.shape, logits, problem_type).to(logits.dtype)
        total, count = (logits - labels).square().sum(), torch.tensor(labels.numel(), device=logits.device)
    else:
        raise ValueError(
            f"`problem_type={problem_type!r}` is not known; expected 'single_label_classification', "
            "'multi_label_classification' or 'regression'."
        )
    if num_items_in_batch is None:
        return total / count.clamp(min=1)
    # If no file of a step can be read, all its labels are ignored: the loss is then 0, not 0 / 0.
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def _fit(labels: torch.Tensor, shape: torch.Size, logits: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Return labels in `shape`; only a last axis of 1 may be missing or extra, as broadcasting would hide mistakes."""
    trimmed, expected = ([*s, 1] if len(s) == 1 else [*s] for s in (labels.shape, shape))
    if trimmed != expected:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} do not fit logits of shape "
            f"{tuple(logits.shape)} under {problem_type}; expected {tuple(shape)}."
        )
    return labels.reshape(shape)


__all__ = ["ViViTForPreTraining", "ViViTForVideoClassification", "ViViTModel", "ViViTPreTrainedModel"]
