"""From decoded frames to RGB arrays: colours, size, rotation and crop."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np


try:
    from av.video.reformatter import VideoReformatter
except ImportError:
    VideoReformatter = None  # type: ignore[assignment, misc]


_FRAMES_AHEAD = 3
# libswscale's BILINEAR | ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP, by their numbers: PyAV 17 has no names for the
# last three. Without them it rounds coarsely and takes every second chroma sample, an error of 1 to 5 grey levels.
_SCALER_FLAGS = 0x2 | 0x40000 | 0x2000 | 0x4000

FrameSize = Callable[[int, int], tuple[int, int]]
FrameWindow = Callable[[int, int], tuple[int, int, int, int]]
NumberedFrame = tuple[int, Any]  # the row of the result, and the `av.VideoFrame`
FrameShape = tuple[FrameSize | None, FrameWindow | None]


def _decoded_ahead(frames: Iterator[NumberedFrame]) -> Generator[NumberedFrame, None, None]:
    """Yield the same frames, decoding the next ones in a thread while the caller converts one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, frames, None) for _ in range(_FRAMES_AHEAD))
        while (frame := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, frames, None))
            yield frame


class Orientation(NamedTuple):
    """How to show a stored picture: swap its axes, then reverse the order of its rows, and that of its columns."""

    swaps_axes: bool
    reverses_rows: bool
    reverses_columns: bool

    @classmethod
    def of(cls, frame: Any) -> "Orientation":
        """Read the orientation of a decoded frame from its display matrix, by which a file can also mirror it."""
        try:
            # Pixel (x, y) of the stored picture is shown at (a x + c y, b x + d y).
            a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
        except (KeyError, ValueError):  # there is none, or PyAV does not know another kind of the frame's side data
            a, b, c, d = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
        return cls(True, b < 0, c < 0) if abs(b) > abs(a) else cls(False, d < 0, a < 0)

    @property
    def rotation(self) -> int:
        """The clockwise rotation in degrees: 0, 90, 180 or 270. A mirrored picture is mirrored left to right first."""
        return 270 - 180 * self.reverses_columns if self.swaps_axes else 180 * self.reverses_rows

    def turned(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the upright picture from that of the stored one, or the reverse."""
        return (width, height) if self.swaps_axes else (height, width)

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """Return an upright view of a stored plane (height, width)."""
        plane = plane.T if self.swaps_axes else plane
        return plane[:: -1 if self.reverses_rows else 1, :: -1 if self.reverses_columns else 1]


class FrameConverter:
    """Converts decoded frames to arrays, with one scaler for all of them; `num_threads` as for `VideoReader`."""

    def __init__(self, num_threads: int):
        self._reformatter = VideoReformatter()
        self._num_threads = num_threads
        self._orientations: dict[int, Orientation] = {}

    def to_rgb(
        self,
        frames: Generator[NumberedFrame, None, None],
        num_frames: int,
        header: tuple[int, int],
        shape: FrameShape,
    ) -> np.ndarray:
        """
        Scale, convert, turn upright and crop frames.

        Args:
            frames: every row of the result at least once. If a row comes again, the last one counts.
            header: (height, width) of the stream in its header, in pixels.

        Returns:
            uint8 RGB (num_frames, height, width, 3), a view of planes.
        """
        size, window = shape
        planes: Any = None
        # Closed at once, so that no thread decodes on after an error, when the container is closed.
        is_alone = self._num_threads == 1 or num_frames == 1
        with contextlib.closing(frames if is_alone else _decoded_ahead(frames)) as frames:
            for row, frame in frames:
                orientation = self._orientation(frame)
                if planes is None:
                    # A stream whose pictures change size half-way is scaled to the size in its header.
                    stored = (header[0] or frame.height, header[1] or frame.width)
                    upright = orientation.turned(*stored)
                    scaled = size(*upright) if size is not None else upright
                    top, left, height, width = window(*scaled) if window is not None else (0, 0, *scaled)
                    planes = np.empty((num_frames, 3, height, width), dtype=np.uint8)
                rows, columns = orientation.turned(*scaled)
                for channel, plane in enumerate(self._planes(frame, rows, columns)):
                    pixels = orientation.upright(plane)
                    planes[row, channel] = pixels[top : top + height, left : left + width]
        return np.moveaxis(planes, 1, -1)

    def one_to_rgb(self, frame: Any, header: tuple[int, int], shape: FrameShape) -> np.ndarray:
        """Scale, convert, turn and crop one frame to uint8 RGB (height, width, 3)."""
        return self.to_rgb((row_and_frame for row_and_frame in ((0, frame),)), 1, header, shape)[0]

    def _orientation(self, frame: Any) -> Orientation:
        # A frame whose side data was read stays in memory until the garbage collector runs: read one of each angle.
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = Orientation.of(frame)
        return self._orientations[frame.rotation]

    def _planes(self, frame: Any, height: int, width: int) -> list[np.ndarray]:
        """Return red, green and blue of a frame, uint8 (height, width) each."""
        # libswscale converts to planes twice as fast as to interleaved pixels. The colours are the same, except for a
        # rounding error of 1 where chroma is scaled; in a frame that keeps its size, only odd sizes need that.
        keeps_odd_size = (frame.height, frame.width) == (height, width) and (height % 2 or width % 2)
        pixel_format = "rgb24" if keeps_odd_size else "gbrp"
        rgb = self._reformatter.reformat(
            frame, width, height, pixel_format, interpolation=_SCALER_FLAGS, threads=self._num_threads
        )
        if keeps_odd_size:
            return list(np.moveaxis(rgb.to_ndarray(), -1, 0))
        lines = [np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size) for plane in rgb.planes]
        green, blue, red = (plane[:height, :width] for plane in lines)
        return [red, green, blue]
