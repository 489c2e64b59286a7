"""The threads that decode and classify, without HTTP."""

import io
import threading
import time

import pytest
import torch
from tiny_models import case_config, make_model
from video_files import write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import predict_videos, unknown
from vivit_hf.inference.finite_outputs import NonFiniteError
from vivit_hf.inference.prediction import Answers
from vivit_hf.serving import Predictor, ServingLimits
from vivit_hf.serving.metrics import Metrics
from vivit_hf.serving.predictor import Job


VIEWS = {"num_clips": 2, "num_crops": 3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    sizes = [(48, 64), (64, 48), (30, 50), (48, 64), (80, 80)]
    paths = []
    for number, (height, width) in enumerate(sizes):
        paths.append(write_video(folder / f"{number}.mp4", num_frames=20 + number, height=height, width=width))
    return paths


def make_processor(**settings):
    return ViViTVideoProcessor(num_frames=8, frame_stride=1, size=30, crop_size=(24, 40), **settings)


def make_predictor(model, processor=None, **settings):
    settings = {**VIEWS, "batch_size": 24, "num_decoders": 2, "limits": ServingLimits(), **settings}
    return Predictor(model, processor or make_processor(), metrics=settings.pop("metrics", Metrics()), **settings)


def job_of(path, seconds=60.0):
    return Job({"bytes": io.BytesIO(path.read_bytes()), "path": path.name}, time.monotonic() + seconds)


def answers(predictor, jobs):
    predictor.start()
    for job in jobs:
        predictor.submit(job)
    predictor.stop()
    return [job.future.result(timeout=0) for job in jobs]


def test_answers_are_those_of_predict_videos(variant, videos):
    model = make_model(case_config(variant))
    expected = [one.probabilities for one in predict_videos(model, make_processor(), videos, **VIEWS)]
    found = answers(make_predictor(model), [job_of(path) for path in videos])
    for one, probabilities in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(probabilities, abs=1e-5)


def test_videos_of_several_requests_go_through_the_model_together(videos):
    model, metrics = make_model(case_config("factorised_encoder")), Metrics()
    predictor, jobs = make_predictor(model, metrics=metrics), [job_of(path) for path in videos * 3]
    go_on, forward = threading.Event(), model.forward

    def slow(*args, **kwargs):
        if threading.current_thread().name == "model":
            go_on.wait(20)
        return forward(*args, **kwargs)

    model.forward = slow
    threading.Timer(1.0, go_on.set).start()
    answers(predictor, jobs)
    (counted,) = [
        sample.value
        for sample in metrics.batch_videos.collect()[0].samples
        if sample.name == "vivit_batch_videos_count"
    ]
    assert counted < len(jobs)


def test_a_broken_video_spoils_no_other(videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    found = answers(
        make_predictor(make_model(case_config("spatio_temporal"))),
        [job_of(path) for path in (videos[0], tmp_path / "broken.mp4", videos[1])],
    )
    assert [one.error is None for one in found] == [True, False, True]
    assert found[1].error.startswith("Cannot read broken.mp4: ")


def test_numbers_that_are_not_finite_spoil_no_other_video(videos, monkeypatch):
    real = Answers.of_decoded
    marked = make_processor()(videos[2], **VIEWS)["pixel_values"]

    def failing(self, items):
        if any(torch.equal(one.pixel_values, marked) for one in items):
            raise NonFiniteError("overflow")
        return real(self, items)

    monkeypatch.setattr(Answers, "of_decoded", failing)
    found = answers(make_predictor(make_model(case_config("spatio_temporal"))), [job_of(path) for path in videos])
    assert [one.error for one in found] == [None, None, "overflow", None, None]


def test_the_rule_for_unknown_videos_is_read_once(videos, monkeypatch):
    model = ViViTForVideoClassification.from_pretrained(demo_model_path()).eval()
    processor = ViViTVideoProcessor.from_pretrained(demo_model_path())
    paths = [demo_model_path() / "samples" / "up_left.mp4", *videos]
    expected = [one.unknown for one in predict_videos(model, processor, paths, **VIEWS)]
    assert not expected[0] and any(expected)
    read, calls = unknown.read_known_features, []
    monkeypatch.setattr(unknown, "read_known_features", lambda *arguments: calls.append(1) or read(*arguments))
    predictor = make_predictor(model, processor, batch_size=1)  # a batch for each video
    assert [one.unknown for one in answers(predictor, list(map(job_of, paths)))] == expected and len(calls) == 1


def test_a_model_with_a_damaged_rule_does_not_start(tmp_path):
    model = ViViTForVideoClassification.from_pretrained(demo_model_path()).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "known_features.safetensors").write_bytes(b"damaged")
    broken = ViViTForVideoClassification.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"known_features\.safetensors"):
        make_predictor(broken, ViViTVideoProcessor.from_pretrained(demo_model_path()))


def test_a_model_that_is_broken_does_not_start(videos):
    model = make_model(case_config("spatio_temporal"))
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"classifier\.weight"):
        make_predictor(model)


def test_an_error_of_the_model_is_that_of_one_answer(videos):
    model = make_model(case_config("spatio_temporal"))
    predictor = make_predictor(model)
    predictor.start()
    forward, failures = model.forward, iter([True])

    def failing(*args, **kwargs):
        if next(failures, False):
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    model.forward = failing
    first, second = job_of(videos[0]), job_of(videos[1])
    predictor.submit(first)
    with pytest.raises(RuntimeError, match="out of memory"):
        first.future.result(timeout=60)
    predictor.submit(second)
    assert second.future.result(timeout=60).error is None and predictor.is_alive()
    predictor.stop()
    assert not predictor.is_alive()


def test_jobs_that_nobody_waits_for_are_left_out_and_their_files_closed(videos):
    predictor = make_predictor(make_model(case_config("spatio_temporal")))
    given_up, late, good = job_of(videos[0]), job_of(videos[1], seconds=-1.0), job_of(videos[2])
    given_up.give_up()
    assert given_up.source["bytes"].closed
    predictor.start()
    for job in (given_up, late, good):
        predictor.submit(job)
    predictor.stop()
    assert given_up.future.cancelled() and late.future.cancelled() and good.future.result(timeout=0).error is None
    assert all(job.source["bytes"].closed for job in (given_up, late, good))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_bytes": 0}, "`max_bytes=0` must be a whole number of at least 1"),
        ({"max_requests": 1.5}, "`max_requests=1.5` must be a whole number"),
        ({"deadline": float("inf")}, "`deadline=inf` must be a number above 0"),
        ({"max_requests_per_client": 0}, "`max_requests_per_client=0` must be"),
        ({"allow_private_addresses": 1}, "`allow_private_addresses=1` must be"),
    ],
)
def test_limits_are_checked(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ServingLimits(**fields)


def test_views_that_the_processor_cannot_make_are_refused():
    with pytest.raises(ValueError, match="num_crops"):
        make_predictor(make_model(case_config("spatio_temporal")), make_processor(do_center_crop=False))
