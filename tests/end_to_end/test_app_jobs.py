"""The jobs of the page, without the page: what they answer, and which files, models and times they refuse."""

import importlib

import pytest
import torch
from moving_shapes import MOTIONS
from served_page import DEMO, SPACE, TIMEOUT
from tuned_models import tune_folder
from video_files import damage_packet, write_video as write_any_video

from vivit_hf import NonFiniteError, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.data.labels import to_probabilities


pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("jobs")


@pytest.fixture
def answers(jobs):
    return importlib.import_module("answers")


def make_job(jobs, folder, path, model=DEMO, task="classify", **limits):
    models = model if isinstance(model, tuple) else (model,)
    made = jobs.Limits(**{"max_seconds": 60, "max_megabytes": 10, "job_seconds": TIMEOUT, **limits})
    return jobs.Job(task, str(path), models, made, folder=str(folder))


def test_a_job_that_takes_too_long_ends_with_its_process_and_the_next_is_answered(jobs, tmp_path):
    worker = jobs.Worker()
    (part,) = worker.run(make_job(jobs, tmp_path, SPACE / "clips" / "up_left.mp4", job_seconds=0.2))
    assert part["error"].startswith("This took longer than 0.2 seconds and was stopped") and worker._process is None
    job = make_job(jobs, tmp_path, SPACE / "clips" / "up_left.mp4")
    parts = list(worker.run(job))
    assert parts[-1] == {"end": True} and any("what" in part for part in parts)
    process = worker._process
    (*_, last) = worker.run(make_job(jobs, tmp_path, SPACE / "README.md"))
    assert last["error"].startswith("Cannot read README.md") and worker._process is process
    process.kill()
    process.join()
    assert list(worker.run(job))[-1] == {"end": True}
    worker.stop()


def test_labels_of_parts_are_explained_if_the_whole_has_none(jobs, answers, tmp_path):
    samples = demo_model_path() / "samples"
    found = {}
    for name in ("all", "up_left"):
        parts = answers.answer(make_job(jobs, tmp_path, samples / f"{name}.mp4"))
        (found[name],) = [part for part in parts if "segments" in part]
    assert {*MOTIONS} <= {label for _, _, label, _ in found["all"]["segments"]} and found["up_left"]["note"] == ""
    story = importlib.import_module("story")
    shown = story.when_html(found["all"]["segments"], found["all"]["note"])
    assert "<p>As a whole the video is &#x27;none of these&#x27;, yet parts of it show a label" in shown


def test_the_clip_that_decided_is_the_one_that_is_explained(jobs, answers, tmp_path):
    """In all.mp4 the motion changes: the clip in the middle is called otherwise than the video."""
    video = demo_model_path() / "samples" / "all.mp4"
    *_, first, _, last = answers.answer(make_job(jobs, tmp_path, video))
    assert first["what"] == {"answers": ["none of these"], "rows": [], "unknown": True}  # no training video has all
    loaded = answers.load_model(DEMO)
    found = answers.classify(loaded, video, {"num_clips": 4, "num_crops": 3})
    with torch.no_grad():
        of_views = to_probabilities(loaded.model(found.views.pixel_values).logits, loaded.answers.label_map)
    assert found.place == int(of_views[:, found.class_index].argmax())
    torch.testing.assert_close(found.score, float(of_views[found.place, found.class_index]), rtol=1e-4, atol=1e-5)
    assert last["caption"].startswith(f"Clip {found.place // 3 + 1} of 4, crop {found.place % 3 + 1} of 3, from ")
    assert f"it has the highest score for the nearest label, {found.label!r}" in last["caption"]
    assert f"Its nearest label is {found.label!r}" in first["sure"][0]
    assert "The demo model only knows shapes that move along a diagonal" in last["status"]


@pytest.fixture(scope="module")
def sample():
    return (SPACE / "clips" / "up_left.mp4").read_bytes()


UPLOADS = {
    "empty": (lambda sample: b"", "Cannot read upload.mp4: it is empty"),
    "text": (lambda sample: b"not a video " * 99, "Cannot read upload.mp4: "),
    "cut off": (lambda sample: sample[: len(sample) // 3], "Cannot read upload.mp4: .* It may be damaged"),
    "too large": (lambda sample: sample + bytes(10_000_000), "upload.mp4 is too large: it has 10.0 MB"),
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_uploads_that_cannot_be_used_are_named(jobs, answers, kind, sample, tmp_path):
    make, message = UPLOADS[kind]
    path = tmp_path / "upload.mp4"
    path.write_bytes(make(sample))
    with pytest.raises(jobs.UserError, match=message):
        next(answers.answer(make_job(jobs, tmp_path, path)))


def test_an_upload_that_is_too_long_is_named(jobs, answers, tmp_path):
    video = demo_model_path() / "samples" / "all.mp4"
    with pytest.raises(jobs.UserError, match="is too long: it lasts 16 seconds, and this page accepts up to 3 seconds"):
        next(answers.answer(make_job(jobs, tmp_path, video, max_seconds=3)))


def test_an_upload_with_too_many_frames_is_named(jobs, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MOST_FRAMES_PER_SECOND", 1)
    with pytest.raises(jobs.UserError, match="is too long or its pictures are too large"):
        next(answers.answer(make_job(jobs, tmp_path, SPACE / "clips" / "up_left.mp4", max_seconds=3)))


def test_a_damaged_upload_is_answered_from_what_is_left(jobs, answers, tmp_path):
    path = write_any_video(tmp_path / "damaged.mp4", num_frames=60, options={"bf": "0"})
    damage_packet(path, 30)
    parts = list(answers.answer(make_job(jobs, tmp_path, path)))
    assert parts[-1]["pictures"] and any("what" in part for part in parts)


def test_pictures_too_large_in_all_are_refused_before_they_are_decoded(jobs, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MOST_PIXELS", 24 * 80 * 96 - 1)
    with pytest.raises(jobs.UserError, match="24 frames of 96 x 80 are more than"):
        answers.check_clip(str(SPACE / "clips" / "up_left.mp4"), jobs.Limits())


def test_the_page_runs_the_exact_model_and_says_so(jobs, answers, tmp_path):
    for cls in (ViViTForVideoClassification, ViViTVideoProcessor):
        cls.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    clip = SPACE / "clips" / "up_left.mp4"
    *_, before = answers.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path)))
    tune_folder(tmp_path, merge_tokens=1)
    answers.load_model.cache_clear()
    *_, last = answers.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path)))
    assert last["status"] == f"{before['status']} {answers.EXACT_NOTE}" and last["caption"] == before["caption"]


def test_models_that_would_stall_the_page_or_have_no_answer_are_named(jobs, answers, tmp_path):
    model, processor = (
        cls.from_pretrained(demo_model_path()) for cls in (ViViTForVideoClassification, ViViTVideoProcessor)
    )
    for name in ("fast", "nan"):
        processor.frames_per_second = 3e7 if name == "fast" else None
        if name == "nan":
            torch.nn.init.constant_(model.classifier.weight, float("nan"))
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    clip = SPACE / "clips" / "up_left.mp4"
    for name, message in (
        ("fast", "Cannot load the model .* `frames_per_second=30000000.0` .* at most 1000"),
        ("nan", "NaN or infinite"),
    ):
        with pytest.raises((jobs.UserError, NonFiniteError), match=message):
            list(answers.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path / name))))
