"""Generated videos in which no shape moves, of the size and length of the moving shapes."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from moving_shapes import write_video


HEIGHT, WIDTH, NUM_FRAMES = 80, 96, 24


def _noise(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every pixel changes at random, as on a television without a signal."""
    while True:
        yield np.broadcast_to(rng.uniform(0, 255, (HEIGHT, WIDTH, 1)), (HEIGHT, WIDTH, 3))


def _bars(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Coloured stripes that drift to one side."""
    colours, step = rng.uniform(0, 255, (int(rng.integers(4, 10)), 3)), rng.uniform(-4, 4)
    for time in range(NUM_FRAMES):
        place = ((np.arange(WIDTH) + time * step) / WIDTH * len(colours)).astype(int) % len(colours)
        yield np.broadcast_to(colours[place], (HEIGHT, WIDTH, 3))


def _plasma(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Waves of colours that run through each other."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 10
    directions, speed = rng.normal(size=(2, 3)), rng.uniform(-0.5, 0.5, 3)
    for time in range(NUM_FRAMES):
        waves = [np.sin(directions[0, i] * y + directions[1, i] * x + speed[i] * time) for i in range(3)]
        yield 128 + 120 * np.stack(waves, axis=-1)


def _squares(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A chessboard that the camera approaches."""
    size, growth, colours = rng.uniform(3, 10), rng.uniform(1.02, 1.1), rng.uniform(0, 255, (2, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH] - np.array([HEIGHT, WIDTH])[:, None, None] / 2
    for time in range(NUM_FRAMES):
        cell = size * growth**time
        yield colours[(np.floor(y / cell) + np.floor(x / cell)).astype(int) % 2]


def _rain(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Two hundred short strokes that fall, each at its own speed."""
    places, speeds = rng.uniform(0, 1, (200, 2)) * (HEIGHT, WIDTH), rng.uniform(2, 6, 200)
    colour = rng.uniform(128, 255, 3)
    for time in range(NUM_FRAMES):
        picture = np.full((HEIGHT, WIDTH, 3), 30.0)
        for length in range(5):
            y = (places[:, 0] + time * speeds + length).astype(int) % HEIGHT
            picture[y, places[:, 1].astype(int)] = colour
        yield picture


def _lights(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A blurred picture that lights up and goes dark."""
    tiles = torch.from_numpy(rng.uniform(0, 255, (1, 3, 6, 7)))
    picture = torch.nn.functional.interpolate(tiles, (HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0).numpy()
    period = rng.uniform(3, 12)
    for time in range(NUM_FRAMES):
        yield picture * (0.55 + 0.45 * np.sin(2 * np.pi * time / period))


STRANGE: dict[str, Callable[[np.random.Generator], Iterator[np.ndarray]]] = {
    "noise": _noise,
    "bars": _bars,
    "plasma": _plasma,
    "squares": _squares,
    "rain": _rain,
    "lights": _lights,
}


def write_strange_videos(folder: Path, count: int) -> list[Path]:
    """Write `count` videos of each kind in `STRANGE`, of the size and length of the moving shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in STRANGE.items():
        for number in range(count):
            frames = list(islice(draw(np.random.default_rng([4, number])), NUM_FRAMES))
            written.append(folder / f"{name}_{number:03d}.mp4")
            write_video(written[-1], np.stack(frames).clip(0, 255).astype(np.uint8))
    return written
