"""Heat maps over the frames of a clip."""

import numpy as np
import torch


# From violet over red to light yellow, in rising lightness, so that it also reads in grey and with colour blindness.
_RAMP = np.array([(104, 24, 140), (163, 41, 135), (214, 62, 108), (245, 107, 72), (254, 166, 60), (255, 232, 120)])
# The opacity of the hottest colour: enough to stand out, while the frame stays visible.
_MOST_COVERED = 0.75
# How much the frame is greyed, so that the heat stands out from its colours.
_FADED = 0.65
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# The share of tokens that get the hottest colour.
_HOTTEST = 0.03
# The least peak, in multiples of the mean, so that a nearly even map does not look as if it had found something.
_LEAST_PEAK = 2.0


def draw_overlay(frames: np.ndarray, space_map: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    Draw a heat map over the greyed frames of a clip.

    Tokens at or below the mean get no heat. From there the heat rises to the hottest 3 % of the tokens, or to twice the
    mean if that is more.

    Args:
        frames: uint8 (frames, height, width, 3), RGB.
        space_map: floats (time, height, width) in tokens, not negative, such as `Relevance.space` of one clip. Each
            time step covers frames / time frames.

    Returns:
        uint8 (frames, height, width, 3).

    Raises:
        ValueError: if the frames or the map have another type or shape, or the time steps do not divide the frames.
    """
    heat = _heat(_checked_map(frames, space_map))
    size = frames.shape[1:3]
    grown = torch.nn.functional.interpolate(torch.from_numpy(heat)[:, None], size, mode="bilinear")[:, 0].numpy()
    grown = grown.repeat(len(frames) // len(heat), axis=0)  # (time, height, width) -> (frames, height, width)
    faded = frames + _FADED * ((frames @ _LUMA)[..., None] - frames)
    # The opacity rises faster than the colour, or medium heat would hardly show.
    covered = _MOST_COVERED * (grown**0.75)[..., None]
    return np.rint(faded * (1 - covered) + colours(grown) * covered).astype(np.uint8)


def _checked_map(frames: np.ndarray, space_map: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"`frames` must be uint8 (frames, height, width, 3), got {got}.")
    values = np.asarray(space_map.detach().cpu() if isinstance(space_map, torch.Tensor) else space_map, np.float32)
    if values.ndim != 3 or not values.size or len(frames) == 0 or len(frames) % len(values):
        raise ValueError(
            f"`space_map` must be (time, height, width) with a time that divides the {len(frames)} frames, got "
            f"{tuple(values.shape)}."
        )
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"`space_map` must be finite and not negative, got {values.min()} to {values.max()}.")
    return values


def peak(values: np.ndarray) -> float:
    """Return the value of the hottest colour, in multiples of the mean. A few outliers do not set it."""
    return max(_LEAST_PEAK, float(np.quantile(values, 1 - _HOTTEST)) / max(float(values.mean()), 1e-30))


def _heat(values: np.ndarray) -> np.ndarray:
    """Scale values to 0 (at or below the mean) to 1 (the peak)."""
    ratio = values / max(float(values.mean()), 1e-30)
    return np.clip((ratio - 1) / (peak(values) - 1), 0, 1).astype(np.float32)


def colours(heat: np.ndarray) -> np.ndarray:
    """Map heat (...) from 0 to 1 to RGB (..., 3) from 0 to 255."""
    steps = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(heat, steps, channel) for channel in _RAMP.T], axis=-1)
