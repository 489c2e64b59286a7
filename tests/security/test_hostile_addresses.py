"""Addresses that mean harm: malformed ones are named, and no secret in an address is told."""

import pytest
from hostile_server import OK, Server, error_of, says

from vivit_hf.video_download import redacted
from vivit_hf.video_sources import source_name


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1",
        "http://[x]/",
        "http://[v1.x]/",
        "http://a\u2100.com/",
        "http://",
        "http:///video.mp4",
        "http://:80/",
        "http://exa mple/x.mp4",
        "http://a..b/",
        "http://.a/",
        "http://a:b/",
        "http://a:99999/",
        "http://%31%32%37.0.0.1/",
        f"http://{'a' * 64}.org/",
        "http://a\\b/",
        "http://host\udcff/",
        "http://127.0.0.1/\udcff",
        "http://a\x00b/",
    ],
)
def test_malformed_addresses_are_named(address):
    error = error_of(address)
    assert "the address is malformed" in str(error) and str(error).isprintable()


def test_control_characters_in_a_path_cannot_add_headers():
    with Server(says(b"HTTP/1.1 410 Gone\r\n\r\n")) as server:
        error_of(f"{server.address}/a b\r\nX-Evil: 1\x1b\x00?q=\u00e9 \t")
        assert server.requests[0].startswith(b"GET /a%20bX-Evil:%201%1B%00?q=%C3%A9")
        assert b"\nX-Evil" not in server.requests[0]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://example.org/a/b.mp4", "http://example.org/a/b.mp4"),
        ("https://example.org:8443/@user/b.mp4", "https://example.org:8443/@user/b.mp4"),
        ("https://example.org/b.mp4?X-Amz-Signature=secret", "https://example.org/b.mp4?***"),
        ("https://example.org/b.mp4#secret", "https://example.org/b.mp4#***"),
        ("https://example.org/b.mp4?mail=a@secret", "https://example.org/b.mp4?***"),
        ("http://user:secret@example.org/b.mp4", "http://***@example.org/b.mp4"),
        ("http://secret@[::1]:80/b.mp4?secret", "http://***@[::1]:80/b.mp4?***"),
        ("http://user:sec@ret@example.org/b.mp4", "http://***@example.org/b.mp4"),
        ("http://user:sec/ret@example.org/b.mp4", "http://***"),
        ("http://user:sec?ret@example.org/b.mp4", "http://***?***"),
        ("http://user:sec#ret@example.org/b.mp4", "http://***#***"),
        ("http://user:se@cr/et@example.org/b.mp4", "http://***"),
        ("rtsp://admin:secret@192.168.1.20:554/stream", "rtsp://***@192.168.1.20:554/stream"),
        ("s3://key:secret@bucket/b.mp4", "s3://***@bucket/b.mp4"),
        (" http://user:secret@example.org/", " http://***@example.org/"),
        ("http:/user:secret@example.org/b.mp4", "http:/***@example.org/b.mp4"),
        ("async:http://user:secret@example.org/", "async:http://***@example.org/"),
        ("http://example.org/\x1b[31m\n", "http://example.org/\\x1b[31m\\n"),
        ("http://[::1", "http://[::1"),
        ("clips/what?.mp4", "clips/what?.mp4"),
        ("C:/clips/what?.mp4", "C:/clips/what?.mp4"),
        ("user@host.mp4", "user@host.mp4"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_secrets_in_addresses_are_not_shown(address, shown):
    assert redacted(address) == shown
    assert source_name({"path": address or None, "bytes": b""}) == (shown or "<0 bytes of video data>")


def test_no_error_tells_a_secret():
    with Server(says(b"HTTP/1.1 404 Not Found\r\n\r\n")) as server:
        rest = f"127.0.0.1:{server.port}/video.mp4?key=hunter2"
        for address in (
            f"http://{rest}",
            f"https://{rest}",
            f"http://hunter2:hunter2@{rest}",
            f"http://hunter2@{rest}",
            f"ftp://hunter2@{rest}",
            f"http://u:hunter2/x@{rest}",
            "http://u:hunter2@[::1/",
            "https://u:hunter2@a\u2100.com/?hunter2",
        ):
            error = error_of(address, download_timeout=1.0)
            while error is not None:
                assert "hunter2" not in f"{error} {vars(error)}"
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_user_names_and_passwords_are_not_sent():
    with Server(says(OK + b"\r\n")) as server:
        error = error_of(server.address.replace("//", "//user:word@"))
        assert "user names and passwords in addresses are not sent" in str(error) and server.num_connections == 0
