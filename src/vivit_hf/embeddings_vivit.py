"""
The tokens of a clip (ViViT, section 3.2): patch embeddings, class tokens, and position embeddings on any grid.

Shapes are written in the words batch, time, space, hidden: a clip of `num_frames` frames becomes a grid of
time x space tokens (space = height x width, in patches), ordered time, then height, then width.
"""

import math

import torch
from torch import nn

from .configuration_vivit import ViViTConfig
from .frame_sampling import sample_frames_uniformly


Grid = tuple[int, int, int]


def resample_position_embeddings(
    position_embeddings: torch.Tensor,
    new_grid: Grid,
    old_grid: Grid,
    num_prefix_tokens: int = 0,
    mode: str = "bicubic",
) -> torch.Tensor:
    """
    Interpolates learned position embeddings from one (time, height, width) grid to another.

    Height and width are resampled together, time on its own. The sides need not be square, and whatever does not change
    is not touched: the same grid gives the same tensor back.

    Args:
        position_embeddings: (1, num_prefix_tokens + time * height * width, hidden), tokens in the order time, height,
            width; any floating dtype (the interpolation runs in float32 at least).
        new_grid, old_grid: (time, height, width) in tokens.
        num_prefix_tokens: leading tokens that have no place in the grid (a class token) and are kept as they are.
        mode: "bicubic" (as image transformers do; linear in time), or "align_corners_linear", which is linear in all
            three between aligned corners, as the official code resizes.

    Returns:
        (1, num_prefix_tokens + new time * new height * new width, hidden), same dtype and device.

    Raises:
        ValueError: if the tensor does not hold `old_grid`, or the mode is unknown.
    """
    time, height, width = old_grid
    expected = num_prefix_tokens + time * height * width
    if position_embeddings.ndim != 3 or position_embeddings.shape[1] != expected:
        raise ValueError(
            f"Position embeddings of shape {tuple(position_embeddings.shape)} do not hold {num_prefix_tokens} prefix "
            f"tokens and a (time, height, width) grid of {old_grid}; expected (1, {expected}, hidden)."
        )
    if mode not in ("bicubic", "align_corners_linear"):
        raise ValueError(f"`mode={mode!r}` is not known; expected 'bicubic' or 'align_corners_linear'.")
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
        grid = nn.functional.interpolate(grid, (new_height, new_width), mode=spatial, align_corners=align)
        grid = grid.permute(0, 2, 3, 1)  # (time, height, width, hidden)
    if new_time != time:
        grid = grid.reshape(time, -1).T[None]  # (1, height * width * hidden, time)
        grid = nn.functional.interpolate(grid, new_time, mode="linear", align_corners=align)
        grid = grid[0].T  # (time, height * width * hidden)
    grid = grid.reshape(1, new_time * new_height * new_width, hidden).to(dtype)
    return torch.cat([prefix, grid], dim=1)


class ViViTTubeletProjection(nn.Conv3d):
    """A 3D convolution whose stride is its kernel, computed as one matrix product over non-overlapping patches."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, frames, height, width) -> (batch, hidden, time, height, width), in tokens."""
        (kt, kh, kw), (batch, channels, frames, height, width) = self.kernel_size, pixel_values.shape
        time, rows, columns = frames // kt, height // kh, width // kw
        patches = pixel_values[:, :, : time * kt, : rows * kh, : columns * kw]  # the official VALID padding
        patches = patches.reshape(batch, channels, time, kt, rows, kh, columns, kw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (batch, time, height, width, patch)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class ViViTPatchProjection(nn.Conv2d):
    """A 2D convolution whose stride is its kernel, computed as one matrix product over non-overlapping patches."""

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
    """Uniform frame sampling: 2D patches of frames at equal distances (section 3.2, figure 2)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        patch = tuple(config.tubelet_size[1:])
        self.config = config
        self.projection = ViViTPatchProjection(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, time, height, width, hidden)."""
        frames = len(pixel_values.unbind(1))  # a number, where `shape` may hold a symbol (compiling, tracing)
        pixel_values = pixel_values[:, _sampled_frames(frames, self.config.num_sampled_frames)]
        batch, time = pixel_values.shape[:2]
        patches = self.projection(pixel_values.flatten(0, 1))  # (batch * time, hidden, height, width)
        return patches.permute(0, 2, 3, 1).unflatten(0, (batch, time))


class ViViTTubeletEmbeddings(nn.Module):
    """Tubelet embedding: non-overlapping spatio-temporal patches of the whole clip (section 3.2, figure 3)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        patch: tuple[int, int, int] = tuple(config.tubelet_size)
        self.projection = ViViTTubeletProjection(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, time, height, width, hidden)."""
        return self.projection(pixel_values.transpose(1, 2)).permute(0, 2, 3, 4, 1)


PATCH_EMBEDDINGS = {"tubelet": ViViTTubeletEmbeddings, "uniform_frame_sampling": ViViTUniformFrameEmbeddings}


class ViViTEmbeddings(nn.Module):
    """
    Tokens of a clip with their position embeddings, and the class token where the variant has one.

    The position embeddings cover the class token and the whole grid, except in Model 2, whose spatial encoder sees one
    frame of tokens at a time: there they cover the class token and the space of one frame.
    """

    def __init__(self, config: ViViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = PATCH_EMBEDDINGS[config.embedding_type](config)
        self.num_prefix_tokens = int(config.pooling == "cls")
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if self.num_prefix_tokens else None
        self.grid = self.position_grid(config.grid_size)
        num_positions = self.num_prefix_tokens + math.prod(self.grid)
        self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))

    def resize(self, grid: Grid) -> None:
        """Interpolates the position embeddings for a (time, height, width) token grid, for good."""
        self.position_embeddings = _resized(self, self.position_grid(grid), self.grid)
        self.grid = self.position_grid(grid)

    def position_grid(self, grid: Grid) -> Grid:
        """The part of a (time, height, width) token grid that the position embeddings cover."""
        return (1, *grid[1:]) if self.config.attention_type == "factorised_encoder" else grid

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        (batch, frames, channels, height, width) -> tokens (batch, time, space, hidden), class token (1, 1, hidden).
        """
        dtype = self.position_embeddings.dtype
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        tokens = self.patch_embeddings(pixel_values.to(dtype))  # (batch, time, height, width, hidden)
        positions = resample_position_embeddings(
            self.position_embeddings,
            new_grid=self.position_grid(tuple(tokens.shape[1:4])),
            old_grid=self.grid,
            num_prefix_tokens=self.num_prefix_tokens,
        )
        tokens = tokens.flatten(2, 3)  # (batch, time, height, width, hidden) -> (batch, time, space, hidden)
        tokens = tokens + positions[:, self.num_prefix_tokens :].unflatten(1, (-1, tokens.shape[2]))
        class_token = None if self.cls_token is None else self.cls_token + positions[:, :1]
        return tokens, class_token


class ViViTTemporalEmbeddings(nn.Module):
    """Class token and position embeddings over time for the temporal encoder of Model 2 (section 3.3.2)."""

    def __init__(self, config: ViViTConfig):
        super().__init__()
        self.num_prefix_tokens = int(config.pooling == "cls")
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if self.num_prefix_tokens else None
        self.grid = (config.grid_size[0], 1, 1)
        num_positions = self.num_prefix_tokens + math.prod(self.grid)
        self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))

    def resize(self, grid: Grid) -> None:
        """Interpolates the position embeddings for a (time, height, width) token grid, for good."""
        self.position_embeddings = _resized(self, (grid[0], 1, 1), self.grid)
        self.grid = (grid[0], 1, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time, hidden) -> (batch, 1 + time, hidden), without the 1 where there is no class token."""
        positions = resample_position_embeddings(
            self.position_embeddings,
            new_grid=(tokens.shape[1], 1, 1),
            old_grid=self.grid,
            num_prefix_tokens=self.num_prefix_tokens,
        )
        return prepend_class_token(tokens, self.cls_token) + positions


def _resized(embeddings: ViViTEmbeddings | ViViTTemporalEmbeddings, new_grid: Grid, old_grid: Grid) -> nn.Parameter:
    old = embeddings.position_embeddings
    if old.is_meta:
        raise ValueError(
            "The position embeddings are offloaded and cannot be resized. Resize and save the model without a "
            "`device_map` that offloads them, and load that."
        )
    new = resample_position_embeddings(old.detach(), new_grid, old_grid, embeddings.num_prefix_tokens)
    return nn.Parameter(new, requires_grad=old.requires_grad)


def prepend_class_token(tokens: torch.Tensor, class_token: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens, hidden), (1, 1, hidden) -> (batch, 1 + tokens, hidden); as it is without a class token."""
    if class_token is None:
        return tokens
    return torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)


def check_pixel_values(pixel_values: torch.Tensor, config: ViViTConfig, any_size: bool) -> None:
    """ValueError unless a model can take these clips, of its own size or of any that has a whole patch."""
    check_values(pixel_values, config)
    _, frames, _, height, width = pixel_values.shape
    actual, expected = (frames, height, width), (config.num_frames, *config.frame_size)
    if any_size:
        if any(side < patch for side, patch in zip(actual, config.tubelet_size, strict=True)):
            raise ValueError(f"A clip of {actual} (frames, height, width) has no whole patch of {config.tubelet_size}.")
    elif actual != expected:
        raise ValueError(
            f"The model expects clips of {expected} (frames, height, width), but got {actual}. Resize the clip, pass "
            "`interpolate_pos_encoding=True`, or change the model with `resize_position_embeddings`."
        )


def check_values(pixel_values: torch.Tensor, config: ViViTConfig) -> None:
    """ValueError unless these are clips of floats with the model's channels, whatever their size."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 5:
        got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(f"`pixel_values` must be (batch, frames, channels, height, width), but got {got}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` of {pixel_values.dtype} look like raw frames; the model takes floats in [-1, 1], which "
            "ViViTVideoProcessor makes of them."
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
    """ValueError unless (..., height, width) are those of the model."""
    size = tuple(frames.shape[-2:])
    if size != config.frame_size:
        raise ValueError(
            f"The model expects frames of {config.frame_size} (height, width), but got {size}. Resize the frames, or "
            "change the model with `resize_position_embeddings`."
        )
