"""`vivit-hf classify`: files, folders, patterns, addresses and standard input."""

import os
from functools import partial

import pytest
from command_line import MOTIONS, SAMPLES, check_refusal, invoke, rows, said, start
from hostile_server import Server, redirects
from transformers import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from video_files import http_server, write_kind, write_video

from vivit_hf.cli.options import expand


QUICK = ("--num-clips", 1, "--num-crops", 1)


def test_files_folders_and_patterns_are_classified_in_order(tmp_path):
    write_kind(tmp_path, "turned_90")
    process = start("classify", SAMPLES / "up*.mp4", tmp_path, "--json", "--num-clips", 2, "--num-crops", 1)
    found = rows(process.stdout)
    assert process.returncode == 0 and "demo model" in process.stderr
    assert [os.path.basename(row["file"]) for row in found] == ["up_left.mp4", "up_right.mp4", "turned_90.mp4"]
    for row in found[:2]:
        assert row["predictions"][0]["label"] == os.path.basename(row["file"]).removesuffix(".mp4")


def test_scores_are_those_of_every_label_the_best_first():
    (row,) = rows(invoke("classify", SAMPLES / "up_left.mp4", "--json", *QUICK).stdout)
    scores = [one["score"] for one in row["predictions"]]
    assert {one["label"] for one in row["predictions"]} == set(MOTIONS)
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-3)


def test_videos_that_cannot_be_read_are_named_and_the_others_go_on(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    result = invoke("classify", tmp_path, "gone.mp4", SAMPLES / "up_left.mp4", "--json", *QUICK)
    broken, gone, good = rows(result.stdout)
    assert result.exit_code == 1 and set(broken) == set(gone) == {"file", "error"}
    assert "broken.mp4" in broken["error"] and "No such file" in gone["error"]
    assert good["predictions"][0]["label"] == "up_left"


def test_names_are_printed_as_they_are(tmp_path):
    for name in ("clip[bold].mp4", "clip[red]broken.mp4", ":smile:.mp4", "\x1b[31m.mp4", os.fsdecode(b"\xff.mp4")):
        (tmp_path / name).write_bytes(b"no video" if "broken" in name else (SAMPLES / "up_left.mp4").read_bytes())
    result = invoke("classify", tmp_path, "--top-k", 1, "--num-crops", 1)
    assert result.exit_code == 1 and "clip[bold].mp4" in result.stdout and "clip[red]broken.mp4" in result.stdout
    assert ":smile:.mp4" in result.stdout and r"\x1b[31m.mp4" in result.stdout and r"\udcff.mp4" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_table_ends_with_its_views_and_its_rate():
    result = invoke("classify", SAMPLES, "--top-k", 1)
    assert result.exit_code == 0
    assert all(f"{motion}.mp4" in result.stdout for motion in [*MOTIONS, "all"])
    assert "5 videos in " in result.stdout and "4 clips x 3 crops of 16 frames" in result.stdout


def test_a_single_video_is_counted_as_one():
    assert "1 video in " in invoke("classify", SAMPLES / "up_left.mp4", *QUICK).stdout


def test_labels_come_by_their_group(grouped, tmp_path):
    path = write_video(tmp_path / "video.mp4")
    (row,) = rows(invoke("classify", path, "--model", grouped, "--json", "--top-k", 2, "--num-crops", 1).stdout)
    assert [one["group"] for one in row["predictions"]] == ["noun", "noun", "verb", "verb"]
    assert sum(one["score"] for one in row["predictions"][:2]) == pytest.approx(1, abs=1e-3)
    table = invoke("classify", path, "--model", grouped, "--num-crops", 1).stdout
    assert "noun: " in table and "verb: " in table


def test_a_folder_of_transformers_vivit_is_taken_with_its_number_of_frames(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = VivitConfig(num_frames=4, image_size=32, num_labels=2, **sizes)
    VivitForVideoClassification(config).save_pretrained(tmp_path)
    VivitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    result = invoke("classify", SAMPLES / "up_left.mp4", "--model", tmp_path, "--num-clips", 1)
    assert result.exit_code == 0 and "1 clip x 3 crops of 4 frames" in result.stdout, result.stderr


def test_three_crops_are_taken_only_of_a_processor_that_crops(grouped):
    arguments = ("classify", SAMPLES / "up_left.mp4", "--model", grouped, "--num-clips", 1)
    result = invoke(*arguments)
    assert result.exit_code == 0 and "1 clip x 1 crop of 8 frames" in result.stdout, result.stderr
    check_refusal([*arguments, "--num-crops", 3], 2, "use num_crops=1 (`--num-crops 1`)")


def test_a_pattern_finds_folders_and_each_file_once(tmp_path):
    for name in ("clips_a/up_left.mp4", "clips_b/inner/up_right.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((SAMPLES / os.path.basename(name)).read_bytes())
    for pattern in ("clips_*", "**"):
        assert [os.path.relpath(path, tmp_path) for path in expand([f"{tmp_path}/{pattern}"])] == [
            "clips_a/up_left.mp4",
            "clips_b/inner/up_right.mp4",
        ]
    (tmp_path / "none_here").mkdir()
    check_refusal(["classify", f"{tmp_path}/none_*"], 2, "no video in")


# Addresses


def test_videos_are_downloaded_from_this_machine_where_that_is_allowed():
    with http_server(SAMPLES) as address:
        files = [f"{address}/up_left.mp4", f"{address}/up_right.mp4"]
        result = invoke("classify", *files, "--json", "--allow-private-addresses", *QUICK)
    found = rows(result.stdout)
    assert result.exit_code == 0 and [row["file"] for row in found] == files
    assert [row["predictions"][0]["label"] for row in found] == ["up_left", "up_right"]


def test_a_download_gives_the_scores_of_the_file():
    with http_server(SAMPLES) as address:
        (row,) = rows(invoke("classify", f"{address}/all.mp4", "--json", "--allow-private-addresses").stdout)
    (expected,) = rows(invoke("classify", SAMPLES / "all.mp4", "--json").stdout)
    assert row["predictions"] == expected["predictions"]


def test_a_download_follows_redirects():
    with http_server(SAMPLES) as address, Server(redirects(f"{address}/up_left.mp4")) as server:
        arguments = ("classify", f"{server.address}/here", "--json", "--allow-private-addresses", *QUICK)
        (row,) = rows(invoke(*arguments).stdout)
    assert row["predictions"][0]["label"] == "up_left"


def test_processes_that_decode_download_too():
    with http_server(SAMPLES) as address:
        arguments = ("classify", f"{address}/up_left.mp4", "--json", "--workers", 1, "--allow-private-addresses")
        process = start(*arguments, *QUICK)
    (row,) = rows(process.stdout)
    assert process.returncode == 0 and row["predictions"][0]["label"] == "up_left"


def test_an_address_that_is_not_there_is_named():
    with http_server(SAMPLES) as address:
        result = invoke("classify", f"{address}/gone.mp4", "--json", "--allow-private-addresses")
    (row,) = rows(result.stdout)
    assert result.exit_code == 1 and row["file"] == f"{address}/gone.mp4" and "404" in row["error"]


def test_secrets_of_addresses_are_not_printed():
    with http_server(SAMPLES) as address:
        arguments = ("classify", f"{address}/up_left.mp4?key=hunter2", "--allow-private-addresses", *QUICK)
        table, lines = invoke(*arguments).stdout, invoke(*arguments, "--json").stdout
    assert "up_left.mp4?***" in table and rows(lines)[0]["file"] == f"{address}/up_left.mp4?***"
    assert "hunter2" not in table + lines


def test_private_addresses_are_refused_unless_they_are_allowed():
    with http_server(SAMPLES) as address:
        result = invoke("classify", f"{address}/up_left.mp4", "--json")
    assert result.exit_code == 1 and "--allow-private-addresses" in rows(result.stdout)[0]["error"]


# Standard input


def test_standard_input_is_classified():
    process = start("classify", "-", "--json", *QUICK, input=(SAMPLES / "down_left.mp4").read_bytes())
    (row,) = rows(process.stdout.decode())
    assert row["file"] == "-" and row["predictions"][0]["label"] == "down_left"


def test_standard_input_is_read_for_the_processes_that_decode():
    data = (SAMPLES / "down_left.mp4").read_bytes()
    process = start("classify", "-", "--workers", 1, "--json", "--num-crops", 1, input=data)
    (row,) = rows(process.stdout.decode())
    assert row["predictions"][0]["label"] == "down_left" and process.returncode == 0


@pytest.mark.parametrize(
    "arguments", [["classify", "-"], ["explain", "-", "--output", "x.png"]], ids=lambda one: one[0]
)
def test_standard_input_has_a_limit(arguments, monkeypatch):
    from vivit_hf import video_sources

    monkeypatch.setattr(video_sources, "VideoLimits", partial(video_sources.VideoLimits, max_bytes=1000))
    result = invoke(*arguments, input=b"x" * 5000)
    assert result.exit_code == 1 and "more than max_bytes=1000 bytes" in result.stderr, result.output


# Damage


@pytest.mark.parametrize(
    ("command", "answer"),
    [("classify", "none of these (otherwise down_left)"), ("timeline", "none of these"), ("explain", "down_left")],
)
def test_a_damaged_video_is_answered_with_a_warning(command, answer, one_frame_lost, tmp_path, caplog):
    """Its moving pattern is no shape that the demo model was trained on; a map explains the nearest label."""
    output = ["--output", tmp_path / "x.png"] if command == "explain" else []
    result = invoke(command, one_frame_lost, *output)
    assert result.exit_code == 0 and answer in result.stdout, result.stderr
    assert "corrupted.mp4 is damaged: of the frames read from it, 1 are lost" in caplog.text


@pytest.mark.parametrize("command", ["classify", "timeline", "explain"])
@pytest.mark.parametrize("choice", ["skip", "raise"])
def test_a_damaged_video_has_no_answer_if_one_asks(command, choice, one_frame_lost, tmp_path):
    output = ["--output", tmp_path / "x.png"] if command == "explain" else []
    result = invoke(command, one_frame_lost, *output, "--on-error", choice)
    assert result.exit_code == 1 and "is lost to damage" in result.output


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [("raise", ["error"]), ("skip", ["error", "predictions"]), ("warn", ["predictions"] * 2)],
)
def test_the_first_damaged_video_ends_the_command_only_if_one_asks(choice, kinds, one_frame_lost):
    files = (one_frame_lost, SAMPLES / "up_left.mp4")
    result = invoke("classify", *files, "--json", "--num-crops", 1, "--batch-size", 4, "--on-error", choice)
    assert [kind for row in rows(result.stdout) for kind in row if kind in ("error", "predictions")] == kinds
    assert result.exit_code == (choice != "warn")


def test_a_full_disk_is_not_blamed_on_the_video():
    with open("/dev/full", "wb") as full:
        process = start("classify", SAMPLES / "up_left.mp4", "--json", *QUICK, stdout=full)
    assert process.returncode == 1 and "Cannot write the output: No space left" in process.stderr
    assert "Traceback" not in process.stderr and "Cannot read" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["x.mp4", "--num-crops", "2"], "expected 1 or 3, got 2"),
        (["x.mp4", "--on-error", "repeat_last"], "'repeat_last' is not one of 'warn', 'skip', 'raise'"),
    ],
)
def test_wrong_options_of_classify_are_named(arguments, message):
    check_refusal(["classify", *arguments], 2, message)


def test_an_empty_folder_is_named(tmp_path):
    result = invoke("classify", tmp_path)
    assert result.exit_code == 2 and "contains no video" in said(result.stderr)
