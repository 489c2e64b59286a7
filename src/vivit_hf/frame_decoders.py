"""Decode the frames of a file by index, in two ways.

SeekingDecoder      A scan of the packets, without decoding, gives the timestamps and the keyframes. A read seeks
                    to the keyframe before a frame, decodes forward, and checks each frame against the scan.
SequentialDecoder   If timestamps are missing or repeated, packets and frames are not one to one, the file is
                    damaged, or a check failed: one decode of the whole file, past the packets that the decoder
                    rejects, gives the frames. A read decodes from the beginning and counts.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .video_container import SentPacket, VideoContainer
from .video_sources import DecodingReport, VideoDecodingError


try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

# Codecs of which each packet gives one frame, and a keyframe needs no other. Not APNG, whose packets are all marked as
# keyframes although each needs the one before; nor QuickTime Animation, where a damaged keyframe shows older pixels.
# Files of any other codec are indexed by decoding them.
# fmt: off
_ONE_FRAME_PER_PACKET = {
    "av1", "dnxhd", "ffv1", "gif", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "prores", "rawvideo",
    "vp8", "vp9",
}
# fmt: on
# Containers that store timestamps. By these a frame is recognised even if the decoder skipped others before it.
_TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
# Decoding up to this many frames more is cheaper than a seek.
_SEEK_GAP = 8


# Which frames there are


@dataclass
class PacketIndex:
    """The frames of a file by its packets, without decoding."""

    pts: np.ndarray  # (frames,), sorted: frame i is shown at pts[i]
    frame_of_pts: dict[int, int]
    position_of_pts: dict[int, int]  # pts -> place of the packet in the file
    keyframes: np.ndarray  # (keyframes,), sorted: frames at which decoding can start
    keyframe_dts: dict[int, int | None]

    def keyframe_before(self, frames: Any) -> Any:
        """Return the keyframe at or before each frame, from which decoding has to start."""
        return self.keyframes[np.searchsorted(self.keyframes, frames, side="right") - 1]

    def num_frames_on_the_way(self, wanted: np.ndarray) -> int:
        """Return how many frames to decode for `wanted` (sorted, unique), each from its keyframe or the one before."""
        first = np.maximum(self.keyframe_before(wanted), np.concatenate([[0], wanted[:-1] + 1]))
        return int((wanted - first + 1).sum())


@dataclass
class OutputIndex:
    """The frames of a file by what the decoder gave for the whole file."""

    pts: np.ndarray | None  # (frames,), never decreasing; None if timestamps are missing or unusable
    frame_of_output: np.ndarray  # (outputs,), sorted: the k-th frame out of the decoder is frame frame_of_output[k]
    is_damaged: np.ndarray  # (outputs,), bool

    @property
    def num_frames(self) -> int:
        return int(self.frame_of_output[-1]) + 1


def tainted_timestamps(sent: Iterable[SentPacket], corrupt: set[int | None]) -> set[int | None]:
    """Return the timestamps of the frames in which damage may show.

    Damage spreads from a rejected packet, or one whose frame is in `corrupt`, to all packets before the next keyframe,
    and to those after that keyframe which are shown before it: they may be predicted from both sides.
    """
    tainted: set[int | None] = set()
    is_broken = was_broken = False
    keyframe_pts: int | None = None
    for packet in sent:
        if packet.is_keyframe:
            is_broken, was_broken, keyframe_pts = False, is_broken, packet.pts
        is_broken = is_broken or packet.is_rejected or packet.pts in corrupt
        is_leading = packet.pts is not None and keyframe_pts is not None and packet.pts < keyframe_pts
        if is_broken or (was_broken and is_leading):
            tainted.add(packet.pts)
    return tainted


def _is_hidden(packet: Any, codec: str) -> bool:
    """Return whether a VP8 or VP9 packet only updates a reference and is never shown (show_frame in its header)."""
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0x10
    is_superframe = data[-1] & 0xE0 == 0xC0
    is_profile_3 = data[0] & 0x30 == 0x30  # one more bit comes before the two that matter
    shows_existing, shown = (0x04, 0x01) if is_profile_3 else (0x08, 0x02)
    return not is_superframe and not data[0] & (shows_existing | shown)


def index_packets(packets: Iterable[Any], codec: str, container: str) -> tuple[np.ndarray | None, PacketIndex | None]:
    """Index the packets of a video stream, given from its beginning.

    Returns the sorted timestamps, int64 (frames,), or None if they are missing or repeated; and the index, or None if
    the packets do not tell which frames there are.
    """
    pts, positions, keyframes, keyframe_dts = [], [], [], {}
    trusted = codec in _ONE_FRAME_PER_PACKET
    is_hidden = False
    for position, packet in enumerate(packets):
        is_hidden = codec in ("vp8", "vp9") and _is_hidden(packet, codec)
        # A read would never send a hidden packet before the first frame, or after the last. Good files have none there.
        trusted = trusted and not (is_hidden and position == 0)
        if packet.is_discard or is_hidden:
            continue
        trusted = trusted and not packet.is_corrupt
        pts.append(packet.pts)
        positions.append(position)
        if packet.is_keyframe:
            keyframes.append(packet.pts)
            keyframe_dts[packet.pts] = packet.dts
    if None in pts or not len(set(pts)) == len(pts) > 0:
        return None, None
    sorted_pts = np.sort(np.array(pts, dtype=np.int64))
    # AVI stores no timestamps. With B-frames they are guessed by counting, and guessed wrong where a packet is missing.
    trusted = trusted and not is_hidden and (container != "avi" or pts == sorted_pts.tolist())
    # Frames that are shown before the first keyframe cannot be decoded, or only in part.
    if not trusted or not keyframes[:1] == pts[:1] == [sorted_pts[0]]:
        return sorted_pts, None
    frame_of_pts = {value: frame for frame, value in enumerate(sorted_pts.tolist())}
    index = PacketIndex(
        pts=sorted_pts,
        frame_of_pts=frame_of_pts,
        position_of_pts=dict(zip(pts, positions, strict=True)),
        keyframes=np.sort(np.array([frame_of_pts[value] for value in keyframes])),
        keyframe_dts=keyframe_dts,
    )
    return sorted_pts, index


def index_outputs(
    pts: list[int | None], corrupt: set[int | None], sent: list[SentPacket], scanned: np.ndarray | None
) -> OutputIndex:
    """Index the frames that came out of the decoder, at least one.

    Args:
        pts: the timestamp of each frame, in the decoder's order.
        corrupt: the timestamps of the frames that the decoder marked as corrupt.
        sent: the packets that the decoder was given.
        scanned: the sorted timestamps of the packets, int64 (frames,), if they are known and unique.
    """
    tainted = tainted_timestamps(sent, corrupt)
    is_damaged = np.array([value in tainted for value in pts])
    frames = np.arange(len(pts))
    if None in pts or np.any(np.array(pts[1:]) < np.array(pts[:-1])):
        return OutputIndex(None, frames, is_damaged)
    output_pts = np.array(pts, dtype=np.int64)
    is_rejected = any(packet.is_rejected for packet in sent)
    if is_rejected and scanned is not None and np.isin(output_pts, scanned).all() and len(set(pts)) == len(pts):
        # A frame lost to damage keeps its place if it lies between the first and the last decoded frame.
        frames = np.searchsorted(scanned, output_pts)
        output_pts = scanned[frames[0] : frames[-1] + 1]
        frames = frames - frames[0]
    return OutputIndex(output_pts, frames, is_damaged)


# Decoders


class IndexMismatchError(Exception):
    """The decoder gave other frames than the packets promised."""


def _timestamps(container: VideoContainer, pts: np.ndarray | None, num_frames: int) -> np.ndarray:
    """Return the times of the frames in seconds, from 0, float64 (num_frames,); without `pts` by the frame rate."""
    ticks = np.zeros(1) if pts is None else pts.astype(np.float64)  # differences of absurd integers would overflow
    timestamps = (ticks - ticks[0]) * float(container.stream.time_base or 0)
    # A gap longer than the longest video is a broken timestamp.
    if pts is None or np.any(np.diff(timestamps) > container.limits.max_duration):
        # FFmpeg calls the average rate of every raw stream 25; the rate that it guesses is the one in the header.
        rate = container.stream.guessed_rate or container.stream.average_rate or 25
        timestamps = np.arange(num_frames) / float(rate)
    container.check_limit("max_duration", float(timestamps[-1]))
    return timestamps


class SeekingDecoder:
    """Decode frames by index, each from the keyframe before it, and check them against the index of the packets."""

    def __init__(self, container: VideoContainer, index: PacketIndex):
        self._container, self._index = container, index
        self.timestamps = _timestamps(container, index.pts, len(index.pts))
        self._can_skip = container.format in _TIMED_CONTAINERS and container.codec in ("h264", "hevc")
        self.reset()

    def reset(self) -> None:
        """
        Forget the current position, and the iterator that refers back to this object.

        In such a cycle, a decoder would stay until the garbage collector frees it, perhaps in a forked process, where
        FFmpeg would wait forever for threads that exist only in the parent.
        """
        self._outputs: Iterator[Any] = iter(())
        self._position = -1  # of the last packet sent, -1 before the first seek
        self._first = self._expected = 0  # the frame of the last seek, and the next that should come out
        self._frame: Any = None  # the last one that came out
        self._is_draining = False
        self._begun_in: int | None = None  # the opening of the container in which the first frame was decoded
        self._wanted_pts: set[int] | None = None
        self._call: object = None  # the call of `frames` that uses the position

    def begin(self) -> bool:
        """
        Decode the first frame, and return whether it is the promised one.

        Packets do not tell whether they can be decoded: they may be encrypted, or may not hold a picture. `frames`
        continues from here, so no frame is decoded twice.
        """
        self.reset()
        self._container.check_pixels(1)
        try:
            self._seek(0)
            self._advance(0)
        except IndexMismatchError:
            self.reset()
            return False
        self._begun_in = self._container.num_openings
        return True

    def frames(self, wanted: np.ndarray, on_lost: str) -> Iterator[Any]:
        """
        Yield the frames `wanted` (sorted, unique). `on_lost` has no effect: frames that are lost are a mismatch.

        Raises IndexMismatchError as soon as the decoder departs from the index.
        """
        index = self._index
        self._container.check_pixels(index.num_frames_on_the_way(wanted))
        if self._begun_in != self._container.num_openings or self._is_far(index.keyframe_before(wanted[0])):
            self.reset()
        self._begun_in = None
        self._call = call = object()
        self._wanted_pts = set(index.pts[wanted].tolist()) if self._can_skip else None
        try:
            for target in wanted.tolist():
                keyframe = int(index.keyframe_before(target))
                if self._is_far(keyframe):
                    self._drain()
                    self._seek(keyframe)
                self._advance(target)
                yield self._frame
            self._drain()
        finally:
            if self._call is call:
                self.reset()

    def _is_far(self, keyframe: int) -> bool:
        place = self._index.position_of_pts[int(self._index.pts[keyframe])]
        return self._position < 0 or place - self._position > _SEEK_GAP

    def _seek(self, keyframe: int) -> None:
        self._first = self._expected = keyframe
        self._outputs = self._container.frames(self._packets_from(keyframe))

    def _advance(self, target: int) -> None:
        """Decode up to the frame `target`."""
        while self._expected <= target:
            frame = next(self._outputs, None)
            found = -1 if frame is None else self._index.frame_of_pts.get(frame.pts, -1)
            # Pictures shown before a keyframe may come after it in the file.
            if 0 <= found < self._first:
                continue
            is_next = found == self._expected or (self._can_skip and self._expected < found <= target)
            if frame is None or not is_next or frame.is_corrupt:
                raise IndexMismatchError
            self._frame, self._expected = frame, found + 1

    def _drain(self) -> None:
        """Check the frames that the decoder still holds: damage in a later frame may show in the ones before it."""
        if self._position < 0:
            return
        self._is_draining = True
        for frame in self._outputs:
            if frame.is_corrupt and self._index.frame_of_pts.get(frame.pts, -1) >= self._first:
                raise IndexMismatchError
        if any(packet.is_rejected for packet in self._container.sent):
            raise IndexMismatchError
        self._is_draining = False

    def _packets_from(self, keyframe: int) -> Iterator[Any]:
        for packet in self._landed_on(keyframe):
            self._position = self._index.position_of_pts.get(packet.pts, self._position)
            if self._wanted_pts is not None:
                is_wanted = packet.pts in self._wanted_pts
                self._container.stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield packet
            if self._is_draining:
                return

    def _landed_on(self, keyframe: int) -> Iterator[Any]:
        """Return the packets from `keyframe` on. A seek may land before it, and in some containers after it."""
        index, container = self._index, self._container
        pts = int(index.pts[keyframe])
        start = index.position_of_pts[pts]
        for moment in (pts, index.keyframe_dts[pts]):
            try:
                container.seek(pts if moment is None else moment)
            except av.FFmpegError:
                continue
            packets = container.packets()
            for packet in packets:
                position = index.position_of_pts.get(packet.pts, -1)
                if position == start:
                    return chain([packet], packets)
                if position > start:
                    break
        container.reopen()
        packets = container.packets()
        for packet in packets:
            if packet.pts == pts and not packet.is_discard:
                return chain([packet], packets)
        raise IndexMismatchError


class SequentialDecoder:
    """
    Decode frames by index from the beginning of the file, past damage.

    The constructor decodes the whole file, and sets the figures of the report.

    Args:
        scanned_pts: the sorted timestamps of the packets, int64 (frames,), if they are known and unique.
        num_packets: how many packets the file has.

    Raises VideoDecodingError if no frame can be decoded.
    """

    def __init__(
        self, container: VideoContainer, report: DecodingReport, scanned_pts: np.ndarray | None, num_packets: int
    ):
        self._container, self._report = container, report
        container.reopen()
        container.check_pixels(num_packets)
        container.num_demux_errors = 0
        pts: list[int | None] = []
        corrupt: set[int | None] = set()
        for frame in container.frames(container.packets()):
            pts.append(frame.pts)
            if frame.is_corrupt:
                corrupt.add(frame.pts)
            container.check_limit("max_frames", len(pts))
        if not pts:
            reason = "no frame of it can be decoded"
            if not all(container.header_size):  # only the decoder saw how large they are
                reason += f", or they have more than {container.max_pixels_text} pixels"
            raise VideoDecodingError.about(container.name, reason, num_recovered=0)
        index = self._index = index_outputs(pts, corrupt, container.sent, scanned_pts)
        self.timestamps = _timestamps(container, index.pts, index.num_frames)
        self.num_damaged_frames = int(index.is_damaged.sum())
        num_rejected = sum(packet.is_rejected for packet in container.sent)
        report.num_rejected_packets = num_rejected + container.num_demux_errors
        report.num_lost_frames = index.num_frames - len(pts)

    def frames(self, wanted: np.ndarray, on_lost: str) -> Iterator[Any]:
        """
        Yield the frames `wanted` (sorted, unique), and add to the report. In place of a lost frame, yield the frame
        before it if `on_lost` is "repeat_last"; otherwise raise VideoDecodingError.
        """
        index, container = self._index, self._container
        outputs = np.searchsorted(index.frame_of_output, wanted, side="right") - 1
        self._account_for(wanted[index.frame_of_output[outputs] != wanted], np.unique(outputs), on_lost)
        container.check_pixels(int(outputs[-1]) + 1)
        container.reopen()
        remaining = iter(outputs.tolist())
        target = next(remaining)
        for output, frame in enumerate(container.frames(container.packets())):
            while output == target:
                yield frame
                target = next(remaining, None)
            if target is None:
                return
        raise VideoDecodingError.about(container.name, "it changed while it was read")

    def _account_for(self, lost: np.ndarray, needed: np.ndarray, on_lost: str) -> None:
        """Raise or report the frames that are lost, and report the decoder's outputs that are damaged."""
        report, num_frames, num_recovered = self._report, len(self.timestamps), len(self._index.frame_of_output)
        if len(lost) and on_lost == "raise":
            raise VideoDecodingError.about(
                self._container.name,
                f"frame {lost[0]} is lost to damage, {num_recovered} of {num_frames} frames can be recovered; "
                "'repeat_last' puts the frame before in its place",
                num_recovered=num_recovered,
                num_frames=num_frames,
            )
        report.num_repeated_frames += len(lost)
        report.num_damaged_frames += int(self._index.is_damaged[needed].sum())
        if report.num_repeated_frames or report.num_damaged_frames:
            logger.warning(
                f"{self._container.name} is damaged: of the frames read from it, {report.num_repeated_frames} are lost "
                f"and replaced by the one before, {report.num_damaged_frames} may show damage."
            )
