"""`vivit-hf explain`: pictures of where the model looked."""

import av
import pytest
from command_line import SAMPLES, check_refusal, invoke, said, start
from PIL import Image
from video_files import http_server, write_video


@pytest.mark.parametrize("method", ["rollout", "gradient"])
def test_a_picture_is_drawn(method, tmp_path):
    output = tmp_path / "out.png"
    result = invoke("explain", SAMPLES / "up_left.mp4", "--output", output, "--method", method, "--top-k", 2)
    assert result.exit_code == 0 and result.stdout.splitlines()[0].endswith("up_left")
    with Image.open(output) as picture:
        assert getattr(picture, "n_frames", 1) == 1 and picture.width > 200


def test_a_gif_is_drawn(tmp_path):
    assert start("explain", SAMPLES / "up_left.mp4", "--output", tmp_path / "out.gif").returncode == 0
    with Image.open(tmp_path / "out.gif") as picture:
        assert picture.n_frames == 16


def test_an_mp4_is_drawn(tmp_path):
    assert invoke("explain", SAMPLES / "up_left.mp4", "--output", tmp_path / "out.mp4").exit_code == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16


def test_a_video_is_downloaded(tmp_path):
    with http_server(SAMPLES) as address:
        arguments = ("explain", f"{address}/up_left.mp4", "--output", tmp_path / "out.png")
        refused, allowed = invoke(*arguments), invoke(*arguments, "--allow-private-addresses")
    assert refused.exit_code == 1 and "--allow-private-addresses" in refused.stderr
    assert allowed.exit_code == 0 and allowed.stdout.splitlines()[0].endswith("up_left")


def test_a_part_of_a_video_and_a_label_can_be_chosen(tmp_path):
    output = tmp_path / "out.png"
    part = ("--start", 8.5, "--end", 11.5)
    result = invoke("explain", SAMPLES / "all.mp4", "-o", output, *part, "--method", "gradient", "--label", "down_left")
    assert result.exit_code == 0 and result.stdout.splitlines()[0].endswith("up_left") and output.exists()


def test_labels_are_known_by_the_names_that_are_printed(grouped, tmp_path):
    video = write_video(tmp_path / "video.mp4")
    arguments = ("explain", video, "-o", tmp_path / "out.png", "--model", grouped, "--method", "gradient")
    result = invoke(*arguments, "--label", "noun: cup")
    assert result.exit_code == 0 and "noun: cup" in result.stdout
    names = "noun: cup, noun: door, verb: take, verb: open, verb: close"
    check_refusal([*arguments, "--label", "cup"], 2, names)


def test_the_video_is_not_overwritten(tmp_path):
    mine = tmp_path / "mine.mp4"
    mine.write_bytes((SAMPLES / "up_left.mp4").read_bytes())
    check_refusal(["explain", mine, "--output", mine], 2, "is the video itself")
    assert mine.read_bytes() == (SAMPLES / "up_left.mp4").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x.mp4", "--output", "x.bmp"], 2, "expected .png, .gif, .mp4, got 'x.bmp'"),
        (["x.mp4", "--output", "no/where/x.png"], 2, "there is no folder 'no/where'"),
        (["x.mp4", "--output", "x.png", "--method", "magic"], 2, "'magic' is not one of 'rollout', 'gradient'"),
        (["x.mp4", "--output", "x.png", "--label", "up_left"], 2, "rollout does not depend on a label"),
        (
            ["x.mp4", "--output", "x.png", "--method", "gradient", "--label", "sideways"],
            2,
            "the model does not know 'sideways'; it knows down_left",
        ),
        (["gone.mp4", "--output", "x.png"], 1, "Cannot read gone.mp4"),
    ],
)
def test_what_goes_wrong_in_explain_is_named(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refusal(["explain", *arguments], code, message)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "x.png").mkdir()
    result = invoke("explain", "x.mp4", "--output", tmp_path / "x.png")
    assert result.exit_code == 2 and "is a folder" in said(result.stderr)
