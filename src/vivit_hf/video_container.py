"""A video file as FFmpeg opens it: its video stream, packets, decoded frames and limits."""

import contextlib
import io
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from .mp4_tables import BoxLimitError, num_claimed_entries
from .video_sources import VideoDecodingError, VideoLimitError, VideoLimits, open_source, source_name


try:
    import av
    from av.stream import Disposition
except ImportError:
    av = None  # type: ignore[assignment]


# FFmpeg opens a decoder for each stream to learn its properties. That takes memory for a whole picture, and a file may
# have a thousand streams. The video is usually among the first, so only these get a working decoder.
_NUM_PROBED_STREAMS = 4
# Decoders round the sides of a picture up, to a multiple of at most 64. This is enough for sides of up to 16,384.
_PADDING_PIXELS = 1 << 21
# The decoder of a video keeps up to 17 pictures, that of a single picture one.
_STILL_FACTOR = 8
# Formats that do not list their streams in a header (MPEG-PS, FLV), and live sources, have few streams.
_MAX_UNLISTED_STREAMS = 16
# FFmpeg keeps about 36 bytes for each sample of each stream. A day of video and sound has 10 million.
_MAX_INDEX_ENTRIES = 1 << 24
# A demuxer that fails this often in a row will not find another packet.
_MAX_DEMUX_ERRORS = 16


def decoder_max_pixels(max_pixels: int) -> str:
    """Return FFmpeg's option for pictures of up to this many pixels, with room for the decoder's padding."""
    return str(int(max_pixels) + _PADDING_PIXELS)


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
    Open a source with FFmpeg, within `max_pixels` and `max_streams`. All sources of this package are opened here.

    Args:
        protocols: the protocols that FFmpeg may follow from the source, separated by commas. By default none, so that
            a playlist cannot make it read other files.
        is_live: whether the source can be opened only once.
        options, settings: as for `av.open`.

    Raises VideoLimitError for too many streams or index entries, and what `av.open` raises.
    """
    if not isinstance(source, str) and source.seekable():
        _check_index_size(source, limits)
    options = {"max_pixels": decoder_max_pixels(limits.max_pixels), "protocol_whitelist": protocols, **(options or {})}
    settings = {"mode": "r", "metadata_errors": "replace", **settings}
    no_decoder = {"skip_frame": "all", "max_pixels": "1"}
    decoder: Any = {"skip_frame": "default", "max_pixels": options["max_pixels"]}
    # One more stream than is allowed, so that too many are noticed.
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
            # This format reveals its streams only while it is read, so it refuses options for them.
            source.seek(0)
            container = av.open(source, options={**few, **options}, **settings)
        if len(container.streams) <= limits.max_streams:
            return container
        container.close()
        reason = ""
    except MemoryError:
        reason = ", or its header is too large for the memory"
    reason = f"it has more than max_streams={limits.max_streams} streams{reason}"
    raise VideoLimitError.about(source_name(source), reason)


def _check_index_size(file: Any, limits: VideoLimits) -> None:
    """Raise VideoLimitError if an MP4 file claims more samples than it has bytes, or too many for the memory."""
    start = file.tell()
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
    raise VideoLimitError.about(source_name(file), reason)


def demuxed(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream. PyAV raises IndexError at the end if streams appeared while it was read."""
    with contextlib.suppress(IndexError):
        yield from container.demux(stream)


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn errors of PyAV and the operating system into errors that name the file."""
    try:
        yield
    except VideoDecodingError:
        raise
    except (av.FFmpegError, OSError, EOFError, UnicodeError, OverflowError, MemoryError) as error:
        reason = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        raise VideoDecodingError.about(name, reason) from error


class SentPacket(NamedTuple):
    """A packet that was sent to the decoder."""

    pts: int | None
    is_keyframe: bool
    is_rejected: bool


class VideoContainer:
    """
    The packets and decoded frames of a file's first video stream that is not a cover picture.

    `name` is the file's name in messages, `format` and `codec` are FFmpeg's names of its container and codec, and
    `header_size` is the stored (height, width) of the header, (0, 0) if only the pictures tell it.
    """

    def __init__(self, source: Any, limits: VideoLimits, num_threads: int):
        if av is None:
            raise ImportError("Reading video files needs PyAV: pip install av.")
        self.name = source_name(source)
        self.limits = limits
        self.num_demux_errors = self.num_openings = 0
        self.sent: list[SentPacket] = []  # what the decoder was given since `frames` began
        self._num_threads = num_threads
        self._num_pixels, self._deadline = 0, 0.0
        self._max_pixels = limits.max_pixels
        self._container: Any = None
        self._file, self._owns_file = open_source(source, limits)
        self.begin_call()
        try:
            self.reopen()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the container, and the file unless the caller opened it."""
        if self._container is not None:
            self._container.close()
        if self._owns_file:
            self._file.close()

    def reopen(self) -> None:
        """Go back to the beginning with a new decoder."""
        self.num_openings += 1
        if self._container is not None:
            self._container.close()
        self._file.seek(0)
        if not self._file.read(1):
            raise VideoDecodingError.about(self.name, "it is empty")
        self._file.seek(0)
        self._container = open_container(self._file, self.limits)
        streams = [stream for stream in self._container.streams.video if stream.codec_context is not None]
        # A music file has its cover as a video stream of one picture.
        streams = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoDecodingError.about(self.name, "it has no video stream that can be decoded")
        self.stream = streams[0]
        context = self.stream.codec_context
        context.thread_type = "SLICE"  # frame threads have hung in data loader workers that stop early
        context.thread_count = self._num_threads
        self.format = self._container.format.name
        self.codec = context.codec.canonical_name
        self.header_size = (context.height, context.width)  # decoding changes the context's
        self._apply_max_pixels()

    def seek(self, moment: int) -> None:
        """Seek to the keyframe at or before a timestamp. Raises what PyAV raises."""
        self._container.seek(moment, stream=self.stream)

    def mark_as_still(self) -> None:
        """Raise the limit on pixels, for a file that has a single packet. Call this before anything is decoded."""
        self._max_pixels = _STILL_FACTOR * self.limits.max_pixels
        self._apply_max_pixels()

    # Limits

    def check_limit(self, name: str, value: float) -> None:
        limit = getattr(self.limits, name)
        if value > limit:
            raise VideoLimitError.about(self.name, f"{value:.12g} is more than {name}={limit:.12g}")

    def check_size(self, height: int, width: int) -> None:
        """Raise VideoLimitError for a picture of more than `max_pixels`."""
        if height * width > self._max_pixels:
            raise VideoLimitError.about(self.name, f"{height * width} is more than {self.max_pixels_text}")

    @property
    def max_pixels_text(self) -> str:
        factor = f"{_STILL_FACTOR} x " if self._max_pixels > self.limits.max_pixels else ""
        return f"{factor}max_pixels={self.limits.max_pixels}"

    def begin_call(self) -> None:
        """Count the decoded pixels and the seconds of a new call from 0."""
        self._num_pixels = 0
        self._deadline = time.monotonic() + self.limits.decoding_timeout

    def _check_time(self) -> None:
        """Raise VideoLimitError if the call takes too long; called for every packet, since FFmpeg cannot be stopped."""
        if time.monotonic() > self._deadline:
            timeout = self.limits.decoding_timeout
            raise VideoLimitError.about(self.name, f"it took longer than decoding_timeout={timeout:g} seconds")

    def check_pixels(self, num_frames: int) -> None:
        """Raise VideoLimitError if decoding this many frames more, of the size in the header, would take too long."""
        height, width = self.header_size
        self.check_limit("max_decoded_pixels", self._num_pixels + num_frames * height * width)

    def _apply_max_pixels(self) -> None:
        # The decoder checks the size of each picture, because the header may be wrong.
        self.stream.codec_context.options = {"max_pixels": decoder_max_pixels(self._max_pixels)}

    # Packets and frames

    def packets(self) -> Iterator[Any]:
        """Yield the packets of the video stream from the current position, past errors of the demuxer."""
        num_errors = 0
        while num_errors < _MAX_DEMUX_ERRORS:
            try:
                for packet in demuxed(self._container, self.stream):
                    self._check_time()
                    # An empty packet would tell the decoder that the video ends here.
                    if packet.size > 0:
                        num_errors = 0
                        yield packet
                return
            except av.FFmpegError:
                self.num_demux_errors += num_errors == 0  # the demuxer may repeat an error
                num_errors += 1

    def frames(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Yield the frames that the decoder gives for these packets, past those it rejects; `sent` records both."""
        self.sent = []
        context = self.stream.codec_context
        for packet in packets:
            self._check_time()  # the packets may be a list
            is_rejected, frames = False, []
            try:
                frames = packet.decode()
            except av.FFmpegError:
                is_rejected = True
            self.sent.append(SentPacket(packet.pts, packet.is_keyframe, is_rejected))
            # A packet that gives no frame costs time as well.
            self._num_pixels += context.height * context.width * max(1, len(frames))
            self.check_limit("max_decoded_pixels", self._num_pixels)
            for frame in frames:
                self.check_size(frame.height, frame.width)
                yield frame
        try:
            for frame in context.decode(None):
                self.check_size(frame.height, frame.width)
                yield frame
        except av.EOFError:
            return
        except av.FFmpegError:
            self.sent.append(SentPacket(self.sent[-1].pts if self.sent else None, False, True))
