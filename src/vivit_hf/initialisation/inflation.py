"""How weights of an image transformer become those of a ViViT: pure functions on tensors (section 3.4 of the paper)."""

from collections.abc import Callable, Mapping

import torch

from ..modeling_vivit import Grid, resample_position_embeddings


def central_frame_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """
    The image kernel in the central frame, zero elsewhere (equation 9), so that a tubelet starts as its central frame.

    (hidden, channels, height, width) -> (hidden, channels, num_frames, height, width); the central one of an even
    number is the one behind the middle, as in the official code.
    """
    inflated = kernel.new_zeros(*kernel.shape[:2], num_frames, *kernel.shape[2:])
    inflated[:, :, num_frames // 2] = kernel
    return inflated


def filter_inflation_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The image kernel in every frame, divided by their number (equation 8); shapes as in `central_frame_kernel`."""
    return kernel.unsqueeze(2).repeat(1, 1, num_frames, 1, 1) / num_frames


def approximate_rank_pooling_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """
    The image kernel weighted by approximate rank pooling (Bilen et al., PAMI 2018, equation 3), divided by the number
    of frames as in the official code; shapes as in `central_frame_kernel`.
    """
    frames = torch.arange(1, num_frames + 1, dtype=torch.float64)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), (1 / frames).cumsum(0)])
    weights = 2 * (num_frames - frames + 1) - (num_frames + 1) * (harmonic[-1] - harmonic[:-1])
    weights = (weights / num_frames).view(num_frames, 1, 1)
    return (kernel.double().unsqueeze(2) * weights).to(kernel.dtype)


TUBELET_INITS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "central_frame": central_frame_kernel,
    "filter_inflation": filter_inflation_kernel,
    "approximate_rank_pooling": approximate_rank_pooling_kernel,
}


def image_to_video_position_embeddings(
    position_embeddings: torch.Tensor,
    new_grid: Grid,
    old_grid: tuple[int, int],
    *,
    old_prefix_tokens: int = 1,
    class_position: torch.Tensor | None = None,
    mode: str = "bicubic",
) -> torch.Tensor:
    """
    Position embeddings of an image, resized to the new height and width and repeated over time (section 3.4).

    Args:
        position_embeddings: (1, old_prefix_tokens + old height * old width, hidden).
        new_grid: (time, height, width) in tokens.
        old_grid: (height, width) in tokens.
        old_prefix_tokens: 1 if the image model has a class token, else 0.
        class_position: (1, 1, hidden) to put in front where the video model has a class token; None where it has none.
        mode: "bicubic", or "align_corners_linear", which is what the official code does.

    Returns:
        (1, 1 + time * height * width, hidden), without the 1 if there is no `class_position`.
    """
    time, height, width = new_grid
    grid = resample_position_embeddings(
        position_embeddings[:, old_prefix_tokens:], new_grid=(1, height, width), old_grid=(1, *old_grid), mode=mode
    )
    tiled = grid.repeat(1, time, 1)
    return tiled if class_position is None else torch.cat([class_position, tiled], dim=1)


def fold_layer_scales(weights: Mapping[str, torch.Tensor], scales: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """
    Weights without LayerScale (Touvron et al., 2021) that compute the same.

    LayerScale multiplies each output channel of a projection by a number; multiplying the rows of its weight and its
    bias is the same.

    Args:
        weights: all weights of an image model by name; they stay as they are.
        scales: the names of LayerScale arrays, (hidden,), each with the name of the projection before it.

    Raises ValueError for an array that does not fit its projection.
    """
    folded = {name: tensor for name, tensor in weights.items() if name not in scales}
    for scale, projection in scales.items():
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name not in folded:
                continue
            if weights[scale].shape != folded[name].shape[:1]:
                raise ValueError(
                    f"{scale} has the shape {tuple(weights[scale].shape)}, which is not a number for each output of "
                    f"{name}, {tuple(folded[name].shape)}."
                )
            rows = weights[scale].view(-1, *[1] * (folded[name].ndim - 1))
            folded[name] = folded[name] * rows
    return folded
