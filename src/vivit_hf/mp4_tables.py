"""Count the index entries that an MP4 or QuickTime file claims, before FFmpeg opens it.

FFmpeg allocates about 36 bytes for each sample that a file claims. A file of a few hundred bytes can claim millions: by
samples of constant size, fragments without sizes, or edit lists that repeat the same samples. An honest file has at
least one byte for each sample, so it never claims more entries than it has bytes.

FFmpeg reads boxes more freely than the standard allows: it accepts tables inside almost any box, and headers that are
compressed or disguised as free space. The count below includes all of these.
"""

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


# The boxes that decide how much FFmpeg allocates.
_TABLES = (b"stsz", b"stz2", b"stts", b"stsc", b"stco", b"co64", b"elst", b"hdlr", b"trun", b"keys", b"iloc", b"iinf")
# Boxes that hold no other boxes: the media data, and the most frequent ones.
_LEAVES = {b"mdat", b"mfhd", b"tfhd", b"tfdt", b"sidx", b"styp", *_TABLES}
_MAX_DEPTH = 12  # FFmpeg stops at 10
_MAX_BOXES = 1 << 20
_MAX_HEADER_BYTES = 1 << 26
# FFmpeg indexes sound whose samples last one tick by its chunks, split into entries of at least 160 samples.
_SOUND_SAMPLES_PER_ENTRY = 160


class BoxLimitError(ValueError):
    """The boxes of a file are too many or too large to be counted."""


@dataclass
class _Track:
    num_samples: int = 0
    num_edits: int = 1
    num_chunks: int = 0
    samples_per_chunk: int = 0
    has_one_tick_samples: set[bool] = field(default_factory=set)  # one value for each table of durations
    handlers: set[bytes] = field(default_factory=set)

    @property
    def num_entries(self) -> int:
        is_sound = b"soun" in self.handlers and self.handlers <= {b"soun", b"alis", b"url "}
        if is_sound and self.has_one_tick_samples == {True}:
            return self.num_edits * (self.num_chunks * self.samples_per_chunk // _SOUND_SAMPLES_PER_ENTRY)
        return self.num_edits * self.num_samples

    def add(self, kind: bytes, content: bytes, num_bytes: int) -> None:
        """Add a table, given its type, its content (or the start of it) and the content's full length."""
        count = _number(content, 4)
        if kind == b"hdlr":
            self.handlers.add(content[8:12])
        elif kind == b"elst":
            self.num_edits = max(self.num_edits, min(count, num_bytes // 12))
        elif kind == b"stts":
            self.has_one_tick_samples.add(count == 1 and _number(content, 12) == 1)
        elif kind in (b"stco", b"co64"):
            self.num_chunks = max(self.num_chunks, min(count, num_bytes // 4))
        elif kind == b"stsc":  # (first chunk, samples per chunk, description) for each run of chunks
            rows = content[8 : 8 + 12 * count]
            counts = np.frombuffer(rows[: len(rows) // 12 * 12], ">u4")[1::3]
            self.samples_per_chunk = max(self.samples_per_chunk, int(counts.max(initial=0)))
        else:  # stsz and stz2: one size for all samples (0: they differ and are listed), then the number of samples
            num_samples = _number(content, 8)
            is_listed = kind == b"stz2" or count == 0
            self.num_samples = max(self.num_samples, min(num_samples, 2 * num_bytes) if is_listed else num_samples)


def num_claimed_entries(file: Any) -> int:
    """
    Return the number of index entries that FFmpeg would allocate for a seekable binary file, 0 if it is not MP4.

    Counts from the current position on, and restores it. Raises BoxLimitError if the boxes are too many or too large.
    """
    start = file.tell()
    try:
        return _count(file, start, file.seek(0, io.SEEK_END))
    finally:
        file.seek(start)


def _count(file: Any, start: int, end: int, may_be_compressed: bool = True) -> int:
    tracks, num_others = [_Track()], 0
    for number, (kind, place, stop) in enumerate(_boxes(file, start, end)):
        if number == _MAX_BOXES:
            raise BoxLimitError(f"it has more than {_MAX_BOXES} boxes")
        if kind == b"trak":
            tracks.append(_Track())
        elif kind == b"cmvd":
            if not may_be_compressed:
                raise BoxLimitError("it has more than one compressed header")
            may_be_compressed = False
            num_others += _count_compressed(_read(file, place, min(stop - place, _MAX_HEADER_BYTES)))
        elif kind in (b"trun", b"keys", b"iinf", b"iloc"):
            num_others += _num_listed(kind, _read(file, place, 12))
        elif kind in _TABLES:
            needed = _MAX_HEADER_BYTES if kind == b"stsc" else 16
            tracks[-1].add(kind, _read(file, place, min(stop - place, needed)), stop - place)
    return num_others + sum(track.num_entries for track in tracks)


def _boxes(file: Any, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield each box and the boxes inside it: type, start of the content, end."""
    while end - start >= 8 and depth < _MAX_DEPTH:
        header = _read(file, start, 16)
        size, kind, place = _number(header, 0), header[4:8], start + 8
        if size == 1:
            size, place = _number(header, 8, 8), start + 16
        stop = end if size == 0 else min(start + size, end)
        if stop < place:
            return
        yield kind, place, stop
        if kind == b"stsd":  # codec descriptions: fields of varying length come before the boxes
            for match in re.finditer(b"|".join(_TABLES), _read(file, place, min(stop - place, _MAX_HEADER_BYTES))):
                yield match.group(), place + match.end(), stop
        elif kind == b"meta":  # FFmpeg skips everything before the handler
            handler = _read(file, place, min(stop - place, _MAX_HEADER_BYTES)).find(b"hdlr")
            if handler >= 4:
                yield from _boxes(file, place + handler - 4, stop, depth + 1)
        elif kind.isalnum() and kind not in _LEAVES:  # other types are numbers that only look like a box
            yield from _boxes(file, place, stop, depth + 1)
        start = stop


def _read(file: Any, place: int, num_bytes: int) -> bytes:
    file.seek(place)
    return bytes(file.read(num_bytes))


def _number(data: bytes, place: int, num_bytes: int = 4) -> int:
    return int.from_bytes(data[place : place + num_bytes], "big")


def _num_listed(kind: bytes, content: bytes) -> int:
    """Return the number of entries that a box outside the sample tables claims."""
    version = content[:1]
    if kind == b"iloc":
        return _number(content, 6, 4 if version == b"\2" else 2)
    if kind == b"iinf":
        return _number(content, 4, 2 if version == b"\0" else 4)
    return _number(content, 4)


def _count_compressed(content: bytes) -> int:
    """Return the number of entries that a compressed header claims."""
    num_bytes = _number(content, 0)
    if num_bytes > _MAX_HEADER_BYTES:
        raise BoxLimitError(f"its compressed header claims {num_bytes} bytes, more than {_MAX_HEADER_BYTES}")
    try:
        header = zlib.decompressobj().decompress(content[4:], _MAX_HEADER_BYTES)
    except zlib.error:
        return 0  # FFmpeg refuses it too
    return _count(io.BytesIO(header), 0, len(header), may_be_compressed=False)
