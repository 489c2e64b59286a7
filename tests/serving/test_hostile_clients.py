"""Clients that send too much, too slowly, nothing, or files made to exhaust the server."""

import contextlib
import random
import socket
import time

import httpx
import pytest
from command_line import SAMPLES, rows, start
from hostile_server import CHUNKED, OK, Server, drips, redirects, says
from running_server import RunningServer, error_of
from video_files import KINDS, large_gif, write_kind, write_video


pytestmark = pytest.mark.slow

GOOD = (SAMPLES / "up_left.mp4").read_bytes()
FORM_TYPE = "multipart/form-data; boundary=b"
FORM = b"Host: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="video"; filename="x.mp4"\r\n\r\n'


def connect(server, data=b"", source="127.0.0.1"):
    """A connection on which the beginning of a request was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), source_address=(source, 0), timeout=30)
    connection.sendall(data)
    return connection


def post(length, *headers):
    return b"POST /classify HTTP/1.1\r\n" + FORM + b"Content-Length: %d\r\n" % length + b"".join(headers) + b"\r\n"


def answer_on(connection):
    """Everything that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            found += data
    return found


def check_healthy(server):
    """It answers, and holds nothing of earlier requests."""
    server.wait_for("vivit_requests_in_progress", 0.0)
    assert server.send(GOOD).json()["predictions"][0]["label"] == "up_left"
    assert server.open_uploads() == [] and server.named_uploads() == []


# Too much


def test_a_body_over_the_limit_is_refused_before_and_while_it_is_sent(strict):
    assert "at most 500000 are accepted" in error_of(strict.send(bytes(600_000)), 413)

    def chunks():
        yield PART
        for _ in range(20):
            yield bytes(50_000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = strict.client.post("/classify", content=chunks(), headers=headers)
    assert "more than 500000 bytes" in error_of(response, 413)
    response = strict.client.post(
        "/classify", content=b'{"url": "' + b"x" * 20_000, headers={"Content-Type": "application/json"}
    )
    assert "at most 16384 are accepted" in error_of(response, 413)
    check_healthy(strict)


def test_a_client_that_waits_for_leave_is_refused_at_once(strict):
    with connect(strict, post(10**12, b"Expect: 100-continue\r\n")) as connection:
        begin = time.monotonic()
        answer = answer_on(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ({"num_frames": 501, "height": 16, "width": 16, "rate": 50}, "max_frames=500"),
        ({"num_frames": 30, "height": 16, "width": 16, "rate": 1}, "max_duration=20"),
        ({"num_frames": 2, "height": 400, "width": 600}, "max_pixels=200000"),
    ],
)
def test_videos_over_the_limits_are_refused_by_name(strict, arguments, limit, tmp_path):
    path = write_video(tmp_path / "large.mp4", **arguments)
    error = error_of(strict.send(path), 422)
    assert "Cannot read large.mp4" in error and limit in error
    check_healthy(strict)


def test_a_client_that_was_told_to_go_on_sees_the_answer(strict):
    """As curl sends large forms: it waits for leave to send the body, and sends all of it."""
    headers = b"POST /classify HTTP/1.1\r\n" + FORM + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    with connect(strict, headers) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        body = PART + bytes(1_900_000)
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        answer = answer_on(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"at most 500000 are accepted" in answer
    check_healthy(strict)


def test_a_server_that_sends_too_much_or_drips_is_left(strict):
    with Server(says(OK + b"Content-Length: 600000\r\n\r\n")) as other:
        assert "more than max_bytes=500000 bytes" in error_of(strict.ask(other.address), 413)
    begin = time.monotonic()
    with Server(drips(CHUNKED, b"1\r\nx\r\n")) as other:
        assert "the download takes too long" in error_of(strict.ask(other.address), 504)
        assert other.all_closed.wait(10)
    with Server(redirects("file:///etc/passwd")) as other:
        assert "redirected to file:///etc/passwd: only http:// and https://" in error_of(strict.ask(other.address), 422)
    assert time.monotonic() - begin < 20
    check_healthy(strict)


def test_requests_over_the_limits_are_told_when_to_come_again(strict):
    with connect(strict, post(1000)):
        strict.wait_for("vivit_requests_in_progress", 1.0)
        response = strict.send(GOOD)
        assert "1 requests of this client are in progress" in error_of(response, 429)
        assert 1 <= int(response.headers["Retry-After"]) <= 5
        with connect(strict, post(1000), source="127.0.0.2"):
            strict.wait_for("vivit_requests_in_progress", 2.0)
            assert strict.client.get("/health/ready").status_code == 503
            assert strict.client.get("/health/live").status_code == 200
            with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3")) as third:
                response = third.post(f"{strict.address}/classify", files={"video": ("x.mp4", GOOD)})
            assert "2 requests are in progress" in error_of(response, 503) and "Retry-After" in response.headers
    check_healthy(strict)
    assert strict.client.get("/health/ready").status_code == 200


# Too slowly


def test_a_video_that_takes_too_long_is_given_up():
    """A file of 80 KB whose pictures take the only decoder much longer: it stops, and decodes the next video."""
    data = large_gif(4000, 2304, 4096)
    with RunningServer("--deadline", 3, "--workers", 1, "--max-decoded-pixels", 10**11) as server:
        begin = time.monotonic()
        response = server.send(data, "slow.gif")
        assert "no answer after 3 seconds" in error_of(response, 504) and response.json()["file"] == "slow.gif"
        assert time.monotonic() - begin < 6
        check_healthy(server)


@pytest.mark.parametrize("first", [b"", PART, PART + GOOD[:2000]])
def test_an_upload_that_stops_is_refused(strict, first):
    with connect(strict, post(100_000) + first) as connection:
        begin = time.monotonic()
        answer = answer_on(connection)
    assert time.monotonic() - begin < 9, "the connection is closed with the answer"
    assert answer.startswith(b"HTTP/1.1 408 ") and b"The body took longer than 4 seconds" in answer
    check_healthy(strict)


def test_an_upload_that_drips_is_refused_by_its_rate():
    with RunningServer("--min-upload-rate", 1000, "--num-crops", 1) as server:
        with connect(server, post(100_000) + PART) as connection:
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() < begin + 15:
                    connection.sendall(b"x")
                    time.sleep(0.05)
            answer = answer_on(connection)
        assert b"at least 1000 per second are expected" in answer and answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begin < 20
        check_healthy(server)


def test_headers_that_drip_or_never_come_end_the_connection(server):
    silent = connect(server)
    begin = time.monotonic()
    with connect(server, b"GET /health/live HTTP/1.1\r\n") as connection, contextlib.suppress(OSError):
        while time.monotonic() < begin + 15:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.2)
    assert 9 < time.monotonic() - begin < 14
    silent.settimeout(5)
    assert silent.recv(1) == b""


# Clients that leave


@pytest.mark.parametrize("sent", [PART[:20], PART + GOOD[:3000], PART + GOOD + b"\r\n--b--\r\n"])
def test_clients_that_leave_cost_nothing(server, sent):
    whole = PART + GOOD + b"\r\n--b--\r\n"
    before = server.metric('vivit_requests_total{status="gone"}')
    for _ in range(5):
        connect(server, post(len(whole)) + sent).close()
    server.wait_for("vivit_requests_in_progress", 0.0)
    if sent != whole:  # an answer may be on its way before the end of the connection is seen
        server.wait_for('vivit_requests_total{status="gone"}', before + 5)
    check_healthy(server)


def test_files_are_gone_even_when_the_server_is_killed():
    server = RunningServer("--num-crops", 1)
    with server.killed(), connect(server, post(10_000_000) + PART + bytes(5_000_000)):
        deadline = time.monotonic() + 10
        while not server.open_uploads() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.open_uploads() and server.named_uploads() == [], "the file has no name"


# Malformed requests and files


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"x", None, 415, "There is no content type"),
        (b"x", "video/mp4", 415, "The content type is 'video/mp4'. Expected multipart/form-data"),
        (b"x", "multipart/form-data", 415, "Expected multipart/form-data"),
        (b"x", FORM_TYPE, 400, "The form cannot be read"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", FORM_TYPE, 400, 'field "name" must be provided'),
        (PART + b"x", FORM_TYPE, 422, "no file in the field 'video'; its fields: none"),
        (
            b'--b\r\nContent-Disposition: form-data; name="video"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            422,
            "its fields: 'video'",
        ),
        ((PART + b"x\r\n") * 2 + b"--b--\r\n", FORM_TYPE, 400, "Too many files"),
        (b"{", "application/json", 422, "The body is not JSON"),
        (b"[" * 10_000, "application/json", 422, "The body is not JSON"),
        (b"[]", "application/json", 422, "The JSON has list, and needs one field, 'url'"),
        (b'{"url": 1}', "application/json", 422, "needs one field, 'url', a text"),
        (b'{"url": "http://x", "b": 1}', "application/json", 422, "The JSON has the fields 'url', 'b'"),
    ],
)
def test_malformed_requests_are_refused_by_name(server, content, kind, status, reason):
    response = server.client.post("/classify", content=content, headers={"Content-Type": kind} if kind else {})
    assert reason in error_of(response, status)


@pytest.mark.parametrize("top_k", ["0", "x", "1001", ""])
def test_wrong_parameters_are_refused_by_name(server, top_k):
    assert f"top_k={top_k!r}" in error_of(server.send(GOOD, params={"top_k": top_k}), 422)


def test_other_paths_and_methods_are_errors_in_json(server):
    assert "Not Found" in error_of(server.client.get("/x"), 404)
    assert "Method Not Allowed" in error_of(server.client.get("/classify"), 405)


def broken(data, generator):
    """A file with something wrong, as in the fuzzing tests of the reader."""
    data = bytearray(data)
    start, length = generator.randrange(len(data)), generator.randrange(1, 2000)
    kind = generator.choice(["truncate", "flip", "garbage", "zeros", "delete", "repeat"])
    if kind == "truncate":
        return bytes(data[:start])
    if kind == "flip":
        for _ in range(20):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == "delete":
        del data[start : start + length]
    else:
        part = data[start : start + length]
        same = {"garbage": generator.randbytes(len(part)), "zeros": bytes(len(part)), "repeat": bytes(part) * 2}
        data[start : start + length] = same[kind]
    return bytes(data)


def test_broken_files_have_the_answers_of_classify(server, tmp_path):
    generator, files = random.Random(0), []
    for kind in KINDS:
        data = write_kind(tmp_path, kind).read_bytes()
        for number in range(2):
            path = tmp_path / f"{kind}_{number}.bin"
            path.write_bytes(broken(data, generator))
            files.append(path)
    # Its worker decodes on one thread, like the server: the only way in which FFmpeg conceals damage always alike.
    found = rows(start("classify", *files, "--json", "--workers", 1).stdout)
    assert len(found) == len(files)
    for path, expected in zip(files, found, strict=True):
        response = server.send(path)
        assert response.status_code == (422 if "error" in expected else 200), response.text
        assert response.json() == {
            key: value.replace(f"{tmp_path}/", "") if isinstance(value, str) else value
            for key, value in expected.items()
        }
    assert 5 < sum("error" in one for one in found) < len(found) - 5
    check_healthy(server)


def test_playlists_and_scripts_open_no_other_files(server, tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(GOOD)
    for name, text in {
        "list.m3u8": f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "list.sdp": f"v=0\ns=x\nu=file://{secret}\n",
        "clip.avs": f'AviSource("{secret}")',
    }.items():
        assert "Cannot read" in error_of(server.send(text.encode(), name), 422)
