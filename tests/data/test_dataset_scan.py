"""Test scanning of data sets: results for real files, and workers that crash or hang."""

import os
import signal
import threading
import time
from pathlib import Path

import av
import psutil
import pytest
from video_files import damage_packet, packet_places, write_kind, write_video

from vivit_hf.data.scan import VideoScan, find_videos, scan_file, scan_files


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    options = {"bf": "3", "x264-params": "scenecut=0"}
    return write_video(tmp_path_factory.mktemp("scan") / "video.mp4", num_frames=60, gop=20, options=options)


def test_sound_file_is_described(video):
    assert scan_file(video, min_frames=60) == VideoScan(
        path=str(video),
        status="ok",
        num_bytes=video.stat().st_size,
        num_frames=60,
        duration=pytest.approx(2.4),
        frames_per_second=pytest.approx(25),
        height=48,
        width=64,
        container="mov,mp4,m4a,3gp,3g2,mj2",
        codec="h264",
        pixel_format="yuv420p",
        rotation=0,
        is_variable_rate=False,
        is_short=False,
        num_rejected_packets=0,
        num_lost_frames=0,
        num_damaged_frames=0,
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("turned_90", {"rotation": 90, "height": 64, "width": 48}),
        ("turned_180", {"rotation": 180, "height": 48, "width": 64}),
        ("turned_270", {"rotation": 270, "height": 66, "width": 50}),
        ("h264_variable_rate", {"is_variable_rate": True, "num_frames": 30}),
        ("h264_one_frame", {"num_frames": 1, "is_short": True, "is_variable_rate": False}),
        ("hevc_10_bit", {"codec": "hevc", "pixel_format": "yuv420p10le", "is_variable_rate": False}),
    ],
)
def test_rotation_rate_length_and_codec_are_reported(kind, expected, tmp_path):
    scan = scan_file(write_kind(tmp_path, kind), min_frames=2)
    assert scan.status == "ok"
    assert {name: getattr(scan, name) for name in expected} == expected


def test_damage_is_found_by_decoding_but_not_from_packets(video, tmp_path):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(video.read_bytes())
    number = next(n for n, (_, _, _, is_key) in enumerate(packet_places(video)) if is_key and n > 0)
    damage_packet(path, number + 1)
    scan = scan_file(path)
    assert (scan.status, scan.num_frames, scan.num_rejected_packets, scan.num_lost_frames) == ("damaged", 60, 1, 1)
    assert "1 frames are lost" in scan.reason
    assert scan_file(path, packets_only=True).status == "ok"


def plain_outcome(path) -> tuple[int, bool]:
    """Decode a file past all errors; return the number of frames, and whether there was any damage."""
    num_frames, is_damaged = 0, False
    with av.open(str(path)) as container:
        try:
            for packet in container.demux(container.streams.video[0]):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    is_damaged = True
                    continue
                num_frames += len(frames)
                is_damaged = is_damaged or any(frame.is_corrupt for frame in frames)
        except av.FFmpegError:
            is_damaged = True
    return num_frames, is_damaged


@pytest.mark.parametrize("kind", ["h264_avi", "h264_raw", "h264_mkv", "h264_ts_late_start", "mpeg4_avi", "apng"])
def test_last_frame_of_a_truncated_file_is_counted(kind, tmp_path):
    path = write_kind(tmp_path, kind)
    _, position, size, _ = packet_places(path)[20]
    path.write_bytes(path.read_bytes()[: position + size // 2])
    num_frames, is_damaged = plain_outcome(path)
    scan = scan_file(path)
    assert scan.num_frames - scan.num_lost_frames == num_frames
    assert scan.status == ("damaged" if is_damaged else "ok")


def test_later_headers_do_not_hide_missing_ones(tmp_path):
    """Transport streams repeat the codec headers with each keyframe; this test erases the first ones."""
    path = write_kind(tmp_path, "h264_ts_late_start")
    data = bytearray(path.read_bytes())
    place, length = data.index(b"\0\0\1\x67") + 4, 20  # the sequence parameters
    data[place : place + length] = bytes(length)
    path.write_bytes(data)
    num_frames, is_damaged = plain_outcome(path)
    assert num_frames < 30 and is_damaged
    scan = scan_file(path)
    assert (scan.status, scan.num_frames - scan.num_lost_frames) == ("damaged", num_frames)


def test_damaged_packet_without_a_visible_frame_is_found(tmp_path):
    """Zero the first packet of a VP9 file; its header then means an update of a reference frame only."""
    path = write_video(tmp_path / "video.webm", codec="libvpx-vp9", options={"deadline": "realtime"}, gop=1)
    data = bytearray(path.read_bytes())
    place, length = data.index(b"\x49\x83\x42") - 2, 16  # before the sync code of the first keyframe
    data[place : place + length] = bytes(length)
    path.write_bytes(data)
    assert plain_outcome(path)[1]
    assert scan_file(path).status == "damaged"


def test_packets_refused_by_the_container_count_as_damage(tmp_path):
    """Break the checksum of an animated PNG chunk, so that none of its packets reaches the decoder."""
    path = write_kind(tmp_path, "apng")
    data = path.read_bytes()
    place = data.rindex(b"fcTL")
    path.write_bytes(data[: place - 4] + bytes(3) + b"\x01" + data[place:])
    assert plain_outcome(path)[1]
    assert scan_file(path).status == "damaged"


@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"not a video " * 99, "Invalid data")])
def test_unreadable_files_are_unusable(content, reason, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    scan = scan_file(path)
    assert scan.status == "unusable" and reason in scan.reason and scan.num_frames is None


def test_videos_are_found_in_folders(tmp_path):
    for name in ("b.MP4", "a/c.webm", "a/notes.txt", "a/.hidden.mp4", ".cache/d.mp4", "e.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.mkv").symlink_to(tmp_path / "e.dat")
    (tmp_path / "gone.mkv").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]
    assert found == ["a/c.webm", "b.MP4", "gone.mkv", "link.mkv"]
    assert [path.name for path in find_videos(tmp_path, ["dat"])] == ["e.dat"]
    with pytest.raises(OSError, match="nowhere"):
        find_videos(tmp_path / "nowhere")


def waiting_for(pipe: Path) -> list[psutil.Process]:
    """Return the worker processes that have opened a pipe."""
    return [process for process in psutil.Process().children(recursive=True) if _has_opened(process, pipe)]


def _has_opened(process: psutil.Process, path: Path) -> bool:
    try:
        return any(link.resolve() == path for link in Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:
        return False


def test_hanging_or_killed_worker_only_loses_its_file(video, tmp_path):
    # Reading a pipe without a writer blocks.
    os.mkfifo(tmp_path / "pipe.mp4")
    start = time.monotonic()
    paths = [video, tmp_path / "pipe.mp4", video, video]
    scans = list(scan_files(paths, num_workers=1, timeout=8))
    assert [scan.status for scan in scans] == ["ok", "unusable", "ok", "ok"]
    assert scans[1].reason == "it took longer than 8 seconds" and time.monotonic() - start < 60

    def kill_the_one_that_waits() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for process in waiting_for(tmp_path / "pipe.mp4"):
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_the_one_that_waits)
    thread.start()
    scans = list(scan_files(paths, num_workers=1, timeout=100))
    thread.join()
    assert [scan.status for scan in scans] == ["ok", "unusable", "ok", "ok"]
    assert scans[1].reason == "the decoder crashed (exit code -9)"


def test_closing_a_scan_ends_all_workers(video):
    before = psutil.Process().children()  # servers of other tests
    found = scan_files([video] * 50, num_workers=2)
    next(found)
    found.close()
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children() if process not in before]
    assert not [command for command in commands if "forkserver" not in command and "resource_tracker" not in command]
