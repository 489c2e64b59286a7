"""MP4 files of a few hundred bytes whose headers claim millions of samples, for which FFmpeg would allocate memory."""

import ctypes
import io
import struct
import zlib

import av
import numpy as np
import pytest
from video_files import KINDS, write_kind, write_video

from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.mp4_tables import BoxLimitError, num_claimed_entries
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError


MANY = 60_000_000
MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def table(kind: bytes, *fields: bytes | int, flags: int = 0, version: int = 0) -> bytes:
    numbers = [field if isinstance(field, bytes) else struct.pack(">I", field) for field in fields]
    return box(kind, struct.pack(">I", version << 24 | flags), *numbers)


def description(handler: bytes, inside: bytes = b"") -> bytes:
    """The `stsd` box: MPEG-4 video of 64 x 48, or 16-bit sound."""
    if handler == b"soun":
        entry = box(b"sowt", bytes(6), b"\0\1", bytes(8), struct.pack(">4HI", 1, 16, 0, 0, 8000 << 16), inside)
    else:
        fields = bytes(16) + struct.pack(">HH", 64, 48) + b"\0\x48\0\0" * 2 + bytes(4) + b"\0\1" + bytes(32)
        entry = box(b"mp4v", bytes(6), b"\0\1", fields, b"\0\x18\xff\xff", inside)
    return table(b"stsd", 1, entry)


def samples(durations=(1, 10, 40), chunks=(1, 1, 10, 1), sizes=(6, 10), offsets=(1, 48)) -> list[bytes]:
    """The sample tables, by default of ten samples of six bytes in one chunk."""
    return [table(b"stts", *durations), table(b"stsc", *chunks), table(b"stsz", *sizes), table(b"stco", *offsets)]


def movie(tables, *, handler=b"vide", num_tracks=1, inside=b"", edits=b"", header=b"", after=b"") -> bytes:
    """A file with these tables and boxes: in the codec's description, the track, the header, and after the header."""
    media = box(
        b"mdia",
        table(b"mdhd", 0, 0, 1000, 1000, 0x55C40000),
        table(b"hdlr", 0, handler, bytes(13)),
        box(b"minf", table(b"vmhd", 0, 0, flags=1), box(b"stbl", description(handler, inside), *tables)),
    )
    size = struct.pack(">II", 64 << 16, 48 << 16)
    track = box(b"trak", table(b"tkhd", 0, 0, 1, 0, 1000, bytes(16), MATRIX, size, flags=3), edits, media)
    movie_header = table(b"mvhd", 0, 0, 1000, 1000, 0x10000, b"\1\0", bytes(10), MATRIX, bytes(24), 2)
    moov = box(b"moov", movie_header, track * num_tracks, header)
    return box(b"ftyp", b"isomiso2", bytes(4)) + moov + after + box(b"mdat", bytes(64))


def fragments(*runs: bytes) -> bytes:
    empty = samples((0,), (0,), (0, 0), (0,))
    moof = box(b"moof", table(b"mfhd", 1), box(b"traf", table(b"tfhd", 1, flags=0x20000), table(b"tfdt", 0), *runs))
    return movie(empty, header=box(b"mvex", table(b"trex", 1, 1, 10, 1, 0)), after=moof)


def compressed(data: bytes) -> bytes:
    """The same file with its `moov` box compressed."""
    start = data.index(b"moov") - 4
    end = data.index(b"mdat") - 4
    moov = data[start:end]
    packed = box(b"cmvd", struct.pack(">I", len(moov)), zlib.compress(moov, 9))
    return data[:start] + box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), packed)) + data[end:]


CLAIM = samples((1, MANY, 2), (1, 1, MANY, 1), (1, MANY))
TEN = samples()
WITHOUT_SIZES = [CLAIM[0], CLAIM[1], CLAIM[3]]
REPEATED = table(b"elst", 20_000, struct.pack(">III", 80_000, 0, 0x10000) * 20_000)
BOMBS = {
    "one size for all": movie(CLAIM),
    "many chunks": movie(samples((1, MANY, 2), (1, 1, MANY // 100, 1), (1, MANY), (100, bytes([0, 0, 0, 48]) * 100))),
    "sound": movie(samples((1, MANY, 2), (1, 1, MANY, 1), (1, MANY)), handler=b"soun"),
    "sound in chunks": movie(
        samples((1, 2**32 - 1, 1), (1, 1, 2**31 - 2, 1), (1, 10)), handler=b"soun", num_tracks=100
    ),
    "durations that contradict": movie([*CLAIM, table(b"stts", 1, MANY, 1)], handler=b"soun"),
    "a run of a fragment": fragments(table(b"trun", MANY)),
    "many runs": fragments(*[table(b"trun", MANY // 20)] * 20),
    "a run with sizes": fragments(table(b"trun", MANY, bytes(40), flags=0x200)),
    "edits": movie(
        samples((1, 2000, 40), (1, 1, 2000, 1), (0, 2000, struct.pack(">I", 1) * 2000)), edits=box(b"edts", REPEATED)
    ),
    "metadata keys": movie(TEN, header=box(b"meta", table(b"hdlr", 0, b"mdta", bytes(13)), table(b"keys", MANY))),
    "picture items": box(b"ftyp", b"avif", bytes(4), b"avifmif1")
    + table(
        b"meta",
        table(b"hdlr", 0, b"pict", bytes(13)),
        table(b"pitm", b"\0\1"),
        table(b"iloc", b"\0\0", MANY, version=2),
    ),
    "compressed header": compressed(movie(CLAIM)),
    "disguised as free space": movie(CLAIM).replace(b"moov", b"free"),
    "inside a codec's description": movie(WITHOUT_SIZES, inside=CLAIM[2]),
    **{f"inside {kind.decode()}": movie([box(kind, CLAIM[2]), *WITHOUT_SIZES]) for kind in (b"wave", b"sinf", b"tref")},
}


def peak_growth(job) -> float:
    """The MiB that a job adds to the peak memory of this process."""

    def kilobytes(name: str) -> int:
        with open("/proc/self/status") as file:
            return int(file.read().split(f"{name}:")[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide what the job takes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # begins a new peak
    before = kilobytes("VmRSS")
    job()
    return (kilobytes("VmHWM") - before) / 1024


@pytest.mark.parametrize("name", BOMBS)
def test_claims_beyond_the_size_of_the_file_are_refused_before_memory_is_taken(name):
    data = BOMBS[name]

    def refuse():
        for use in (VideoReader, LiveVideo):
            with pytest.raises(
                VideoDecodingError, match=r"header claims \d+ samples, more than its \d+ bytes can hold"
            ):
                use(io.BytesIO(data))

    assert peak_growth(refuse) < 50


def test_the_bomb_is_one_for_ffmpeg():
    """If this fails, FFmpeg has become careful itself and the check may go."""
    few = movie(samples((1, 10_000_000, 2), (1, 1, 10_000_000, 1), (1, 10_000_000)))
    assert len(few) < 1000
    assert peak_growth(lambda: av.open(io.BytesIO(few)).close()) > 150


def test_a_compressed_header_is_counted_within_limits():
    data = compressed(movie(TEN))
    assert num_claimed_entries(io.BytesIO(data)) == 10
    with pytest.raises(BoxLimitError, match="compressed header claims 4294967295 bytes"):
        num_claimed_entries(io.BytesIO(box(b"cmvd", b"\xff" * 4)))
    with pytest.raises(BoxLimitError, match="more than one compressed header"):
        num_claimed_entries(io.BytesIO(box(b"cmvd", bytes(4), zlib.compress(b"")) * 2))
    with pytest.raises(VideoLimitError, match="more than 1048576 boxes"):
        VideoReader(movie(TEN) + box(b"free") * (1 << 20))


def test_samples_are_counted_over_tracks_and_fragments():
    assert num_claimed_entries(io.BytesIO(movie(TEN, num_tracks=3))) == 30
    assert num_claimed_entries(io.BytesIO(fragments(table(b"trun", 7), table(b"trun", 5)))) == 12
    for data in (b"", b"short", bytes(100), b"\xff" * 100):
        assert num_claimed_entries(io.BytesIO(data)) == 0
    file = io.BytesIO(b"before" + movie(TEN))
    file.seek(6)
    assert num_claimed_entries(file) == 10 and file.tell() == 6


def test_tables_that_are_shorter_than_they_claim_are_left_to_ffmpeg():
    """FFmpeg stops at the end of these without allocating, and reads the samples that are there."""
    offsets = movie(samples(offsets=(MANY, 48)))
    assert num_claimed_entries(io.BytesIO(offsets)) == 10
    with VideoReader(write_video_with_long_claim()) as reader:
        assert len(reader.frames_at(range(30))) == 30


def write_video_with_long_claim() -> bytes:
    """A good file whose chunk offsets claim more entries than their box holds."""
    file = io.BytesIO()
    file.name = "good.mp4"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(file.getvalue())
    place = data.index(b"stco") + 8
    data[place : place + 4] = struct.pack(">I", MANY)
    return bytes(data)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0].endswith(("mp4", "mov"))])
def test_good_files_claim_a_fraction_of_their_bytes(kind, tmp_path):
    path = write_kind(tmp_path, kind)
    with open(path, "rb") as file:
        assert 0 < num_claimed_entries(file) <= 30 * 2 < path.stat().st_size / 10


def test_sound_without_sizes_of_its_own_passes(tmp_path):
    """A minute of 16-bit sound has more samples than its track has entries, and a video next to it is read."""
    path = write_video(tmp_path / "video.mov", num_frames=25)
    with av.open(str(tmp_path / "both.mov"), "w") as output, av.open(str(path)) as given:
        video = output.add_stream_from_template(given.streams.video[0])
        sound = output.add_stream("pcm_s16le", rate=48000, layout="mono")
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = video
                output.mux(packet)
        for start in range(0, 60 * 48000, 48000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    with VideoReader(tmp_path / "both.mov") as reader:
        assert reader.num_frames == 25
