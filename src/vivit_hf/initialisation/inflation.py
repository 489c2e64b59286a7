"""Turn the weights of an image ViT into those of a ViViT (section 3.4 of the paper): pure functions on tensors."""

from collections.abc import Callable, Mapping

import torch

from ..modeling_vivit import Grid, resample_position_embeddings


def central_frame_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """
    Put the image kernel into the central frame and zeros elsewhere (equation 9): a tubelet starts as its central frame.

    (hidden, channels, height, width) -> (hidden, channels, num_frames, height, width). With an even number of frames,
    the central one is the first of the second half, as in the official code.
    """
    inflated = kernel.new_zeros(*kernel.shape[:2], num_frames, *kernel.shape[2:])
    inflated[:, :, num_frames // 2] = kernel
    return inflated


def filter_inflation_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Put the image kernel, divided by `num_frames`, into every frame (equation 8); shapes as above."""
    return kernel.unsqueeze(2).repeat(1, 1, num_frames, 1, 1) / num_frames


def approximate_rank_pooling_kernel(kernel: torch.Tensor, num_frames: int) -> torch.Tensor:
    """
    Weight the image kernel by approximate rank pooling (Bilen et al., PAMI 2018, equation 3); shapes as above.

    As in the official code, the weights are divided by the number of frames.
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
    Resize position embeddings of an image to a new height and width, and repeat them over time (section 3.4).

    Args:
        position_embeddings: (1, old_prefix_tokens + old height * old width, hidden).
        new_grid: (time, height, width) in tokens.
        old_grid: (height, width) in tokens.
        old_prefix_tokens: 1 if the image model has a class token, else 0.
        class_position: (1, 1, hidden), the position of the video model's class token; None if it has none.
        mode: as in `resample_position_embeddings`.

    Returns:
        (1, 1 + time * height * width, hidden), or without the 1 + if `class_position` is None.
    """
    time, height, width = new_grid
    grid = resample_position_embeddings(
        position_embeddings[:, old_prefix_tokens:], new_grid=(1, height, width), old_grid=(1, *old_grid), mode=mode
    )
    tiled = grid.repeat(1, time, 1)
    return tiled if class_position is None else torch.cat([class_position, tiled], dim=1)


def fold_layer_scales(weights: Mapping[str, torch.Tensor], scales: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """
    Return equivalent weights without LayerScale (Touvron et al., 2021).

    LayerScale multiplies each output channel of a projection by a number, which equals multiplying the rows of the
    projection's weight and its bias.

    Args:
        weights: all weights of an image model by name; they are not changed.
        scales: the names of LayerScale arrays, (hidden,), each with the name of the projection before it.

    Raises:
        ValueError: if an array does not fit its projection.
    """
    folded = {name: tensor for name, tensor in weights.items() if name not in scales}
    for scale, projection in scales.items():
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name not in folded:
                continue
            if weights[scale].shape != folded[name].shape[:1]:
                raise ValueError(
                    f"{scale} has the shape {tuple(weights[scale].shape)}; expected one number for each output of "
                    f"{name}, {tuple(folded[name].shape)}."
                )
            rows = weights[scale].view(-1, *[1] * (folded[name].ndim - 1))
            folded[name] = folded[name] * rows
    return folded
