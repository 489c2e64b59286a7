"""The index of a video's frames, made from its packets or from what its decoder gave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


# Codecs whose every packet gives one frame and whose keyframes stand on their own: not APNG, where every packet is
# called a keyframe and depends on the one before, nor QuickTime Animation, where a damaged keyframe shows older pixels.
# Files of any other codec are indexed by decoding them.
# fmt: off
_ONE_FRAME_PER_PACKET = {
    "av1", "dnxhd", "ffv1", "gif", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "prores", "rawvideo",
    "vp8", "vp9",
}
# fmt: on


@dataclass
class PacketIndex:
    """The frames of a file by its packets, without decoding."""

    pts: np.ndarray  # (frames,), sorted: frame i is shown at pts[i]
    frame_of_pts: dict[int, int]
    position_of_pts: dict[int, int]  # pts -> place of the packet in the file
    keyframes: np.ndarray  # (keyframes,), sorted: frames at which decoding can start
    keyframe_dts: dict[int, int | None]

    def keyframe_before(self, frame: int) -> int:
        """The keyframe at or before a frame, from which decoding has to start."""
        return int(self.keyframes[np.searchsorted(self.keyframes, frame, side="right") - 1])


@dataclass
class OutputIndex:
    """The frames of a file by what came out of the decoder when it read the whole file."""

    pts: np.ndarray | None  # (frames,), None if timestamps are missing or unusable
    frame_of_output: np.ndarray  # (outputs,), sorted: the k-th frame out of the decoder is frame frame_of_output[k]
    is_damaged: np.ndarray  # (outputs,), bool

    @property
    def num_frames(self) -> int:
        return int(self.frame_of_output[-1]) + 1


class SentPacket(NamedTuple):
    """A packet that was sent to the decoder."""

    pts: int | None
    is_keyframe: bool
    is_rejected: bool


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
        # Reading does not come to a hidden packet before the first frame, or after the last. Good files have none.
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
    # What is shown before the first keyframe cannot be decoded, or only in part.
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
    output_pts = np.array([-1 if value is None else value for value in pts], dtype=np.int64)
    frames = np.arange(len(pts))
    is_timed = scanned is not None and bool(np.all(np.diff(output_pts) > 0) and np.isin(output_pts, scanned).all())
    if scanned is None or not is_timed:
        return OutputIndex(None, frames, is_damaged)
    if any(packet.is_rejected for packet in sent):
        # A frame lost to damage keeps its place, unless a plain decode would begin after it.
        frames = np.searchsorted(scanned, output_pts)
        output_pts = scanned[frames[0] : frames[-1] + 1]
        frames = frames - frames[0]
    return OutputIndex(output_pts, frames, is_damaged)


def num_frames_on_the_way(index: PacketIndex, wanted: np.ndarray) -> int:
    """Return how many frames to decode for `wanted` (sorted, unique): each from its keyframe or the one before."""
    keyframes = index.keyframes[np.searchsorted(index.keyframes, wanted, side="right") - 1]
    first = np.maximum(keyframes, np.concatenate([[0], wanted[:-1] + 1]))
    return int((wanted - first + 1).sum())
