"""Hostile servers: no download waits too long, grows too large or goes where it must not."""

import contextlib
import ipaddress
import os
import socket
import ssl
import threading
import time
from unittest.mock import patch

import pytest
from hostile_server import CHUNKED, OK, Server, drips, error_of, limits, redirects, says
from paths import FIXTURES
from video_files import write_video

from vivit_hf import VideoReader, video_download
from vivit_hf.video_download import MAX_REDIRECTS, is_public
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError


CERTIFICATE = FIXTURES / "localhost.pem"


@pytest.fixture(scope="module")
def video_bytes(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=8).read_bytes()


@pytest.fixture
def only_first_is_public(monkeypatch):
    """Takes 127.0.0.1 for an address of the internet, and the rest of the loopback network for private."""
    monkeypatch.setattr(video_download, "is_public", lambda ip: str(ip) == "127.0.0.1")


# Time

SLOW = {
    "says nothing": None,
    "status line": drips(b"", b"H"),
    "headers": drips(OK, b"X"),
    "header lines": drips(OK, b"A: b\r\n"),
    "continue": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": drips(OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "body without an end": drips(OK + b"\r\n", b"x"),
    "chunks": drips(CHUNKED, b"1\r\nx\r\n"),
    "size of a chunk": drips(CHUNKED, b"0"),
    "extension of a chunk": drips(CHUNKED + b"5;", b"x"),
    "trailers": drips(CHUNKED + b"0\r\n", b"A: b\r\n"),
    "body at full speed": drips(OK + b"\r\n", b"x" * 100, pause=0.0),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_server_is_given_up_in_time_and_leaves_nothing_behind(name):
    files = set(os.listdir("/proc/self/fd"))
    with Server(SLOW[name]) as server:
        threads = set(threading.enumerate())
        begin = time.monotonic()
        error = error_of(f"{server.address}/video.mp4", download_timeout=0.5)
        assert time.monotonic() - begin < 3
        assert type(error) is VideoLimitError and "it took longer than download_timeout=0.5 seconds" in str(error)
        assert server.all_closed.wait(3)
        started = {thread.name for thread in set(threading.enumerate()) - threads}
        assert not any("looking up" in name for name in started)
    time.sleep(0.05)
    assert len(set(os.listdir("/proc/self/fd")) - files) == 0


def test_redirects_share_one_deadline():
    with Server(redirects("/again", pause=0.15)) as server:
        begin = time.monotonic()
        error = error_of(server.address, download_timeout=0.5)
        assert time.monotonic() - begin < 3 and "download_timeout=0.5" in str(error)
        assert 2 <= server.num_connections <= 4


def test_a_host_that_does_not_take_connections_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as waiting:
        address = server.getsockname()
        for _ in range(4):  # until the queue is full, and the system leaves further ones without an answer
            other = waiting.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(address)
        begin = time.monotonic()
        error = error_of(f"http://127.0.0.1:{address[1]}/", download_timeout=0.5)
        assert 0.4 < time.monotonic() - begin < 3 and "download_timeout=0.5" in str(error)


def test_a_tls_handshake_without_an_answer_is_given_up_in_time():
    with Server(None) as server:
        begin = time.monotonic()
        error = error_of(server.address.replace("http", "https"), download_timeout=0.5)
        assert time.monotonic() - begin < 3 and "download_timeout=0.5" in str(error)
        assert server.all_closed.wait(3)


def test_a_slow_name_server_is_given_up_in_time():
    answered = threading.Event()

    def slow(*_, **__):
        answered.wait(20)
        return []

    with patch("socket.getaddrinfo", slow):
        begin = time.monotonic()
        error = error_of("http://example.org/video.mp4", download_timeout=0.5)
        assert time.monotonic() - begin < 3 and "download_timeout=0.5" in str(error)
        answered.set()
    for thread in threading.enumerate():
        if thread.name == "looking up example.org":
            thread.join(5)
            assert not thread.is_alive()


def test_a_silent_server_is_given_up_before_the_deadline(monkeypatch):
    monkeypatch.setattr(video_download, "PATIENCE", 0.3)
    with Server(None) as server:
        begin = time.monotonic()
        error = error_of(server.address)
        assert time.monotonic() - begin < 3 and "the server did not answer for 0.3 seconds" in str(error)


# Size and form


def test_a_body_has_its_limit_however_it_is_sent():
    data = b"x" * 2000
    for answer in (
        says(OK + b"Content-Length: 2000\r\n\r\n", data),
        says(OK + b"\r\n", data),
        says(CHUNKED, b"7d0\r\n", data, b"\r\n0\r\n\r\n"),
        drips(OK + b"\r\n", data, pause=0.0),
        drips(CHUNKED, b"1;" + b"x" * 60 + b"\r\nx\r\n", pause=0.0),
        says(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", data),
    ):
        with Server(answer) as server:
            error = error_of(server.address, max_bytes=1999)
            assert type(error) is VideoLimitError and "it has more than max_bytes=1999 bytes" in str(error)


def test_a_body_is_not_decompressed():
    with Server(says(OK + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\n12345")) as server:
        assert "the server sends it compressed (gzip)" in str(error_of(server.address))
    assert b"Accept-Encoding: identity" in server.requests[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (OK + b"Content-Length: 10\r\n\r\nshort", "the download broke off after 5 of 10 bytes"),
        (CHUNKED + b"a\r\nshort", "does not speak proper HTTP (IncompleteRead"),
        (CHUNKED + b"word\r\nshort", "does not speak proper HTTP (IncompleteRead"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\x1b[31m", "does not speak proper HTTP (BadStatusLine: SSH-2.0"),
        (b"", "does not speak proper HTTP (RemoteDisconnected"),
        (OK + b"A: b\r\n" * 200 + b"\r\n", "does not speak proper HTTP (HTTPException: got more than 100 headers"),
        (OK + b"A: " + b"b" * 70000 + b"\r\n\r\n", "does not speak proper HTTP (LineTooLong"),
        (b"HTTP/1.1 404 \x1b[31mGo\x07ne\r\nContent-Length: 0\r\n\r\n", r"the server answers 404 (\x1b[31mGo\x07ne)"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\npart", "the server answers 206 (Partial Content)"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "the server answers 304 (Not Modified)"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "the server answers 302 (Found)"),
        (OK + b"Content-Length: \xb2\r\n\r\n", "it is empty"),
        (OK + b"Content-Length: -5\r\n\r\n", "it is empty"),
    ],
)
def test_what_goes_wrong_is_named(answer, reason):
    with Server(says(answer)) as server:
        error = error_of(f"{server.address}/video.mp4")
        assert reason in str(error) and f"{server.address}/video.mp4" in str(error)
        assert str(error).isprintable()


def test_a_port_that_nobody_listens_on_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "ConnectionRefusedError: Connection refused" in str(error_of(f"http://127.0.0.1:{port}/"))


def test_a_whole_body_does_not_wait_for_the_end_of_the_connection(video_bytes):
    def answer(connection, _):
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(video_bytes) + video_bytes + b"more")
        time.sleep(5)

    begin = time.monotonic()
    with Server(answer) as server, VideoReader(server.address, limits=limits()) as reader:
        assert reader.num_frames == 8
    assert time.monotonic() - begin < 4


def test_chunks_and_redirects_lead_to_the_video(video_bytes):
    def answer(connection, head):
        path = head.split()[1]
        if path != b"/d%C3%A9part%20two.mp4?a=1&b=%20":
            return redirects("/d\u00e9part two.mp4?a=1&b=%20#end", 308)(connection, head)
        half = len(video_bytes) // 2
        parts = (b"%x\r\n%s\r\n" % (len(part), part) for part in (video_bytes[:half], video_bytes[half:], b""))
        return says(CHUNKED, *parts)(connection, head)

    with Server(answer) as server:
        with VideoReader(f"{server.address}/any", limits=limits()) as reader:
            assert reader.num_frames == 8
        assert f"Host: 127.0.0.1:{server.port}\r\n".encode() in server.requests[0]


# Where it leads


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 localhost 127.1 2130706433 0x7f.0.0.1 0.0.0.0 0 [::1] [::ffff:127.0.0.1] [::] "
    "127.0.0.1.".split(),
)  # fmt: skip
def test_nothing_connects_to_this_machine_unless_allowed(host):
    with Server(says(OK + b"\r\n")) as server:
        with pytest.raises(VideoDecodingError, match=r"is not a public address|gaierror"):
            VideoReader(f"http://{host}:{server.port}/")
        time.sleep(0.05)
        assert server.num_connections == 0


def test_which_addresses_are_public():
    private = (
        "127.0.0.1 127.255.255.254 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 "
        "100.100.100.200 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 "
        "255.255.255.255 ::1 :: fe80::1 fe80::1%lo fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 100::1 "
        "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe "
        "64:ff9b:1::a00:1 2002:7f00:1:: 2002:a00:1::1 2001:0:7f00:1::1 5f00::1"
    ).split()
    public = "8.8.8.8 1.1.1.1 172.32.0.1 2606:4700:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808".split()
    assert [one for one in private if is_public(ipaddress.ip_address(one))] == []
    assert [one for one in public if not is_public(ipaddress.ip_address(one))] == []


def test_redirects_do_not_lead_to_private_addresses(only_first_is_public):
    with Server(says(OK + b"\r\n"), host="127.0.0.2") as inner, Server(redirects(f"{inner.address}/x?key=1")) as outer:
        with pytest.raises(
            VideoDecodingError, match=r"redirected to http://127.0.0.2:\d+/x\?\*\*\*: 127.0.0.2 is not a"
        ):
            VideoReader(outer.address)
        time.sleep(0.05)
        assert outer.num_connections == 1 and inner.num_connections == 0


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher", "data", "ws"])
def test_redirects_lead_to_http_alone(scheme):
    with Server(None) as other:
        location = {"file": "file:///etc/passwd", "data": "data:video/mp4;base64,AAAA"}.get(
            scheme, other.address.replace("http", scheme)
        )
        with Server(redirects(location)) as server:
            error = error_of(server.address)
        assert "only http:// and https:// addresses are supported" in str(error) and f"redirected to {scheme}:" in str(
            error
        )
        time.sleep(0.05)
        assert other.num_connections == 0


def test_redirects_come_to_an_end():
    for location in ("/again", "http://127.0.0.1:%d/"):
        server = Server(None)
        server.answer = redirects(location % server.port if "%d" in location else location)
        with server:
            assert f"it is redirected more than {MAX_REDIRECTS} times" in str(error_of(server.address))
            assert server.num_connections == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://\u2100.com/", "//u:hunter2@127.0.0.1/", "http://x:y/", "\x1b]0;x"]
)
def test_redirects_to_nowhere_are_named(location):
    with Server(redirects(location)) as server:
        error = error_of(server.address)
        assert str(error).isprintable() and "hunter2" not in str(error)


def test_a_name_is_looked_up_once_and_the_checked_address_is_connected_to(only_first_is_public, video_bytes):
    """A name server that answers otherwise the second time (DNS rebinding) is not asked a second time."""
    answers = ["127.0.0.1", "127.0.0.2", "127.0.0.2"]
    look_up = socket.getaddrinfo

    def rebinding(host, port, *others, **more):
        return look_up(answers.pop(0) if host == "rebind.example" else host, port, *others, **more)

    body = OK + b"Content-Length: %d\r\n\r\n" % len(video_bytes) + video_bytes
    with Server(says(body)) as outer, patch("socket.getaddrinfo", rebinding):
        address = f"http://rebind.example:{outer.port}/video.mp4"
        VideoReader(address).close()
        assert f"Host: rebind.example:{outer.port}\r\n".encode() in outer.requests[0]
        with pytest.raises(VideoDecodingError, match=r"127\.0\.0\.2 is not a public address"):
            VideoReader(address)
        assert outer.num_connections == 1 and answers == ["127.0.0.2"]


def test_of_several_addresses_the_public_ones_are_tried(only_first_is_public, video_bytes):
    look_up = socket.getaddrinfo

    def several(host, port, *others, **more):
        return [one for ip in ("127.0.0.2", "127.0.0.1") for one in look_up(ip, port, *others, **more)]

    body = OK + b"Content-Length: %d\r\n\r\n" % len(video_bytes) + video_bytes
    with Server(says(body)) as server, patch("socket.getaddrinfo", several):
        VideoReader(f"http://several.example:{server.port}/").close()


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with Server(says(OK + b"\r\n")) as proxy, Server(says(b"HTTP/1.1 410 Gone\r\n\r\n")) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.address)
        assert "410" in str(error_of(server.address)) and proxy.num_connections == 0


def test_certificates_are_checked_against_the_name_in_the_address(monkeypatch, video_bytes):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    names = []
    context.sni_callback = lambda _, name, __: names.append(name)

    def wrap(connection):
        return context.wrap_socket(connection, server_side=True)

    body = OK + b"Content-Length: %d\r\n\r\n" % len(video_bytes) + video_bytes
    with Server(says(body), wrap=wrap) as server:
        address = f"https://localhost:{server.port}/video.mp4"
        assert "the server's certificate is not valid: self-signed certificate" in str(error_of(address))
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        with VideoReader(address, limits=limits()) as reader:
            assert reader.num_frames == 8
        server.answer = drips(OK + b"\r\n", b"x")
        assert "download_timeout=0.5" in str(error_of(address, download_timeout=0.5))
        error = error_of(address.replace("localhost", "127.0.0.1"))
        assert "the server's certificate is not valid: IP address mismatch" in str(error)
    assert names[:2] == ["localhost", "localhost"] and len(server.requests) == 2


def test_a_body_without_a_length_is_whole_only_if_tls_says_that_it_ends(monkeypatch, video_bytes):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

    def ended(connection, _):
        connection.sendall(OK + b"\r\n" + video_bytes)
        connection.unwrap()

    with Server(ended, wrap=lambda connection: context.wrap_socket(connection, server_side=True)) as server:
        address = f"https://localhost:{server.port}/video.mp4"
        with VideoReader(address, limits=limits()) as reader:
            assert reader.num_frames == 8
        server.answer = says(OK + b"\r\n" + video_bytes)
        assert "the server broke off the connection" in str(error_of(address))
