"""`vivit-hf timeline`: the parts of video files."""

import json
import re
import subprocess
import sys

import av
import numpy as np
import pytest
from command_line import MOTIONS, SAMPLES, check_refusal, invoke, rows, start
from tiny_models import make_model, tiny_config
from video_files import http_server, write_video

from vivit_hf import VideoReader, ViViTVideoProcessor


pytestmark = pytest.mark.slow


VIDEO = SAMPLES / "all.mp4"


def test_the_parts_of_a_joined_video_are_found():
    process = start("timeline", VIDEO, "--json")
    found = rows(process.stdout)
    assert process.returncode == 0 and [row["label"] for row in found] == MOTIONS
    assert [row["start"] for row in found[1:]] == [row["end"] for row in found[:-1]]
    assert [row["start"] for row in found] == pytest.approx([0, 4, 8, 12], abs=0.4)


def test_the_table_has_every_part():
    table = invoke("timeline", VIDEO, "--hop", 8, "--min-score", 0.5).stdout
    assert all(motion in table for motion in MOTIONS) and "12." in table


def test_every_window_can_be_printed():
    windows = rows(invoke("timeline", VIDEO, "--windows", "--hop", 16, "--json").stdout)
    assert len(windows) == 192 // 16 and windows[0]["end"] == 1.25


def test_standard_input_is_read_to_its_end():
    process = start("timeline", "-", "--json", "--hop", 8, input=VIDEO.read_bytes())
    assert [row["label"] for row in rows(process.stdout.decode())] == MOTIONS


def test_an_address_is_downloaded():
    with http_server(SAMPLES) as address:
        result = invoke("timeline", f"{address}/all.mp4", "--json", "--hop", 8, "--allow-private-addresses")
    assert [row["label"] for row in rows(result.stdout)] == MOTIONS


def test_a_full_disk_is_not_blamed_on_the_video():
    with open("/dev/full", "wb") as full:
        process = start("timeline", VIDEO, "--json", stdout=full)
    assert process.returncode == 1 and "Cannot write the output: No space left" in process.stderr
    assert "Traceback" not in process.stderr and "Cannot read" not in process.stderr


def test_the_output_can_be_cut_off():
    command = f"{sys.executable} -m vivit_hf timeline {VIDEO} --json | head -1"
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120).stdout
    assert json.loads(printed.splitlines()[0])["label"] == MOTIONS[0]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two still pictures of 4 seconds each, from a sample, without loss."""
    with VideoReader(VIDEO) as reader:
        frames = np.repeat(reader.frames_at([0, 100]), 48, axis=0)
    return write_video(tmp_path_factory.mktemp("slides") / "slides.mkv", frames, codec="ffv1", pix_fmt="bgr0", rate=12)


def test_pictures_that_stand_still_are_encoded_once(slides):
    process = start("timeline", slides, "--json")
    assert process.returncode == 0 and rows(process.stdout)[-1]["end"] == pytest.approx(7.917, abs=0.01)
    assert "46 of 48 time steps took the token of the last encoded one, which has equal pixels." in process.stderr


def test_a_threshold_shows_its_error():
    plain = rows(invoke("timeline", VIDEO, "--json", "--windows").stdout)
    result = invoke("timeline", VIDEO, "--json", "--windows", "--unchanged-threshold", 255)
    report = (
        r"(\d+) of 96 time steps took .* at most 255 grey levels. In (\d+) windows? computed both ways, the largest "
    )
    found = re.search(report + r"change of a probability was ([\d.e-]+)\.", result.stderr)
    assert found is not None, result.stderr
    reused, windows, change = int(found[1]), int(found[2]), float(found[3])
    assert reused == 95 and windows >= 1 and 0 < change <= 1
    assert [row["start"] for row in rows(result.stdout)] == [row["start"] for row in plain]


def test_a_threshold_needs_a_factorised_encoder(tmp_path):
    config = tiny_config("spatio_temporal")
    make_model(config).save_pretrained(tmp_path)
    ViViTVideoProcessor(num_frames=8, crop_size={"height": 24, "width": 40}).save_pretrained(tmp_path)
    assert invoke("timeline", VIDEO, "--model", tmp_path, "--json").exit_code == 0
    message = "`unchanged_threshold=2.0` needs a factorised encoder"
    for command in ("timeline", "watch"):
        check_refusal([command, VIDEO, "--model", tmp_path, "--unchanged-threshold", 2], 2, message)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["-", "--live"], "--live"),
        (["x.mp4", "--policy", "wait"], "--policy"),
        (["x.mp4", "--format", "v4l2"], "--format"),
        (["rtsp://127.0.0.1:1/x"], "VIDEO"),
    ],
)
def test_live_sources_are_sent_to_watch(arguments, option):
    check_refusal(["timeline", *arguments], 2, f"{option}: timeline reads files; use `vivit-hf watch`")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone.mp4"], 1, "Cannot read gone.mp4"),
        (["x.mp4", "--on-error", "ignore"], 2, "'ignore' is not one of"),
        (["x.mp4", "--windows", "--min-score", "0.5"], 2, "every window is printed"),
        (["x.mp4", "--hop", "0"], 2, "--hop"),
        (
            ["x.mp4", "--unchanged-threshold", "300"],
            2,
            "'--unchanged-threshold': Input should be less than or equal to 255",
        ),
    ],
)
def test_what_goes_wrong_in_timeline_is_named(arguments, code, message):
    check_refusal(["timeline", *arguments], code, message)


def test_a_file_without_video_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux(stream.encode())
        container.start_encoding()
    check_refusal(["timeline", tmp_path / "sound.mp4"], 1, "no video stream")
