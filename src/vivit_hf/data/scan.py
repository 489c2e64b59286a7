"""Scan a data set of videos before training for files that are damaged, short, rotated or of variable rate."""

import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..video_decoding import VideoReader
from ..video_sources import VideoDecodingError


VIDEO_EXTENSIONS = tuple(
    "3gp asf avi flv gif h264 h265 hevc m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv y4m".split()
)
# Timestamps are rounded to the clock of the container, often milliseconds: a step may differ by one tick and more.
_VARIABLE_RATE_TOLERANCE = 0.25


@dataclass
class VideoScan:
    """The result of scanning one file.

    `status` is "ok", "damaged" (it can be read; `reason` tells what is lost) or "unusable" (`reason` tells why).
    `duration` is in seconds, from the first frame to the end of the last; `frames_per_second` is the average rate;
    `height` and `width` are upright, in pixels; `rotation` is the one that is stored in the file, in degrees clockwise.
    `is_variable_rate`: the distances of frames differ by more than a quarter. `is_short`: fewer frames than
    `min_frames`. Fields that could not be determined are None.
    """

    path: str
    status: str
    reason: str | None = None
    num_bytes: int | None = None
    num_frames: int | None = None
    duration: float | None = None
    frames_per_second: float | None = None
    height: int | None = None
    width: int | None = None
    container: str | None = None
    codec: str | None = None
    pixel_format: str | None = None
    rotation: int | None = None
    is_variable_rate: bool | None = None
    is_short: bool | None = None
    num_rejected_packets: int | None = None
    num_lost_frames: int | None = None
    num_damaged_frames: int | None = None


def find_videos(folder: str | os.PathLike[str], extensions: Iterable[str] = VIDEO_EXTENSIONS) -> list[Path]:
    """Return the regular video files in a folder and its subfolders, sorted, without hidden ones.

    Links to files and folders are followed, each folder once. Raises OSError for a folder that cannot be listed.
    """
    endings = {"." + extension.lower().removeprefix(".") for extension in extensions}

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in seen
        ]
        paths = (Path(root, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in endings and _is_regular(path)]
    return sorted(found)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # a broken link or no permission: scanning it gives the reason


def scan_file(path: str | os.PathLike[str], *, min_frames: int = 1, packets_only: bool = False) -> VideoScan:
    """Scan one file in this process. `packets_only` decodes one frame instead of all."""
    scan = VideoScan(os.fsdecode(path), "ok")
    try:
        scan.num_bytes = os.stat(path).st_size
        with VideoReader(path, num_threads=1) as reader:
            for name, value in reader.describe().items():
                setattr(scan, name, value)
            report = reader.report if packets_only else reader.verify()
            steps = np.diff(reader.timestamps)
            scan.num_frames = reader.num_frames
    except (VideoDecodingError, OSError) as error:
        scan.status, scan.reason = "unusable", getattr(error, "reason", None) or str(error)
        return scan
    typical = float(np.median(steps)) if len(steps) else 0.0
    scan.duration = float(steps.sum()) + typical
    scan.frames_per_second = scan.num_frames / scan.duration if scan.duration > 0 else None
    scan.is_variable_rate = bool(np.any(np.abs(steps - typical) > _VARIABLE_RATE_TOLERANCE * typical))
    scan.is_short = scan.num_frames < min_frames
    scan.num_rejected_packets, scan.num_lost_frames = report.num_rejected_packets, report.num_lost_frames
    scan.num_damaged_frames = report.num_damaged_frames
    if scan.num_rejected_packets or scan.num_lost_frames or scan.num_damaged_frames:
        scan.status = "damaged"
        scan.reason = (
            f"{scan.num_rejected_packets} packets are rejected, {scan.num_lost_frames} frames are lost, "
            f"{scan.num_damaged_frames} may show damage"
        )
    return scan


def _work(connection: Connection, min_frames: int, packets_only: bool) -> None:
    """Scan files received over the connection until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    try:
        while (path := connection.recv()) is not None:
            connection.send(scan_file(path, min_frames=min_frames, packets_only=packets_only))
    except (EOFError, OSError):
        return


class _Worker:
    def __init__(self, context: Any, *arguments: Any):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.path: Path | None = None
        self.deadline = float("inf")

    def give(self, path: Path, timeout: float) -> None:
        self.path, self.deadline = path, time.monotonic() + timeout
        self.connection.send(str(path))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def scan_files(
    paths: Iterable[str | os.PathLike[str]],
    *,
    min_frames: int = 1,
    packets_only: bool = False,
    num_workers: int | None = None,
    timeout: float = 120.0,
) -> Iterator[VideoScan]:
    """Scan files in `num_workers` processes (None: one per core) and yield a `VideoScan` as each is done.

    A worker that crashes, or that has no result after `timeout` seconds, makes its file unusable and is replaced.
    """
    waiting = [Path(path) for path in paths][::-1]
    # Packages are imported once, in the server that workers are forked from.
    is_forked = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if is_forked else "spawn")
    if is_forked:
        context.set_forkserver_preload([__name__])
    workers: list[_Worker] = []
    count = min(num_workers or os.cpu_count() or 1, len(waiting))
    try:
        while waiting or any(worker.path is not None for worker in workers):
            while waiting and len(workers) < count:
                workers.append(_Worker(context, min_frames, packets_only))
            for worker in workers:
                if worker.path is None and waiting:
                    worker.give(waiting.pop(), timeout)
            busy = [worker for worker in workers if worker.path is not None]
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            patience = min(patience, 86400.0)  # `wait` does not accept infinity
            ready = wait([worker.connection for worker in busy], timeout=patience)
            for worker in busy:
                scan = None
                if worker.connection in ready:
                    try:
                        scan = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        code = worker.process.exitcode
                        scan = VideoScan(str(worker.path), "unusable", f"the decoder crashed (exit code {code})")
                elif time.monotonic() >= worker.deadline:
                    scan = VideoScan(str(worker.path), "unusable", f"it took longer than {timeout:g} seconds")
                if scan is None:
                    continue
                if worker.connection not in ready or not worker.process.is_alive():
                    worker.end()
                    workers.remove(worker)
                worker.path = None
                yield scan
    finally:
        for worker in workers:
            worker.end()
