"""Damaged files: lost frames are named or repeated, and every other frame is exact."""

from pathlib import Path

import numpy as np
import pytest
from video_files import damage_packet, packet_places, plain_decode, write_kind, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import DecodingReport, FramesChangedError, VideoDecodingError


def test_a_rejected_packet_costs_its_frame_and_no_other(video, tmp_path):
    expected = plain_decode(video)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(video.read_bytes())
    order = sorted(range(120), key=lambda number: packet_places(video)[number][0])
    lost = 50
    damage_packet(path, order[lost])
    with VideoReader(path) as reader:
        # Before the damage, and after the next keyframe (60), frames are what they were, under their own numbers.
        assert np.array_equal(reader.frames_at([0, 39, 60, 119]), expected[[0, 39, 60, 119]])
        with pytest.raises(VideoDecodingError, match=rf"damaged\.mp4: frame {lost} is lost.*119 of 120") as caught:
            reader.frames_at([lost])
        assert (caught.value.num_recovered, caught.value.num_frames) == (119, 120)
        repeated = reader.frames_at([lost - 1, lost], on_lost="repeat_last")
        assert np.array_equal(repeated[0], repeated[1])
        assert reader.num_frames == 120
        report = reader.report
        assert (report.num_rejected_packets, report.num_lost_frames, report.num_repeated_frames) == (1, 1, 1)


def test_what_may_show_damage_is_counted_and_logged(video, tmp_path, caplog):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(video.read_bytes())
    number = next(n for n, (_, _, _, is_key) in enumerate(packet_places(video)) if is_key and n > 0)
    damage_packet(path, number + 1)
    with VideoReader(path) as reader:
        reader.frames_at(range(20), on_lost="raise")
        assert reader.report.num_damaged_frames == 0
        reader.frames_at(range(20, 40), on_lost="repeat_last")
        # The whole group hangs on its first predicted frame: all of it but the keyframe and the lost frame.
        assert reader.report.num_damaged_frames == 18
        reader.frames_at(range(40, 60), on_lost="raise")
        assert reader.report.num_damaged_frames == 18
    assert "damaged.mp4 is damaged" in caplog.text


def test_verifying_decodes_everything_and_reports_all_damage(video, tmp_path):
    with VideoReader(video) as reader:
        assert reader.verify() == DecodingReport(str(video), num_frames=120)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(video.read_bytes())
    number = next(n for n, (_, _, _, is_key) in enumerate(packet_places(video)) if is_key and n > 0)
    damage_packet(path, number + 1)
    with VideoReader(path) as reader:
        report = reader.verify()
        assert (report.num_rejected_packets, report.num_lost_frames, report.num_damaged_frames) == (1, 1, 18)


@pytest.mark.parametrize("kind", ["h264_mkv", "h264_ts_late_start", "mpeg4_avi", "h264_fragmented", "gif", "vp9"])
def test_a_file_that_was_cut_off_gives_what_is_there(kind, folder, tmp_path):
    path = write_kind(folder, kind)
    expected = plain_decode(path)
    data = path.read_bytes()
    cut = tmp_path / path.name
    cut.write_bytes(data[: packet_places(path)[20][1] + 7])
    with VideoReader(cut) as reader:
        try:
            frames = reader.frames_at(range(reader.num_frames), on_lost="repeat_last")
        except FramesChangedError:
            frames = reader.frames_at(range(reader.num_frames), on_lost="repeat_last")
        assert 10 <= len(frames) <= 21
        assert np.array_equal(frames[:10], expected[:10])


def without_the_last_20(video, folder) -> Path:
    """A file whose last packets are zeros, so that 100 of its 120 frames can be decoded."""
    data = video.read_bytes()
    path = folder / "tail.mp4"
    start = min(position for _, position, _, _ in packet_places(video)[100:])
    end = max(position + size for _, position, size, _ in packet_places(video)[100:])
    path.write_bytes(data[:start] + bytes(end - start) + data[end:])
    return path


@pytest.mark.parametrize("on_lost", ["raise", "repeat_last"])
def test_a_file_with_fewer_frames_than_promised_asks_once_to_choose_again(on_lost, video, tmp_path):
    expected = plain_decode(video)
    with VideoReader(without_the_last_20(video, tmp_path)) as reader:
        assert reader.num_frames == 120
        with pytest.raises(FramesChangedError, match="only 100 of its 120 frames can be decoded; choose frames again"):
            reader.frames_at([3, 116], on_lost=on_lost)
        assert reader.num_frames == len(reader.timestamps) == reader.report.num_frames == 100
        assert np.array_equal(reader.frames_at([3, -1], on_lost=on_lost), expected[[3, 99]])


def test_a_clip_is_laid_into_the_frames_that_can_be_decoded(video, tmp_path):
    processor = ViViTVideoProcessor(num_frames=4, frame_stride=8, num_clips=2, size=16, crop_size=16)
    damaged = processor(without_the_last_20(video, tmp_path))["pixel_values"]
    expected = processor(plain_decode(video)[:100])["pixel_values"]
    assert (damaged - expected).abs().mean() < 0.02  # the scalers of files and of arrays differ
    assert (damaged - processor(video)["pixel_values"]).abs().mean() > 0.1


def test_a_stream_ends_where_the_frames_do(video, tmp_path):
    path = without_the_last_20(video, tmp_path)
    expected = plain_decode(video)
    with VideoReader(path) as reader:
        frames = [frame for _, frame in reader.stream(range(90, 120))]
        assert np.array_equal(frames, expected[90:100])
    for indices, on_lost in ((range(101, 120), "repeat_last"), (range(120), "raise")):
        with VideoReader(path) as reader, pytest.raises(FramesChangedError, match="only 100 of its 120"):
            list(reader.stream(indices, on_lost=on_lost))


def test_verifying_counts_the_frames_that_are_there(video, tmp_path):
    with VideoReader(without_the_last_20(video, tmp_path)) as reader:
        report = reader.verify()
        assert (report.num_frames, reader.num_frames, report.num_rejected_packets) == (100, 100, 20)


@pytest.mark.parametrize("num_frames", [1, 30])
def test_a_file_without_a_frame_that_can_be_decoded_is_refused_when_it_is_opened(num_frames, tmp_path):
    """Its packets are in order, but hold no pictures, like those of an encrypted file."""
    path = write_video(tmp_path / "video.mp4", num_frames=num_frames)
    data = bytearray(path.read_bytes())
    for _, position, size, _ in packet_places(path):
        data[position : position + size] = np.random.default_rng(0).bytes(size)
    for open_it in (VideoReader, ViViTVideoProcessor(num_frames=2, size=16, crop_size=16)):
        with pytest.raises(VideoDecodingError, match="no frame of it can be decoded"):
            open_it(bytes(data))


def test_mutated_files_end_in_frames_or_in_a_named_error(folder):
    sources = [
        write_kind(folder, kind).read_bytes() for kind in ("h264_b_frames", "h264_mkv", "vp9", "mpeg4_avi", "gif")
    ]
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for number in range(150):
        data = bytearray(sources[number % len(sources)])
        if number % 3 == 0:
            del data[rng.integers(len(data)) :]
        else:
            for place in rng.integers(0, len(data) if number % 3 == 1 else 1500, size=12):
                data[place] = rng.integers(256)
        try:
            with VideoReader(bytes(data)) as reader:
                frames = reader.frames_at([0, -1], size=lambda *_: (16, 16), on_lost="repeat_last")
            assert frames.shape == (2, 16, 16, 3)
            outcomes["read"] += 1
        except VideoDecodingError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
