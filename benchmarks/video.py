"""
From a video file to `pixel_values`: time and memory against the decoder alone and against other packages.

    python benchmarks/video.py [--videos FOLDER] [--json FILE] [--rounds N] [--smoke]

FOLDER holds the videos to measure on; those with fewer than 64 frames are left out. Without it the script writes three
of its own: H.264 with B-frames at 340 x 256 and 320 x 180, and AV1 at 640 x 360.

Every ratio is taken within one run, the jobs taking turns; the figure is the median over the rounds. Decoding alone
(PyAV with its defaults, from opening the file to the last frame that the clip needs, nothing converted) is the floor
that no reader of the same frames gets under by much. Decord is measured where it is installed and reads the file:
pip install decord.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from measuring import Row, at_least, at_most, file_to_write, interleaved_seconds, median_ratio, report

from vivit_hf import ViViTVideoProcessor
from vivit_hf.frame_sampling import centre_crop, resized_size, sample_clips
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_frames import resize_frames


NUM_FRAMES, STRIDE = 32, 2
MIN_FRAMES = NUM_FRAMES * STRIDE
SIZE, CROP = {"shortest_edge": 256}, 224
FPS, LONG_SECONDS, KEYFRAME_SECONDS = 25, 600, 2

FLOOR_TARGET = 1.8
TRANSFORMERS_TARGET = 1.7
DECORD_TARGET = 1.0
VIEWS_TARGET = 1.0
SPARSE_TARGET = 5.0
MEMORY_TARGET = 300.0


# Videos


def pattern(num_frames: int, height: int, width: int, start: int = 0) -> np.ndarray:
    """uint8 RGB (num_frames, height, width, 3): a soft texture that drifts, with a little noise, as films have."""
    random = np.random.default_rng(start)
    row, column = np.mgrid[:height, :width]
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for number, frame in enumerate(frames, start=start):
        waves = [np.sin(column / (9 + c) + number / 5) + np.cos(row / (13 - c) - number / 7) for c in range(3)]
        frame[:] = 128 + 50 * np.stack(waves, axis=-1) + random.normal(0, 4, (height, width, 1))
    return frames


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", options: dict[str, str] | None = None) -> Path:
    options = {"preset": "fast", "bf": "3", "x264-params": "mbtree=0"} if options is None else options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # As root the encoder makes its caller a real-time process, which would distort what is measured.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_videos(folder: Path) -> list[Path]:
    return [
        encode(folder / "h264_340x256.mp4", pattern(280, 256, 340)),
        encode(folder / "h264_320x180.mp4", pattern(325, 180, 320)),
        encode(folder / "av1_640x360.mkv", pattern(125, 360, 640), "libsvtav1", {"preset": "10"}),
    ]


def write_long_video(path: Path, height: int, width: int) -> Path:
    """Ten minutes with a keyframe every two seconds: one closed group of pictures, encoded once and repeated."""
    num_frames = FPS * KEYFRAME_SECONDS
    params = f"mbtree=0:keyint={num_frames}:min-keyint={num_frames}:scenecut=0:open-gop=0"
    group = encode(
        path.with_suffix(".group.mp4"),
        pattern(num_frames, height, width),
        options={"preset": "veryfast", "bf": "3", "x264-params": params},
    )
    with av.open(str(path), "w") as output:
        target: Any = None
        for repeat in range(LONG_SECONDS // KEYFRAME_SECONDS):
            with av.open(str(group)) as source:
                stream = source.streams.video[0]
                target = target or output.add_stream_from_template(stream)
                shift = round(repeat * KEYFRAME_SECONDS / stream.time_base)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = target
                        output.mux(packet)
    group.unlink()
    return path


# Jobs


def decode_through(path: Path, last: int | None = None) -> int:
    """Decodes up to frame `last` (None: to the end) and converts nothing."""
    count = 0
    with av.open(str(path)) as container:
        for index, _ in enumerate(container.decode(video=0)):
            count += 1
            if index == last:
                break
    return count


def with_transformers(path: Path, indices: np.ndarray, processor: Any) -> Any:
    from transformers.pipelines.video_classification import read_video_pyav

    with av.open(str(path)) as container:
        frames = read_video_pyav(container, indices)
    return processor(list(frames), return_tensors="pt")["pixel_values"]


def with_decord(
    path: Path, indices: np.ndarray, processor: ViViTVideoProcessor, size: tuple[int, int], scaled_by_decord: bool
) -> Any:
    import decord

    sizes = {"height": size[0], "width": size[1]} if scaled_by_decord else {}
    frames = decord.VideoReader(str(path), **sizes).get_batch(indices).asnumpy()
    frames = resize_frames(frames, size, processor.resample)  # changes nothing after decord's own scaling
    top, left, _, _ = centre_crop(*frames.shape[1:3], CROP, CROP)
    crop = frames[:, top : top + CROP, left : left + CROP]
    return processor(crop, do_sample_frames=False, do_resize=False, do_center_crop=False)["pixel_values"]


# Figures


def clip_rows(path: Path, rounds: int) -> list[Row]:
    """One clip of a short video, and its twelve views."""
    from transformers import VivitImageProcessor

    processor = ViViTVideoProcessor(num_frames=NUM_FRAMES, frame_stride=STRIDE, size=SIZE, crop_size=CROP)
    transformers_processor = VivitImageProcessor()
    with VideoReader(path) as video:
        total = video.num_frames
        new_size = resized_size(*video.frames_at([0]).shape[1:3], SIZE)
    indices = sample_clips(total, NUM_FRAMES, STRIDE)[0]
    jobs: dict[str, Callable[[], Any]] = {
        "floor": partial(decode_through, path, int(indices[-1])),
        "ours": partial(processor, path),
        "transformers": partial(with_transformers, path, indices, transformers_processor),
        "views": partial(processor, path, num_clips=4, num_crops=3),
        "whole": partial(decode_through, path),
    }
    for job, scaled_by_decord in (("decord", False), ("decord, scaling by itself", True)):
        run = partial(with_decord, path, indices, processor, new_size, scaled_by_decord)
        if decord_reads(path.name, run):
            jobs[job] = run
    seconds = interleaved_seconds(jobs, rounds)
    name, ours = path.name, seconds["ours"]
    limit = [2 * one + whole for one, whole in zip(ours, seconds["whole"], strict=True)]
    return [
        at_most(f"{name}: file to pixel_values", 1e3 * statistics.median(ours), "ms", None),
        at_most(f"{name}: time over decoding alone", median_ratio(ours, seconds["floor"]), "x", FLOOR_TARGET),
        at_least(
            f"{name}: speed over transformers' read_video_pyav and VivitImageProcessor",
            median_ratio(seconds["transformers"], ours),
            "x",
            TRANSFORMERS_TARGET,
        ),
        *(
            at_least(f"{name}: speed over {job}", median_ratio(seconds[job], ours), "x", DECORD_TARGET)
            for job in jobs
            if job.startswith("decord")
        ),
        at_most(f"{name}: time of 4 x 3 views over one", median_ratio(seconds["views"], ours), "x", None),
        at_most(
            f"{name}: time of 4 x 3 views over twice one view plus one whole decode",
            median_ratio(seconds["views"], limit),
            "x",
            VIEWS_TARGET,
        ),
    ]


def decord_reads(name: str, run: Callable[[], Any]) -> bool:
    if importlib.util.find_spec("decord") is None:
        print("decord is not installed: not measured", file=sys.stderr)
        return False
    try:
        run()
    except Exception as error:  # decord has its own class of error, and others for other files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"decord does not read {name}: {reason}", file=sys.stderr)
        return False
    return True


def sparse_row(folder: Path, rounds: int, size: tuple[int, int]) -> Row:
    path = write_long_video(folder / "ten_minutes.mp4", *size)
    processor = ViViTVideoProcessor(num_frames=NUM_FRAMES, frame_sampling="uniform")
    seconds = interleaved_seconds(
        {"sparse": partial(processor, path), "through": partial(decode_through, path)}, max(1, min(rounds, 3))
    )
    ratio = median_ratio(seconds["through"], seconds["sparse"])
    return at_least(
        f"10 minutes of {size[1]} x {size[0]}, 32 frames over all of it: speed over decoding through",
        ratio,
        "x",
        SPARSE_TARGET,
    )


def memory_row(folder: Path, size: tuple[int, int]) -> Row:
    """How far the peak memory of a fresh process grows by one long file, after a short one."""
    short = encode(folder / "short.mp4", pattern(MIN_FRAMES, 180, 320))
    path = write_long_video(folder / "ten_minutes_for_memory.mp4", *size)
    code = """
import resource, sys
from pathlib import Path
from vivit_hf import ViViTVideoProcessor

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

processor = ViViTVideoProcessor(frame_sampling="uniform")
processor(sys.argv[1])
before = peak()
processor(sys.argv[2])
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(short), str(path)]
    plain = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout)
    return at_most(
        f"10 minutes of {size[1]} x {size[0]}, 32 frames over all of it: growth of peak memory",
        grown,
        "MB",
        MEMORY_TARGET,
    )


# Twelve views are 231 MB. What glibc gives back after every call comes back page by page, on a virtual machine from the
# host, at a cost that varies and swamps the rest; so the process keeps the memory that it has, for all jobs alike.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--videos", metavar="FOLDER", type=Path, help="measure on the videos in this folder")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="also write the rows to this file")
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--smoke", action="store_true", help="long videos of 160 x 90: to see that it runs")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_videos(folder) if args.videos is None else long_enough(args.videos, parser)
        rows = []
        for path in paths:
            print(f"measuring {path.name}", file=sys.stderr)
            rows += clip_rows(path, args.rounds)
        print("measuring ten minutes of video", file=sys.stderr)
        sparse, large = ((90, 160), (90, 160)) if args.smoke else ((360, 640), (1080, 1920))
        rows += [sparse_row(folder, args.rounds, sparse), memory_row(folder, large)]
    return report(rows, args.json)


def long_enough(folder: Path, parser: argparse.ArgumentParser) -> list[Path]:
    """The videos in a folder that a whole clip fits into."""
    if not folder.is_dir():
        parser.error(f"--videos: there is no folder {folder}")
    paths = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".mp4", ".mkv", ".mov", ".webm", ".avi"):
            with VideoReader(path) as video:
                if video.num_frames >= MIN_FRAMES:
                    paths.append(path)
    if not paths:
        parser.error(f"--videos: {folder} has no video of at least {MIN_FRAMES} frames")
    return paths


if __name__ == "__main__":
    if sys.platform == "linux" and not KEEP_MEMORY.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    sys.exit(main())
