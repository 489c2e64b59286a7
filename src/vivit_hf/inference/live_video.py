"""
Read the frames of live sources: cameras, network streams and pipes, which cannot be read twice and may never end.

A thread decodes. Its policy decides what happens to frames that arrive faster than they are taken.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from ..frame_conversion import FrameConverter, FrameShape, FrameSize
from ..limits_vivit import check_choice, check_positive_integer
from ..video_container import decoder_max_pixels, demuxed, open_container
from ..video_sources import VideoDecodingError, VideoLimits, is_pipe, open_pipe, source_name


POLICIES = ("drop_oldest", "wait")
# Seconds that `close` waits for the thread. FFmpeg cannot be interrupted while a source is silent.
PATIENCE = 1.0
# An address may lead to other addresses, as playlists and RTSP do, but never to a file on this machine.
_NETWORK_PROTOCOLS = "crypto,data,http,httpproxy,https,rtmp,rtmps,rtmpt,rtp,rtsp,rtsps,srt,srtp,tcp,tls,udp"
# A longer gap between two frames, in seconds, means that the clock of the source was set.
LONGEST_GAP = 10.0


class LiveVideo:
    """
    Iterate over the frames of a camera, a stream or a pipe as they arrive: (seconds, uint8 RGB (height, width, 3)).

    `seconds` count from the first frame, by the timestamps of the source. If these go back or jump by more than ten
    seconds, as when a source restarts, time continues by one frame. Packets that cannot be decoded are skipped and
    counted in `num_rejected_packets`. Use it as a context manager, which ends the thread and closes the source.

    Args:
        source: an address or device that FFmpeg opens ("rtsp://...", "udp://...", "/dev/video0" with `format="v4l2"`),
            or a binary file, read from its current position, such as `sys.stdin.buffer`. Unlike `VideoReader`, this
            opens any address, so only pass addresses that you trust. The data of a source cannot make it open files.
        format, options: arguments of `av.open`, such as `options={"rtsp_transport": "tcp"}`.
        policy: what to do with frames that arrive faster than they are taken. "drop_oldest" drops the oldest waiting
            frame, so that the newest is never late, and counts it in `num_dropped`. "wait" makes the source wait and
            loses nothing, which suits pipes and files.
        queue_size: frames that may wait.
        size: see `VideoReader.frames_at`. Frames are resized in the thread.
        timeout: seconds without data from the network, or without a writer of a named pipe, until the source counts as
            broken.
        limits: `VideoLimits`; only `max_pixels` and `max_streams` apply to live sources.

    Raises:
        VideoDecodingError: if the source cannot be opened or breaks off, with its name and the reason.
    """

    def __init__(
        self,
        source: Any,
        *,
        format: str | None = None,
        options: dict[str, str] | None = None,
        policy: str = "drop_oldest",
        queue_size: int = 32,
        size: FrameSize | None = None,
        timeout: float = 30.0,
        limits: VideoLimits | None = None,
    ):
        self.policy = check_choice("policy", policy, POLICIES)
        self.queue_size = check_positive_integer("queue_size", queue_size)
        self.name = source_name(source)
        self.num_received = self.num_dropped = self.num_rejected_packets = 0
        self._shape: FrameShape = (size, None)
        self._waiting: deque[tuple[float, np.ndarray]] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._is_finished = self._is_closed = False
        self._file: Any = None
        limits = limits or VideoLimits()
        try:
            self._container = self._opened(source, limits, format=format, options=options, timeout=timeout)
            streams = [stream for stream in self._container.streams.video if stream.codec_context is not None]
            if not streams:
                self._container.close()
                raise self._broken("it has no video stream that can be decoded")
        except BaseException:
            self._close_file()
            raise
        self._stream = streams[0]
        self._stream.codec_context.options = {"max_pixels": decoder_max_pixels(limits.max_pixels)}
        self._thread = threading.Thread(target=self._receive, name=f"frames of {self.name}", daemon=True)
        self._thread.start()

    def _opened(
        self, source: Any, limits: VideoLimits, *, format: str | None, timeout: float, options: dict[str, str] | None
    ) -> Any:
        try:
            # Open files here: given a path, FFmpeg would let a playlist lead to other files. Anything that is neither a
            # file nor an address is a device of `format`.
            is_named = isinstance(source, os.PathLike) or (isinstance(source, str) and "://" not in source)
            if is_pipe(source):
                source = self._file = open_pipe(source, timeout, "timeout")
            elif is_named and (format is None or os.path.isfile(source)):
                source = self._file = open(source, "rb")  # noqa: SIM115 (closed with the container)
            protocols = _NETWORK_PROTOCOLS if isinstance(source, str) else "none"
            return open_container(
                source, limits, protocols=protocols, is_live=True, format=format, options=options, timeout=timeout
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._broken(error) from None  # FFmpeg's message contains the address with its password

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "LiveVideo":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """
        End the thread, which closes the source, and drop the waiting frames.

        If the source is silent, the thread ends later: when data arrives, or after `timeout`.
        """
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(PATIENCE)

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_finished or self._is_closed)
                if not self._waiting:
                    if self._error is not None:
                        raise self._broken(self._error) from None
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item

    def _broken(self, reason: Exception | str) -> VideoDecodingError:
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {getattr(reason, 'strerror', None) or reason}"
        return VideoDecodingError(f"Cannot read {self.name}: {reason}.", source=self.name, reason=reason)

    def _receive(self) -> None:
        try:
            self._decode()
        except Exception as error:
            self._error = error
        finally:
            self._container.close()
            self._close_file()
            with self._changed:
                self._is_finished = True
                self._changed.notify_all()

    def _decode(self) -> None:
        stream = self._stream
        stream.thread_type = "SLICE"
        converter = FrameConverter(1)
        header = (stream.codec_context.height, stream.codec_context.width)
        duration = 1 / float(stream.average_rate or 25)
        last = offset = None
        for packet in demuxed(self._container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.num_rejected_packets += 1
                continue
            for frame in frames:
                seconds = frame.time
                if seconds is None:  # a source without timestamps: use its nominal rate
                    seconds = self.num_received * duration
                if offset is None or last is None:
                    offset, last = -seconds, 0.0
                elif not last <= seconds + offset <= last + LONGEST_GAP:
                    offset = last + duration - seconds
                last = seconds + offset
                self.num_received += 1
                image = converter.one_to_rgb(frame, header, self._shape)
                if not self._hand_over(last, image):
                    return

    def _hand_over(self, seconds: float, image: np.ndarray) -> bool:
        """Put a frame into the queue. Return False once the reader is closed."""
        with self._changed:
            if self.policy == "wait":
                self._changed.wait_for(lambda: len(self._waiting) < self.queue_size or self._is_closed)
            elif len(self._waiting) == self.queue_size:
                self._waiting.popleft()
                self.num_dropped += 1
            if not self._is_closed:
                self._waiting.append((seconds, image))
                self._changed.notify_all()
            return not self._is_closed
