"""One video file as FFmpeg opens it: its video stream, its packets, its limits, and errors that name it."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

from .frame_index import SentPacket
from .mp4_tables import BoxLimitError, num_claimed_entries
from .video_sources import (
    DecodingReport,
    VideoDecodingError,
    VideoLimitError,
    VideoLimits,
    open_source,
    source_name,
)


try:
    import av
    from av.stream import Disposition
except ImportError:
    av = None  # type: ignore[assignment]


# FFmpeg opens a decoder for each stream to learn its properties, which takes memory for a whole picture, and a file can
# list a thousand streams. The video is among the first; only these get a decoder that works.
_NUM_PROBED_STREAMS = 4
# Formats that do not list their streams in a header (MPEG-PS, FLV), and live sources, have few.
_MAX_UNLISTED_STREAMS = 16
# FFmpeg keeps about 36 bytes for each sample of each stream. A day of video and sound has 10 million.
_MAX_INDEX_ENTRIES = 1 << 24
# A demuxer that fails this often in a row will not find another packet.
_MAX_DEMUX_ERRORS = 16


def open_container(
    source: Any,
    limits: VideoLimits,
    *,
    protocols: str = "none",
    is_live: bool = False,
    options: dict[str, str] | None = None,
    **settings: Any,
) -> Any:
    """
    Open a source with FFmpeg, within `max_pixels` and `max_streams`; every container of this package is opened here.

    Args:
        protocols: those that the source may make FFmpeg open, separated by commas. By default none: a playlist must not
            make it read other files.
        is_live: the source can be opened only once.
        options, settings: as for `av.open`.

    Raises VideoLimitError for too many streams or index entries, and what `av.open` raises.
    """
    if not isinstance(source, str) and source.seekable():
        _check_index_size(source, limits)
    options = {"max_pixels": str(limits.max_pixels), "protocol_whitelist": protocols, **(options or {})}
    settings = {"mode": "r", "metadata_errors": "replace", **settings}
    no_decoder = {"skip_frame": "all", "max_pixels": "1"}
    decoder: Any = {"skip_frame": "default", "max_pixels": options["max_pixels"]}
    # One more than are allowed, so that it shows when there are more.
    many, few = ({"max_streams": str(min(limits.max_streams, most) + 1)} for most in (1 << 20, _MAX_UNLISTED_STREAMS))
    try:
        if is_live:
            return av.open(source, options={**few, **options}, **settings)
        try:
            container = av.open(
                source,
                options={**many, **options, **no_decoder},
                stream_options=[decoder] * _NUM_PROBED_STREAMS,
                **settings,
            )
        except ValueError as error:
            if isinstance(error, av.FFmpegError):
                raise
            # The streams of this format are found only as it is read: they take no options.
            source.seek(0)
            container = av.open(source, options={**few, **options}, **settings)
        if len(container.streams) <= limits.max_streams:
            return container
        container.close()
        reason = ""
    except MemoryError:
        reason = ", or its header is too large for the memory"
    reason = f"it has more than max_streams={limits.max_streams} streams{reason}"
    name = source_name(source)
    raise VideoLimitError(f"Cannot read {name}: {reason}.", source=name, reason=reason)


def _check_index_size(file: Any, limits: VideoLimits) -> None:
    """Raise VideoLimitError if an MP4 file claims more samples than it has bytes, or too many for the memory."""
    start, name = file.tell(), source_name(file)
    num_bytes = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    most = max(_MAX_INDEX_ENTRIES, limits.max_frames)
    try:
        num_entries = num_claimed_entries(file)
        if num_entries <= min(most, num_bytes):
            return
        reason = f"its header claims {num_entries} samples, more than its {num_bytes} bytes can hold"
        if num_entries <= num_bytes:
            reason = f"its header claims {num_entries} samples, more than the {most} that are indexed"
    except BoxLimitError as error:
        reason = str(error)
    raise VideoLimitError(f"Cannot read {name}: {reason}.", source=name, reason=reason)


def demuxed(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream. At the end, PyAV trips over streams that appeared on the way."""
    with contextlib.suppress(IndexError):
        yield from container.demux(stream)


class VideoContainer:
    """What `VideoReader` reads from; the first video stream that is not a cover picture."""

    def __init__(self, source: Any, limits: VideoLimits, num_threads: int, thread_type: str):
        if av is None:
            raise ImportError("Reading video files needs PyAV: pip install av.")
        self.name = source_name(source)
        self.limits = limits
        self.report = DecodingReport(self.name)
        self._num_threads, self._thread_type = num_threads, thread_type
        self._container: Any = None
        self._file: Any = None
        self._owns_file = False
        self._num_demux_errors = self._num_packets = self._num_pixels = 0
        self._sent: list[SentPacket] = []
        self._lock = threading.RLock()
        self._turn = 0
        self._is_closed = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the container, and the file unless the caller had opened it."""
        with self._lock:
            self._is_closed = True
            if self._container is not None:
                self._container.close()
            if self._owns_file and self._file is not None:
                self._file.close()

    def _begin(self) -> int:
        """The turn of whoever reads now; FFmpeg crashes where two move one container, or one moves a closed one."""
        if self._is_closed:
            raise ValueError(f"The reader of {self.name} is closed: open another one.")
        self._turn += 1
        self._num_pixels = 0
        return self._turn

    def _check_turn(self, turn: int) -> None:
        if self._is_closed or turn != self._turn:
            what = "is closed" if self._is_closed else "was used for something else"
            raise RuntimeError(f"The reader of {self.name} {what} before its stream was at the end: open one for each.")

    def _open(self, source: Any) -> None:
        self._file, self._owns_file = open_source(source, self.limits)
        self._reopen()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns what PyAV and the operating system raise about a file into an error that names the file."""
        try:
            yield
        except VideoDecodingError:
            raise
        except (av.FFmpegError, OSError, EOFError, UnicodeError, OverflowError, MemoryError) as error:
            raise self._error(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error

    def _error(self, reason: str, **details: Any) -> VideoDecodingError:
        return VideoDecodingError(f"Cannot read {self.name}: {reason}.", source=self.name, reason=reason, **details)

    def _check_limit(self, name: str, value: float) -> None:
        limit = getattr(self.limits, name)
        if value > limit:
            reason = f"{value:.12g} is more than {name}={limit:.12g}"
            raise VideoLimitError(f"Cannot read {self.name}: {reason}.", source=self.name, reason=reason)

    def _check_pixels(self, num_frames: int) -> None:
        """Refuses what is going to take too long, if the header tells the truth about the size of the frames."""
        height, width = self._header_size
        self._check_limit("max_decoded_pixels", self._num_pixels + num_frames * height * width)

    def _reopen(self) -> None:
        if self._container is not None:
            self._container.close()
        self._file.seek(0)
        if not self._file.read(1):
            raise self._error("it is empty")
        self._file.seek(0)
        self._container = open_container(self._file, self.limits)
        streams = [stream for stream in self._container.streams.video if stream.codec_context is not None]
        # Music files carry their cover as a video stream of one picture.
        streams = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise self._error("it has no video stream that can be decoded")
        self._stream = streams[0]
        context = self._stream.codec_context
        self._check_limit("max_pixels", context.width * context.height)
        # The decoder checks each picture too: the header need not tell the truth.
        context.options = {"max_pixels": str(self.limits.max_pixels)}
        context.thread_type = self._thread_type
        context.thread_count = self._num_threads
        self._codec = context.codec.canonical_name
        self._header_size = (context.height, context.width)  # decoding changes that of the context

    def _packets(self) -> Iterator[Any]:
        """The packets of the video stream from where the container stands, going on past errors of the demuxer."""
        num_errors = 0
        while num_errors < _MAX_DEMUX_ERRORS:
            try:
                for packet in demuxed(self._container, self._stream):
                    # An empty packet would tell the decoder that the video ends here.
                    if packet.size > 0:
                        num_errors = 0
                        yield packet
                return
            except av.FFmpegError:
                self._num_demux_errors += num_errors == 0  # it may say so again and again
                num_errors += 1

    def _frames(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Each frame that comes out of the decoder, on past the packets that it rejects; `_sent` keeps account."""
        self._sent = []
        context = self._stream.codec_context
        for packet in packets:
            is_rejected, frames = False, []
            try:
                frames = packet.decode()
            except av.FFmpegError:
                is_rejected = True
            self._sent.append(SentPacket(packet.pts, packet.is_keyframe, is_rejected))
            # A packet without a frame costs time as well.
            self._num_pixels += context.height * context.width * max(1, len(frames))
            self._check_limit("max_decoded_pixels", self._num_pixels)
            yield from frames
        try:
            yield from context.decode(None)
        except av.EOFError:
            return
        except av.FFmpegError:
            self._sent.append(SentPacket(self._sent[-1].pts if self._sent else None, False, True))
