"""One video file as FFmpeg opens it: its video stream, its packets, its limits, and errors that name it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

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


# A demuxer that fails this often in a row will not find another packet.
_MAX_DEMUX_ERRORS = 16


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
        self._num_demux_errors = 0
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
            reason = f"{value:.10g} is more than {name}={limit:.10g}"
            raise VideoLimitError(f"Cannot read {self.name}: {reason}.", source=self.name, reason=reason)

    def _reopen(self) -> None:
        if self._container is not None:
            self._container.close()
        self._file.seek(0)
        if not self._file.read(1):
            raise self._error("it is empty")
        self._file.seek(0)
        # The decoder checks each picture too: the header need not tell the truth.
        options = {"max_pixels": str(self.limits.max_pixels)}
        # No protocol is open to the demuxers: a playlist must not make the reader fetch other files.
        sealed = {"protocol_whitelist": "none"}
        self._container = av.open(
            self._file, mode="r", options=options, container_options=sealed, metadata_errors="replace"
        )
        streams = [stream for stream in self._container.streams.video if stream.codec_context is not None]
        # Music files carry their cover as a video stream of one picture.
        streams = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise self._error("it has no video stream that can be decoded")
        self._stream = streams[0]
        context = self._stream.codec_context
        self._check_limit("max_pixels", context.width * context.height)
        self._check_limit("max_duration", (self._container.duration or 0) / av.time_base)
        context.options = options
        context.thread_type = self._thread_type
        context.thread_count = self._num_threads
        self._codec = context.codec.canonical_name
        self._header_size = (context.height, context.width)  # decoding changes that of the context

    def _packets(self) -> Iterator[Any]:
        """The packets of the video stream from where the container stands, going on past errors of the demuxer."""
        num_errors = 0
        while num_errors < _MAX_DEMUX_ERRORS:
            try:
                for packet in self._container.demux(self._stream):
                    # An empty packet would tell the decoder that the video ends here.
                    if packet.size > 0:
                        num_errors = 0
                        yield packet
                return
            except av.FFmpegError:
                num_errors += 1
                self._num_demux_errors += 1
