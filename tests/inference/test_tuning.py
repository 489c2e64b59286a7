"""What `vivit-hf tune` tries, measures, keeps and chooses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference import optimization, tuning_candidates
from vivit_hf.inference.finite_outputs import NonFiniteError
from vivit_hf.inference.onednn import has_vnni
from vivit_hf.inference.shards import OtherRunError
from vivit_hf.inference.stored_fields import write_field
from vivit_hf.inference.tuning import TuningRun, evenly_spread, held_megabytes
from vivit_hf.inference.tuning_candidates import Candidate, list_candidates
from vivit_hf.inference.tuning_picture import draw_trade_off
from vivit_hf.inference.tuning_results import (
    TunedRow,
    TuningResults,
    check_place,
    least_agreement,
    needed_clips,
    tuning_results,
)


CPU = torch.device("cpu")
EXACT, MERGING = Candidate("exact"), Candidate("merging-3", torch.float32, 3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos that differ, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(7):
        frames = np.roll(moving_frames(12, 32, 48), 5 * number, axis=2)
        write_video(folder / f"{number}.mp4", frames)
    (folder / "5b.mp4").write_bytes(b"broken")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def processor():
    return ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 28}, crop_size={"height": 24, "width": 40}
    )


def run_in(folder, videos, processor, candidates=(EXACT, MERGING), model=None, **settings):
    model = model or make_model(tiny_config("spatio_temporal"))
    return TuningRun(folder, "tiny", model, processor, videos, candidates, batch_size=3, **settings)


def finish(run, overwrite=False):
    run.start(overwrite)
    for steps in (run.decode(0), run.prepare(), run.measure()):
        list(steps)
    return run


# Candidates


def names(*arguments):
    found, notes = list_candidates(*arguments)
    return [one.name for one in found], notes


def test_everything_that_machine_and_model_can_do_is_tried(monkeypatch):
    for unit in ("has_vnni", "has_bfloat16_units"):
        monkeypatch.setattr(tuning_candidates, unit, lambda: True)
    config = tiny_config("factorised_encoder", num_hidden_layers=4)  # 15 tokens in space
    merging = [f"merging-{count}{kind}" for count in (1, 2, 3) for kind in ("", "-decreasing")]
    assert names(config, CPU) == (["exact", "bfloat16", "int8", *merging, *(f"int8-{one}" for one in merging)], [])
    found, _ = list_candidates(config, CPU)
    assert {one.dtype for one in found if one.name != "exact"} == {torch.bfloat16}
    assert [one.merge_tokens for one in found if one.name.startswith("int8-merging-2")] == [2, [4, 3, 1, 0]]
    assert all(one.int8 == one.name.startswith("int8") for one in found)


def test_what_they_cannot_do_is_named(monkeypatch):
    for unit in ("has_vnni", "has_bfloat16_units"):
        monkeypatch.setattr(tuning_candidates, unit, lambda: False)
    found, notes = names(tiny_config("factorised_self_attention"), CPU)
    assert found == ["exact"] and [note.split(":")[0] for note in notes] == ["bfloat16", "Token merging", "int8"]
    found, _ = list_candidates(tiny_config("spatio_temporal"), CPU, [7])
    assert [(one.name, one.merge_tokens) for one in found[1:]] == [("merging-7", 7), ("merging-7-decreasing", [14, 0])]
    assert {one.dtype for one in found} == {torch.float32}
    with pytest.raises(ValueError, match="whole grid"):
        list_candidates(tiny_config("factorised_self_attention"), CPU, [7])


def test_items_are_spread_evenly():
    assert evenly_spread(range(10), 4) == [0, 2, 5, 7] and evenly_spread("abc", 5) == ["a", "b", "c"]


# Measuring


@torch.no_grad()
def test_logits_are_those_of_the_model_on_the_processors_clips(tmp_path, videos, processor):
    run = finish(run_in(tmp_path, videos, processor))
    plain, merged = make_model(tiny_config("spatio_temporal")), make_model(tiny_config("spatio_temporal"))
    optimization.optimize(merged, merge_tokens=3)
    good = [video for video in videos if "5b" not in video]
    clips = torch.cat([processor(video)["pixel_values"] for video in good])
    torch.testing.assert_close(run.logits("plain"), plain(clips).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.logits("merging-3"), merged(clips).logits, atol=1e-5, rtol=1e-5)
    assert (run.logits("merging-3") - run.logits("plain")).abs().max() > 1e-3
    assert run.found_clips["videos"] == [0, 1, 2, 3, 4, 5, 7] and "5b.mp4" in run.found_clips["errors"]["6"]
    assert run.num_bytes == 7 * 8 * 3 * 24 * 40, "clips are kept as bytes"


def test_clips_of_another_kind_than_bytes_are_scaled_alike(tmp_path, videos, processor):
    """transformers' offset, no rescaling, and a filter that the decoder does not have."""
    settings = ({"offset": True, "rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"resample": 3})
    for number, changes in enumerate(settings):
        other = ViViTVideoProcessor(**{**processor.settings.__dict__, **changes})
        run = finish(run_in(tmp_path / str(number), videos[:3], other))
        expected = torch.cat([other(video)["pixel_values"] for video in videos[:3]])
        assert torch.equal(run._pixel_values(range(3)), expected)


def test_rows_hold_what_the_logits_say(tmp_path, videos, processor):
    run = finish(run_in(tmp_path, videos, processor))
    targets = [torch.tensor(index % 5) for index in range(len(videos))]
    results = tuning_results(run, targets)
    plain, exact, merged = results.rows
    assert [row.name for row in results.rows] == ["plain", "exact", "merging-3"]
    assert (plain.agreement, plain.largest_change, plain.speed) == (1, 0, 1)
    assert exact.agreement == 1 and exact.largest_change < 1e-5
    changes = (run.logits("merging-3").softmax(-1) - run.logits("plain").softmax(-1)).abs()
    assert merged.largest_change == pytest.approx(float(changes.max()))
    assert merged.mean_change == pytest.approx(float(changes.mean()))
    of_clips = torch.tensor([targets[index] for index in run.found_clips["videos"]])
    assert merged.accuracy == pytest.approx(float((run.logits("merging-3").argmax(-1) == of_clips).float().mean()))
    top = run.logits("plain").softmax(-1).sort(dim=-1).values
    torch.testing.assert_close(results.margins, top[:, -1] - top[:, -2])
    assert all(row.clips_per_second > 0 and row.speed > 0 and row.megabytes > 0 for row in results.rows)


def test_few_clips_are_measured_in_several_rounds(tmp_path, videos, processor):
    run = finish(run_in(tmp_path, videos[:2], processor))
    assert run.num_rounds == 5 and len(list(tmp_path.glob("round-*"))) == 5 and len(run.logits("exact")) == 2


def test_memory_counts_weights_in_every_layout_and_the_tensors_of_a_batch(tmp_path, videos, processor):
    model = make_model(tiny_config("spatio_temporal"))
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    assert held_megabytes(model) == pytest.approx(weights)
    run = finish(run_in(tmp_path, videos, processor, model=model))
    clips = 3 * 8 * 3 * 24 * 40 * 4 / 1e6
    assert weights < run.prepared("plain").megabytes < weights + 10 * clips
    if has_vnni():
        optimization.optimize(model, int8=True, calibration=torch.randn(2, 8, 3, 24, 40))
        assert held_megabytes(model) > 1.15 * weights


@pytest.mark.parametrize("attention_type", ["factorised_encoder", "factorised_dot_product_attention"])
def test_bfloat16_runs_on_a_copy(tmp_path, videos, processor, attention_type):
    model = make_model(tiny_config(attention_type))
    run = finish(run_in(tmp_path, videos, processor, [Candidate("bfloat16", torch.bfloat16)], model))
    assert model.dtype == torch.float32
    changes = (run.logits("bfloat16") - run.logits("plain")).abs()
    assert 0 < changes.max() < 0.2


def test_a_setting_that_fails_is_a_row_and_the_others_go_on(tmp_path, videos, processor, monkeypatch):
    monkeypatch.setattr(optimization, "check_int8", lambda *arguments: None)

    def fail(*arguments):
        raise NonFiniteError("the calibration overflows")

    monkeypatch.setattr(optimization, "quantise_layers", fail)
    run = finish(run_in(tmp_path, videos, processor, [EXACT, Candidate("int8", int8=True), MERGING]))
    _, _, int8, merged = tuning_results(run).rows
    assert int8.error == "the calibration overflows" and np.isnan(int8.speed)
    assert merged.error is None and merged.speed > 0 and run.is_finished()


def test_a_model_that_computes_nan_ends_the_run(tmp_path, videos, processor):
    model = make_model(tiny_config("spatio_temporal"))
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"classifier\.bias"):
        finish(run_in(tmp_path, videos, processor, model=model))


def test_no_readable_video_is_an_error(tmp_path, videos, processor):
    with pytest.raises(ValueError, match=r"None of the videos can be read: .*5b\.mp4"):
        finish(run_in(tmp_path, [video for video in videos if "5b" in video], processor))


def test_clips_of_another_size_are_left_out(tmp_path, videos):
    uncropped = ViViTVideoProcessor(num_frames=8, frame_stride=1, do_resize=False, do_center_crop=False)
    with pytest.raises(ValueError, match=r"expects clips of \(8, 24, 40\).*got \(8, 32, 48\)"):
        finish(run_in(tmp_path, videos, uncropped))


# Going on


def counting(monkeypatch):
    """The names of the settings that run from now on."""
    timed, found = TuningRun._timed, []

    def counted(self, name, pixel_values):
        found.append(name)
        return timed(self, name, pixel_values)

    monkeypatch.setattr(TuningRun, "_timed", counted)
    return found


def test_nothing_is_measured_twice(tmp_path, videos, processor, monkeypatch):
    finish(run_in(tmp_path, videos, processor))
    found, again = counting(monkeypatch), run_in(tmp_path, videos, processor)
    again.start(overwrite=False)
    assert again.is_finished()
    list(again.measure())
    assert not found and [row.name for row in tuning_results(again).rows] == ["plain", "exact", "merging-3"]


def test_an_interrupted_run_goes_on_with_the_round_that_is_missing(tmp_path, videos, processor, monkeypatch):
    run = run_in(tmp_path, videos, processor)
    run.start(overwrite=False)
    for steps in (run.decode(0), run.prepare()):
        list(steps)
    steps = run.measure()
    for _ in range(4):  # the second round has begun
        next(steps)
    found = counting(monkeypatch)
    finish(run_in(tmp_path, videos, processor))
    assert found == ["plain", "exact", "merging-3"] * 4


def test_a_new_setting_is_measured_beside_the_plain_model_alone(tmp_path, videos, processor, monkeypatch):
    finish(run_in(tmp_path, videos, processor))
    found = counting(monkeypatch)
    run = finish(run_in(tmp_path, videos, processor, [EXACT, MERGING, Candidate("merging-5", merge_tokens=5)]))
    assert found == ["plain", "merging-5"] * 5 and len(tuning_results(run).rows) == 4


def test_a_damaged_round_is_measured_again(tmp_path, videos, processor, monkeypatch):
    finish(run_in(tmp_path, videos, processor))
    path = tmp_path / "round-0001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = counting(monkeypatch)
    finish(run_in(tmp_path, videos, processor))
    assert found == ["plain", "exact", "merging-3"]


@pytest.mark.parametrize("change", ["weights", "videos", "batch_size", "torch"])
def test_measurements_of_another_run_are_refused_or_deleted(tmp_path, videos, processor, change, monkeypatch):
    finish(run_in(tmp_path, videos, processor))
    model = make_model(tiny_config("spatio_temporal"), seed=1 if change == "weights" else 0)
    other = run_in(tmp_path, videos[1:] if change == "videos" else videos, processor, model=model)
    if change == "batch_size":
        other.batch_size = 2
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(OtherRunError, match=rf"holds another run \({change} .* -> .*--overwrite"):
        other.start(overwrite=False)
    assert list(tmp_path.glob("round-*"))
    other.start(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, videos, processor):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OtherRunError, match=r"run\.json is missing"):
            run_in(tmp_path, videos, processor).start(overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_removed(tmp_path, videos, processor):
    (tmp_path / ".run.json.17.unfinished").write_text("{")
    finish(run_in(tmp_path, videos, processor))
    assert not list(tmp_path.glob(".*"))


def test_other_videos_than_before_the_interruption_are_refused(tmp_path, videos, processor):
    run = run_in(tmp_path, videos, processor)
    run.start(overwrite=False)
    list(run.decode(0))
    found = json.loads((tmp_path / "clips.json").read_text())
    (tmp_path / "clips.json").write_text(json.dumps({**found, "videos": found["videos"][1:]}))
    with pytest.raises(OtherRunError, match="other videos could be read"):
        list(run_in(tmp_path, videos, processor).decode(0))


# The choice


def results_of(*figures):
    """Rows of (name, speed, agreement)."""
    rows = [TunedRow(name, 10 * speed, speed, 1.0, agreement, 0.1, 0.01) for name, speed, agreement in figures]
    return TuningResults(tuple(rows), torch.linspace(0, 1, 101))


ROWS = (("plain", 1, 1), ("exact", 1.2, 1), ("int8", 2, 0.995), ("merging-4", 3, 0.99), ("merging-8", 4, 0.97))


def test_the_fastest_that_agrees_is_chosen():
    results = results_of(*ROWS)
    assert results.choose(0.99).name == "merging-4" and results.choose(0.991).name == "int8"
    assert results.choose(0.5).name == "merging-8" and results.choose(1.0).name == "exact"
    assert results.choose(0.99, "merging-8").name == "merging-8", "a name is a name"


def test_a_setting_with_an_error_is_not_chosen():
    broken = TunedRow("int8", *[float("nan")] * 6, error="it overflows")
    results = TuningResults((*results_of(*ROWS[:2]).rows, broken), torch.zeros(3))
    assert results.choose(0.0).name == "exact"
    with pytest.raises(ValueError, match="'int8' cannot be chosen: it overflows"):
        results.choose(0.0, "int8")


def test_few_clips_show_little():
    """The rule of three: if none of n differs, at most 3 in n do."""
    assert least_agreement(300) == pytest.approx(1 - 3 / 300, abs=1e-4)
    assert needed_clips(0.99) == 299 and least_agreement(299) >= 0.99 > least_agreement(298)


def test_margins_are_summed_up_by_quantiles():
    found = results_of(*ROWS).margin_quantiles
    assert found[0.05] == pytest.approx(0.05) and found[0.5] == pytest.approx(0.5)


def test_the_picture_shows_every_row(tmp_path):
    draw_trade_off(results_of(*ROWS), tmp_path / "a.png", 0.99, "merging-4", "a title")
    draw_trade_off(results_of(*ROWS[:2]), tmp_path / "b.png", 0.99, None, r"$\frac{$ läuft")
    with Image.open(tmp_path / "a.png") as many, Image.open(tmp_path / "b.png") as few:
        assert many.size == few.size and min(many.size) > 400
        colours = [{colour for _, colour in one.convert("RGB").getcolors(1 << 24)} for one in (many, few)]
    for colour in ((0xEE, 0x66, 0x77), (0x22, 0x88, 0x33)):  # int8 and merging; the former is also the median's
        assert colour in colours[0]
    assert (0x22, 0x88, 0x33) not in colours[1]


# The place


@pytest.fixture
def folder(tmp_path):
    make_model(tiny_config("spatio_temporal")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_setting_changes_nothing_else_in_the_configuration(folder, processor, videos, tmp_path):
    before = json.loads((folder / "config.json").read_text())
    model = ViViTForVideoClassification.from_pretrained(folder)
    run = finish(run_in(tmp_path / "run", videos, processor, model=model.eval()))
    setting = run.prepared("merging-3").setting.to_dict(run.weights, CPU)
    write_field(folder, "optimization", setting)
    after = json.loads((folder / "config.json").read_text())
    assert after["optimization"] == json.loads(json.dumps(setting)) and after == {**before, "optimization": setting}
    assert optimization.optimize(ViViTForVideoClassification.from_pretrained(folder)).setting == "merging-3"
    write_field(folder, "optimization", None)
    assert json.loads((folder / "config.json").read_text()) == before


def test_places_that_cannot_keep_a_setting_are_named_with_the_way_out(folder, tmp_path):
    assert check_place(str(folder), None, False) == folder and (folder / "tuning").is_dir()
    with pytest.raises(ValueError, match=r"google/vivit is no folder.*--output FOLDER"):
        check_place("google/vivit", None, False)
    assert check_place("google/vivit", tmp_path / "copy", False) == tmp_path / "copy"
    with pytest.raises(ValueError, match="holds another model"):
        check_place("google/vivit", folder, False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vivit"}))
    with pytest.raises(ValueError, match=r"type 'vivit', whose config\.json cannot keep it: give --output"):
        check_place(str(folder), None, False)
    assert check_place(str(folder), None, True) == folder
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        check_place(str(folder), None, False)
    (tmp_path / "copy" / "tuning").rmdir()
    (tmp_path / "copy" / "tuning").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written to \(File exists\): give another --output"):
        check_place("google/vivit", tmp_path / "copy", True)
