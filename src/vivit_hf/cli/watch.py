"""`vivit-hf watch`: what happens in a live video, as it happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from ..data.escaping import counted
from . import options
from .output import echo, echo_json, read_from, say, video_errors


LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "udp", "tcp", "srt")


def is_live(video: str) -> bool:
    """Return whether an address is one that only `watch` can read."""
    return video.split("://")[0].lower() in LIVE_SCHEMES


def watch(
    video: Annotated[
        str,
        typer.Argument(metavar="VIDEO", help="A camera, a stream (rtsp://, udp:// ...), or - for standard input."),
    ],
    model: options.Model = None,
    hop: options.Hop = None,
    unchanged_threshold: options.UnchangedThreshold = 0.0,
    min_score: options.MinScore = 0.0,
    min_duration: options.MinDuration = None,
    windows: options.Windows = False,
    source_format: Annotated[
        str | None, typer.Option("--format", help="FFmpeg's name for the format of the source, such as v4l2.")
    ] = None,
    policy: Annotated[
        Literal["drop_oldest", "wait"] | None,
        typer.Option(
            help="What to do with frames that arrive faster than they are classified.",
            show_default="wait for -, else drop_oldest",
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.AnswersDtype = None,
    as_json: options.Json = False,
) -> None:
    """
    Say what happens in a live video: a camera, a network stream, or a pipe without an end.

    The source is read once, as it arrives, and each segment is printed once it has ended: start and end in seconds from
    the first frame, score, label. See timeline for segments. At the end, the frames received and dropped are counted.
    Only watch addresses that you trust: FFmpeg opens them without the checks of downloads.

    With --json, print one line per segment: {"start", "end", "label", "score"}, in seconds. Exit code 0: the source has
    ended; 1: it broke off (the reason is on standard error); 2: wrong usage; 130: interrupted.

    Example: ffmpeg -i talk.mkv -f mpegts - | vivit-hf watch - --model my_vivit
    """
    from ..inference.timeline import stream_live

    options.check_windows(windows, min_score, min_duration)
    classifier, processor = options.load(model, device, dtype)
    stream = options.stream_of(video, classifier, processor, hop, unchanged_threshold)
    with _opened(video, source_format, policy, stream) as source:
        found = stream_live(stream, source)
        for one in read_from(video, options.segments_of(found, classifier.config, windows, min_score, min_duration)):
            if as_json:
                echo_json(options.as_row(one))
            else:
                echo(f"{one.start:10.2f} {one.end:10.2f}  {one.score:.3f}  {one.label}")


@contextmanager
def _opened(video: str, source_format: str | None, policy: str | None, stream: Any) -> Iterator[Any]:
    """Open a live source; at the end, close it and report how many frames it sent and how many steps were reused."""
    from ..inference.live_video import LiveVideo
    from ..video_processing_vivit import reader_size

    with video_errors(video):
        source: Any = video
        if video == "-":
            source = options.standard_input_file()
            source.peek(1)  # wait in Python, which can be interrupted, and not in FFmpeg, which cannot
        policy = policy or ("wait" if video == "-" else "drop_oldest")
        opened = LiveVideo(source, format=source_format, policy=policy, size=reader_size(stream.processor))
    try:
        yield opened
    finally:
        opened.close()
        say(f"{counted(opened.num_received, 'frame')} received, {opened.num_dropped} dropped.")
        options.say_reuse(stream.reuse)
