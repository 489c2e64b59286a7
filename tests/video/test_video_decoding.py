"""Reading real files: exact frames by index, right colours, named errors, nothing left open."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import threading
import wave
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.dynamic_module_utils import get_imports
from video_files import (
    KINDS,
    damage_packet,
    http_server,
    moving_frames,
    plain_decode,
    set_matrix,
    write_kind,
    write_video,
)

import vivit_hf.video_decoding
from vivit_hf.frame_decoders import SeekingDecoder
from vivit_hf.video_container import VideoContainer
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError, VideoLimits


@pytest.mark.parametrize("kind", KINDS)
def test_frames_by_index_are_those_of_a_plain_decode(kind, folder):
    path = write_kind(folder, kind)
    expected = plain_decode(path)
    rng = np.random.default_rng(0)
    with VideoReader(path) as reader:
        assert reader.num_frames == len(expected) == len(reader.timestamps)
        assert reader.timestamps[0] == 0 and np.all(np.diff(reader.timestamps) > 0)
        for _ in range(8):
            indices = rng.integers(-len(expected), len(expected), size=rng.integers(1, 7))
            frames = reader.frames_at(indices)
            assert frames.dtype == np.uint8
            assert np.array_equal(frames, expected[indices]), indices
        assert np.array_equal(reader.frames_at(range(len(expected))), expected)
        shape = reader.frames_at(np.zeros((2, 3), dtype=int)).shape
        assert shape == (2, 3, *expected.shape[1:])


def test_timestamps_are_those_of_the_file(folder):
    path = write_kind(folder, "h264_variable_rate")
    pts = np.array(KINDS["h264_variable_rate"][1]["pts"])
    with VideoReader(path) as reader:
        assert np.abs(reader.timestamps - (pts - pts[0]) / 1000).max() < 1e-3


def test_repeated_timestamps_do_not_change_those_of_other_frames(tmp_path):
    pts = [*range(0, 400, 40), 500, 500, *range(600, 2200, 200)]
    path = write_video(tmp_path / "video.mkv", num_frames=20, pts=pts, options={"bf": "0"})
    with VideoReader(path) as reader:
        assert np.array_equal(reader.frames_at(range(20)), plain_decode(path))
        assert np.allclose(reader.timestamps, np.array(pts) / 1000)


@pytest.mark.parametrize(("codec", "name"), [("libx264", "raw.h264"), ("libx265", "raw.hevc")])
def test_streams_without_timestamps_are_timed_by_the_rate_in_their_header(codec, name, tmp_path):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / name, codec=codec, options=options, num_frames=20, rate=50)
    with VideoReader(path) as reader:
        assert np.allclose(reader.timestamps, np.arange(20) / 50)


def test_an_encrypted_file_is_refused_by_name(tmp_path):
    key = "00112233445566778899aabbccddeeff"
    encryption = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": key, "encryption_kid": key}
    path = write_video(tmp_path / "video.mp4", container_options=encryption)
    with pytest.raises(VideoDecodingError, match=r"video\.mp4: it is encrypted; decrypt it first"):
        VideoReader(path)


def test_sparse_frames_are_reached_by_seeking_and_not_by_decoding_through(video, monkeypatch):
    num_decoded = 0
    plain_frames = VideoContainer.frames

    def counted(self, packets):
        nonlocal num_decoded
        for frame in plain_frames(self, packets):
            num_decoded += 1
            yield frame

    monkeypatch.setattr(VideoContainer, "frames", counted)
    expected = plain_decode(video)
    with VideoReader(video) as reader:
        frames = reader.frames_at([1, 61, 101])
    assert np.array_equal(frames, expected[[1, 61, 101]])
    assert num_decoded < 20  # the decoder is some frames ahead


def test_indices_outside_of_the_video_are_index_errors(video):
    with VideoReader(video) as reader:
        for wrong in ([120], [-121], [0.5], []):
            with pytest.raises(IndexError):
                reader.frames_at(wrong)


@pytest.mark.parametrize("color_range", ["MPEG", "JPEG"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colours_come_back_in_either_range(color_range, pix_fmt, folder):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [60, 120, 180]])
    frames = np.broadcast_to(colours[:, None, None].astype(np.uint8), (6, 32, 32, 3))
    path = folder / f"{color_range}_{pix_fmt}.mkv"
    write_video(path, frames, codec="ffv1", pix_fmt=pix_fmt, color_range=1 if color_range == "MPEG" else 2)
    with VideoReader(path) as reader:
        assert np.abs(reader.frames_at(range(6)).astype(int) - frames).max() <= 2


def test_alpha_and_grey_become_rgb(folder):
    for kind in ("alpha", "grey"):
        path = write_kind(folder, kind)
        with VideoReader(path) as reader:
            frames = reader.frames_at(range(30)).astype(int)
        expected = moving_frames().astype(int)
        if kind == "grey":
            assert np.array_equal(frames[..., 0], frames[..., 2])
            expected = (expected @ [0.299, 0.587, 0.114])[..., None]
        assert np.abs(frames - expected).max() <= 2


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),  # turned by 0, 90, 180, 270 degrees
        *((-1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, -1), (0, -1, -1, 0)),  # mirrored, then turned, as front cameras do
    ],
)
def test_frames_are_turned_and_mirrored_by_the_matrix_of_the_file(matrix, folder):
    path = write_video(folder / "turned.mp4")
    stored = plain_decode(path)
    set_matrix(path, *matrix)
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[1], : stored.shape[2]]
    shown_y, shown_x = b * x + d * y, a * x + c * y
    shown_y, shown_x = shown_y - shown_y.min(), shown_x - shown_x.min()
    expected = np.empty((30, shown_y.max() + 1, shown_x.max() + 1, 3), np.uint8)
    expected[:, shown_y, shown_x] = stored
    sizes = []

    def halved(height, width):
        sizes.append((height, width))
        return height // 2, width // 2

    with VideoReader(path) as reader:
        assert np.array_equal(reader.frames_at([3, 7]), expected[[3, 7]])
        assert reader.frames_at([3], size=halved).shape == (1, expected.shape[1] // 2, expected.shape[2] // 2, 3)
        assert (reader.describe()["height"], reader.describe()["width"]) == expected.shape[1:3]
    assert sizes == [expected.shape[1:3]]


def test_every_kind_of_source_gives_the_same_frames(video):
    expected = plain_decode(video)[[5, 50]]
    data = video.read_bytes()
    assert np.array_equal(_read(video), expected)
    for source in (str(video), data, bytearray(data), {"path": str(video)}, {"path": None, "bytes": data}):
        assert np.array_equal(_read(source), expected)
    with open(video, "rb") as file:
        file.seek(100)
        assert np.array_equal(_read(file), expected)
        assert not file.closed
    for stream in (_Stream(data), SimpleNamespace(read=io.BytesIO(data).read)):
        assert np.array_equal(_read(stream), expected)
    here = VideoLimits(allow_private_addresses=True)
    with http_server(video.parent) as address:
        with VideoReader(f"{address}/{video.name}", limits=here) as reader:
            assert np.array_equal(reader.frames_at([5, 50]), expected)
        with pytest.raises(VideoDecodingError, match=r"missing\.mp4: .*404"):
            VideoReader(f"{address}/missing.mp4", limits=here)


class _Stream(io.BytesIO):
    """Like a pipe: it can only be read once, forward."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError("not seekable")


def _read(source, indices=(5, 50)):
    with VideoReader(source) as reader:
        return reader.frames_at(list(indices))


def test_what_is_no_video_is_an_error_with_its_name(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    reasons = {
        "missing.mp4": "No such file",
        "empty.mp4": "it is empty",
        "text.mp4": "Invalid data",
        "sound.wav": "no video stream",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoDecodingError, match=reason) as caught:
            VideoReader(tmp_path / name)
        assert caught.value.source == str(tmp_path / name) and name in str(caught.value)
    with pytest.raises(VideoDecodingError, match="directory"):
        VideoReader(tmp_path)
    with pytest.raises(VideoDecodingError, match="<12 bytes of video data>"):
        VideoReader(b"not a video!")
    with pytest.raises(TypeError, match="binary mode"):
        VideoReader(io.StringIO("text"))
    with pytest.raises(TypeError, match="'path' or 'bytes'"):
        VideoReader({"path": None, "bytes": None})
    with pytest.raises(TypeError, match="int"):
        VideoReader(7)


def test_a_video_cannot_make_the_reader_open_other_files(video, monkeypatch):
    monkeypatch.chdir(video.parent)
    playlist = b"ffconcat version 1.0\nfile video.mp4\n"
    Path("list.mp4").write_bytes(playlist)
    assert len(plain_decode("list.mp4")) == 120  # FFmpeg by itself follows it
    for source in ("list.mp4", playlist, "concat:video.mp4|video.mp4", "file:video.mp4"):
        with pytest.raises(VideoDecodingError):
            VideoReader(source)


@pytest.mark.parametrize(
    "limits",
    [{"max_frames": 119}, {"max_pixels": 48 * 64 - 1}, {"max_duration": 4.7}],
    ids=lambda value: next(iter(value)),
)
def test_limits_are_kept_and_named(limits, video):
    with pytest.raises(VideoLimitError, match=f"video.mp4.*{next(iter(limits))}="):
        VideoReader(video, limits=VideoLimits(**limits))
    roomier = VideoLimits(**{name: value + 1 for name, value in limits.items()})
    VideoReader(video, limits=roomier).close()


@pytest.mark.parametrize("gap", [10**9, 10**13], ids=["11 days", "300 years"])
def test_frames_with_absurd_timestamps_are_read_and_timed_by_their_rate(gap, tmp_path):
    pts = [40 * number + (gap if number > 20 else 0) for number in range(30)]
    path = write_video(tmp_path / "video.mkv", pts=pts, options={"bf": "2"})
    with VideoReader(path) as reader:
        assert np.array_equal(reader.frames_at(range(30)), plain_decode(path))
        assert reader.timestamps[-1] < 2


def test_errors_survive_pickling():
    error = VideoDecodingError("message", source="a.mp4", reason="why", num_recovered=3, num_frames=5)
    for clone in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(clone) == "message" and vars(clone) == vars(error)


def test_opening_and_reading_from_the_start_decodes_each_frame_once(video, monkeypatch):
    num_sent = 0
    plain_packets = VideoContainer.frames

    def counted(self, packets):
        def count():
            nonlocal num_sent
            for packet in packets:
                num_sent += 1
                yield packet

        return plain_packets(self, count())

    monkeypatch.setattr(VideoContainer, "frames", counted)
    with VideoReader(video) as reader:
        assert np.array_equal(reader.frames_at(range(120)), plain_decode(video))
    assert num_sent == 120


def test_a_reader_does_one_thing_at_a_time(video):
    """FFmpeg crashes the process where a container is read from two places, or after it was closed."""

    def started(reader):
        frames = reader.stream(range(reader.num_frames))
        next(frames)
        return frames

    for disturb in (lambda one: one.describe(), lambda one: one.frames_at([3]), started, lambda one: one.verify()):
        with VideoReader(video) as reader:
            frames = started(reader)
            disturb(reader)
            with pytest.raises(
                RuntimeError, match=f"{video.name} was used for something else before the end of its stream"
            ):
                next(frames)
            assert len(reader.frames_at([1, 2])) == 2
    with VideoReader(video) as reader:
        frames = started(reader)
    with pytest.raises(RuntimeError, match=f"{video.name} is closed before the end of its stream"):
        next(frames)
    uses = (lambda: reader.frames_at([0]), reader.describe, reader.verify, lambda: started(reader))
    for use in uses:
        with pytest.raises(ValueError, match=f"The reader of .*{video.name} is closed: open another one"):
            use()


def test_a_stream_that_is_forgotten_leaves_the_next_one_alone(video):
    expected = plain_decode(video)
    with VideoReader(video) as reader:
        first = reader.stream(range(30, 120))
        next(first)
        second = reader.stream(range(70, 90))
        frames = [next(second)[1]]
        del first
        frames += [frame for _, frame in second]
        assert np.array_equal(frames, expected[70:90])
        assert isinstance(reader._decoder, SeekingDecoder)


def test_threads_can_share_a_reader(video):
    expected = plain_decode(video)
    with VideoReader(video) as reader, ThreadPoolExecutor(6) as pool:
        places = [np.random.default_rng(seed).integers(0, len(expected), 5) for seed in range(24)]
        for place, frames in zip(places, pool.map(reader.frames_at, places), strict=True):
            assert np.array_equal(frames, expected[place])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64])
def test_indices_of_every_integer_type(tmp_path, dtype):
    path = write_video(tmp_path / "video.mp4", num_frames=300, height=16, width=16)
    with VideoReader(path) as reader:
        assert np.array_equal(reader.frames_at(np.array([5, 100], dtype)), reader.frames_at([5, 100]))


def test_other_addresses_are_refused_in_words():
    for address in ("s3://bucket/video.mp4", "ftp://host/video.mp4", "file:///tmp/video.mp4"):
        with pytest.raises(
            VideoDecodingError, match="only http:// and https:// addresses are supported; download the file first"
        ):
            VideoReader(address)


def test_a_pipe_with_a_name_is_read_to_its_end(video, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(video.read_bytes()))
    writer.start()
    with VideoReader(pipe) as reader:
        assert reader.num_frames == 120
    writer.join()


def test_nothing_is_left_open(video, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _read(video)
        with pytest.raises(VideoDecodingError):
            VideoReader(tmp_path / "text.mp4")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_closed_reader_is_freed_at_once(video, tmp_path):
    """Freed later by the garbage collector, in a forked process, a decoder would wait for threads of its parent."""
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(video.read_bytes())
    damage_packet(damaged, 30)
    decoders = []
    gc.collect()
    gc.disable()
    try:
        for path in (video, damaged):
            for num_read in range(3):
                with VideoReader(path) as reader:
                    decoders.append(weakref.ref(reader._decoder))
                    frames = reader.stream(range(25, 60))
                    for _ in range(num_read):  # the stream breaks off
                        next(frames)
                del reader, frames
        assert [decoder() for decoder in decoders] == [None] * 6
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_files_can_be_read_in_data_loader_workers(method, video):
    loader = torch.utils.data.DataLoader(
        [str(video)] * 4,
        batch_size=None,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=multiprocessing.get_context(method),
        collate_fn=partial(_read, indices=(5, 50)),
        timeout=60,
    )
    expected = plain_decode(video)[[5, 50]]
    assert all(np.array_equal(frames, expected) for frames in loader)


def test_pyav_is_no_hard_requirement_of_the_source():
    folder = Path(vivit_hf.video_decoding.__file__).parent
    files = (
        "frame_conversion",
        "frame_decoders",
        "frame_sampling",
        "mp4_tables",
        "video_container",
        "video_download",
        "video_sources",
        "video_decoding",
        "video_frames",
        "video_processing_vivit",
    )
    imported = {name for file in files for name in get_imports(folder / f"{file}.py")}
    assert {"av", "torchvision", "torchcodec", "vivit_hf"}.isdisjoint(imported)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="the system has no scheduling policies")
def test_writing_av1_leaves_the_scheduling_of_the_tests_alone(tmp_path):
    before = os.sched_getscheduler(0)
    write_video(tmp_path / "av1.mkv", codec="libsvtav1", height=64, width=96, num_frames=4)
    assert os.sched_getscheduler(0) == before
