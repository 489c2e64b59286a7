"""Receive a video: from the body of a request, or by downloading the address in it."""

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ..video_download import (
    DownloadError,
    DownloadLimitError,
    DownloadTimeoutError,
    PrivateAddressError,
    download,
    redacted,
)
from .problems import Problem
from .serving_limits import ServingLimits


EXPECTED = (
    "Expected multipart/form-data with the file in the field 'video', as of `curl -F video=@clip.mp4`, or "
    'application/json {"url": "https://..."}.'
)
# Seconds before `min_upload_rate` holds, so that slow starts do not count.
_GRACE = 5.0
# Of everything but the file: an address, and the headers of a form.
_MOST_TEXT_BYTES = 16_384
_MOST_NAME_CHARACTERS = 255
# After a refusal, the rest of the body is read for this long: closing the connection earlier would lose the answer.
_DISCARDING_SECONDS = 2.0


class NamedFile:
    """A seekable binary file with a name for messages; FFmpeg also takes a hint at the format from it."""

    def __init__(self, file: Any, name: str):
        self.name = name
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def __enter__(self) -> "NamedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Video:
    """
    A video that was received: its name for answers and messages, and its file, which has no path.

    The operating system frees the file when it is closed, or when the process ends in whatever way.
    """

    name: str
    file: NamedFile

    @property
    def source(self) -> dict[str, Any]:
        """Return the video as an input of the processor."""
        return {"bytes": self.file, "path": self.name}


async def receive_video(request: Request, limits: ServingLimits, deadline: float) -> Video:
    """
    Return the video of a request.

    Args:
        deadline: see `time.monotonic`; for downloads. Callers cancel an upload.

    Raises:
        Problem: if the request has no video, or it is too large or too slow.
        ClientDisconnect: if the client left.
    """
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type == b"multipart/form-data" and options.get(b"boundary"):
        return await _uploaded(request, limits)
    if content_type == b"application/json":
        body = b"".join([chunk async for chunk in bounded(request, limits, _MOST_TEXT_BYTES)])
        return await _downloaded(_address_in(body), limits, deadline)
    given = request.headers.get("content-type")
    raise Problem(
        415, f"The content type is {given!r}. {EXPECTED}" if given else f"There is no content type. {EXPECTED}"
    )


async def bounded(request: Request, limits: ServingLimits, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a body. Raises Problem if it is too large or too slow."""
    promised = request.headers.get("content-length", "0")
    if promised.isdigit() and int(promised) > max_bytes:
        raise _too_large(f"{promised} bytes", max_bytes)
    begin, received = time.monotonic(), 0
    chunks = request.stream()
    request.state.has_leave = True  # to send its body
    while True:
        # When the average falls below the rate, unless a chunk comes before.
        patience = begin + _GRACE + received / limits.min_upload_rate - time.monotonic()
        try:
            with anyio.fail_after(max(0.0, patience)):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise Problem(
                408,
                f"After {time.monotonic() - begin:.0f} seconds, {received} bytes of the body have arrived: at least "
                f"{limits.min_upload_rate} per second are expected. Send a smaller file, or its address.",
            ) from None
        if chunk is None:
            return
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(f"more than {max_bytes} bytes", max_bytes)
        yield chunk


async def discard(request: Request) -> bool:
    """Read what a client still sends, for a moment, so that it gets to see the answer; return whether that was all."""
    if "expect" in request.headers and not hasattr(request.state, "has_leave"):
        return False  # it waits for leave to send the body
    with anyio.move_on_after(_DISCARDING_SECONDS):
        try:
            async for _ in request.stream():
                pass
        except (ClientDisconnect, RuntimeError):  # the latter: it was read to its end before
            pass
        return True
    return False


def _too_large(size: str, max_bytes: int) -> Problem:
    return Problem(413, f"The body has {size}, and at most {max_bytes} are accepted. Cut or compress the video.")


async def _uploaded(request: Request, limits: ServingLimits) -> Video:
    chunks = bounded(request, limits, limits.max_bytes)
    parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=1, max_part_size=_MOST_TEXT_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem(400, f"The form cannot be read: {error.message} {EXPECTED}") from None
    except OSError as error:
        raise Problem(507, f"The server has no room for the file ({error.strerror}). Try again later.") from error
    video = form.get("video")
    if not isinstance(video, UploadFile):
        await form.close()
        fields = ", ".join(repr(name[:80]) for name in form) or "none"
        raise Problem(422, f"The form has no file in the field 'video'; its fields: {fields}. {EXPECTED}")
    # Names are for people, and FFmpeg: no file is opened by them.
    name = (video.filename or "").replace("\\", "/").rpartition("/")[2] or "video"
    name = name[-_MOST_NAME_CHARACTERS:]
    return Video(name, NamedFile(video.file, name))


def _address_in(body: bytes) -> str:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(422, f"The body is not JSON. {EXPECTED}") from None
    if not isinstance(given, dict) or not isinstance(given.get("url"), str) or len(given) > 1:
        what = f"the fields {', '.join(map(repr, given))[:200]}" if isinstance(given, dict) else type(given).__name__
        raise Problem(422, f"The JSON has {what}, and needs one field, 'url', a text. {EXPECTED}")
    return given["url"]


async def _downloaded(address: str, limits: ServingLimits, deadline: float) -> Video:
    name = redacted(address)
    get = partial(
        download,
        address,
        limits.max_bytes,
        max(deadline - time.monotonic(), 1e-3),
        allow_private_addresses=limits.allow_private_addresses,
    )
    try:
        # The download ends with the deadline by itself, and says so: the deadline of the request, which is the same,
        # does not come before it. Its thread is not one of those that write uploads: slow servers would stop these.
        with anyio.CancelScope(shield=True):
            file = await anyio.to_thread.run_sync(get, limiter=anyio.CapacityLimiter(1))
    except PrivateAddressError:  # whose reason tells what the server's network looks like
        raise Problem(
            422, f"Cannot read {name}: it does not lead to a public address. Upload the file instead.", file=name
        ) from None
    except DownloadTimeoutError:
        text = f"Cannot read {name}: the download takes too long. Try again, or upload the file."
        raise Problem(504, text, file=name) from None
    except DownloadError as error:
        status = 413 if isinstance(error, DownloadLimitError) else 422
        raise Problem(status, f"Cannot read {name}: {error}.", file=name) from None
    except OSError as error:
        raise Problem(507, f"The server has no room for the file ({error.strerror}). Try again later.") from error
    return Video(name, NamedFile(file, name))
