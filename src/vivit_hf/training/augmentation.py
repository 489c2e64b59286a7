"""Training augmentation of clips: random values are drawn once per clip and applied to all of its frames.

The values are those of the official recipes: scale jitter, random crop and flip, colour jitter and drop for Kinetics
(google-research/scenic projects/vivit and the DMVR processors that it reads data with), and RandAugment (Cubuk et al.,
2020) for Something-Something and EPIC-Kitchens, with the magnitudes of its TensorFlow implementation, where 10 is the
full scale of every operation.

The image operations are Pillow's. Colour operations run on all frames at once, as one tall image, so that statistics of
the image (the extremes of AutoContrast, the histogram of Equalize) are statistics of the clip.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..frame_sampling import random_crop
from ..video_frames import resize_frames


_GREY = 128  # fills holes, and pixels from outside the frame
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_FULL_MAGNITUDE = 10.0
_TRANSLATION, _CUTOUT = 100, 40  # pixels at the full magnitude

Clip = np.ndarray


def clip_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one example in one epoch, which depends on nothing else."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index)))


@dataclass(frozen=True)
class ClipAugmentation:
    """Augments a clip, uint8 (frames, height, width, 3), and crops it to `crop_size`.

    Args:
        crop_size: (height, width) of the random crop, in pixels.
        flip_probability: probability of a horizontal flip.
        scale_jitter: None, or the smallest and the largest factor of height and width, which are drawn independently,
            as in the official code (0.9 to 1.33). A clip too small for the crop is scaled up evenly.
        colour_jitter_probability: probability of changing brightness (by up to 32 of 255), saturation and contrast (0.6
            to 1.4 times) and hue (by up to a fifth of the circle).
        colour_drop_probability: probability of a grey clip.
        rand_augment_layers: number of RandAugment operations per clip.
        rand_augment_magnitude: their strength; 10 is the full scale, and the official recipes use 15 and 20.

    Raises ValueError for values out of range.
    """

    crop_size: tuple[int, int]
    flip_probability: float = 0.0
    scale_jitter: tuple[float, float] | None = None
    colour_jitter_probability: float = 0.0
    colour_drop_probability: float = 0.0
    rand_augment_layers: int = 0
    rand_augment_magnitude: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip_probability", "colour_jitter_probability", "colour_drop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not a probability; expected 0 to 1.")
        if len(self.crop_size) != 2 or min(self.crop_size) < 1:
            raise ValueError(f"`crop_size={self.crop_size!r}` must be (height, width) in pixels.")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"`scale_jitter={self.scale_jitter!r}` must be (smallest, largest), both above 0.")
        if self.rand_augment_layers < 0 or self.rand_augment_magnitude < 0:
            raise ValueError(
                f"`rand_augment_layers={self.rand_augment_layers}` and `rand_augment_magnitude="
                f"{self.rand_augment_magnitude}` must not be negative."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, clip: Clip, generator: np.random.Generator) -> Clip:
        """Return an augmented copy, uint8 (frames, *crop_size, 3), with random numbers from `generator`."""
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            raise ValueError(
                f"A clip to augment is uint8 (frames, height, width, 3), got {clip.dtype} {tuple(clip.shape)}."
            )
        clip = self._scaled(clip, generator)
        top, left, height, width = random_crop(clip.shape[1], clip.shape[2], *self.crop_size, generator)
        clip = clip[:, top : top + height, left : left + width]
        if generator.random() < self.flip_probability:
            clip = clip[:, :, ::-1]
        clip = np.ascontiguousarray(clip)
        if self.rand_augment_layers:
            clip = rand_augment(clip, self.rand_augment_layers, self.rand_augment_magnitude, generator)
        if generator.random() < self.colour_jitter_probability:
            clip = jitter_colours(clip, generator)
        if generator.random() < self.colour_drop_probability:
            clip = _on_tall_image(clip, lambda image: image.convert("L").convert("RGB"))
        return clip

    def _scaled(self, clip: Clip, generator: np.random.Generator) -> Clip:
        size = clip.shape[1:3]
        if self.scale_jitter is not None:
            factors = generator.uniform(*self.scale_jitter, size=2)
            size = tuple(int(side * factor) for side, factor in zip(size, factors, strict=True))
        # Both sides by one factor, so that a portrait video is not squeezed for a landscape crop.
        growth = max(1.0, *(crop / side for side, crop in zip(size, self.crop_size, strict=True)))
        height, width = (max(round(side * growth), crop) for side, crop in zip(size, self.crop_size, strict=True))
        return resize_frames(clip, (height, width), Image.Resampling.BILINEAR)


def _on_tall_image(clip: Clip, operation: Callable[[Image.Image], Image.Image]) -> Clip:
    """Apply a colour operation to all frames as one image."""
    frames, height, width, channels = clip.shape
    image = operation(Image.fromarray(clip.reshape(frames * height, width, channels)))
    return np.asarray(image).reshape(clip.shape)


def _on_each_frame(clip: Clip, operation: Callable[[Image.Image], Image.Image]) -> Clip:
    return np.stack([np.asarray(operation(Image.fromarray(frame))) for frame in clip])


def jitter_colours(clip: Clip, generator: np.random.Generator) -> Clip:
    """Change brightness, saturation, contrast and hue, in this order, as the DMVR processors do.

    Takes and returns uint8 (frames, height, width, 3). Contrast is about the mean of each channel over the clip.
    """
    brightness = generator.uniform(-32, 32)
    saturation, contrast = generator.uniform(0.6, 1.4, size=2)
    hue = generator.uniform(-0.2, 0.2)
    # The first three are linear in the colour of a pixel, so they are one matrix; contrast keeps the means.
    to_grey = np.tile(_GREY_WEIGHTS, (3, 1))
    matrix = saturation * np.eye(3) + (1 - saturation) * to_grey
    offset = matrix @ np.full(3, brightness)
    means = matrix @ _channel_means(clip) + offset
    matrix, offset = contrast * matrix, contrast * offset + (1 - contrast) * means
    entries = tuple(np.column_stack([matrix, offset]).ravel().tolist())
    steps = round(hue * 256)

    def jitter(image: Image.Image) -> Image.Image:
        hues, *others = image.convert("RGB", entries).convert("HSV").split()
        turned = hues.point([(value + steps) % 256 for value in range(256)])
        return Image.merge("HSV", (turned, *others)).convert("RGB")

    return _on_tall_image(clip, jitter)


def _channel_means(clip: Clip) -> np.ndarray:
    """Return the means of red, green and blue over a clip, float64 (3,)."""
    frames, height, width, channels = clip.shape
    counts = Image.fromarray(clip.reshape(frames * height, width, channels)).histogram()
    return np.array(counts, dtype=np.float64).reshape(3, 256) @ np.arange(256) / (frames * height * width)


# RandAugment

Operation = Callable[[Clip, float, np.random.Generator], Clip]  # of a clip and a share of the full magnitude


def _factor(share: float) -> float:
    return share * 1.8 + 0.1


def _coloured(operation: Callable[[Image.Image, float], Image.Image]) -> Operation:
    return lambda clip, share, _: _on_tall_image(clip, lambda image: operation(image, share))


def _contrast(clip: Clip, share: float, _: np.random.Generator) -> Clip:
    mean = round(float(_channel_means(clip) @ _GREY_WEIGHTS))
    table = [round(min(max(mean + _factor(share) * (value - mean), 0), 255)) for value in range(256)] * 3
    return _on_tall_image(clip, lambda image: image.point(table))


def _solarise_add(image: Image.Image, share: float) -> Image.Image:
    return image.point([min(value + int(share * 110), 255) if value < 128 else value for value in range(256)] * 3)


def _sharpness(clip: Clip, share: float, _: np.random.Generator) -> Clip:
    return _on_each_frame(clip, lambda image: Image.blend(image.filter(ImageFilter.SMOOTH), image, _factor(share)))


def _sign(generator: np.random.Generator) -> int:
    return -1 if generator.random() < 0.5 else 1


def _rotate(clip: Clip, share: float, generator: np.random.Generator) -> Clip:
    degrees = share * 30 * _sign(generator)
    return _on_each_frame(clip, lambda image: image.rotate(degrees, fillcolor=(_GREY,) * 3))


def _affine(matrix_of: Callable[[float], tuple[float, ...]]) -> Operation:
    """Return an operation whose matrix, from output to input coordinates, depends on the share with a random sign."""

    def operation(clip: Clip, share: float, generator: np.random.Generator) -> Clip:
        matrix, kind = matrix_of(share * _sign(generator)), Image.Transform.AFFINE
        return _on_each_frame(clip, lambda image: image.transform(image.size, kind, matrix, fillcolor=(_GREY,) * 3))

    return operation


def _cutout(clip: Clip, share: float, generator: np.random.Generator) -> Clip:
    """Paint a grey square of side 2 * `reach` at a random place, clipped to the frame."""
    reach, (height, width) = int(share * _CUTOUT), clip.shape[1:3]
    row, column = int(generator.integers(height)), int(generator.integers(width))
    result = clip.copy()
    result[:, max(0, row - reach) : row + reach, max(0, column - reach) : column + reach] = _GREY
    return result


RAND_AUGMENT_OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _coloured(lambda image, _: ImageOps.autocontrast(image)),
    "equalise": _coloured(lambda image, _: ImageOps.equalize(image)),
    "invert": lambda clip, *_: 255 - clip,
    "rotate": _rotate,
    "posterise": _coloured(lambda image, share: ImageOps.posterize(image, max(1, 8 - int(share * 4)))),
    "solarise": _coloured(lambda image, share: ImageOps.solarize(image, max(0, 256 - int(share * 256)))),
    "solarise_add": _coloured(_solarise_add),
    "colour": _coloured(lambda image, share: ImageEnhance.Color(image).enhance(_factor(share))),
    "contrast": _contrast,
    "brightness": _coloured(lambda image, share: ImageEnhance.Brightness(image).enhance(_factor(share))),
    "sharpness": _sharpness,
    "shear_x": _affine(lambda share: (1, share * 0.3, 0, 0, 1, 0)),
    "shear_y": _affine(lambda share: (1, 0, 0, share * 0.3, 1, 0)),
    "translate_x": _affine(lambda share: (1, 0, share * _TRANSLATION, 0, 1, 0)),
    "translate_y": _affine(lambda share: (1, 0, 0, 0, 1, share * _TRANSLATION)),
    "cutout": _cutout,
}


def rand_augment(clip: Clip, num_layers: int, magnitude: float, generator: np.random.Generator) -> Clip:
    """Apply `num_layers` random operations in turn, each to all frames alike.

    Takes and returns uint8 (frames, height, width, 3). Translations and cutouts have a fixed size in pixels from 224
    pixels up, and shrink in proportion for smaller frames.
    """
    share = magnitude / _FULL_MAGNITUDE
    names = list(RAND_AUGMENT_OPERATIONS)
    for _ in range(num_layers):
        name = names[int(generator.integers(len(names)))]
        is_in_pixels = name in ("translate_x", "translate_y", "cutout")
        scale = min(1.0, min(clip.shape[1:3]) / 224) if is_in_pixels else 1.0
        clip = RAND_AUGMENT_OPERATIONS[name](clip, share * scale, generator)
    return clip


# Flips

_WORDS_OF_SIDES = set(
    "left leftward leftwards leftmost right rightward rightwards rightmost clockwise anticlockwise "
    "counterclockwise".split()
)


def names_with_sides(names: Iterable[str]) -> list[str]:
    """Return the class names that mention a side or a turn, where a mirrored video would be of another class."""
    spaced = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in names}
    return [name for name, words in spaced.items() if _WORDS_OF_SIDES & set(re.findall(r"[a-z]+", words))]
