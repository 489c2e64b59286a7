"""`classify`, `timeline`, `explain` and `demo` as users run them: real processes, files, pipes and addresses."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import av
import pytest
from PIL import Image
from tiny_models import make_model, tiny_config
from transformers import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from typer.testing import CliRunner
from video_files import damage_packet, write_kind, write_video

from vivit_hf import ViViTVideoProcessor, demo_model_path
from vivit_hf.cli.app import app
from vivit_hf.cli.options import expand


SAMPLES = demo_model_path() / "samples"
MOTIONS = ["down_left", "down_right", "up_left", "up_right"]


def run(*arguments, **options):
    command = [sys.executable, "-m", "vivit_hf", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        command, capture_output=True, text="input" not in options, timeout=120, env=environment, **options
    )


def said(errors):
    """What stands in a box on standard error, whose lines are as long as the names in it let them be."""
    return " ".join(errors.replace("│", " ").split())


def rows(process):
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A random model with two groups of labels, of another variant."""
    folder = tmp_path_factory.mktemp("grouped")
    labels = {0: "cup", 1: "door", 2: "take", 3: "open", 4: "close"}
    config = tiny_config("factorised_self_attention", id2label=labels, label_groups={"noun": 2, "verb": 3})
    make_model(config).save_pretrained(folder)
    processor = ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"height": 24, "width": 40}, do_center_crop=False
    )
    processor.save_pretrained(folder)
    return folder


def test_classify_takes_files_folders_patterns_and_goes_on_past_damage(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_kind(tmp_path, "turned_90")
    process = run("classify", SAMPLES / "up*.mp4", tmp_path, "gone.mp4", "--json", "--num-clips", 2, "--num-crops", 1)
    found = rows(process)
    assert process.returncode == 1
    assert [os.path.basename(row["file"]) for row in found[:2]] == ["up_left.mp4", "up_right.mp4"]
    for row in found[:2]:
        scores = [one["score"] for one in row["predictions"]]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-3)
        assert row["predictions"][0]["label"] == os.path.basename(row["file"]).removesuffix(".mp4")
        assert {one["label"] for one in row["predictions"]} == set(MOTIONS)
    by_name = {os.path.basename(row["file"]): row for row in found[2:]}
    assert set(by_name["broken.mp4"]) == {"file", "error"} and "broken.mp4" in by_name["broken.mp4"]["error"]
    assert "No such file" in by_name["gone.mp4"]["error"] and len(found) == 5
    assert "demo model" in process.stderr and "Traceback" not in process.stderr


def test_names_are_printed_as_they_are(tmp_path):
    for name in ("clip[bold].mp4", "clip[red]broken.mp4", ":smile:.mp4", "\x1b[31m.mp4", os.fsdecode(b"\xff.mp4")):
        (tmp_path / name).write_bytes(b"no video" if "broken" in name else (SAMPLES / "up_left.mp4").read_bytes())
    result = CliRunner().invoke(app, ["classify", str(tmp_path), "--top-k", "1", "--num-crops", "1"])
    assert result.exit_code == 1 and "clip[bold].mp4" in result.stdout and "clip[red]broken.mp4" in result.stdout
    assert ":smile:.mp4" in result.stdout and r"\x1b[31m.mp4" in result.stdout and r"\udcff.mp4" in result.stdout
    assert "\x1b" not in result.stdout


def test_classify_prints_a_table_with_its_views_and_its_rate():
    process = run("classify", SAMPLES, "--top-k", 1)
    assert process.returncode == 0
    assert all(f"{motion}.mp4" in process.stdout for motion in [*MOTIONS, "all"])
    assert "5 videos in " in process.stdout and "4 clips x 3 crops of 16 frames" in process.stdout


def test_classify_reads_addresses_and_standard_input(tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(SAMPLES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        data = (SAMPLES / "down_left.mp4").read_bytes()
        arguments = ["classify", f"{address}/up_left.mp4?key=hunter2", f"{address}/gone.mp4", "--num-crops", "1"]
        process = run(*arguments, "-", "--json", "--allow-private-addresses", input=data)
        table = CliRunner().invoke(app, [*arguments, "--allow-private-addresses"]).stdout
        refused = CliRunner().invoke(app, [*arguments, "--json"]).stdout
        server.shutdown()
    first, second, third = [json.loads(line) for line in process.stdout.decode().splitlines()]
    assert first["file"] == f"{address}/up_left.mp4?***" and first["predictions"][0]["label"] == "up_left"
    assert second["file"] == f"{address}/gone.mp4" and "404" in second["error"]
    assert third["file"] == "-" and third["predictions"][0]["label"] == "down_left"
    assert "up_left.mp4?***" in table and "hunter2" not in table
    assert all("--allow-private-addresses" in json.loads(line)["error"] for line in refused.splitlines())


def test_standard_input_has_a_limit(monkeypatch, tmp_path):
    from vivit_hf import video_sources

    monkeypatch.setattr(video_sources, "VideoLimits", partial(video_sources.VideoLimits, max_bytes=1000))
    for arguments in (["classify", "-"], ["explain", "-", "--output", str(tmp_path / "x.png")]):
        result = CliRunner().invoke(app, arguments, input=b"x" * 5000)
        assert result.exit_code == 1 and "more than max_bytes=1000 bytes" in result.stderr, result.output


def test_standard_input_is_read_for_the_processes_that_decode():
    data = (SAMPLES / "down_left.mp4").read_bytes()
    process = run("classify", "-", "--workers", 1, "--json", "--num-crops", 1, input=data)
    assert json.loads(process.stdout)["predictions"][0]["label"] == "down_left" and process.returncode == 0


def test_a_pattern_takes_folders_and_each_file_once(tmp_path):
    for name in ("clips_a/up_left.mp4", "clips_b/inner/up_right.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((SAMPLES / os.path.basename(name)).read_bytes())
    for pattern in ("clips_*", "**"):
        assert [os.path.relpath(path, tmp_path) for path in expand([f"{tmp_path}/{pattern}"])] == [
            "clips_a/up_left.mp4",
            "clips_b/inner/up_right.mp4",
        ]
    (tmp_path / "none_here").mkdir()
    result = CliRunner().invoke(app, ["classify", f"{tmp_path}/none_*"])
    assert result.exit_code == 2 and "no video in" in said(result.stderr)


def test_explain_knows_labels_by_the_names_that_it_prints(grouped, tmp_path):
    arguments = ("explain", write_video(tmp_path / "video.mp4"), "--output", tmp_path / "out.png", "--model", grouped)
    process = run(*arguments, "--method", "gradient", "--label", "noun: cup")
    assert process.returncode == 0 and "noun: cup" in process.stdout
    process = run(*arguments, "--method", "gradient", "--label", "cup")
    names = "noun: cup, noun: door, verb: take, verb: open, verb: close"
    assert process.returncode == 2 and names in said(process.stderr)


def test_classify_takes_a_folder_of_transformers_vivit_with_its_number_of_frames(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = VivitConfig(num_frames=4, image_size=32, num_labels=2, **sizes)
    VivitForVideoClassification(config).save_pretrained(tmp_path)
    VivitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    arguments = ["classify", str(SAMPLES / "up_left.mp4"), "--model", str(tmp_path), "--num-clips", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "1 clip x 3 crops of 4 frames" in result.stdout, result.stderr


def test_classify_takes_three_crops_only_of_a_processor_that_crops(grouped):
    arguments = ["classify", str(SAMPLES / "up_left.mp4"), "--model", str(grouped), "--num-clips", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "1 clip x 1 crop of 8 frames" in result.stdout, result.stderr
    result = CliRunner().invoke(app, [*arguments, "--num-crops", "3"])
    assert result.exit_code == 2 and "use num_crops=1 (`--num-crops 1`)" in said(result.stderr)


def test_classify_gives_labels_by_their_group(grouped, tmp_path):
    path = write_video(tmp_path / "video.mp4")
    (row,) = rows(run("classify", path, "--model", grouped, "--json", "--top-k", 2, "--num-crops", 1))
    assert [one["group"] for one in row["predictions"]] == ["noun", "noun", "verb", "verb"]
    assert sum(one["score"] for one in row["predictions"][:2]) == pytest.approx(1, abs=1e-3)
    table = run("classify", path, "--model", grouped, "--num-crops", 1).stdout
    assert "noun: " in table and "verb: " in table


def test_timeline_finds_the_parts_of_a_joined_video():
    process = run("timeline", SAMPLES / "all.mp4", "--json")
    found = rows(process)
    assert process.returncode == 0 and [row["label"] for row in found] == MOTIONS
    assert [row["start"] for row in found[1:]] == [row["end"] for row in found[:-1]]
    assert [row["start"] for row in found] == pytest.approx([0, 4, 8, 12], abs=0.4)
    table = run("timeline", SAMPLES / "all.mp4", "--hop", 8, "--min-score", 0.5).stdout
    assert all(motion in table for motion in MOTIONS) and "12." in table
    windows = rows(run("timeline", SAMPLES / "all.mp4", "--windows", "--hop", 16, "--json"))
    assert len(windows) == 192 // 16 and windows[0]["end"] == 1.25


def test_timeline_reads_pipes_to_their_end_and_as_they_come(tmp_path):
    data = (SAMPLES / "all.mp4").read_bytes()
    process = run("timeline", "-", "--json", input=data)
    assert [json.loads(line)["label"] for line in process.stdout.decode().splitlines()] == MOTIONS
    stream = tmp_path / "all.ts"
    with av.open(str(SAMPLES / "all.mp4")) as source, av.open(str(stream), "w") as sink:
        output = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = output
                sink.mux(packet)
    process = run("timeline", "-", "--live", input=stream.read_bytes())
    lines = process.stdout.decode().splitlines()
    assert [line.split()[-1] for line in lines] == MOTIONS
    assert "192 frames received, 0 dropped" in process.stderr.decode()


@pytest.mark.parametrize("suffix", ["png", "gif", "mp4"])
@pytest.mark.parametrize("method", ["rollout", "gradient"])
def test_explain_draws(tmp_path, suffix, method):
    output = tmp_path / f"out.{suffix}"
    process = run("explain", SAMPLES / "up_left.mp4", "--output", output, "--method", method, "--top-k", 2)
    assert process.returncode == 0 and process.stdout.splitlines()[0].endswith("up_left")
    if suffix == "mp4":
        with av.open(str(output)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 16
    else:
        with Image.open(output) as picture:
            assert getattr(picture, "n_frames", 1) == (16 if suffix == "gif" else 1) and picture.width > 200


def test_where_the_output_goes_is_not_blamed_on_the_video(tmp_path):
    with open("/dev/full", "wb") as full:
        for arguments in (["timeline", SAMPLES / "all.mp4"], ["classify", SAMPLES / "up_left.mp4"]):
            command = [sys.executable, "-m", "vivit_hf", *map(str, arguments), "--json"]
            process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
            assert process.returncode == 1 and "Cannot write standard output: No space left" in process.stderr
            assert "Traceback" not in process.stderr and "Cannot read" not in process.stderr
    first, *_ = subprocess.run(
        f"{sys.executable} -m vivit_hf timeline {SAMPLES}/all.mp4 --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.splitlines()
    assert json.loads(first)["label"] == MOTIONS[0]


def test_a_live_pipe_is_interrupted_while_nothing_comes():
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vivit_hf", "timeline", "-", "--live"],
        stdin=read,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = process.stderr.readline()  # that it is the demo model, whose weights come next
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    os.close(write), os.close(read)
    assert "demo model" in said and process.returncode == 130 and errors.strip() == "Interrupted."


def test_videos_of_the_user_are_not_overwritten(tmp_path):
    mine = tmp_path / "all.mp4"
    mine.write_bytes((SAMPLES / "up_left.mp4").read_bytes())
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "is there already" in said(result.stderr)
    result = CliRunner().invoke(app, ["explain", str(mine), "--output", str(mine)])
    assert result.exit_code == 2 and "is the video itself" in said(result.stderr)
    assert mine.read_bytes() == (SAMPLES / "up_left.mp4").read_bytes()
    result = CliRunner().invoke(app, ["demo", "--output", str(mine)])
    assert result.exit_code == 2 and "File exists" in said(result.stderr)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "with space")])
    assert result.exit_code == 0 and f"vivit-hf timeline '{tmp_path}/with space'/all.mp4" in result.stdout


def test_explain_a_label_in_a_part_of_a_video(tmp_path):
    output = tmp_path / "out.png"
    arguments = ("explain", SAMPLES / "all.mp4", "--output", output, "--start", 8.5, "--end", 11.5)
    process = run(*arguments, "--method", "gradient", "--label", "down_left")
    assert process.returncode == 0 and process.stdout.splitlines()[0].endswith("up_left") and output.exists()


def test_the_demo_writes_videos_and_labels_them(tmp_path):
    process = run("demo", "--output", tmp_path / "out")
    assert process.returncode == 0 and len(list((tmp_path / "out").glob("*.mp4"))) == 5
    for motion in MOTIONS:
        assert any(motion in line and f"{motion}.mp4" in line for line in process.stdout.splitlines())
    timeline, explain = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("vivit-hf ")]
    assert run(*timeline).returncode == 0
    assert run(*explain, cwd=tmp_path).returncode == 0 and (tmp_path / explain[-1]).exists()


@pytest.fixture(scope="module")
def one_frame_lost(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("lost") / "corrupted.mp4", num_frames=24, options={"bf": "0"})
    damage_packet(path, 11)
    return path


def test_a_damaged_video_has_an_answer_with_a_warning_or_none_as_one_asks(one_frame_lost, tmp_path, caplog):
    def invoke(command, *options):
        caplog.clear()
        output = ["--output", str(tmp_path / "x.png")] if command == "explain" else []
        return CliRunner().invoke(app, [command, str(one_frame_lost), *output, *options])

    for command in ("classify", "timeline", "explain"):
        result = invoke(command)
        assert result.exit_code == 0 and any(motion in result.stdout for motion in MOTIONS), (command, result.stderr)
        assert "corrupted.mp4 is damaged: of the frames read from it, 1 are lost" in caplog.text
        for choice in ("skip", "raise"):
            result = invoke(command, "--on-error", choice)
            assert result.exit_code == 1 and "is lost to damage" in result.output, (command, choice)
        result = invoke(command, "--on-error", "repeat_last")
        assert result.exit_code == 2 and "expected warn, skip or raise, got 'repeat_last'" in said(result.stderr)


def test_the_first_damaged_video_ends_a_command_only_if_one_asks(one_frame_lost):
    good = str(SAMPLES / "up_left.mp4")
    arguments = ["classify", str(one_frame_lost), good, "--json", "--num-crops", "1", "--batch-size", "4", "--on-error"]
    for choice, kinds in (("raise", ["error"]), ("skip", ["error", "predictions"]), ("warn", ["predictions"] * 2)):
        result = CliRunner().invoke(app, [*arguments, choice])
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert [kind for row in found for kind in row if kind != "file"] == kinds
        assert result.exit_code == (choice != "warn")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify"], 2, "Missing argument"),
        (["classify", "x.mp4", "--model", "my_vivit"], 2, "there is no folder 'my_vivit', and models of the Hub"),
        (
            ["inspect", "my_vivit"],
            1,
            "there is no folder 'my_vivit', and models of the Hub are named like 'owner/name'",
        ),
        (["inspect", "nowhere/at-all"], 1, "there is no folder 'nowhere/at-all', and the Hub cannot be asked"),
        (["timeline", "x.mp4", "--on-error", "ignore"], 2, "expected warn, skip or raise, got 'ignore'"),
        (["classify", "x.mp4", "--num-crops", "2"], 2, "there are 1 or 3 crops, got 2"),
        (["classify", "x.mp4", "--dtype", "int8"], 2, "expected float32, bfloat16 or float16, got 'int8'"),
        (["classify", "x.mp4", "--device", "abacus"], 2, "'abacus' cannot be used here"),
        (["classify", "x.mp4", "--model", "nowhere/at-all"], 2, "Cannot load the model nowhere/at-all"),
        (["classify", "{empty}"], 2, "holds no video"),
        (["timeline", "gone.mp4"], 1, "Cannot read gone.mp4"),
        (["timeline", "tcp://127.0.0.1:1"], 1, "Cannot read tcp://127.0.0.1:1"),
        (["timeline", "{empty}/sound.mp4"], 1, "no video stream"),
        (["classify", "x.mp4", "--device", "meta"], 2, "'meta' cannot be used here: it computes nothing"),
        (["classify", "x.mp4", "--model", "./nope"], 2, "there is no folder './nope'"),
        (["classify", "x.mp4", "--model", ""], 2, "there is no folder ''"),
        (["classify", "x.mp4", "--model", "vivit-b-16x2-fe"], 2, "is a preset without weights"),
        (["classify", "x.mp4", "--model", "{empty}/cut_weights"], 2, "model.safetensors is damaged"),
        (["classify", "x.mp4", "--model", "{empty}/other_weights"], 2, "Load it with the configuration"),
        (["scan", "{empty}", "--json", ""], 2, "expected a file, got ''"),
        (["scan", "{empty}", "--json", "{empty}"], 2, "expected a file, got"),
        (["inspect", "{empty}"], 1, "config.json"),
        (["explain", "x.mp4", "--output", "{empty}"], 2, "expected .png"),
        (["explain", "x.mp4", "--output", "x.bmp"], 2, "expected .png, .gif, .mp4, got 'x.bmp'"),
        (["explain", "x.mp4", "--output", "no/where/x.png"], 2, "there is no folder 'no/where'"),
        (["explain", "x.mp4", "--output", "x.png", "--method", "magic"], 2, "expected rollout or gradient"),
        (["explain", "x.mp4", "--output", "x.png", "--label", "up_left"], 2, "rollout is of no label"),
        (["explain", "gone.mp4", "--output", "{empty}/x.png"], 1, "gone.mp4"),
        (["timeline", "x.mp4", "--policy", "wait"], 2, "that is of live sources; add --live"),
        (["timeline", "x.mp4", "--format", "v4l2"], 2, "that is of live sources; add --live"),
        (["timeline", "x.mp4", "--windows", "--min-score", "0.5"], 2, "every window is printed"),
        (["classify", "x.mp4", "--model", "{empty}/no_labels"], 2, "no_labels has no classifier"),
        (["timeline", "x.mp4", "--model", "{empty}/no_labels"], 2, "no_labels has no classifier"),
        (
            ["explain", "x.mp4", "--output", "x.png", "--method", "gradient", "--model", "{empty}/no_labels"],
            2,
            "no_labels has no classifier",
        ),
        (["classify", "x.mp4", "--model", "{empty}/short"], 2, "gives clips of (4, 24, 40) (frames, height, width)"),
        (["timeline", "x.mp4", "--model", "{empty}/wide"], 2, "and the model takes (8, 24, 40): set `num_frames`"),
        (
            ["explain", "x.mp4", "--output", "x.png", "--method", "gradient", "--label", "sideways"],
            2,
            "the model does not know 'sideways'; it knows down_left",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_words(arguments, code, message, tmp_path):
    for name, labels, num_frames, width in (("no_labels", 0, 8, 40), ("short", 3, 4, 40), ("wide", 3, 8, 41)):
        if any(name in argument for argument in arguments):
            make_model(tiny_config("factorised_encoder", num_labels=labels)).save_pretrained(tmp_path / name)
            sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 24, "width": width}}
            ViViTVideoProcessor(num_frames=num_frames, **sizes).save_pretrained(tmp_path / name)
    if any("sound.mp4" in argument for argument in arguments):
        with av.open(str(tmp_path / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            container.mux(stream.encode())
            container.start_encoding()
    for name in ("cut_weights", "other_weights"):
        if any(name in argument for argument in arguments):
            make_model(tiny_config("factorised_encoder")).save_pretrained(tmp_path / name)
            if name == "cut_weights":
                os.truncate(tmp_path / name / "model.safetensors", 1000)
            else:
                tiny_config("spatio_temporal").save_pretrained(tmp_path / name)
    if arguments[0] == "scan":
        (tmp_path / "x.mp4").touch()
    result = CliRunner().invoke(app, [argument.replace("{empty}", str(tmp_path)) for argument in arguments])
    assert result.exit_code == code and message in said(result.stderr), result.stderr
    assert isinstance(result.exception, SystemExit) and not list(tmp_path.glob("*.png"))
