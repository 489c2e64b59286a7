"""Short videos with `short_video_policy="mask"`: every way to run a model on videos passes their masks on."""

import time

import numpy as np
import pytest
import torch
from command_line import invoke
from optimized_models import assert_close, make_pair
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model, tiny_config
from transformers import pipeline
from video_files import moving_frames, write_video

from vivit_hf import StreamingClassifier, ViViTVideoProcessor
from vivit_hf.inference import embed_videos, optimize, restore
from vivit_hf.inference.clips import predict_clips
from vivit_hf.inference.features import step_frames
from vivit_hf.inference.prediction import predict_each, predict_videos
from vivit_hf.inference.timeline import file_windows
from vivit_hf.inference.tuning import TuningRun
from vivit_hf.inference.tuning_candidates import Candidate
from vivit_hf.serving.metrics import Metrics
from vivit_hf.serving.predictor import Job, Predictor
from vivit_hf.serving.serving_limits import ServingLimits


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CASES = [*ATTENTION_TYPES, "average_pool_baseline", "uniform_frames_factorised_encoder", "temporal_attention_pooling"]
VIEWS = {"num_clips": 3, "num_crops": 3}
FRAMES = {"long": 40, "short": 11, "odd": 5, "single": 1}  # clips have 8 at stride 2


def make_processor(config, **settings):
    sizes = {"size": 48, "crop_size": config.frame_size, "frame_stride": 2}
    return ViViTVideoProcessor(**{"num_frames": config.num_frames, "short_video_policy": "mask", **sizes, **settings})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 15 visible frames and more, 6, 3 and 1; one of them is upright."""
    folder = tmp_path_factory.mktemp("videos")
    sizes = {"short": (96, 64)}
    made = {name: moving_frames(count, *sizes.get(name, (64, 96))) for name, count in FRAMES.items()}
    return [str(write_video(folder / f"{name}.mp4", frames)) for name, frames in made.items()]


@torch.no_grad()
def masked_logits(model, processor, video, **views):
    """Logits of the plain model, a view at a time: (views, num_labels)."""
    features = processor(video, **views)
    pairs = zip(features["pixel_values"], features["frame_mask"], strict=True)
    return torch.cat([model(clip[None], frame_mask=mask[None]).logits for clip, mask in pairs])


@pytest.fixture(params=CASES)
def model(request):
    return make_model(case_config(request.param))


# Videos


def test_videos_of_all_lengths_share_batches(model, videos):
    processor = make_processor(model.config, num_crops=1)
    views = {"num_clips": 1 if model.config.embedding_type == "uniform_frame_sampling" else 3, "num_crops": 3}
    readable = videos[:-1] if model.config.embedding_type == "uniform_frame_sampling" else videos
    found = list(predict_videos(model, processor, readable, **views, averaging="logits", batch_size=30))
    plain = make_processor(model.config, short_video_policy="repeat_last")
    repeated = list(predict_videos(model, plain, readable, **views, averaging="logits"))
    for video, one, other in zip(readable, found, repeated, strict=True):
        expected = masked_logits(model, processor, video, **views).mean(dim=0)
        torch.testing.assert_close(torch.from_numpy(one.logits), expected, **CLOSE)
        if video in videos[:2]:  # the mean of equal frames is that frame
            assert np.allclose(one.logits, other.logits, **CLOSE) == (video == videos[0])


def test_a_video_of_which_the_model_takes_no_frame_is_shown_whole(videos, tmp_path):
    """A model that samples frames 2, 3, 5 and 6 of a clip takes nothing of a video with one frame but its repeats."""
    model = make_model(case_config("uniform_frames"))
    processor = make_processor(model.config)
    plain = make_processor(model.config, short_video_policy="repeat_last")
    found = list(predict_videos(model, processor, videos))
    expected = list(predict_videos(model, plain, videos[-1:]))
    np.testing.assert_allclose(found[-1].logits, expected[0].logits, **CLOSE)
    assert all(one.error is None for one in found)
    folder = tmp_path / "model"
    for one in (model, processor):
        one.save_pretrained(folder)
    scores = {
        entry["label"]: entry["score"] for entry in pipeline("video-classification", model=str(folder))(videos[-1])
    }
    named = dict(zip(model.config.id2label.values(), expected[0].probabilities, strict=True))
    assert scores == pytest.approx({name: named[name] for name in scores}, abs=1e-6)
    pairs = [next(embed_videos(model, one, videos[-1:])).vectors for one in (processor, plain)]
    np.testing.assert_allclose(*pairs, **CLOSE)
    result = invoke("explain", videos[-1], "--model", folder, "--output", tmp_path / "seen.png")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("position", ["tail", "head", "middle"])
@torch.no_grad()
def test_clips_that_overlap_share_only_visible_steps(position):
    model = make_model(tiny_config("factorised_encoder"))
    clips, ids = make_clips(model.config, 1), np.arange(8)[None]
    clips, ids = clips.repeat(3, 1, 1, 1, 1), ids.repeat(3, axis=0)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1:, {"tail": slice(5, 8), "head": slice(0, 3), "middle": slice(2, 5)}[position]] = False
    expected = model(clips, frame_mask=mask).logits
    hidden = clips.masked_fill(~mask[:, :, None, None, None], float("nan"))
    torch.testing.assert_close(predict_clips(model, hidden, ids, 2, mask), expected, **CLOSE)
    torch.testing.assert_close(predict_clips(model, hidden, None, 2, mask), expected, **CLOSE)


def test_masked_steps_are_not_encoded_and_equal_clips_are_encoded_once(videos):
    """3 equal clips of 3 visible frames, 2 steps, instead of 3 clips of 4 steps."""
    model = make_model(tiny_config("factorised_encoder"))
    encoded, encode = [], model.vivit.encode_space

    def counted(tokens, *arguments, **options):
        encoded.append(tuple(tokens.shape[:2]))
        return encode(tokens, *arguments, **options)

    model.vivit.encode_space = counted
    list(predict_videos(model, make_processor(model.config), videos[2:3], num_clips=3))
    assert encoded == [(2, 1)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_those_of_visible_steps(model, videos, num_workers):
    processor, config = make_processor(model.config), model.config
    is_uniform = config.embedding_type == "uniform_frame_sampling"
    videos = videos[:-1] if is_uniform else videos
    options = {"batch_size": 30, "num_workers": num_workers}
    vectors = [one.vectors for one in embed_videos(model, processor, videos, **VIEWS, **options)]
    steps = list(embed_videos(model, processor, videos, per_step=True, num_clips=2, num_crops=3, **options))
    for video, vector, found in zip(videos, vectors, steps, strict=True):
        features = processor(video, **VIEWS)
        with torch.no_grad():
            pooled = model.vivit(**features).pooler_output.mean(dim=0)
        torch.testing.assert_close(torch.from_numpy(vector), pooled, **CLOSE)
        views = processor(video, num_clips=2, num_crops=3)
        mask = views["frame_mask"][::3]
        places = torch.from_numpy(step_frames(config) - config.tubelet_size[0] // 2)
        visible = mask[:, places]  # of the first frames of steps, as the ends are masked
        assert found.vectors.shape[0] == int(visible.sum()) == len(found.times)
        times = views.frame_times[::3][:, step_frames(config)]
        np.testing.assert_allclose(found.times, np.sort(times[visible.numpy()]), atol=1e-6)


def test_a_video_with_nan_outputs_leaves_the_others(videos):
    model = make_model(tiny_config("spatio_temporal"))
    found = list(predict_each(model, make_processor(model.config), [videos[0], "gone.mp4", videos[2]]))
    assert [one.error is None for one in found] == [True, False, True]


# Streams


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("rate", [None, 12.5])
def test_a_video_shorter_than_a_window_is_masked(attention_type, videos, rate):
    model = make_model(tiny_config(attention_type))
    processor = make_processor(model.config, frames_per_second=rate)
    for video in videos[1:]:
        (window,) = file_windows(model, processor, video)
        torch.testing.assert_close(window.logits, masked_logits(model, processor, video)[0], **CLOSE)
    plain = make_processor(model.config, frames_per_second=rate, short_video_policy="repeat_last")
    masked, repeated = (list(file_windows(model, one, videos[0])) for one in (processor, plain))
    assert len(masked) == len(repeated) > 1
    assert all(one.logits.equal(other.logits) for one, other in zip(masked, repeated, strict=True))


def test_the_end_of_a_short_live_stream_is_masked():
    model = make_model(tiny_config("factorised_encoder"))
    processor = make_processor(model.config, frame_stride=1)
    stream, frames = StreamingClassifier(model, processor), moving_frames(5, 48, 80)
    assert stream.push(frames) == []
    (window,) = stream.last_window()
    torch.testing.assert_close(window.logits, masked_logits(model, processor, frames)[0], **CLOSE)


# Pipelines and servers


def test_pipelines_pass_masks_on(videos, tmp_path):
    model = make_model(tiny_config("factorised_encoder", id2label=dict(enumerate("abcde"))))
    model.save_pretrained(tmp_path)
    processor = make_processor(model.config)
    processor.save_pretrained(tmp_path)
    classify = pipeline("video-classification", model=str(tmp_path))
    for batch_size in (1, 3):
        for video, answers in zip(videos, classify(videos, top_k=5, batch_size=batch_size), strict=True):
            expected = masked_logits(model, processor, video)[0].softmax(dim=-1)
            found = {answer["label"]: answer["score"] for answer in answers}
            assert [found[label] for label in "abcde"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_server_passes_masks_on(videos):
    model = make_model(tiny_config("factorised_self_attention"))
    processor = make_processor(model.config)
    settings = {"num_clips": 2, "num_crops": 1, "batch_size": 16, "num_decoders": 1}
    predictor = Predictor(model, processor, **settings, limits=ServingLimits(), metrics=Metrics())
    predictor.start()
    jobs = [Job({"bytes": open(video, "rb"), "path": video}, time.monotonic() + 60) for video in videos]  # noqa: SIM115
    for job in jobs:
        predictor.submit(job)
    answers = [job.future.result(60) for job in jobs]
    predictor.stop()
    expected = predict_videos(model, processor, videos, num_clips=2)
    for answer, one in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.probabilities, one.probabilities, atol=1e-5)


# Faster models


@pytest.mark.parametrize("case", ATTENTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimised_models_give_the_logits_of_plain_ones(case, dtype, machine, videos):
    plain, twin = (model.to(dtype) for model in make_pair(case, machine))
    processor = make_processor(plain.config)
    found = list(predict_videos(twin, processor, videos, num_clips=2, averaging="logits"))
    for video, one in zip(videos, found, strict=True):
        features = processor(video, num_clips=2, dtype=dtype)
        with torch.no_grad():
            expected = plain(**features).logits.float().mean(dim=0).to(dtype)
        assert_close(torch.from_numpy(one.logits).to(dtype), expected)


def test_tuning_measures_the_masked_model(videos, tmp_path):
    """Model 1 does not merge masked tokens, so this candidate cannot be used."""
    model = make_model(tiny_config("spatio_temporal", id2label=dict(enumerate("abcde"))))
    processor = make_processor(model.config)
    candidates = [Candidate("merging", merge_tokens=2)]
    run = TuningRun(tmp_path / "run", "model", model, processor, videos, candidates, batch_size=3)
    run.start(overwrite=False)
    for steps in (run.decode(0), run.prepare(), run.measure()):
        list(steps)
    expected = torch.cat([masked_logits(model, processor, video) for video in videos])
    torch.testing.assert_close(run.logits("plain"), expected, **CLOSE)
    assert "takes no `frame_mask`" in run.prepared("merging").error


# Models that take no masks


def test_who_takes_no_masks_says_so_before_anything_is_decoded(videos):
    model = make_model(tiny_config("spatio_temporal"))
    processor = make_processor(model.config)
    optimize(model, merge_tokens=2)
    message = "short_video_policy='mask', and the model takes no `frame_mask`: it merges tokens"
    for call in (
        lambda: list(predict_videos(model, processor, ["gone.mp4"])),
        lambda: list(embed_videos(model, processor, ["gone.mp4"])),
        lambda: StreamingClassifier(model, processor),
        lambda: pipeline("video-classification", model=model, video_processor=processor)(videos[0]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    restore(model)
    (found,) = predict_videos(model, processor, videos[2:3])
    assert found.error is None


def test_merging_models_with_a_factorised_encoder_take_masks(videos):
    """Tokens merge within time steps."""
    model = make_model(tiny_config("factorised_encoder"))
    processor = make_processor(model.config)
    optimize(model, merge_tokens=2)
    (found,) = predict_videos(model, processor, videos[2:3])
    torch.testing.assert_close(torch.from_numpy(found.logits), masked_logits(model, processor, videos[2])[0], **CLOSE)
