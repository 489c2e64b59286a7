"""Answers over HTTP: those of `vivit-hf classify`, each of its own file, from uploads and addresses."""

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from command_line import SAMPLES, invoke, rows, start
from hostile_server import Server, redirects
from running_server import RunningServer, error_of
from tuned_models import tune_folder
from video_files import KINDS, http_server, write_kind

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path


pytestmark = pytest.mark.slow


def classified(*files, options=()):
    """What `classify --json` prints for files, by their names."""
    found = rows(invoke("classify", *files, "--json", *options).stdout)
    return {os.path.basename(row["file"]): {**row, "file": os.path.basename(row["file"])} for row in found}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The samples, and a file of each kind that is difficult to read."""
    folder = tmp_path_factory.mktemp("kinds")
    return [*sorted(SAMPLES.glob("*.mp4")), *(write_kind(folder, kind) for kind in KINDS)]


def test_answers_are_those_of_classify(server, videos):
    expected = classified(*videos)
    assert len(expected) == len(videos) >= 30
    for video in videos:
        response = server.send(video)
        assert response.status_code == 200 and response.json() == expected[video.name], video.name


def test_each_of_many_clients_gets_the_answer_of_its_file(server, videos):
    expected = classified(*videos)

    def ask(number):
        video = videos[number % len(videos)]
        return video.name, server.send(video.read_bytes(), f"{number}_{video.name}")

    before = server.metric("vivit_batch_videos_count")
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(ask, range(200)))
    for number, (name, response) in enumerate(answers):
        assert response.status_code == 200 and response.json()["file"] == f"{number}_{name}"
        scores = {one["label"]: one["score"] for one in response.json()["predictions"]}
        assert scores == pytest.approx({one["label"]: one["score"] for one in expected[name]["predictions"]}, abs=2e-4)
    assert server.metric("vivit_batch_videos_count") - before < 200, "no batch held videos of two requests"
    assert server.metric("vivit_requests_in_progress") == 0 and server.open_uploads() == []


def test_a_model_with_groups_and_other_views_answers_as_classify(grouped, videos):
    options = ["--model", grouped, "--num-clips", 2, "--top-k", 2]
    expected = classified(*videos[:8], options=options)
    with RunningServer(*options) as server, ThreadPoolExecutor(8) as clients:
        for video, response in zip(videos[:8], clients.map(server.send, videos[:8]), strict=True):
            assert response.json() == expected[video.name]
        assert {one["group"] for one in response.json()["predictions"]} == {"noun", "verb"}
        assert len(server.send(videos[0], params={"top_k": 1}).json()["predictions"]) == 2


def test_a_tuned_model_answers_as_classify(videos, tmp_path):
    for cls in (ViViTForVideoClassification, ViViTVideoProcessor):
        cls.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    options = ["--model", tune_folder(tmp_path, "merging-4", merge_tokens=4), "--num-clips", 1]
    expected = classified(*videos[:3], options=options)
    assert expected != classified(*videos[:3], options=[*options, "--dtype", "float32"])
    with RunningServer(*options) as server:
        assert [server.send(video).json() for video in videos[:3]] == [expected[video.name] for video in videos[:3]]
        assert "Using merging-4" in server.log


def test_a_damaged_video_is_answered_or_refused_as_by_classify(server, one_frame_lost):
    (expected,) = rows(start("classify", one_frame_lost, "--json", "--workers", 1).stdout)
    assert server.send(one_frame_lost).json() == {**expected, "file": "corrupted.mp4"}
    options = ["--on-error", "skip", "--num-clips", 1, "--num-crops", 1]
    with RunningServer(*options) as other:
        response = other.send(one_frame_lost)
    assert "is lost to damage" in error_of(response, 422)
    assert response.json()["error"] == classified(one_frame_lost, options=options)["corrupted.mp4"]["error"].replace(
        str(one_frame_lost), "corrupted.mp4"
    )


def test_names_are_only_names(server):
    data = (SAMPLES / "up_left.mp4").read_bytes()
    names = {"../../etc/passwd": "passwd", "C:\\x\\clip.mp4": "clip.mp4", "%03d": "%03d", "a" * 400: "a" * 255}
    for sent, name in {**names, "concat:a|b": "concat:a|b", "<script>.mp4": "<script>.mp4"}.items():
        response = server.send(data, sent)
        assert response.status_code == 200, response.text
        assert response.json()["file"] == name and response.json()["predictions"][0]["label"] == "up_left"


def test_content_types_are_not_trusted(server):
    data = (SAMPLES / "up_left.mp4").read_bytes()
    for kind in ("text/html", "image/png", "nonsense"):
        response = server.client.post("/classify", files={"video": ("x.mp4", data, kind)})
        assert response.json()["predictions"][0]["label"] == "up_left"
    response = server.client.post("/classify", files={"video": ("x.mp4", b"<html>", "video/mp4")})
    assert "Cannot read x.mp4" in error_of(response, 422)


# Addresses


@pytest.fixture(scope="module")
def private():
    with RunningServer("--allow-private-addresses", "--num-crops", 1) as running:
        yield running


def test_an_address_has_the_answer_of_its_file(private):
    with http_server(SAMPLES) as address, Server(redirects(f"{address}/all.mp4")) as other:
        for name in (f"{address}/all.mp4?key=secret", f"{other.address}/here"):
            response = private.ask(name)
            assert response.status_code == 200, response.text
            expected = classified(SAMPLES / "all.mp4", options=["--num-crops", 1])["all.mp4"]
            assert response.json() == {**expected, "file": name.replace("key=secret", "***")}


def test_private_addresses_are_refused_without_telling_about_the_network(server):
    with http_server(SAMPLES) as address:
        for host in ("127.0.0.1", "localhost"):
            error = error_of(server.ask(f"{address.replace('127.0.0.1', host)}/up_left.mp4?key=secret"), 422)
            assert "does not lead to a public address" in error and "secret" not in error
            assert host == "127.0.0.1" or "127.0.0.1" not in error


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/etc/passwd", "only http:// and https://"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("concat:/etc/passwd", "only http:// and https://"),
        ("http://user:secret@example.org/", "user names and passwords"),
        ("http://[::1/", "malformed"),
        ("", "only http:// and https://"),
    ],
)
def test_other_addresses_are_refused_by_name(private, address, reason):
    error = error_of(private.ask(address), 422)
    assert reason in error and "secret" not in error and "root:" not in error


def test_a_download_that_fails_is_named(private):
    with http_server(SAMPLES) as address:
        assert "the server answers 404" in error_of(private.ask(f"{address}/gone.mp4"), 422)
    error = error_of(private.ask(f"{address}/gone.mp4"), 422)
    assert error.startswith(f"Cannot read {address}/gone.mp4: ") and "refused" in error


# The service


def test_the_interface_describes_itself(server):
    described = server.client.get("/openapi.json").json()
    classify = described["paths"]["/classify"]["post"]
    assert set(classify["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert set(classify["responses"]) >= {"200", "408", "413", "415", "422", "429", "503", "504"}
    assert "4 clips x 3 crops of 16 frames" in described["info"]["description"]
    assert "/openapi.json" in server.client.get("/docs").text


def test_health_and_metrics(server):
    assert server.client.get("/health/live").json() == {"status": "alive"}
    assert server.client.get("/health/ready").json() == {"status": "ready"}
    before = server.metric('vivit_requests_total{status="200"}'), server.metric('vivit_requests_total{status="422"}')
    server.send(SAMPLES / "up_left.mp4")
    server.send(b"no video")
    assert server.metric('vivit_requests_total{status="200"}') == before[0] + 1
    assert server.metric('vivit_requests_total{status="422"}') == before[1] + 1
    for stage in ("receive", "wait", "decode", "model"):
        assert server.metric(f'vivit_stage_seconds_count{{stage="{stage}"}}') > 0
    assert server.metric("process_resident_memory_bytes") > 1e7


def is_open(server):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
        return True
    return False


def test_a_signal_ends_the_server_after_the_requests_in_progress():
    data = (SAMPLES / "up_left.mp4").read_bytes()
    with RunningServer("--num-crops", 1) as server, ThreadPoolExecutor(9) as clients:
        begun, go_on = threading.Event(), threading.Event()

        def drip():
            yield b'--b\r\nContent-Disposition: form-data; name="video"; filename="slow.mp4"\r\n\r\n' + data[:100]
            begun.set()
            go_on.wait(20)
            yield data[100:] + b"\r\n--b--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        slow = clients.submit(httpx.post, f"{server.address}/classify", content=drip(), headers=headers, timeout=60)
        assert begun.wait(20)
        others = [clients.submit(server.send, data, f"{number}.mp4") for number in range(8)]
        while server.metric("vivit_requests_in_progress") + sum(one.done() for one in others) < 9:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while is_open(server):
            time.sleep(0.05)
        go_on.set()
        assert slow.result().json()["predictions"][0]["label"] == "up_left"
        assert [one.result().json()["file"] for one in others] == [f"{number}.mp4" for number in range(8)]
        assert server.process.wait(30) == 0
