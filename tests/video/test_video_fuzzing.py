"""Thousands of broken files: each ends in the right frames, or in an error with a name, and none is kept."""

import contextlib
import ctypes
import gc
import io
import logging
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from video_files import EXACT, write_kind

from vivit_hf.frame_decoders import SeekingDecoder
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import FramesChangedError, VideoDecodingError


pytestmark = pytest.mark.slow


SOURCES = (
    *("h264_b_frames", "h264_open_gop", "h264_mkv", "h264_mov", "h264_avi", "h264_ts_late_start", "h264_fragmented"),
    *("h264_variable_rate", "hevc", "hevc_10_bit", "av1", "vp9", "mpeg4_avi", "gif", "apng", "alpha"),
)
HEADER = 2000


class Files(dict):
    def __repr__(self):  # hypothesis prints the arguments of a failing case
        return "the original files"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return Files({kind: write_kind(folder, kind).read_bytes() for kind in SOURCES})


@pytest.fixture(autouse=True)
def quiet():
    """What the reader says of every damaged file would be thousands of lines."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


share = st.floats(0, 1, exclude_max=True)
mutations = st.one_of(
    st.tuples(st.just("truncate"), share),
    st.tuples(st.just("flip"), st.sampled_from(["anywhere", "header"]), st.lists(st.tuples(share, st.integers(0, 7)))),
    st.tuples(st.just("garbage"), share, st.integers(1, 400), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("zeros"), share, st.integers(1, 4000)),
    st.tuples(st.just("delete"), share, st.integers(1, 4000)),
    st.tuples(st.just("repeat"), share, st.integers(1, 4000)),
)


def decode_past_errors(data: bytes) -> dict[int, np.ndarray]:
    """The frames of a file by their timestamps, errors left out."""
    frames: dict[int, np.ndarray] = {}
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        for packet in container.demux(container.streams.video[0]):
            with contextlib.suppress(av.FFmpegError):
                for frame in packet.decode():
                    image = reformatter.reformat(frame, format="rgb24", interpolation=EXACT).to_ndarray()
                    frames[frame.pts] = np.rot90(image, round(frame.rotation / 90) % 4)
    return frames


def groups_of_pictures(data: bytes) -> list[tuple[set[int], list[bytes]]]:
    """From each keyframe to the next: the timestamps, and the bytes, the codec's header included."""
    groups: list[tuple[set[int], list[bytes]]] = []
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        header = stream.codec_context.extradata or b""
        for packet in container.demux(stream):
            if packet.is_keyframe or not groups:
                groups.append((set(), [header]))
            groups[-1][0].add(packet.pts)
            groups[-1][1].append(bytes(packet))
    return groups


def mutated(data: bytes, mutation: tuple) -> bytes:
    name, *arguments = mutation
    if name == "flip":
        where, flips = arguments
        result = bytearray(data)
        end = len(data) if where == "anywhere" else min(HEADER, len(data))
        for place, bit in flips if end else ():
            result[int(place * end)] ^= 1 << bit
        return bytes(result)
    start = int(arguments[0] * len(data))
    if name == "truncate":
        return data[:start]
    length = arguments[1]
    if name == "garbage":
        garbage = np.random.default_rng(arguments[2]).bytes(length)
        return data[:start] + garbage + data[start + length :]
    if name == "zeros":
        return data[:start] + bytes(length) + data[start + length :]
    if name == "delete":
        return data[:start] + data[start + length :]
    return data[: start + length] + data[start:]


@settings(
    max_examples=2000,
    deadline=10_000,  # milliseconds for one file
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(kind=st.sampled_from(SOURCES), changes=st.lists(mutations, min_size=1, max_size=2), seed=st.integers(0, 2**16))
def test_2000_broken_files(originals, kind, changes, seed):
    data = originals[kind]
    for change in changes:
        data = mutated(data, change)
    try:
        with VideoReader(data) as reader:
            indices = np.random.default_rng(seed).integers(0, reader.num_frames, size=3)
            try:
                frames = reader.frames_at(indices)
            except FramesChangedError:
                indices = np.random.default_rng(seed).integers(0, reader.num_frames, size=3)
                frames = reader.frames_at(indices)
            report, decoder = reader.report, reader._decoder
    except VideoDecodingError:
        return
    assert frames.shape[0] == 3 and frames.dtype == np.uint8
    # Found by seeking, and not reported as damaged: the frames of a plain decode. A stream that damage makes change its
    # size is scaled to one, and cannot be compared.
    if isinstance(decoder, SeekingDecoder):
        index = decoder._index
        assert not (report.num_damaged_frames or report.num_repeated_frames)
        expected, groups = decode_past_errors(data), groups_of_pictures(data)
        intact = [content for _, content in groups_of_pictures(originals[kind])]
        for frame, pts in zip(frames, index.pts[indices].tolist(), strict=True):
            if expected[pts].shape == frame.shape and not np.array_equal(frame, expected[pts]):
                # Of damage that no decoder notices the picture can depend on where decoding began. Then it is there,
                # between the keyframe before the frame and the next, or in the group before.
                place = next(number for number, (members, _) in enumerate(groups) if pts in members)
                assert not all(content in intact for _, content in groups[max(0, place - 1) : place + 1])


def _grown_megabytes(files: list[bytes]) -> list[float]:
    """How far the memory of this process grows in each of five times 400 opens, after 200 that fill the pools."""

    def resident_megabytes() -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds in reserve does not count
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def open_and_read(times: int) -> None:
        for number in range(times):
            try:
                with VideoReader(files[number % len(files)]) as reader:
                    reader.frames_at([0, 17], on_lost="repeat_last")
            except VideoDecodingError:
                continue

    open_and_read(200)
    held = [resident_megabytes()]
    for _ in range(5):
        open_and_read(400)
        held.append(resident_megabytes())
    return [after - before for before, after in pairwise(held)]


def test_2000_opens_keep_no_memory(originals, monkeypatch):
    """
    Good and broken files by turns, in a process of their own: what other tests left must not count. What is kept of
    each open grows every time; a pool that the allocator enlarges, once.
    """
    data = originals["h264_b_frames"]
    files = [mutated(data, ("zeros", 0.4, 600)), data, data, data]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # decoders' threads otherwise fill pools of their own, by chance
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert statistics.median(pool.submit(_grown_megabytes, files).result()) < 1
