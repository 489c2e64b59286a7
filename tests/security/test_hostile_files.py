"""Files made to exhaust memory or time, or to make the reader open other files."""

import io
import os
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from video_files import large_gif, plain_decode, write_kind, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError, VideoLimits, read_stream


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("hostile") / "video.mp4", num_frames=60, gop=20)


# Memory: many large streams


def with_streams(source, container: str, num_streams: int) -> bytes:
    """The first video stream of a file, `num_streams` times over."""
    output = io.BytesIO()
    with av.open(str(source)) as given, av.open(output, "w", format=container) as taken:
        stream = given.streams.video[0]
        copies = [taken.add_stream_from_template(stream) for _ in range(num_streams)]
        for packet in given.demux(stream):
            for copy in copies if packet.size else ():
                clone = av.Packet(bytes(packet))
                clone.pts, clone.dts, clone.time_base = packet.pts, packet.dts, packet.time_base
                clone.is_keyframe, clone.stream = packet.is_keyframe, copy
                taken.mux(clone)
    return output.getvalue()


@pytest.fixture(scope="module")
def large_picture(tmp_path_factory):
    frames = np.zeros((2, 2160, 4096, 3), np.uint8)
    return write_video(tmp_path_factory.mktemp("large") / "large.mp4", frames, options={"preset": "ultrafast"})


def opened(path) -> tuple[str, float]:
    """What opening a file comes to, and the MiB that it takes at its peak."""

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before = kilobytes("VmRSS")
    try:
        with VideoReader(path) as reader:
            outcome = f"{reader.num_frames} frames"
    except VideoDecodingError as error:
        outcome = str(error.reason)
    return outcome, (kilobytes("VmHWM") - before) / 1024


@pytest.mark.parametrize("num_streams", [60, 150])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_streams_that_nobody_reads_take_no_memory(container, num_streams, large_picture, tmp_path):
    path = tmp_path / "streams"
    path.write_bytes(with_streams(large_picture, container, num_streams))
    outcome, megabytes = opened(path)
    num_frames = len(plain_decode(path))  # not always 2: PyAV before 18.1 loses a packet as it writes the MP4
    assert outcome == f"{num_frames} frames" if num_streams == 60 else "more than max_streams=128 streams" in outcome
    assert megabytes < 300, "each decoder would take 20"


def test_more_streams_than_the_limit_are_refused_by_name(video):
    data = with_streams(video, "mp4", 6)
    VideoReader(data, limits=VideoLimits(max_streams=6)).close()
    with pytest.raises(VideoLimitError, match="it has more than max_streams=5 streams"):
        VideoReader(data, limits=VideoLimits(max_streams=5))
    with pytest.raises(VideoLimitError, match="max_streams=2 streams, or its header is too large for the memory"):
        VideoReader(data, limits=VideoLimits(max_streams=2))


def test_streams_that_appear_late_break_nothing(tmp_path):
    """PyAV raises an IndexError at the end of a transport stream whose last packets belong to a new stream."""
    path = write_kind(tmp_path, "hevc_ts")
    data = bytearray(path.read_bytes())
    starts = [place for place in range(0, len(data), 188) if data[place + 1 : place + 3] == b"\x41\x00"]
    data[starts[-1] + 2] = 2  # the number of the stream
    path.write_bytes(data)
    with pytest.raises(IndexError):
        plain_decode(path)
    with VideoReader(path) as reader:
        assert reader.frames_at(range(25)).shape[0] == 25
    with LiveVideo(path, policy="wait") as live:
        assert len(list(live)) >= 25


# Time: many large pictures in few bytes


@pytest.mark.parametrize("kind", ["h264_b_frames", "gif", "mpeg4_avi"])
def test_a_reader_stops_when_its_time_is_over(kind, tmp_path):
    path = write_kind(tmp_path, kind)
    with pytest.raises(VideoLimitError, match="it took longer than decoding_timeout=1e-06 seconds"):
        VideoReader(path, limits=VideoLimits(decoding_timeout=1e-6))


def test_each_call_of_a_reader_has_its_time(video):
    with VideoReader(video, limits=VideoLimits(decoding_timeout=0.5)) as reader:
        time.sleep(0.6)
        assert len(reader.frames_at([0, 30])) == 2


def test_pixels_times_frames_are_refused_before_they_are_decoded():
    data = large_gif(300, 4320, 8192)
    assert len(data) < 8000
    begin = time.process_time()
    with VideoReader(data, limits=VideoLimits(max_decoded_pixels=1_000_000_000)) as reader:
        with pytest.raises(VideoLimitError, match="10616832000 is more than max_decoded_pixels=1000000000"):
            reader.frames_at([0, 299], size=lambda *_: (16, 16))
        with pytest.raises(VideoLimitError, match="max_decoded_pixels"):
            next(reader.stream(range(300), size=lambda *_: (16, 16)))
        with pytest.raises(VideoLimitError, match="max_decoded_pixels"):
            reader.verify()
        assert reader.frames_at([3], size=lambda *_: (16, 16)).shape == (1, 16, 16, 3)
    assert time.process_time() - begin < 10


def test_the_budget_is_of_one_call_and_of_what_is_decoded(video):
    """The keyframes are 0, 20 and 40: frame 59 takes 20 frames of 48 x 64."""
    with VideoReader(video, limits=VideoLimits(max_decoded_pixels=30 * 48 * 64)) as reader:
        for _ in range(3):
            reader.frames_at([59])
        with pytest.raises(VideoLimitError, match="122880 is more than max_decoded_pixels=92160"):
            reader.frames_at([19, 39])
        assert reader.frames_at([0, 20, 40]).shape[0] == 3
        taken = []
        with pytest.raises(VideoLimitError, match="max_decoded_pixels"):
            taken += reader.stream(range(60))
        assert not taken


def test_the_budget_holds_where_the_header_tells_a_lie(tmp_path):
    """A file without timestamps is decoded to be indexed; its header says 16 x 16."""
    path = write_video(tmp_path / "raw.h264", num_frames=30)
    limits = VideoLimits(max_decoded_pixels=10 * 48 * 64)
    with pytest.raises(VideoLimitError, match="max_decoded_pixels=30720"):
        VideoReader(path, limits=limits)


def test_a_still_picture_over_the_limit_is_told_so():
    """A WebP file tells its size to the decoder only."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 48)).save(file, "webp")
    with VideoReader(file.getvalue()) as reader:
        assert reader.frames_at([0]).shape == (1, 48, 64, 3)
    with pytest.raises(VideoLimitError, match="3072 is more than 8 x max_pixels=383"):
        VideoReader(file.getvalue(), limits=VideoLimits(max_pixels=64 * 48 // 8 - 1))
    huge = io.BytesIO()
    PIL.Image.new("RGB", (2000, 2000)).save(huge, "webp", lossless=True)
    with pytest.raises(VideoDecodingError, match="or they have more than 8 x max_pixels=3072 pixels"):
        VideoReader(huge.getvalue(), limits=VideoLimits(max_pixels=64 * 48))


@pytest.mark.parametrize("is_lossless", [True, False])
def test_a_still_picture_may_be_larger_than_a_frame_of_a_video(is_lossless):
    """Its decoder keeps one picture, that of a video 17."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (7000, 5600), (200, 30, 60)).save(file, "webp", lossless=is_lossless, method=0)
    data = file.getvalue()
    assert 7000 * 5600 > VideoLimits().max_pixels and len(plain_decode(data)) == 1
    processor = ViViTVideoProcessor(num_frames=2, size=16, crop_size=16)
    assert processor(data)["pixel_values"].shape == (1, 2, 3, 16, 16)
    with VideoReader(data) as reader:
        red, green, blue = reader.frames_at([0], size=lambda *_: (2, 2))[0, 0, 0]
        assert abs(int(red) - 200) < 4 and abs(int(green) - 30) < 4 and abs(int(blue) - 60) < 4


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx-vp9", "ffv1"])
def test_the_limit_on_pixels_counts_no_padding(codec, tmp_path):
    """Decoders round the sides of their pictures up; 98 x 70 pixels are within a limit of 6,860."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / "odd.mkv", codec=codec, height=70, width=98, num_frames=5, options=options)
    with VideoReader(path, limits=VideoLimits(max_pixels=70 * 98)) as reader:
        assert reader.frames_at(range(5)).shape == (5, 70, 98, 3)
    with pytest.raises(VideoLimitError, match="6860 is more than max_pixels=6859"):
        VideoReader(path, limits=VideoLimits(max_pixels=70 * 98 - 1))


# Other files


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile video.mp4\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nvideo.mp4\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
}


class Pipe(io.RawIOBase):
    """Text that comes once, like that of standard input."""

    def __init__(self, text: str):
        self._text = io.BytesIO(text.encode())

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._text.readinto(buffer)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("way", ["path", "Path", "file", "pipe"])
def test_a_playlist_opens_no_file_of_this_machine(kind, way, video, monkeypatch):
    monkeypatch.chdir(video.parent)
    Path("list").write_text(LISTS[kind])
    if kind == "ffconcat":
        assert len(plain_decode("list")) == 60  # FFmpeg by itself follows it
    with open("list", "rb") as file:
        source = {"path": "list", "Path": Path("list"), "file": file, "pipe": io.BufferedReader(Pipe(LISTS[kind]))}[way]
        with pytest.raises(VideoDecodingError):
            LiveVideo(source, timeout=3)
        if way != "pipe":
            with pytest.raises(VideoDecodingError):
                VideoReader(source)


def test_a_path_that_is_a_protocol_to_ffmpeg_is_a_path(video, monkeypatch):
    monkeypatch.chdir(video.parent)
    for source in ("concat:video.mp4|video.mp4", "file:video.mp4", "subfile,,start,0,end,0,,:video.mp4"):
        with pytest.raises(VideoDecodingError, match="No such file"):
            LiveVideo(source)
        with pytest.raises(VideoDecodingError, match="No such file"):
            VideoReader(source)
    with pytest.raises(VideoDecodingError, match="null byte"):
        VideoReader("video\0.mp4")


# Pipes and standard input


def test_a_stream_is_read_within_its_limits(video):
    data = video.read_bytes()
    assert read_stream(io.BytesIO(data)) == data
    with pytest.raises(VideoLimitError, match="<BytesIO>: it has more than max_bytes=100 bytes"):
        read_stream(io.BytesIO(data), VideoLimits(max_bytes=100))

    class Endless(io.RawIOBase):
        name = "<stdin>"

        def read(self, _):
            return bytes(1 << 20)

    with pytest.raises(VideoLimitError, match="<stdin>: it has more than max_bytes=10000000"):
        read_stream(Endless(), VideoLimits(max_bytes=10_000_000))


def test_a_pipe_without_a_writer_is_given_up_in_time_and_said_to_wait(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vivit_hf.video_sources._QUIET_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    begin = time.monotonic()
    with pytest.raises(VideoLimitError, match="pipe: nothing was written to this pipe for download_timeout=1 seconds"):
        VideoReader(tmp_path / "pipe", limits=VideoLimits(download_timeout=1))
    with pytest.raises(VideoLimitError, match=r"pipe: nothing was written to this pipe for timeout=0\.5 seconds"):
        LiveVideo(str(tmp_path / "pipe"), timeout=0.5)
    assert time.monotonic() - begin < 10
    assert "Waiting for data from the pipe" in caplog.text


def test_a_pipe_whose_writer_falls_silent_is_given_up(video, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = threading.Event()

    def write():
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            pipe.write(video.read_bytes()[:1000])
            done.wait(30)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(VideoLimitError, match="download_timeout=1"):
        VideoReader(tmp_path / "pipe", limits=VideoLimits(download_timeout=1))
    done.set()
    writer.join()


def test_waiting_for_a_pipe_can_be_interrupted(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for use in (VideoReader, LiveVideo):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            use(str(tmp_path / "pipe"))
