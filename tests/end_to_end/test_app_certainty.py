"""What the page says about how sure a model is: calibrated or not, one label per video, several, groups and values."""

import importlib

import pytest
from served_page import SPACE
from tiny_models import make_model, tiny_config
from video_files import write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.calibration_vivit import answer_fingerprint


VIEWS = {"num_clips": 2, "num_crops": 3}
CALIBRATION = {
    "temperatures": [2.0],
    "num_files": 40,
    "num_units": 40,
    **VIEWS,
    "averaging": "logits",
}
KINDS = {
    "single": {"id2label": dict(enumerate("abcde"))},
    "several": {"id2label": dict(enumerate("abcde")), "problem_type": "multi_label_classification"},
    "groups": {
        "id2label": dict(enumerate(["noun: pan", "noun: lid", "verb: cut", "verb: wash", "verb: dry"])),
        "label_groups": {"noun": 2, "verb": 3},
    },
    "values": {"id2label": {0: "speed", 1: "angle"}, "problem_type": "regression"},
}


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("jobs")


@pytest.fixture
def answers(jobs):
    return importlib.import_module("answers")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=30)


def save(folder, kind, policy="repeat_last", **fields):
    model = make_model(tiny_config("factorised_encoder", **KINDS[kind], **fields))
    if model.config.calibration is not None:
        model.config.calibration["weights"] = answer_fingerprint(model)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 40}, "crop_size": (24, 40), "short_video_policy": policy}
    ViViTVideoProcessor(num_frames=8, frame_stride=1, **sizes).save_pretrained(folder)
    return str(folder)


def told(answers, name, video, job_seconds=1000.0):
    """What the page says about a video, and how sure it is, in one text."""
    loaded = answers.load_model(name)
    found = answers.classify(loaded, video, answers.choose_views(loaded, answers.Limits(job_seconds=job_seconds)))
    return answers.what(loaded, found), " ".join(answers.sentences(loaded, found)), found


def test_a_model_that_was_not_calibrated_says_so(answers, tmp_path, video):
    what, text, _ = told(answers, save(tmp_path, "single"), video)
    assert "The scores are not calibrated" in text and "temperature" not in text and "coverage" not in text
    assert "The model cannot say 'none of these': it gives a label to every video" in text
    assert "The model saw 4 clips x 1 crop" in text
    assert [row["label"] for row in what["rows"] if row["is_given"]] == what["answers"]


def test_a_calibrated_model_answers_from_its_views_and_names_its_label_set(answers, tmp_path, video):
    calibration = {**CALIBRATION, "sets": {"0.8": [0.0], "0.95": [1.0]}}
    what, text, found = told(answers, save(tmp_path, "single", calibration=calibration), video)
    assert found.num_views == VIEWS and "The model saw 2 clips x 3 crops" in text and "logits averaged" in text
    assert "calibrated on 40 labelled files" in text and "The temperature 2.00 makes scores less sure" in text
    assert f"The label set at 95% coverage is '{what['answers'][0]}': about 95 in 100" in text


def test_temperatures_below_1_make_scores_surer_and_at_1_change_nothing(answers, tmp_path, video):
    for temperature, sentence in ((0.5, "The temperature 0.50 makes scores surer"), (1.0, None)):
        calibration = {**CALIBRATION, "temperatures": [temperature]}
        _, text, _ = told(answers, save(tmp_path / str(temperature), "single", calibration=calibration), video)
        assert sentence in text if sentence else "temperature" not in text


def test_several_labels_are_given_from_their_thresholds_on(answers, tmp_path, video):
    name = save(tmp_path, "several", calibration={**CALIBRATION, "thresholds": [0.0, 1.0, 0.0, 1.0, 1.0]})
    what, text, _ = told(answers, name, video)
    assert sorted(what["answers"]) == ["a", "c"] and {row["label"] for row in what["rows"][:2]} == {"a", "c"}
    assert "Each label is given from its own threshold on" in text and "set at" not in text
    what, text, _ = told(answers, save(tmp_path / "plain", "several"), video)
    assert {row["threshold"] for row in what["rows"]} == {0.5} and "a score of 50% on" in text
    assert what["answers"] == [row["label"] for row in what["rows"] if row["score"] >= 0.5]


def test_groups_have_an_answer_a_temperature_and_a_set_each(answers, tmp_path, video):
    calibration = {**CALIBRATION, "temperatures": [2.0, 0.5], "sets": {"0.9": [0.0, 1.0]}}
    what, text, _ = told(answers, save(tmp_path, "groups", calibration=calibration), video)
    noun, verb = what["answers"]
    assert noun.startswith("noun: ") and verb.startswith("verb: ") and len(what["rows"]) == 5
    assert "noun: the temperature 2.00" in text and "verb: the temperature 0.50" in text
    assert "noun: the label set at 90% coverage is 'pan', 'lid'" in text or "is 'lid', 'pan'" in text
    assert f"verb: the label set at 90% coverage is {verb.removeprefix('verb: ')!r}:" in text


def test_values_have_no_probabilities(answers, tmp_path, video):
    what, text, _ = told(answers, save(tmp_path, "values"), video)
    assert text.startswith("The model gives values, not labels") and "calibrated" not in text
    assert {row["label"] for row in what["rows"]} == {"speed", "angle"} and all(r["is_value"] for r in what["rows"])


def test_a_model_too_slow_for_its_views_takes_fewer_and_says_so(answers, tmp_path, video):
    name = save(tmp_path, "single", calibration={**CALIBRATION, "sets": {"0.9": [0.5]}})
    seconds = answers.load_model(name).seconds
    _, text, found = told(answers, name, video, job_seconds=3 * 5 * seconds)  # a third of it is for five clips
    assert found.num_views == {"num_clips": 4, "num_crops": 1}
    assert "calibrated on 2 clips x 3 crops per video, which would take too long here. With 4 clips x 1 crop" in text
    assert "coverage" not in text  # its promise holds for the views of the calibration
    _, _, found = told(answers, name, video, job_seconds=seconds)
    assert found.num_views == {"num_clips": 1, "num_crops": 1}


def test_a_calibration_with_too_many_views_is_cut_down(answers, tmp_path, video):
    name = save(tmp_path, "single", calibration={**CALIBRATION, "num_clips": 10**6})
    _, _, found = told(answers, name, video, job_seconds=1e12)
    assert found.num_views == {"num_clips": 4, "num_crops": 1}


def test_a_clip_with_masked_frames_is_explained_by_its_visible_ones(jobs, answers, tmp_path):
    short = write_video(tmp_path / "short.mp4", num_frames=5)
    name = save(tmp_path / "model", "single", policy="mask")
    job = jobs.Job("classify", str(short), (name,), jobs.Limits(), folder=str(tmp_path))
    *_, last = answers.answer(job)
    assert "from 0.0 to 0.2 s" in last["caption"] and last["pictures"]
