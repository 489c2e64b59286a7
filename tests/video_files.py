"""Writes small video files of every kind that the tests need, and damages them."""

import io
import os
import struct
import threading
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter


os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder prints a page of settings otherwise

# libswscale's BILINEAR | ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP
EXACT = 0x2 | 0x40000 | 0x2000 | 0x4000

# name -> (file name, arguments of write_video): each a different way of being difficult.
KINDS = {
    "h264_b_frames": ("h264.mp4", {"options": {"bf": "3"}}),
    "h264_open_gop": ("open.mp4", {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=8:scenecut=0"}}),
    "h264_intra_refresh": ("refresh.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=8"}}),
    "h264_mkv": ("h264.mkv", {"options": {"bf": "2"}}),
    "h264_mov": ("h264.mov", {"options": {"bf": "2"}}),
    "h264_avi": ("h264.avi", {"options": {"bf": "2"}}),
    "h264_ts_late_start": ("late.ts", {"options": {"bf": "2"}, "pts": [3000 + 40 * i for i in range(30)]}),
    "h264_fragmented": ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264_raw": ("raw.h264", {"options": {"bf": "2"}}),
    "h264_variable_rate": ("variable.mp4", {"pts": np.cumsum(np.arange(30) % 7 * 13 + 11), "options": {"bf": "2"}}),
    "h264_odd_size": ("odd.mkv", {"pix_fmt": "yuv444p", "height": 51, "width": 67}),
    "h264_one_frame": ("one.mp4", {"num_frames": 1}),
    "hevc": ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "keyint=8:log-level=none"}}),
    "hevc_10_bit": (
        "hevc10.mkv",
        {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "keyint=8:log-level=none"}},
    ),
    "av1": ("av1.mkv", {"codec": "libsvtav1", "options": {"preset": "12"}, "height": 64, "width": 96}),
    "av1_mp4": ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "12"}, "height": 64, "width": 96}),
    "hevc_ts": ("hevc.ts", {"codec": "libx265", "options": {"x265-params": "keyint=8:bframes=3:log-level=none"}}),
    "h264_10_bit": ("h264_10.mp4", {"pix_fmt": "yuv420p10le", "options": {"bf": "2"}}),
    "turned_90": ("turned_90.mp4", {"options": {"bf": "2"}, "degrees_clockwise": 90}),
    "turned_180": ("turned_180.mp4", {"options": {"bf": "2"}, "degrees_clockwise": 180}),
    "turned_270": ("turned_270.mp4", {"options": {"bf": "2"}, "degrees_clockwise": 270, "height": 50, "width": 66}),
    "vp9_odd_size": (
        "vp9_odd.webm",
        {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}, "height": 51, "width": 67},
    ),
    "vp9": ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "lag-in-frames": "8"}}),
    "mpeg4_avi": ("mpeg4.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "gif": ("small.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    "apng": ("small.apng", {"codec": "apng", "pix_fmt": "rgba"}),
    "alpha": ("alpha.mov", {"codec": "qtrle", "pix_fmt": "argb"}),
    "grey": ("grey.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
}


def moving_frames(num_frames: int = 30, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 RGB (num_frames, height, width, 3): a smooth coloured pattern that moves; no two frames are alike."""
    time, row, column = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    red = 127 + 120 * np.sin(column / 9 + time / 3)
    green = 127 + 120 * np.sin(row / 7 - time / 5)
    blue = (row + column + 5 * time) % 256
    frames = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    frames[:, :8, :8] = ((np.arange(num_frames) * 7) % 256)[:, None, None, None]
    return frames


def write_video(
    path,
    frames=None,
    *,
    num_frames=30,
    height=48,
    width=64,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    container_options=None,
    pts=None,
    rate=25,
    gop=8,
    color_range=None,
):
    """Writes `frames` (default: `moving_frames`) to `path`. `pts` are in milliseconds."""
    frames = moving_frames(num_frames, height, width) if frames is None else frames
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        if color_range is not None:
            stream.codec_context.color_range = color_range
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        reformatter = VideoReformatter()
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if color_range is not None:
                frame = reformatter.reformat(frame, format=pix_fmt, dst_color_range=color_range, interpolation=EXACT)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # As root the encoder makes its caller a real-time process of the highest priority, and children inherit that.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return Path(path)


def write_kind(folder, kind: str) -> Path:
    name, arguments = KINDS[kind]
    arguments = dict(arguments)
    degrees_clockwise = arguments.pop("degrees_clockwise", 0)
    path = write_video(Path(folder) / name, **arguments)
    return set_rotation(path, degrees_clockwise) if degrees_clockwise else path


def plain_decode(source) -> np.ndarray:
    """Every frame of a file, from beginning to end, the plain way: uint8 RGB, upright."""
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack(
            [
                np.rot90(
                    reformatter.reformat(frame, format="rgb24", interpolation=EXACT).to_ndarray(),
                    round(frame.rotation / 90) % 4,
                )
                for frame in container.decode(video=0)
            ]
        )


def set_rotation(path, degrees_clockwise: int) -> Path:
    """Writes a rotation into the track header of an mp4 file."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_clockwise]
    return set_matrix(path, cos, sin, -sin, cos)


def set_matrix(path, a: int, b: int, c: int, d: int) -> Path:
    """Writes into the track header of an mp4 file that pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(Path(path).read_bytes())
    start = data.index(b"tkhd") + 44  # version, times, track, duration, layer, volume come before the matrix
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], dtype=">i4")
    data[start : start + 36] = matrix.tobytes()
    Path(path).write_bytes(data)
    return Path(path)


def packet_places(path) -> list[tuple[int, int, int, bool]]:
    """(pts, byte position, size, is keyframe) of each video packet."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(packet.pts, packet.pos, packet.size, packet.is_keyframe) for packet in packets]


def damage_packet(path, number: int) -> int:
    """Overwrites packet `number` of a file with zeros; returns its pts."""
    pts, position, size, _ = packet_places(path)[number]
    data = bytearray(Path(path).read_bytes())
    data[position : position + size] = bytes(size)
    Path(path).write_bytes(data)
    return pts


def large_gif(num_frames: int, height: int, width: int) -> bytes:
    """A canvas of which each frame changes one pixel."""
    frame = b"\x21\xf9\x04\x00\x04\x00\x00\x00" + b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0)
    frame += b"\x02\x02\x44\x01\x00"
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return header + frame * num_frames + b"\x3b"


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        return


@contextmanager
def http_server(folder):
    """Serves a folder on this machine; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
