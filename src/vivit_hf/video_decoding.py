"""Read exact RGB frames from a video file, with PyAV.

Frame i is the i-th frame in presentation order that a plain decode from beginning to end gives, whatever the
container, its header, B-frames, the first timestamp or the frame rate.

Video is untrusted input: any file ends in frames, in a `VideoDecodingError` that names the file, or in a
`VideoLimitError` if it is larger than `VideoLimits` allows.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from .frame_conversion import FrameConverter, FrameShape, FrameSize, FrameWindow, NumberedFrame, Orientation
from .frame_decoders import IndexMismatchError, SeekingDecoder, SequentialDecoder, index_packets
from .limits_vivit import check_choice
from .video_container import VideoContainer, named_errors
from .video_sources import DecodingReport, FramesChangedError, VideoDecodingError, VideoLimits, source_name


_ON_LOST = ("raise", "repeat_last")


class VideoReader:
    """Exact random access to the frames of one video file.

    It has a container, and one of two decoders: a seeking one if the packets tell which frames there are, otherwise a
    sequential one. If the seeking one meets other frames than the packets promised, the sequential one takes over.

    Args:
        source: path, `pathlib.Path`, http(s) URL, bytes, binary file (read from its start, left open) or the
            dictionary {"path": ..., "bytes": ...} that `datasets.Video(decode=False)` gives.
        limits: `VideoLimits`.
        num_threads: decoder and scaler threads, 0 = as many as FFmpeg chooses.

    `timestamps`, float64 (num_frames,), are the times in seconds at which the frames are shown, from 0. Without usable
    timestamps in the file they follow from its frame rate, or 25 if it has none. `report` is a `DecodingReport`. Both
    can change when damage comes to light (see `frames_at`).

    The first video stream that is not a cover picture is read. Rotation and mirroring stored in the file are applied;
    non-square pixels are not stretched. Open a reader where it is used (in the worker, not before the fork) and close
    it: it is a context manager. Threads may share it; it serves one call at a time.

    ```python
    with VideoReader("video.mp4") as video:
        frames = video.frames_at([0, 10, -1])  # uint8 (3, height, width, 3), RGB
    ```

    Raises `VideoDecodingError` if no frame can be decoded, `VideoLimitError` if the file is over its limits, TypeError
    if `source` is not a video source.
    """

    def __init__(self, source: Any, *, limits: VideoLimits | None = None, num_threads: int = 0):
        self.name = source_name(source)
        self.report = DecodingReport(self.name)
        self._lock = threading.RLock()
        self._turn = 0
        self._is_closed = False
        self._num_packets = 0
        self._scanned_pts: np.ndarray | None = None
        self._seeking: SeekingDecoder | None = None
        with named_errors(self.name):
            self._container = VideoContainer(source, limits or VideoLimits(), num_threads)
            try:
                self._converter = FrameConverter(num_threads)
                self._decoder = self._first_decoder()
                self.report.num_frames = self.num_frames
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the container, and the file unless the caller opened it."""
        with self._lock:
            self._is_closed = True
            if self._seeking is not None:
                self._seeking.reset()
            self._container.close()

    @property
    def timestamps(self) -> np.ndarray:
        return self._decoder.timestamps

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    def frames_at(
        self,
        indices: Any,
        *,
        size: FrameSize | None = None,
        window: FrameWindow | None = None,
        on_lost: str = "raise",
    ) -> np.ndarray:
        """Return frames by index, as numpy would index the video: in any order, repeated, or counted from the end.

        Args:
            indices: integers of any shape, at least one.
            size: from the (height, width) of the upright frame to the wanted one; scaling (bilinear, antialiased) and
                colour conversion are then one pass. None keeps the size.
            window: from the (height, width) that `size` gives to the (top, left, height, width) to keep of it.
                None keeps all.
            on_lost: for frames lost to damage: "raise", or "repeat_last" for the last frame before.

        Returns:
            uint8 RGB (*indices.shape, height, width, 3).

        Raises:
            IndexError: an index is outside the video.
            FramesChangedError: the file is damaged and has other frames than its packets promised. `timestamps` now
                describe those: choose indices again. This happens at most once.
            VideoDecodingError: a frame is lost, and `on_lost` is "raise"; or the file cannot be read any more.
            VideoLimitError: more than `max_decoded_pixels` would be decoded.
            ValueError: `on_lost` is not known, or the reader is closed.
        """
        check_choice("on_lost", on_lost, _ON_LOST)
        with self._lock, named_errors(self.name):
            self._begin()
            indices = self._checked(indices)
            wanted, places = np.unique(indices, return_inverse=True)
            decoded = self._decoded(wanted, on_lost)
            frames = self._converter.to_rgb(decoded, len(wanted), self._container.header_size, (size, window))
            if not np.array_equal(places.flat, np.arange(len(frames))):
                frames = frames[places.reshape(-1)]
            return frames.reshape(indices.shape + frames.shape[1:])

    def stream(
        self,
        indices: Any,
        *,
        size: FrameSize | None = None,
        window: FrameWindow | None = None,
        on_lost: str = "repeat_last",
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yield frames by index, one after the other, for videos too long to hold: one pass, one frame in memory.

        Args:
            indices: integers (frames,) that do not decrease.
            size, window: as for `frames_at`.
            on_lost: as for `frames_at`. With "repeat_last", a file that turns out to end earlier ends the stream.

        Yields:
            The seconds at which a frame is shown, and the frame, uint8 RGB (height, width, 3).

        Raises:
            IndexError, FramesChangedError, VideoDecodingError, VideoLimitError, ValueError: as `frames_at`.
            RuntimeError: the reader was closed, or used for something else, before the end.
        """
        check_choice("on_lost", on_lost, _ON_LOST)
        with self._lock:
            turn = self._begin()
        frames = self._streamed(indices, (size, window), on_lost)
        while True:
            with self._lock:
                if self._is_closed or turn != self._turn:
                    event = "is closed" if self._is_closed else "was used for something else"
                    raise RuntimeError(
                        f"The reader of {self.name} {event} before the end of its stream: open a reader for each use."
                    )
                item = next(frames, None)
            if item is None:
                return
            yield item

    def _streamed(self, indices: Any, shape: FrameShape, on_lost: str) -> Iterator[tuple[float, np.ndarray]]:
        indices = self._checked(indices)
        if indices.ndim != 1 or np.any(np.diff(indices) < 0):
            raise IndexError("`indices` must be a list of integers that do not decrease.")
        wanted, counts = np.unique(indices, return_counts=True)
        with named_errors(self.name):
            for row, frame in self._decoded(wanted, on_lost, resumes=True):
                image = self._converter.one_to_rgb(frame, self._container.header_size, shape)
                for _ in range(counts[row]):
                    yield float(self.timestamps[wanted[row]]), image

    def describe(self) -> dict[str, Any]:
        """Return the properties of the file and its first frame: `container`, `codec`, `pixel_format`, upright `height`
        and `width` in pixels, and the stored `rotation` in degrees clockwise (0, 90, 180 or 270)."""
        with self._lock, named_errors(self.name):
            self._begin()
            self._container.reopen()
            frame = next(self._container.frames(self._container.packets()), None)
            if frame is None:
                raise VideoDecodingError.about(self.name, "no frame of it can be decoded", num_recovered=0)
            orientation = Orientation.of(frame)
            height, width = orientation.turned(frame.height, frame.width)
            return {
                "container": self._container.format,
                "codec": self._container.codec,
                "pixel_format": frame.format.name,
                "height": height,
                "width": width,
                "rotation": orientation.rotation,
            }

    def verify(self) -> DecodingReport:
        """Decode every frame, keep none, and return the report, with all damage in the file that a decoder notices."""
        with self._lock, named_errors(self.name):
            self._begin()
            decoder = self._decoder
            if not isinstance(decoder, SequentialDecoder):
                decoder = self._sequential_decoder()
                has_changed = not np.array_equal(self.timestamps, decoder.timestamps)
                if decoder.num_damaged_frames or self.report.num_rejected_packets or has_changed:
                    self._decoder = decoder
            self.report.num_damaged_frames = decoder.num_damaged_frames
            return self.report

    def _first_decoder(self) -> SeekingDecoder | SequentialDecoder:
        container = self._container
        self._scanned_pts, index = index_packets(self._counted(container.packets()), container.codec, container.format)
        if self._num_packets == 1:
            container.mark_as_still()
        container.check_size(*container.header_size)
        if index is not None and not container.num_demux_errors:
            self._seeking = SeekingDecoder(container, index)
            if self._seeking.begin():
                return self._seeking
        return self._sequential_decoder()

    def _counted(self, packets: Iterator[Any]) -> Iterator[Any]:
        for packet in packets:
            self._num_packets += 1
            self._container.check_limit("max_frames", self._num_packets)
            if packet.has_sidedata("encryption_info"):  # decoders would make noise of it, some without an error
                raise VideoDecodingError.about(self.name, "it is encrypted; decrypt it first", num_recovered=0)
            yield packet

    def _sequential_decoder(self) -> SequentialDecoder:
        decoder = SequentialDecoder(self._container, self.report, self._scanned_pts, self._num_packets)
        self.report.num_frames = len(decoder.timestamps)
        return decoder

    def _decoded(
        self, wanted: np.ndarray, on_lost: str, *, resumes: bool = False
    ) -> Generator[NumberedFrame, None, None]:
        """
        Yield the frames `wanted` (sorted, unique), each with its place among them.

        If the decoder gives other frames than the packets promised, the file is indexed by decoding it. Then the frames
        begin again with the first, or go on after the last one if `resumes`.
        """
        row = -1
        try:
            for row, frame in enumerate(self._decoder.frames(wanted, on_lost)):
                yield row, frame
            return
        except IndexMismatchError:
            decoder = self._sequential_decoder()
        has_changed, num_promised = not np.array_equal(self.timestamps, decoder.timestamps), self.num_frames
        self._decoder = decoder
        if has_changed:
            kept = wanted[wanted < self.num_frames]
            if not resumes or on_lost == "raise" or (row < 0 and not len(kept)):
                reason = f"only {self.num_frames} of its {num_promised} frames can be decoded"
                if self.num_frames >= num_promised:
                    reason = f"its {self.num_frames} frames are others than its packets promise"
                raise FramesChangedError.about(
                    self.name,
                    f"{reason}; choose frames again by the reader's new timestamps",
                    num_recovered=self.num_frames,
                    num_frames=num_promised,
                )
            wanted = kept
        first = row + 1 if resumes else 0
        if first < len(wanted):
            yield from enumerate(decoder.frames(wanted[first:], on_lost), first)

    def _begin(self) -> int:
        """Return the turn of this call. FFmpeg crashes if two calls use one container, or a call uses a closed one."""
        if self._is_closed:
            raise ValueError(f"The reader of {self.name} is closed: open another one.")
        self._turn += 1
        self._container.begin_call()
        return self._turn

    def _checked(self, indices: Any) -> np.ndarray:
        """Return the indices as int64 from 0. Raises IndexError."""
        indices = np.asarray(indices)
        if indices.size == 0 or indices.dtype.kind not in "iu":
            raise IndexError(f"Frame indices must be integers, and at least one, got {indices!r}.")
        indices = indices.astype(np.int64)  # the number of frames may be too large for their type
        outside = indices[(indices < -self.num_frames) | (indices >= self.num_frames)]
        if outside.size:
            raise IndexError(f"{self.name} has {self.num_frames} frames, index {outside.flat[0]} is outside of them.")
        return np.where(indices < 0, indices + self.num_frames, indices)
