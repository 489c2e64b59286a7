"""NaN and infinite scores are errors by name, wherever a model is asked."""

import numpy as np
import pytest
import torch
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model
from video_files import write_video

from vivit_hf import NonFiniteError, StreamingClassifier, ViViTModel, ViViTVideoProcessor
from vivit_hf.explain.explanation import explain_clip
from vivit_hf.explain.relevance import attention_rollout, gradient_relevance
from vivit_hf.inference.pipeline import ViViTVideoClassificationPipeline
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.inference.timeline import video_timeline


VIDEO = np.random.default_rng(0).integers(0, 256, (20, 24, 40, 3), dtype=np.uint8)


def classify(model, processor, path):
    list(predict_videos(model, processor, [VIDEO]))


def classify_views(model, processor, path):
    list(predict_videos(model, processor, [VIDEO], num_clips=3, averaging="logits"))


def stream(model, processor, path):
    StreamingClassifier(model, processor).push(VIDEO)


def stream_a_short_video(model, processor, path):
    classifier = StreamingClassifier(model, processor)
    classifier.push(VIDEO[:3])
    classifier.last_window()


def timeline(model, processor, path):
    video_timeline(model, processor, path)


def explain(model, processor, path):
    explain_clip(model, processor, processor(VIDEO)["pixel_values"])


def explain_gradient(model, processor, path):
    explain_clip(model, processor, processor(VIDEO)["pixel_values"], "gradient", class_index=1)


def ask_a_pipeline(model, processor, path):
    ViViTVideoClassificationPipeline(model=model, image_processor=processor)(str(path))


ASKS = [classify, classify_views, stream, stream_a_short_video, timeline, explain, explain_gradient, ask_a_pipeline]


@pytest.fixture
def processor():
    return ViViTVideoProcessor(num_frames=8, frame_stride=1, do_resize=False, crop_size={"height": 24, "width": 40})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    write_video(path, num_frames=20, width=40, height=24)
    return path


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_broken_weights_are_an_error_that_names_them(attention_type, value, ask, processor, path):
    model = make_model(case_config(attention_type))
    ask(model, processor, path)
    with torch.no_grad():
        model.classifier.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"So do its weights \(classifier\.weight\)"):
        ask(model, processor, path)


def test_broken_weights_of_a_model_without_classifier_are_an_error():
    model = make_model(case_config("spatio_temporal"), ViViTModel)
    with torch.no_grad():
        model.encoder.layer[0].attention.q_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"encoder\.layer\.0\.attention\.q_proj\.weight"):
        attention_rollout(model, make_clips(model.config))


def test_an_overflow_names_the_dtype(processor):
    model = make_model(case_config("spatio_temporal"))
    with torch.no_grad():
        model.vivit.layernorm.weight.fill_(1e4)
        model.classifier.weight.fill_(1e4)
        model.classifier.weight[:, ::2] = -1e4
    list(predict_videos(model, processor, [VIDEO]))
    with pytest.raises(NonFiniteError, match=r"overflow in torch\.float16"):
        list(predict_videos(model.half(), processor, [VIDEO]))


def test_broken_pixels_are_named():
    model = make_model(case_config("spatio_temporal"))
    clips = make_clips(model.config)
    clips[1, 0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="So do its `pixel_values`"):
        gradient_relevance(model, clips)
