"""`vivit-hf tune`: from a folder of videos to a setting that the other commands take up."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from command_line import check_refusal, invoke, said, start
from hub_server import HubServer
from labelled_videos import start_and_kill, write_labelled_videos
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_model, tiny_config
from tuned_models import tune_folder

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference.onednn import has_bfloat16_units, has_vnni


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 videos in class folders, one of them broken, and a factorised encoder for them, with random weights."""
    return write_labelled_videos(tmp_path_factory.mktemp("data"))


@pytest.fixture
def model(data, tmp_path):
    shutil.copytree(data / "model", tmp_path / "model")
    return tmp_path / "model"


def options(data, *more):
    return ["--videos", data / "videos" / "train", "--workers", 0, "--device", "cpu", "--merge-tokens", 1, *more]


def tune(model, data, *more):
    return invoke("tune", model, *options(data, *more))


def stored_in(folder):
    return json.loads((folder / "config.json").read_text()).get("optimization")


def table_of(output):
    """The rows of the table: the cells by the name of the setting."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


EXPECTED = [
    *("plain", "exact", *["bfloat16"] * has_bfloat16_units(), *["int8"] * has_vnni()),
    *("merging-1", "merging-1-decreasing"),
    *["int8-merging-1", "int8-merging-1-decreasing"] * has_vnni(),
]
# What a user does with the model, in a process that knows nothing of the run.
TAKEN_UP = """
import sys, torch
from safetensors.torch import load_file
from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference import optimize
torch.set_num_threads(1)
folder, videos = sys.argv[1], sys.argv[2:]
model = ViViTForVideoClassification.from_pretrained(folder).eval()
report = optimize(model)
print(report)
clips = ViViTVideoProcessor.from_pretrained(folder)(videos)["pixel_values"].to(model.dtype)
measured = load_file(f"{folder}/tuning/round-0000.safetensors")[f"{report.setting}/logits"]
with torch.inference_mode():
    print("largest difference:", float((model(clips).logits.float() - measured).abs().max()))
"""


def largest_difference(model, videos):
    """Between the logits of `optimize(model)` in a new process and those that were measured on the first batch."""
    command = [sys.executable, "-c", TAKEN_UP, *map(str, (model, *videos))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-3000:]
    return float(process.stdout.splitlines()[-1].split(": ")[1]), process.stdout


# The whole road


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """A model that was tuned with labels, in a process of its own."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(data / "model", folder)
    more = ("--labels", data / "videos" / "train", "--choose", "merging-1", "--num-clips", 2)
    return folder, start("tune", folder, *options(data, *more))


@pytest.mark.slow
def test_the_table_has_a_row_for_every_setting_of_this_machine(tuned):
    _, process = tuned
    assert process.returncode == 0, process.stderr
    rows = table_of(process.stdout)
    assert list(rows) == EXPECTED
    assert rows["plain"][1] == "1.00" and rows["plain"][3:6] == ["1.000", "0.0000", "0.00000"]
    assert rows["exact"][3] == "1.000" and rows["exact"][5] == "0.00000"
    assert all(len(row) == 7 and 0 <= float(row[6]) <= 1 for row in rows.values()), "with labels there is an accuracy"
    assert float(rows["merging-1"][4]) > 0.001
    assert "22 clips of 12 videos held in memory" in process.stderr and "on 22 clips" in process.stdout
    assert "margins between the best answers, plain model: 5% below" in process.stdout
    assert "Few clips" in process.stdout and "299 clips would show 0.99" in process.stdout
    assert "left out: " in process.stdout and "up_left/001.mp4" in process.stdout


@pytest.mark.slow
def test_the_setting_is_stored_with_its_price_and_the_picture_drawn(tuned):
    folder, process = tuned
    stored = stored_in(folder)
    assert stored["name"] == "merging-1" and stored["merge_tokens"] == 1 and stored["int8_inputs"] is None
    assert stored["measured"]["clips"] == 22 and set(stored["measured"]) >= {"agreement", "speed", "accuracy"}
    results = json.loads((folder / "tuning" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == EXPECTED and len(results["margins"]) == 22
    assert results["chosen"] == "merging-1"
    with Image.open(folder / "tuning" / "trade_off.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "merging-1 is stored" in process.stdout


@pytest.mark.slow
def test_a_new_process_takes_the_setting_up_with_the_logits_that_were_measured(tuned, data):
    folder, _ = tuned
    videos = sorted((data / "videos" / "train").glob("*/*.mp4"))[:4]
    shutil.copytree(folder, folder.parent / "one_clip")
    one = folder.parent / "one_clip"
    shutil.rmtree(one / "tuning")
    assert tune(one, data, "--choose", "merging-1", "--batch-size", 4).exit_code == 0
    difference, report = largest_difference(one, videos)
    assert difference < 1e-6 and "the setting 'merging-1'" in report


@pytest.mark.slow
@pytest.mark.skipif(not has_vnni(), reason="int8 needs a CPU with AVX-512 VNNI")
def test_int8_with_merged_tokens_needs_no_calibration_in_a_new_process(model, data):
    assert tune(model, data, "--choose", "int8-merging-1", "--batch-size", 4).exit_code == 0
    videos = sorted((data / "videos" / "train").glob("*/*.mp4"))[:4]
    difference, report = largest_difference(model, videos)
    assert difference < 1e-6 and "multiply in int8, with stored scales" in report
    assert len(stored_in(model)["int8_inputs"]) == 36


@pytest.mark.slow
def test_every_variant_is_tuned(variant, data, tmp_path):
    make_model(tiny_config(variant)).save_pretrained(tmp_path)
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 40}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(tmp_path)
    arguments = options(data, "--num-clips", 1)
    is_merging = variant in ("spatio_temporal", "factorised_encoder")
    if not is_merging:
        arguments = arguments[: arguments.index("--merge-tokens")]
    result = invoke("tune", tmp_path, *arguments, "--choose", "int8" if has_vnni() else "exact")
    assert result.exit_code == 0, result.stderr
    assert ("Token merging: Models 3 and 4 need all tokens" in result.stderr) != is_merging
    if has_vnni():
        assert len(stored_in(tmp_path)["int8_inputs"]) >= 12
        assert "Using int8" in invoke("classify", data / "videos" / "test", "--model", tmp_path).stderr


def test_the_fastest_that_agrees_is_stored_by_default(model, data):
    result = tune(model, data, "--min-agreement", 0)
    assert result.exit_code == 0, result.stderr
    results = json.loads((model / "tuning" / "results.json").read_text())
    fastest = max(results["rows"][1:], key=lambda row: row["speed"])["name"]
    assert results["chosen"] == fastest
    assert (stored_in(model) or {"name": "exact"})["name"] == fastest


def test_the_exact_model_needs_no_setting_and_removes_an_earlier_one(model, data):
    tune_folder(model, "int8", merge_tokens=1)
    result = tune(model, data, "--choose", "exact")
    assert result.exit_code == 0 and stored_in(model) is None
    assert "an earlier one is removed" in result.stdout


def test_a_dry_run_only_looks(model, data):
    before = (model / "config.json").read_bytes()
    result = tune(model, data, "--dry-run")
    assert result.exit_code == 0 and "--dry-run: nothing is stored" in result.stdout
    assert (model / "config.json").read_bytes() == before and (model / "tuning" / "trade_off.png").exists()


def test_rates_that_are_not_given_suit_the_model(model, data):
    arguments = options(data, "--dry-run")
    del arguments[arguments.index("--merge-tokens") :][:2]
    process = invoke("tune", model, "--videos", data / "videos" / "test", "--workers", 0, "--dry-run")
    assert process.exit_code == 0 and "merging-1-decreasing" in table_of(process.stdout), process.stderr


# Labels


def write_rows(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_has_paths_from_the_folder_of_videos(model, data, tmp_path):
    names = sorted(path.relative_to(data / "videos" / "train") for path in (data / "videos" / "train").glob("*/0*.mp4"))
    table = write_rows(tmp_path / "labels.csv", ["path,label", *(f"{name},{name.parent}" for name in names[:5])])
    result = tune(model, data, "--labels", table, "--dry-run")
    assert result.exit_code == 0 and "accuracy" in result.stdout and "on 5 clips" in result.stdout, result.stderr
    write_rows(table, ["path,label", f"{names[0]},jumping"])
    check_refusal(["tune", model, *options(data, "--labels", table)], 2, "'jumping' is not among the 4 of the model")


def save_with_labels(folder, **labels):
    make_model(tiny_config("factorised_encoder", **labels)).save_pretrained(folder)
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 40}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(folder)
    return folder


def test_groups_of_labels_agree_together(data, tmp_path):
    names = {0: "cup", 1: "door", 2: "take", 3: "open", 4: "close"}
    folder = save_with_labels(tmp_path / "m", id2label=names, label_groups={"noun": 2, "verb": 3})
    rows = ["path,noun,verb", "up_left/000.mp4,cup,take", "up_right/000.mp4,door,close"]
    table = write_rows(tmp_path / "labels.csv", rows)
    result = tune(folder, data, "--labels", table, "--label-column-name", "noun,verb", "--choose", "merging-1")
    assert result.exit_code == 0, result.stderr
    logits = {
        name: torch.cat([load_file(path)[f"{name}/logits"] for path in [folder / "tuning" / "round-0000.safetensors"]])
        for name in ("plain", "merging-1")
    }
    same = [[logits[name][:, part].argmax(dim=1) for name in logits] for part in (slice(0, 2), slice(2, 5))]
    agreement = torch.stack([one == other for one, other in same]).all(dim=0).float().mean()
    assert stored_in(folder)["measured"]["agreement"] == pytest.approx(float(agreement))


def test_several_labels_have_a_mean_average_precision(data, tmp_path):
    folder = save_with_labels(
        tmp_path / "m", id2label=dict(enumerate("abcde")), problem_type="multi_label_classification"
    )
    rows = ["path,label", "up_left/000.mp4,a;b", "up_right/000.mp4,b;c", "down_left/000.mp4,e"]
    table = write_rows(tmp_path / "labels.csv", rows)
    result = tune(folder, data, "--labels", table, "--label-separator", ";", "--choose", "merging-1")
    assert result.exit_code == 0, result.stderr
    assert "mAP" in result.stdout and "distances of the closest label from its threshold" in result.stdout


def test_a_regression_has_no_answers_to_agree_on(data, tmp_path):
    folder = save_with_labels(tmp_path / "m", num_labels=1)
    check_refusal(["tune", folder, *options(data)], 2, "there are no answers to agree on")


# Interruptions


def rounds(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "tuning").glob("round-*"))}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_measures_nothing_twice(model, data):
    command = [sys.executable, "-m", "vivit_hf", "tune", model, *options(data, "--batch-size", 2)]
    start_and_kill(command, 2, "round-")
    before = rounds(model)
    assert len(before) == 2 and stored_in(model) is None
    assert list((model / "tuning").glob(".round-0002.*.unfinished")), "the third round was written, and is not there"
    process = start(*command[3:])
    assert process.returncode == 0, process.stderr
    after = rounds(model)
    assert len(after) == 6 and {name: after[name] for name in before} == before
    assert not list((model / "tuning").glob(".*"))
    again = start(*command[3:])
    assert again.returncode == 0 and rounds(model) == after and "All is measured already" in again.stderr
    assert table_of(again.stdout) == table_of(process.stdout)


@pytest.mark.slow
def test_a_run_that_was_killed_while_storing_leaves_the_model_as_it_was(model, data):
    before = (model / "config.json").read_bytes()
    command = [sys.executable, "-m", "vivit_hf", "tune", model, *options(data, "--choose", "merging-1")]
    start_and_kill(command, 0, "config.json")
    assert (model / "config.json").read_bytes() == before
    assert start(*command[3:]).returncode == 0 and stored_in(model)["name"] == "merging-1"


def test_measurements_of_other_weights_are_refused_until_they_are_overwritten(model, data):
    assert tune(model, data, "--dry-run").exit_code == 0
    change(model)
    check_refusal(["tune", model, *options(data, "--dry-run")], 2, "holds another run (weights")
    assert tune(model, data, "--dry-run", "--overwrite").exit_code == 0


# Places


@pytest.mark.slow
def test_a_model_folder_that_cannot_be_written_is_named_before_anything_is_measured(model, data):
    """Root may write anywhere, unless the process gives that up."""
    model.chmod(0o555)
    drop, dac_override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    libc = ctypes.CDLL(None, use_errno=True)
    give_up = (lambda: libc.prctl(drop, dac_override, 0, 0, 0)) if os.geteuid() == 0 else None
    process = start("tune", model, *options(data), preexec_fn=give_up)
    assert process.returncode == 2 and "Permission denied" in process.stderr, process.stderr
    assert "give --output FOLDER" in process.stderr and "decoding" not in process.stderr
    assert not (model / "tuning").exists()
    model.chmod(0o755)


def test_a_model_on_the_hub_needs_a_place(data):
    check_refusal(["tune", "google/vivit", *options(data)], 2, "google/vivit is no folder")
    check_refusal(["tune", "google/vivit", *options(data)], 2, "--output FOLDER")


@pytest.mark.slow
def test_a_model_on_the_hub_is_tuned_into_a_copy(model, data, tmp_path):
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    copy = tmp_path / "copy"
    with HubServer() as hub:
        hub.create_repository("tester/moves", files)
        command = ["tune", "tester/moves", *options(data, "--output", copy, "--choose", "merging-1")]
        process = subprocess.run(
            [sys.executable, "-m", "vivit_hf", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **hub.environment(tmp_path / "home")},
        )
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"{copy}: merging-1 is stored" in process.stdout
    assert "Using merging-1" in invoke("classify", video(data), "--model", copy).stderr


def test_a_copy_keeps_the_setting_and_leaves_the_model_alone(model, data, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    copy = tmp_path / "copy"
    result = tune(model, data, "--output", copy, "--choose", "merging-1")
    assert result.exit_code == 0, result.stderr
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert stored_in(copy)["name"] == "merging-1" and "raise" in (copy / "preprocessor_config.json").read_text()
    assert not list(copy.glob(".*"))
    assert "Using merging-1" in invoke("classify", data / "videos" / "test", "--model", copy).stderr
    weights = [load_file(folder / "model.safetensors") for folder in (model, copy)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_model_that_is_stored_in_bfloat16_stays_so_in_a_copy(model, data, tmp_path):
    ViViTForVideoClassification.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    result = tune(model, data, "--output", tmp_path / "copy", "--choose", "merging-1")
    assert result.exit_code == 0, result.stderr
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "Using merging-1" in invoke("classify", data / "videos" / "test", "--model", tmp_path / "copy").stderr


# What the other commands do with it


def change(folder):
    model = ViViTForVideoClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias[0] += 0.01
    model.save_pretrained(folder)


@pytest.fixture
def merging(model):
    return tune_folder(model, "merging-1", merge_tokens=1)


def video(data):
    return data / "videos" / "test" / "up_left" / "000.mp4"


def commands(data, model, tmp_path):
    path, output = video(data), tmp_path / "out"
    return {
        "classify": ["classify", path, "--model", model],
        "timeline": ["timeline", path, "--model", model],
        "watch": ["watch", path, "--model", model],
        "evaluate": ["evaluate", "--model", model, "--data", data / "videos" / "test", "--output-dir", output],
        "embed": ["embed", path, "--model", model, "--output", tmp_path / "f.parquet", "--workers", 0],
        "explain": ["explain", path, "--model", model, "--output", tmp_path / "seen.png"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["classify", "timeline", "watch", "evaluate"])
def test_commands_that_answer_take_it_up_and_say_so(command, merging, data, tmp_path):
    arguments = commands(data, merging, tmp_path)[command]
    result = invoke(*arguments)
    assert result.exit_code == 0 and "Using merging-1 (float32, 1 token merged per layer)" in result.stderr
    exact = invoke(*arguments, "--dtype", "float32")
    assert exact.exit_code == 0 and "merging-1" not in exact.stderr
    if command == "evaluate":
        assert json.loads((tmp_path / "out" / "results.json").read_text())["optimization"] is None
        assert invoke(*arguments).exit_code == 0
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert found["optimization"] == "merging-1" and found["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "explain"])
def test_commands_that_look_inside_leave_it_out_and_say_so(command, merging, data, tmp_path):
    result = invoke(*commands(data, merging, tmp_path)[command])
    assert result.exit_code == 0 and "The setting merging-1 that `vivit-hf tune` stored is left out" in result.stderr


@pytest.mark.slow
def test_features_from_before_are_still_those_of_the_model(model, data, tmp_path):
    assert invoke(*commands(data, model, tmp_path)["embed"]).exit_code == 0
    tune_folder(model, "merging-1", merge_tokens=1)
    result = invoke("search", video(data), "--index", tmp_path / "f.parquet")
    assert result.exit_code == 0 and "features are those of the exact model" in result.stderr
    assert "1.000" in result.stdout


def test_changed_weights_are_noticed_and_the_model_runs_exact(merging, data):
    expected = invoke("classify", video(data), "--model", merging, "--dtype", "float32", "--json").stdout
    assert invoke("classify", video(data), "--model", merging, "--json").stdout != expected
    change(merging)
    process = start("classify", video(data), "--model", merging, "--json")
    assert process.returncode == 0 and "the weights or their configuration have changed" in process.stderr
    exact = start("classify", video(data), "--model", merging, "--json", "--dtype", "float32")
    assert process.stdout == exact.stdout and not exact.stderr


def test_inspect_describes_it(merging):
    assert "tuned     merging-1 (float32, 1 token merged per layer)" in invoke("inspect", merging).stdout
    found = json.loads(invoke("inspect", merging, "--json").stdout)["optimization"]
    assert found["name"] == "merging-1" and found["int8"] is False


def test_a_setting_for_other_layers_ends_the_command_with_the_way_out(model, data, monkeypatch):
    from vivit_hf.inference import quantisation, stored_settings

    for place in (quantisation, stored_settings):
        monkeypatch.setattr(place, "has_vnni", lambda: True)
    tune_folder(model, "int8", input_scales={"vivit.nowhere": None})
    message = "'vivit.nowhere', which is no plain linear layer of this model. --dtype float32 leaves it out"
    check_refusal(["classify", video(data), "--model", model], 2, message)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--choose", "fastest"], "--choose 'fastest' is not known. There are: exact"),
        (["--videos", "nowhere"], "None of the videos can be read"),
        (["--labels", "nowhere.csv"], "nowhere.csv: there is no such file or folder"),
        (["--device", "cuda:9"], "'cuda:9' cannot be used here"),
    ],
)
def test_what_cannot_be_tuned_is_named(model, data, arguments, message):
    check_refusal(["tune", model, *options(data), *arguments], 2, message)


@pytest.mark.parametrize(
    ("option", "value", "reasons"),
    [
        ("--min-agreement", 2, ("Input should be less than or equal to 1", "2.0 is not in the range 0<=x<=1")),
        ("--merge-tokens", 0, ("Input should be greater than or equal to 1", "0 is not in the range x>=1")),
    ],
)
def test_numbers_out_of_range_are_named_with_the_range(model, data, option, value, reasons):
    """Newer and older typer say so differently."""
    result = tune(model, data, option, value)
    text = said(result.stderr)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in text and any(one in text for one in reasons)


def test_models_3_and_4_refuse_rates(data, tmp_path):
    folder = tmp_path / "m"
    make_model(tiny_config("factorised_self_attention")).save_pretrained(folder)
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 40}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(folder)
    check_refusal(["tune", folder, *options(data)], 2, "whole grid of tokens")


def signal_back():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_an_interrupt_exits_with_130_and_keeps_what_was_measured(model, data):
    command = [sys.executable, "-m", "vivit_hf", "tune", model, *options(data, "--batch-size", 1, "--num-clips", 20)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whatever runs the tests in the background may ignore interrupts, which processes inherit.
    process = subprocess.Popen(list(map(str, command)), **pipes, preexec_fn=signal_back)
    while not rounds(model) and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in errors and rounds(model)
