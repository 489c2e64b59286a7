"""From a video file to exact RGB frames, with PyAV.

Frame i is the i-th frame in presentation order that a plain decode from beginning to end gives, whatever the
container, its header, B-frames, the first timestamp or the frame rate. Two ways lead there:

    trusted     a scan of the packets (nothing is decoded) gives the timestamps and the keyframes; reading seeks to the
                keyframe before a frame, decodes forward, and checks every frame that comes out against the scan
    decoded     where timestamps are missing or repeated, packets and frames are not one to one, the file is damaged,
                or a check failed: one decode of the whole file, past the packets that the decoder rejects, tells
                which frames there are, and reading counts them from the first

Video is untrusted input: whatever a file contains, it ends in frames, or in a `VideoDecodingError` that names the
file, or in a `VideoLimitError` when it is larger than `VideoLimits` allows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Any

import numpy as np

from .frame_conversion import FrameConverter, FrameShape, FrameSize, FrameWindow
from .frame_index import OutputIndex, PacketIndex, index_packets, num_frames_on_the_way, tainted_timestamps
from .video_container import VideoContainer
from .video_sources import DecodingReport, VideoLimits


try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

# They store the timestamps by which frames are known when unwanted ones between them are left out.
_TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
# Decoding on past a few frames is cheaper than a seek.
_SEEK_GAP = 8


class _IndexMismatchError(Exception):
    """The decoder gave other frames than the packets promised."""


def _check_on_lost(on_lost: str) -> None:
    if on_lost not in ("raise", "repeat_last"):
        raise ValueError(f"`on_lost` must be 'raise' or 'repeat_last', got {on_lost!r}.")


class VideoReader(VideoContainer):
    """Exact random access to the frames of one video file.

    Args:
        source: path, `pathlib.Path`, http(s) URL, bytes, binary file (read from its start, left open) or the
            dictionary {"path": ..., "bytes": ...} that `datasets.Video(decode=False)` gives.
        limits: `VideoLimits`.
        num_threads: decoder and scaler threads, 0 = as many as FFmpeg finds right.
        thread_type: "SLICE" or "NONE". Frame threads ("FRAME", "AUTO") are faster for some files and have hung in
            data loader workers that stop early.

    `timestamps`, float64 (num_frames,), are the times in seconds at which the frames are shown, from 0. `report` is a
    `DecodingReport`.

    The first video stream that is not a cover picture is read. Rotation stored in the file is applied; non-square
    pixels are not stretched. Open a reader where it is used (in the worker, not before the fork) and close it: it is a
    context manager. It does one thing at a time, whatever thread asks.

    ```python
    with VideoReader("video.mp4") as video:
        frames = video.frames_at([0, 10, -1])  # uint8 (3, height, width, 3), RGB
    ```

    Raises `VideoDecodingError` if there is no frame to read, `VideoLimitError` if the file is over its limits.
    """

    def __init__(
        self,
        source: Any,
        *,
        limits: VideoLimits | None = None,
        num_threads: int = 0,
        thread_type: str = "SLICE",
    ):
        super().__init__(source, limits or VideoLimits(), num_threads, thread_type)
        self._trusted: PacketIndex | None = None
        self._scanned_pts: np.ndarray | None = None
        try:
            with self._named_errors():
                self._converter = FrameConverter(num_threads)
                self._open(source)
                if not self._scan_packets():
                    self._decode_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

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
        """Frames by index, as numpy would index the whole video: any order, repeats and negative indices included.

        Args:
            indices: integers of any shape.
            size: from the (height, width) of the upright frame to the wanted one; scaling (bilinear, antialiased) and
                colour conversion are then one pass. None keeps the size.
            window: from the (height, width) that `size` gives to the (top, left, height, width) that is kept of it.
                None keeps all.
            on_lost: for frames that damage has taken: "raise", or "repeat_last" for the last frame before.

        Returns:
            uint8 RGB (*indices.shape, height, width, 3).

        Raises:
            IndexError: an index outside of the video.
            VideoDecodingError: a frame that cannot be recovered.
        """
        return self.read(lambda _: indices, size=size, window=window, on_lost=on_lost)

    def read(
        self,
        choose: Callable[[np.ndarray], Any],
        *,
        size: FrameSize | None = None,
        window: FrameWindow | None = None,
        on_lost: str = "raise",
    ) -> np.ndarray:
        """`frames_at` for the indices that `choose` picks, given the `timestamps`.

        A damaged file can turn out to have fewer frames than its packets promise; `choose` is then asked again, so
        that a clip is laid into the frames that are there.
        """
        _check_on_lost(on_lost)
        with self._lock, self._named_errors():
            self._begin()
            indices = self._checked(choose(self.timestamps))
            shape = (size, window)
            if self._trusted is None:
                return self._read_decoded(indices, shape, on_lost)
            wanted, places = np.unique(indices, return_inverse=True)
            try:
                frames = self._converted(self._read_trusted(self._trusted, wanted), len(wanted), shape)
            except _IndexMismatchError:
                num_promised = self.num_frames
                self._decode_index()
                indices = np.asarray(choose(self.timestamps))
                if on_lost == "repeat_last":
                    indices = np.minimum(indices, self.num_frames - 1)
                elif self.num_frames < num_promised and np.any(indices >= self.num_frames):
                    reason = f"only {self.num_frames} of its {num_promised} frames can be decoded"
                    raise self._error(reason, num_recovered=self.num_frames, num_frames=num_promised) from None
                return self._read_decoded(self._checked(indices), shape, on_lost)
            return self._arranged(frames, places, indices)

    def stream(
        self,
        choose: Callable[[np.ndarray], Any],
        *,
        size: FrameSize | None = None,
        window: FrameWindow | None = None,
        on_lost: str = "repeat_last",
    ) -> Iterator[tuple[float, np.ndarray]]:
        """The frames at the indices that `choose` picks, given the `timestamps`, one after the other.

        For videos that are too long to be held: one pass, a frame in memory at a time. The indices must not decrease.

        Args:
            size, window, on_lost: as for `frames_at`, but damage does not raise unless asked to.

        Yields:
            The seconds at which a frame is shown, and the frame, uint8 RGB (height, width, 3).

        Raises:
            IndexError, VideoDecodingError: as `frames_at`.
            RuntimeError: the reader was closed, or used for something else, before the end.
        """
        _check_on_lost(on_lost)
        frames = self._streamed(choose, (size, window), on_lost)
        with self._lock:
            turn = self._begin()
        while True:
            with self._lock:
                self._check_turn(turn)
                item = next(frames, None)
            if item is None:
                return
            yield item

    def _streamed(
        self, choose: Callable[[np.ndarray], Any], shape: FrameShape, on_lost: str
    ) -> Generator[tuple[float, np.ndarray], None, None]:
        with self._named_errors():
            indices = self._checked(choose(self.timestamps))
            if indices.ndim != 1 or np.any(np.diff(indices) < 0):
                raise IndexError("`choose` must give a list of indices that do not decrease.")
            place = 0
            if self._trusted is not None:
                wanted = np.unique(indices)
                try:
                    for number, frame in zip(wanted, self._read_trusted(self._trusted, wanted), strict=True):
                        image = self._one(frame, shape)
                        while place < len(indices) and indices[place] == number:
                            yield float(self.timestamps[number]), image
                            place += 1
                    return
                except _IndexMismatchError:
                    self._decode_index()
                    indices = np.asarray(choose(self.timestamps))
                    indices = np.minimum(indices, self.num_frames - 1)
            outputs = np.maximum(np.searchsorted(self._decoded.frame_of_output, indices, side="right") - 1, 0)
            outputs, indices = outputs[place:], indices[place:]
            if len(outputs) == 0:
                return
            needed = np.unique(outputs)
            self._account_for(indices[self._decoded.frame_of_output[outputs] != indices], needed, on_lost)
            self._reopen()
            place = 0
            for output, frame in zip(needed, self._read_outputs(needed), strict=True):
                image = self._one(frame, shape)
                while place < len(outputs) and outputs[place] == output:
                    yield float(self.timestamps[indices[place]]), image
                    place += 1

    def _one(self, frame: Any, shape: FrameShape) -> np.ndarray:
        return self._converter.to_rgb((frame for _ in range(1)), 1, self._header_size, shape)[0]

    def describe(self) -> dict[str, Any]:
        """What the file and its first frame say: `container`, `codec`, `pixel_format`, upright `height` and `width` in
        pixels, and `rotation` in degrees clockwise (0, 90, 180 or 270)."""
        with self._lock, self._named_errors():
            self._begin()
            self._reopen()
            frame = next(self._frames(self._packets()), None)
            if frame is None:
                raise self._error("no frame of it can be decoded", num_recovered=0)
            quarter_turns = round(frame.rotation / 90) % 4  # anticlockwise
            size = (frame.width, frame.height) if quarter_turns % 2 else (frame.height, frame.width)
            return {
                "container": self._container.format.name,
                "codec": self._codec,
                "pixel_format": frame.format.name,
                "height": size[0],
                "width": size[1],
                "rotation": -90 * quarter_turns % 360,
            }

    def verify(self) -> DecodingReport:
        """Decodes every frame and keeps none; the report then tells all the damage that a decoder can notice."""
        with self._lock, self._named_errors():
            self._begin()
            self._reopen()  # the decoder must not know more than at the beginning, such as later headers
            if self._trusted is not None:
                try:
                    for _ in self._read_trusted(self._trusted, np.arange(self.num_frames)):
                        continue
                    return self.report
                except _IndexMismatchError:
                    self._decode_index()
            self.report.num_damaged_frames = int(self._decoded.damaged.sum())
        return self.report

    def _checked(self, indices: Any) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size == 0 or indices.dtype.kind not in "iu":
            raise IndexError(f"Frame indices must be integers, and at least one, got {indices!r}.")
        indices = indices.astype(np.int64)  # the number of frames may be too large for its type
        outside = indices[(indices < -self.num_frames) | (indices >= self.num_frames)]
        if outside.size:
            raise IndexError(f"{self.name} has {self.num_frames} frames, index {outside.flat[0]} is outside of them.")
        return np.where(indices < 0, indices + self.num_frames, indices)

    @staticmethod
    def _arranged(frames: np.ndarray, places: np.ndarray, indices: np.ndarray) -> np.ndarray:
        places = places.reshape(-1)
        if not np.array_equal(places, np.arange(len(frames))):
            frames = frames[places]
        return frames.reshape(indices.shape + frames.shape[1:])

    # The index

    def _scan_packets(self) -> bool:
        """Builds the trusted index; False if the packets do not tell the frames."""
        self._num_demux_errors = self._num_packets = 0
        packets = self._counted(self._packets())
        self._scanned_pts, index = index_packets(packets, self._codec, self._container.format.name)
        if index is None or self._num_demux_errors:
            return False
        self._trusted = index
        self._set_timestamps(index.pts, len(index.pts))
        return True

    def _counted(self, packets: Iterator[Any]) -> Iterator[Any]:
        for packet in packets:
            self._num_packets += 1
            self._check_limit("max_frames", self._num_packets)
            yield packet

    def _set_timestamps(self, pts: np.ndarray | None, num_frames: int) -> None:
        if pts is None:
            rate = self._stream.average_rate or self._stream.guessed_rate or 25
            self.timestamps = np.arange(num_frames) / float(rate)
        else:
            ticks = pts.astype(np.float64)  # differences of absurd timestamps leave the range of integers
            self.timestamps = (ticks - ticks[0]) * float(self._stream.time_base)
            if np.any(np.diff(self.timestamps) > self.limits.max_duration):  # no video waits that long for a frame
                self._set_timestamps(None, num_frames)
        self._check_limit("max_duration", float(self.timestamps[-1]))
        self.report.num_frames = num_frames

    # Decoding

    def _read_trusted(self, index: PacketIndex, wanted: np.ndarray) -> Generator[Any, None, None]:
        """The frames `wanted` (sorted, unique); _IndexMismatchError once the decoder does not keep to the index."""
        frames: Iterator[Any] = iter(())
        first = expected = 0
        self._position, self._is_draining, self._sent = -1, False, []
        wanted_pts = set(index.pts[wanted].tolist())
        self._check_pixels(num_frames_on_the_way(index, wanted))
        can_skip = self._container.format.name in _TIMED_CONTAINERS and self._codec in ("h264", "hevc")

        for target in wanted.tolist():
            keyframe = int(index.keyframes[np.searchsorted(index.keyframes, target, side="right") - 1])
            if self._position < 0 or index.position_of_pts[int(index.pts[keyframe])] - self._position > _SEEK_GAP:
                self._drain(frames, index, first)
                frames = self._frames(self._packets_from(index, keyframe, wanted_pts if can_skip else None))
                first = expected = keyframe
            while expected <= target:
                frame = next(frames, None)
                found = -1 if frame is None else index.frame_of_pts.get(frame.pts, -1)
                # After a keyframe in the stream there may come pictures to be shown before it.
                if 0 <= found < first:
                    continue
                is_next = found == expected or (can_skip and expected < found <= target)
                if frame is None or not is_next or frame.is_corrupt:
                    raise _IndexMismatchError
                expected = found + 1
            yield frame
        self._drain(frames, index, first)

    def _drain(self, frames: Iterator[Any], index: PacketIndex, first: int) -> None:
        """Has the decoder hand out what it holds: a damaged frame that is shown later may show in those before."""
        self._is_draining = True
        for frame in frames:
            if frame.is_corrupt and index.frame_of_pts.get(frame.pts, -1) >= first:
                raise _IndexMismatchError
        if any(packet.is_rejected for packet in self._sent):
            raise _IndexMismatchError
        self._is_draining = False

    def _packets_from(self, index: PacketIndex, keyframe: int, wanted_pts: set[int] | None) -> Iterator[Any]:
        for packet in self._landed_on(index, keyframe):
            self._position = index.position_of_pts.get(packet.pts, self._position)
            if wanted_pts is not None:
                self._stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted_pts else "NONREF"
            yield packet
            if self._is_draining:
                return

    def _landed_on(self, index: PacketIndex, keyframe: int) -> Iterator[Any]:
        """The packets from that of `keyframe` on. A seek may land before it, and in some containers behind it."""
        pts = int(index.pts[keyframe])
        start = index.position_of_pts[pts]
        for moment in (pts, index.keyframe_dts[pts]):
            try:
                self._container.seek(pts if moment is None else moment, stream=self._stream)
            except av.FFmpegError:
                continue
            packets = self._packets()
            for packet in packets:
                position = index.position_of_pts.get(packet.pts, -1)
                if position == start:
                    return chain([packet], packets)
                if position > start:
                    break
        self._reopen()
        packets = self._packets()
        for packet in packets:
            if packet.pts == pts and not packet.is_discard:
                return chain([packet], packets)
        raise _IndexMismatchError

    def _decode_index(self) -> None:
        """Builds the index by decoding the whole file once."""
        self._reopen()
        self._check_pixels(self._num_packets)
        self._num_demux_errors = 0
        pts: list[int | None] = []
        flagged = []
        for frame in self._frames(self._packets()):
            pts.append(frame.pts)
            flagged.append(frame.is_corrupt)
            self._check_limit("max_frames", len(pts))
        self._num_rejected = sum(packet.is_rejected for packet in self._sent)
        tainted = tainted_timestamps(self._sent, {value for value, flag in zip(pts, flagged, strict=True) if flag})
        num_outputs, scanned = len(pts), self._scanned_pts
        if num_outputs == 0:
            reason = "no frame of it can be decoded"
            if not all(self._header_size):  # only the decoder saw how large they are
                reason += f", or they have more than max_pixels={self.limits.max_pixels} pixels"
            raise self._error(reason, num_recovered=0)
        output_pts = np.array([-1 if value is None else value for value in pts], dtype=np.int64)
        frames = np.arange(num_outputs)
        is_timed = scanned is not None and bool(np.all(np.diff(output_pts) > 0) and np.isin(output_pts, scanned).all())
        if scanned is not None and is_timed and self._num_rejected:
            # A frame that damage has taken keeps its place; what a plain decode does not begin with has none.
            frames = np.searchsorted(scanned, output_pts)
            output_pts = scanned[frames[0] : frames[-1] + 1]
            frames = frames - frames[0]
        self._trusted, self._decoded = (
            None,
            OutputIndex(frame_of_output=frames, damaged=np.array([value in tainted for value in pts])),
        )
        self._set_timestamps(output_pts if is_timed else None, int(frames[-1]) + 1)
        self.report.num_rejected_packets = self._num_rejected + self._num_demux_errors
        self.report.num_lost_frames = self.num_frames - num_outputs

    def _read_decoded(self, indices: np.ndarray, shape: FrameShape, on_lost: str) -> np.ndarray:
        decoded = self._decoded
        wanted, places = np.unique(indices, return_inverse=True)
        # For each frame the last output at or before it: the frame itself, unless that is lost.
        outputs = np.searchsorted(decoded.frame_of_output, wanted, side="right") - 1
        needed, rows = np.unique(outputs, return_inverse=True)
        self._account_for(wanted[decoded.frame_of_output[outputs] != wanted], needed, on_lost)
        self._reopen()
        frames = self._converted(self._read_outputs(needed), len(needed), shape)
        return self._arranged(frames, rows.reshape(-1)[places.reshape(-1)], indices)

    def _account_for(self, lost: np.ndarray, needed: np.ndarray, on_lost: str) -> None:
        """Raises or reports the frames of a read that are lost, and the decoder's outputs for it that are damaged."""
        decoded, report = self._decoded, self.report
        if len(lost) and on_lost == "raise":
            num_recovered = len(decoded.frame_of_output)
            reason = (
                f"frame {lost[0]} is lost to damage, {num_recovered} of {self.num_frames} frames can be recovered; "
            )
            reason += "'repeat_last' puts the frame before in its place"
            raise self._error(reason, num_recovered=num_recovered, num_frames=self.num_frames)
        report.num_repeated_frames += len(lost)
        report.num_damaged_frames += int(decoded.damaged[needed].sum())
        if report.num_repeated_frames or report.num_damaged_frames:
            logger.warning(
                f"{self.name} is damaged: of the frames read from it, {report.num_repeated_frames} are lost and "
                f"replaced by the one before, {report.num_damaged_frames} may show damage."
            )

    def _read_outputs(self, needed: np.ndarray) -> Generator[Any, None, None]:
        self._check_pixels(int(needed[-1]) + 1)
        remaining = iter(needed.tolist())
        target = next(remaining)
        for output, frame in enumerate(self._frames(self._packets())):
            if output == target:
                yield frame
                target = next(remaining, None)
                if target is None:
                    return
        raise self._error("it changed while it was read")

    def _converted(self, frames: Generator[Any, None, None], num_frames: int, shape: FrameShape) -> np.ndarray:
        return self._converter.to_rgb(frames, num_frames, self._header_size, shape)
