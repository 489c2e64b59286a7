"""Write a small data set of video files whose class is the motion: a shape drifts along one of four diagonals.

    python examples/moving_shapes.py moving_shapes --clips-per-class 100

    moving_shapes/train/down_left/000.mp4     H.264, yuv420p, 24 frames of 96x80 at 12 frames per second
    moving_shapes/test/up_right/000.mp4

No single frame shows the class. The shape leaves at one edge and comes back at the opposite one, so its position is
uniformly distributed at any time. Clips with the same number differ only in the direction: they share shape, colours,
background, starting point and speed. A clip played backwards belongs to the opposite class.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np


# Sign of the velocity in (y, x); y grows downwards.
MOTIONS = {"down_left": (1, -1), "down_right": (1, 1), "up_left": (-1, -1), "up_right": (-1, 1)}
BACKGROUNDS = ("flat", "gradient", "noise")


def _polygon(sides: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the signed distance to the regular polygon whose edges touch the circle of radius 1, negative inside."""
    angles = 2 * np.pi * np.arange(sides) / sides
    return lambda y, x: np.max([y * np.sin(angle) + x * np.cos(angle) for angle in angles], axis=0) - 1


# Signed distance to the outline in units of the shape's radius, as a function of y and x.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda y, x: np.hypot(y, x) - 1.2,
    "ring": lambda y, x: np.abs(np.hypot(y, x) - 1) - 0.4,
    "cross": lambda y, x: np.maximum(np.minimum(np.abs(y), np.abs(x)) - 0.4, np.maximum(np.abs(y), np.abs(x)) - 1.4),
    "triangle": _polygon(3),
    "square": _polygon(4),
    "hexagon": _polygon(6),
}


@dataclass(frozen=True)
class Scene:
    """Everything about a clip but its direction. Lengths are in pixels, colours are RGB in [0, 255]."""

    background: np.ndarray  # (height, width, 3)
    shape: str
    colour: np.ndarray  # (3,)
    radius: float
    angle: float  # radians
    start: np.ndarray  # (2,), y and x in the first frame
    speed: np.ndarray  # (2,), pixels per frame along y and x, both positive

    @classmethod
    def draw(cls, rng: np.random.Generator, num_frames: int, height: int, width: int) -> "Scene":
        """Draw a random scene. In `num_frames` frames, the shape crosses each side 0.5 to 1.5 times."""
        size = np.array([height, width])
        colour, first, second = rng.uniform(150, 255, 3), rng.uniform(0, 110, 3), rng.uniform(0, 110, 3)
        if rng.uniform() < 0.5:  # dark on bright instead of bright on dark
            colour, first, second = 255 - colour, 255 - first, 255 - second
        return cls(
            background=_background(rng, first, second, height, width),
            shape=rng.choice(list(SHAPES)),
            colour=colour,
            radius=rng.uniform(0.1, 0.18) * min(height, width),
            angle=rng.uniform(0, 2 * np.pi),
            start=rng.uniform(0, 1, 2) * size,
            speed=rng.uniform(0.5, 1.5, 2) * size / num_frames,
        )

    def render(self, motion: str, num_frames: int) -> np.ndarray:
        """Return the clip with this motion, uint8 RGB (frames, height, width, 3)."""
        height, width = self.background.shape[:2]
        frames = []
        for time in range(num_frames):
            centre_y, centre_x = self.start + time * self.speed * MOTIONS[motion]
            # Offsets from the centre by the shortest way round: what leaves at one edge comes back at the other.
            y = (np.arange(height)[:, None] - centre_y + height / 2) % height - height / 2
            x = (np.arange(width)[None, :] - centre_x + width / 2) % width - width / 2
            sine, cosine = np.sin(self.angle), np.cos(self.angle)
            turned_y, turned_x = (cosine * y + sine * x) / self.radius, (cosine * x - sine * y) / self.radius
            coverage = np.clip(0.5 - self.radius * SHAPES[self.shape](turned_y, turned_x), 0, 1)[..., None]
            frames.append(self.background + coverage * (self.colour - self.background))
        return np.rint(frames).astype(np.uint8)


def _background(rng: np.random.Generator, first: np.ndarray, second: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a flat colour, gradient or mosaic of 8x8 tiles between two colours, (height, width, 3)."""
    kind, mixture = rng.choice(BACKGROUNDS), np.zeros((height, width))
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        mixture = np.sin(angle) * np.linspace(-1, 1, height)[:, None] + np.cos(angle) * np.linspace(-1, 1, width)
        mixture = (mixture - mixture.min()) / np.ptp(mixture)
    elif kind == "noise":
        tiles = rng.uniform(0, 1, (-(-height // 8), -(-width // 8)))
        mixture = np.kron(tiles, np.ones((8, 8)))[:height, :width]
    return first + mixture[..., None] * (second - first)


def write_video(path: str | Path, frames: np.ndarray, fps: int = 12) -> None:
    """Write uint8 RGB `frames` (frames, height, width, 3), of even height and width, as H.264 (yuv420p) in mp4."""
    with av.open(str(path), "w") as container:
        # A low quantiser leaves no trail behind the shape. With several threads, or x264's macroblock tree, the same
        # frames can give other bytes in another run.
        options = {"crf": "14", "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_moving_shapes(
    folder: str | Path,
    clips_per_class: int = 100,
    seed: int = 0,
    *,
    test_clips_per_class: int | None = None,
    num_frames: int = 24,
    height: int = 80,
    width: int = 96,
    fps: int = 12,
) -> Path:
    """Write `folder/train/CLASS/NNN.mp4` and `folder/test/CLASS/NNN.mp4` for every class of `MOTIONS`.

    Args:
        folder: the folder to write to, created if necessary. Files of the same name are overwritten.
        clips_per_class: training files per class.
        seed: the same seed gives the same files. The two splits share no scene.
        test_clips_per_class: test files per class, by default a quarter of `clips_per_class`.
        num_frames, height, width, fps: length in frames, size in pixels (even) and frames per second of every file.

    Returns the folder as a path.
    """
    num_tests = max(1, clips_per_class // 4) if test_clips_per_class is None else test_clips_per_class
    for split, (name, count) in enumerate({"train": clips_per_class, "test": num_tests}.items()):
        for number in range(count):
            scene = Scene.draw(np.random.default_rng([seed, split, number]), num_frames, height, width)
            for motion in MOTIONS:
                path = Path(folder, name, motion, f"{number:03d}.mp4")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, scene.render(motion, num_frames), fps)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write video files of moving shapes; the class is the motion.")
    parser.add_argument("folder", type=Path, help="where to write train/CLASS/NNN.mp4 and test/CLASS/NNN.mp4")
    parser.add_argument("--clips-per-class", type=int, default=100, help="training files per class")
    parser.add_argument("--test-clips-per-class", type=int, help="test files per class (default: a quarter)")
    parser.add_argument("--num-frames", type=int, default=24, help="frames per file")
    parser.add_argument("--height", type=int, default=80, help="in pixels, even")
    parser.add_argument("--width", type=int, default=96, help="in pixels, even")
    parser.add_argument("--fps", type=int, default=12, help="frames per second")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    arguments = parser.parse_args()
    write_moving_shapes(**vars(arguments))
    files = sorted(arguments.folder.glob("*/*/*.mp4"))
    print(f"{arguments.folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
