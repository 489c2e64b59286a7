"""Open encoded videos from paths, URLs, bytes and files as seekable binary files; limits, errors and reports.

Everything is read through a Python file. FFmpeg itself would take "concat:..." or "name%03d.mp4" for a protocol and a
pattern, and would follow the addresses in a playlist.
"""

from __future__ import annotations

import io
import logging
import os
import re
import select
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .limits_vivit import check_bool, check_positive_number
from .video_download import DownloadError, DownloadLimitError, download, redacted


logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
# Log a warning if a pipe has no data after this many seconds.
_QUIET_SECONDS = 3.0


class VideoDecodingError(RuntimeError):
    """A video that cannot be read: the message names the file and the reason.

    `source` and `reason` hold these two; `num_recovered` of `num_frames` frames can be read (None: not known).
    """

    def __init__(
        self,
        message: str,
        *,
        source: str | None = None,
        reason: str | None = None,
        num_recovered: int | None = None,
        num_frames: int | None = None,
    ):
        super().__init__(message)
        self.source, self.reason = source, reason
        self.num_recovered, self.num_frames = num_recovered, num_frames

    @classmethod
    def about(cls, name: str, reason: str, **details: Any) -> VideoDecodingError:
        """Make the error from the file's name and the reason; `details` as for the constructor."""
        return cls(f"Cannot read {name}: {reason}.", source=name, reason=reason, **details)


class VideoLimitError(VideoDecodingError):
    """A video that is larger than its `VideoLimits`."""


class FramesChangedError(VideoDecodingError):
    """A damaged video has other frames than its packets promised: choose again by the reader's new `timestamps`."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits on what a file may cost, so that a hostile or broken one cannot exhaust the machine.

    `max_frames`; `max_pixels` of one frame (eight times as many in a file of a single picture); `max_decoded_pixels`,
    height x width of all frames that one call of a reader decodes, including those on the way to the ones it returns
    (the default: a million frames of 4096 x 2304); `max_streams`, including sound and subtitles; `max_duration` in
    seconds; `max_bytes` of a download, or of a pipe or other stream that has to be copied; `download_timeout` in
    seconds, for a whole download with its redirects, or for the whole copy of a stream; `decoding_timeout` in seconds,
    for opening a file, and again for each call of a reader.

    Videos are downloaded from public IP addresses only. `allow_private_addresses` adds those of this machine and of the
    local network. Only the caller can allow them: processor files cannot.
    """

    max_frames: int = 1_000_000
    max_pixels: int = 8192 * 4320
    max_decoded_pixels: int = 1_000_000 * 4096 * 2304
    max_streams: int = 128
    max_duration: float = 24 * 3600.0
    max_bytes: int = 4 << 30
    download_timeout: float = 300.0
    decoding_timeout: float = 24 * 3600.0
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            (check_bool if name == "allow_private_addresses" else check_positive_number)(name, value)


@dataclass
class DecodingReport:
    """Damage found while reading a video: zeros and None for an intact file, besides its `num_frames`.

    `num_rejected_packets`: packets that the decoder refused, and errors of the demuxer. `num_lost_frames`: frames that
    the file lacks as a result. `num_repeated_frames`: lost frames that were asked for and replaced by the frame before.
    `num_damaged_frames`: frames that were returned, or decoded by `verify`, although the decoder marked them as damaged
    or lost a frame that they may depend on. `error`: why the video was left out.
    """

    source: str
    num_frames: int | None = None
    num_rejected_packets: int = 0
    num_lost_frames: int = 0
    num_repeated_frames: int = 0
    num_damaged_frames: int = 0
    error: str | None = None


def source_name(source: Any) -> str:
    """Return the name of a source for messages and results: its path, its address without secrets, or its kind."""
    if isinstance(source, dict):
        return source_name(source.get("path") or source.get("bytes"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes of video data>"
    if isinstance(source, (str, os.PathLike)):
        return redacted(os.fsdecode(source))
    return redacted(str(getattr(source, "name", None) or f"<{type(source).__name__}>"))


def is_video_source(value: Any) -> bool:
    """Return whether `value` is an encoded video: path, URL, bytes, a binary file, or {"path": ..., "bytes": ...}."""
    if isinstance(value, dict):
        return "path" in value or "bytes" in value
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(value, "read")


def part_of_video(timestamps: np.ndarray, source: Any) -> tuple[int, int]:
    """
    Return the first frame and the number of frames of the part between a source's "start" and "end" in seconds.

    Raises VideoDecodingError if there is no frame between them.
    """
    first, total = 0, len(timestamps)
    start, end = (source.get(name) for name in ("start", "end")) if isinstance(source, dict) else (None, None)
    if start is not None or end is not None:
        # A frame belongs to the part in which it appears. The millisecond is for containers that round times.
        borders = np.array([0.0 if start is None else start, np.inf if end is None else end]) - 1e-3
        first, last = np.searchsorted(timestamps - timestamps[0], borders)
        total = last - first
        if total < 1:
            wanted = f"from {0.0 if start is None else start:g} s" + (" on" if end is None else f" to {end:g} s")
            reason = f"there is no frame {wanted}; the last one is at {timestamps[-1] - timestamps[0]:.3f} s"
            raise VideoDecodingError.about(source_name(source), reason)
    return int(first), int(total)


def _bounded(read: Callable[[int], bytes], name: str, limits: VideoLimits) -> Iterator[bytes]:
    """Yield the chunks of a stream, within `max_bytes` and `download_timeout`."""
    deadline = time.monotonic() + limits.download_timeout
    num_bytes = 0
    while chunk := read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > limits.max_bytes:
            raise VideoLimitError.about(name, f"it has more than max_bytes={limits.max_bytes} bytes")
        if time.monotonic() > deadline:
            raise VideoLimitError.about(name, f"it took longer than download_timeout={limits.download_timeout} seconds")
        yield chunk


def _copy_bounded(read: Callable[[int], bytes], name: str, limits: VideoLimits) -> BinaryIO:
    """Copy a stream into a temporary file, within its limits."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        for chunk in _bounded(read, name, limits):
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    return file


def read_stream(file: Any, limits: VideoLimits | None = None) -> bytearray:
    """
    Read a binary file to its end, such as `sys.stdin.buffer`, which can be read only once.

    Raises VideoLimitError if it has more than `max_bytes` or takes longer than `download_timeout`, VideoDecodingError
    if it cannot be read or does not fit into memory.
    """
    name, data = source_name(file), bytearray()
    try:
        for chunk in _bounded(getattr(file, "read1", file.read), name, limits or VideoLimits()):
            data += chunk
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error or 'it does not fit into memory'}"
        raise VideoDecodingError.about(name, reason) from error
    return data


def is_pipe(path: Any) -> bool:
    """Return whether `path` is a named pipe."""
    try:
        return isinstance(path, (str, os.PathLike)) and stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _wait_for_data(descriptor: int, name: str, timeout: float, limit: str) -> None:
    quiet = min(_QUIET_SECONDS, timeout)
    if select.select([descriptor], [], [], quiet)[0]:
        return
    logger.warning(f"Waiting for data from the pipe {name}, for at most {timeout:g} seconds.")
    if not select.select([descriptor], [], [], timeout - quiet)[0]:
        raise VideoLimitError.about(name, f"nothing was written to this pipe for {limit}={timeout:g} seconds")


def open_pipe(path: str | os.PathLike[str], timeout: float, limit: str) -> io.BufferedReader:
    """
    Open a named pipe once there is something to read; a plain `open` waits for a writer without end.

    Raises VideoLimitError after `timeout` seconds without data, where `limit` is the caller's name for this number, and
    OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _wait_for_data(descriptor, source_name(path), timeout, limit)
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _copy_pipe(path: str | os.PathLike[str], limits: VideoLimits) -> BinaryIO:
    name, timeout = source_name(path), limits.download_timeout
    with open_pipe(path, timeout, "download_timeout") as pipe:

        def read(num_bytes: int) -> bytes:
            _wait_for_data(pipe.fileno(), name, timeout, "download_timeout")
            return pipe.read1(num_bytes)

        return _copy_bounded(read, name, limits)


def _download(address: str, limits: VideoLimits) -> BinaryIO:
    try:
        return download(address, limits.max_bytes, limits.download_timeout, limits.allow_private_addresses)
    except DownloadError as error:
        kind = VideoLimitError if isinstance(error, DownloadLimitError) else VideoDecodingError
        raise kind.about(redacted(address), str(error)) from error


def open_source(source: Any, limits: VideoLimits) -> tuple[BinaryIO, bool]:
    """Return a seekable binary file with the encoded video, and whether the caller must close it.

    Raises TypeError if `source` is not a video source, OSError if it cannot be opened, VideoDecodingError if it cannot
    be downloaded, VideoLimitError if it is over the limits.
    """
    if isinstance(source, dict):
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise TypeError("A video given as a dictionary needs 'path' or 'bytes', both are missing or None.")
        return open_source(path if data is None else data, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), True
    if isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) and not os.path.exists(source):
        return _download(source, limits), True
    if isinstance(source, (str, os.PathLike)):
        if is_pipe(source):
            return _copy_pipe(source, limits), True
        try:
            file = open(source, "rb")  # noqa: SIM115 (the caller closes it)
        except ValueError as error:
            raise VideoDecodingError.about(source_name(source), str(error)) from error
        if file.seekable():
            return file, True
        with file:  # a terminal or another device
            return _copy_bounded(file.read1, source_name(source), limits), True
    if not hasattr(source, "read"):
        raise TypeError(
            f"A video is a path, a URL, bytes, a binary file or {{'path': ..., 'bytes': ...}}, got {type(source)}."
        )
    if isinstance(source, io.TextIOBase):
        raise TypeError(f"The file {source_name(source)} is open as text: open it in binary mode, open(path, 'rb').")
    if not (hasattr(source, "seekable") and source.seekable()):
        return _copy_bounded(getattr(source, "read1", source.read), source_name(source), limits), True
    return source, False
