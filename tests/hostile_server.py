"""HTTP servers that behave as a test wants, for tests/security."""

import contextlib
import socket
import threading
import time

import pytest

from vivit_hf import VideoReader
from vivit_hf.video_sources import VideoDecodingError, VideoLimits


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Server:
    """Has `answer`, a function of a connection and the head of a request, treat whoever connects."""

    def __init__(self, answer, host="127.0.0.1", wrap=None):
        self.answer, self.wrap = answer, wrap
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.all_closed = threading.Event()  # once the other side has hung up
        self.socket = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.socket.getsockname()[1]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.socket.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.num_connections += 1
                threading.Thread(target=self._treat, args=(connection,), daemon=True).start()

    def _treat(self, connection):
        with contextlib.suppress(OSError), connection:
            if self.wrap is not None:
                connection = self.wrap(connection)
            head = b""
            while self.answer is not None and not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            self.requests.append(head)
            with contextlib.suppress(OSError):
                if self.answer is not None:
                    self.answer(connection, head)
                connection.shutdown(socket.SHUT_WR) if self.answer is not None else None
            while connection.recv(4096):
                pass
        self.all_closed.set()


def says(*parts):
    """The same bytes to everybody."""

    def answer(connection, _):
        for part in parts:
            connection.sendall(part)

    return answer


def drips(start, byte, pause=0.05):
    """`start` at once, then `byte` for ever, slowly."""

    def answer(connection, _):
        connection.sendall(start)
        while True:
            connection.sendall(byte)
            time.sleep(pause)

    return answer


def redirects(location, status=302, pause=0.0):
    def answer(connection, _):
        time.sleep(pause)
        connection.sendall(
            b"HTTP/1.1 %d Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, location.encode())
        )

    return answer


def limits(**others):
    return VideoLimits(allow_private_addresses=True, **{"download_timeout": 10.0, **others})


def error_of(address, **others):
    with pytest.raises(VideoDecodingError) as caught:
        VideoReader(address, limits=limits(**others))
    return caught.value
