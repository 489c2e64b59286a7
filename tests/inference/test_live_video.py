"""Live sources over real sockets and pipes: what arrives is what was sent, and what is dropped is counted."""

import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
from tiny_models import make_model, tiny_config
from video_files import damage_packet, write_video

from vivit_hf import VideoDecodingError, VideoReader, ViViTVideoProcessor
from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.inference.timeline import file_windows, live_windows
from vivit_hf.video_processing_vivit import reader_size


# Sends a file over TCP, as a camera would: its packets, in a container that has no end.
CAMERA = """
import sys, time, av
path, url, rate = sys.argv[1], sys.argv[2], float(sys.argv[3])
with av.open(path) as source, av.open(url, "w", format="mpegts") as sink:
    stream = sink.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(source.streams.video[0]):
        if packet.dts is not None:
            packet.stream = stream
            sink.mux(packet)
            time.sleep(1 / rate)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (60, 48, 80, 3), dtype=np.uint8)
    return write_video(tmp_path_factory.mktemp("live") / "video.mp4", frames, gop=12)


def write_stream(video, path):
    """Its packets in a container that can be cut anywhere."""
    with av.open(str(video)) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    return path


@pytest.fixture
def camera(video):
    """A process that sends the video to whoever connects; its address."""
    processes = []

    def start(rate=1000.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", CAMERA, str(video), f"tcp://127.0.0.1:{port}?listen=1", str(rate)]
        processes.append(subprocess.Popen(command))
        return f"tcp://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def connect(address, **options):
    """Once the camera listens."""
    for _ in range(200):
        try:
            return LiveVideo(address, format="mpegts", **options)
        except VideoDecodingError:
            time.sleep(0.05)
    raise AssertionError(f"nobody listens at {address}")


def test_what_a_camera_sends_arrives_in_its_order_with_its_times(camera, video):
    with connect(camera(), policy="wait", queue_size=4) as live:
        received = list(live)
    with VideoReader(video) as reader:
        expected, times = reader.frames_at(np.arange(reader.num_frames)), reader.timestamps
    assert len(received) == live.num_received == 60 and live.num_dropped == 0
    np.testing.assert_allclose([seconds for seconds, _ in received], times, atol=1e-4)
    assert all(np.array_equal(frame, other) for (_, frame), other in zip(received, expected, strict=True))


def test_who_is_too_slow_gets_the_newest_and_is_told_how_many_he_missed(video):
    """From a file, which delivers as fast as it is decoded."""
    with open(video, "rb") as file, LiveVideo(file, policy="drop_oldest", queue_size=5) as live:
        deadline = time.monotonic() + 30
        while live._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        received = list(live)
    assert live.num_received == 60 and live.num_dropped == 55
    with VideoReader(video) as reader:
        np.testing.assert_allclose([seconds for seconds, _ in received], reader.timestamps[-5:], atol=1e-4)


def test_a_source_that_waits_is_not_read_ahead(video):
    with open(video, "rb") as file, LiveVideo(file, policy="wait", queue_size=3) as live:
        time.sleep(0.5)
        assert live.num_received <= 4, "three that wait, and one that would"
        frames = iter(live)
        next(frames)
        time.sleep(0.3)
        assert live.num_received <= 5
        assert len(list(frames)) == 59


def test_a_pipe_is_read_as_it_is_written(video, tmp_path):
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    data = write_stream(video, tmp_path / "stream.ts").read_bytes()

    def write():
        with open(pipe, "wb", buffering=0) as file:
            for start in range(0, len(data), 4096):
                file.write(data[start : start + 4096])

    writer = threading.Thread(target=write)
    writer.start()
    with open(pipe, "rb") as file, LiveVideo(file, policy="wait") as live:
        assert len(list(live)) == 60
    writer.join()


def test_windows_of_a_live_source_are_those_of_the_file(camera, video):
    model = make_model(tiny_config("factorised_encoder", image_size=(24, 24)))
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=2, size={"shortest_edge": 32}, crop_size=24)
    from_file = list(file_windows(model, processor, video))
    with connect(camera(), policy="wait", size=reader_size(processor)) as live:
        found = list(live_windows(model, processor, live))
    assert len(found) == len(from_file) == (30 - 8) // 2 + 1
    for one, other in zip(found, from_file, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
        assert one.start == pytest.approx(other.start, abs=1e-3)


def test_time_goes_on_where_the_clock_is_set(video, tmp_path):
    """As if a camera began again: the same stream twice in one pipe."""
    stream = write_stream(video, tmp_path / "stream.ts").read_bytes()
    with LiveVideo(io.BytesIO(stream + stream), policy="wait") as live:
        times = np.array([seconds for seconds, _ in live])
    assert len(times) == 120
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=1e-3)


def test_closing_ends_the_thread_while_frames_wait(video):
    with open(video, "rb") as file:
        live = LiveVideo(file, policy="wait", queue_size=2)
        next(iter(live))
        live.close()
        assert not live._thread.is_alive() and list(live) == []


def test_a_source_that_fell_silent_does_not_hold_up_who_closes_it(video, tmp_path):
    part = write_stream(video, tmp_path / "part.ts").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.sendall(part)
                is_over.wait(60)

        is_over = threading.Event()
        threading.Thread(target=serve, daemon=True).start()
        live = LiveVideo(f"tcp://127.0.0.1:{server.getsockname()[1]}", format="mpegts", timeout=20)
        received, deadline = -1, time.monotonic() + 30
        # Until most of it has come, and nothing comes any more.
        while (received <= 30 or received != live.num_received) and time.monotonic() < deadline:
            received = live.num_received
            time.sleep(0.5)
        assert received > 30 and live._thread.is_alive()
        begin = time.monotonic()
        live.close()
        assert time.monotonic() - begin < 5 and list(live) == []
        is_over.set()
        live._thread.join(10)
        assert not live._thread.is_alive()


def test_damage_on_the_way_is_counted_and_passed_over(video, tmp_path):
    broken = tmp_path / "broken.mp4"
    shutil.copyfile(video, broken)
    for number in (20, 31):
        damage_packet(broken, number)
    with open(broken, "rb") as file, LiveVideo(file, policy="wait") as live:
        times = [seconds for seconds, _ in live]
    assert live.num_rejected_packets == 2 and len(times) == live.num_received == 58
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tcp://127.0.0.1:1", r"Cannot read tcp://127\.0\.0\.1:1: .*refused"),
        ("nowhere.ts", r"Cannot read nowhere\.ts: FileNotFoundError: No such file or directory"),
    ],
)
def test_what_cannot_be_opened_is_named(source, message):
    with pytest.raises(VideoDecodingError, match=message):
        LiveVideo(source)


def test_a_source_without_video_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoDecodingError, match=r"sound\.wav: it has no video stream"):
        LiveVideo(str(tmp_path / "sound.wav"))


@pytest.mark.parametrize(("option", "value"), [("policy", "drop_newest"), ("queue_size", 0)])
def test_wrong_settings_are_named(video, option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        LiveVideo(str(video), **{option: value})
