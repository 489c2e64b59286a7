"""From a saved folder and a video file to labels: the Auto classes and the pipeline, without torchvision."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVideoClassification,
    VideoClassificationPipeline,
    VivitConfig,
    VivitForVideoClassification,
    VivitImageProcessor,
    pipeline,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from video_files import write_video

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor
from vivit_hf.inference import predict_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    labels = {index: f"motion {index}" for index in range(5)}
    make_model(tiny_config("factorised_encoder", id2label=labels)).save_pretrained(path)
    ViViTVideoProcessor(
        num_frames=8, frame_stride=2, size={"shortest_edge": 48}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    return str(write_video(tmp_path_factory.mktemp("video") / "clip.mp4", frames))


def expected_scores(folder, video, **settings):
    model = ViViTForVideoClassification.from_pretrained(folder)
    inputs = ViViTVideoProcessor.from_pretrained(folder)(video, return_tensors="pt", **settings)
    assert inputs["pixel_values"].shape == (1, 8, 3, 24, 40)
    with torch.no_grad():
        scores = model(**inputs).logits[0].softmax(-1)
    return {model.config.id2label[index]: score for index, score in enumerate(scores.tolist())}


def test_auto_classes_find_the_folder(folder):
    assert type(AutoConfig.from_pretrained(folder)) is ViViTConfig
    assert type(AutoModel.from_pretrained(folder)) is ViViTModel
    assert type(AutoModelForVideoClassification.from_pretrained(folder)) is ViViTForVideoClassification
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is ViViTVideoProcessor and processor.num_frames == 8
    assert type(AutoVideoProcessor.from_pretrained(folder)) is ViViTVideoProcessor


def test_pipeline_on_a_folder_samples_as_the_processor_does(folder, video):
    results = pipeline("video-classification", model=str(folder))(video, top_k=5)
    assert {entry["label"]: entry["score"] for entry in results} == pytest.approx(
        expected_scores(folder, video), abs=1e-6
    )


def test_pipeline_with_our_processor_as_video_processor(folder, video):
    model = AutoModelForVideoClassification.from_pretrained(folder)
    classify = pipeline(
        "video-classification", model=model, video_processor=ViViTVideoProcessor.from_pretrained(folder)
    )
    results = classify([video, video], top_k=5)
    assert len(results) == 2
    for result in results:
        found = {entry["label"]: entry["score"] for entry in result}
        assert found == pytest.approx(expected_scores(folder, video), abs=1e-6)


def test_pipeline_with_our_processor_as_image_processor(folder, video):
    model = AutoModelForVideoClassification.from_pretrained(folder)
    classify = pipeline(
        "video-classification", model=model, image_processor=ViViTVideoProcessor.from_pretrained(folder)
    )
    results = classify(video, top_k=5)
    assert {entry["label"]: entry["score"] for entry in results} == pytest.approx(
        expected_scores(folder, video), abs=1e-6
    )


@pytest.mark.parametrize("name", ["model", "video_processor", "image_processor"])
@pytest.mark.parametrize("rate", [1, 4])
def test_frame_sampling_rate_is_the_stride_of_the_processor(folder, video, name, rate):
    parts = {"model": str(folder)}
    if name != "model":
        parts = {"model": AutoModelForVideoClassification.from_pretrained(folder)}
        parts[name] = ViViTVideoProcessor.from_pretrained(folder)
    expected = pytest.approx(expected_scores(folder, video, frame_stride=rate), abs=1e-6)
    assert expected != expected_scores(folder, video)
    for results in (
        pipeline("video-classification", **parts)(video, top_k=5, frame_sampling_rate=rate),
        pipeline("video-classification", **parts, frame_sampling_rate=rate)(video, top_k=5),
    ):
        assert {entry["label"]: entry["score"] for entry in results} == expected


def test_a_rate_of_frames_that_are_spread_over_the_video_is_refused(folder, video):
    processor = ViViTVideoProcessor.from_pretrained(folder, frame_sampling="uniform")
    model = AutoModelForVideoClassification.from_pretrained(folder)
    classify = pipeline("video-classification", model=model, video_processor=processor)
    classify(video)
    with pytest.raises(ValueError, match="`frame_sampling_rate=2` has no effect"):
        classify(video, frame_sampling_rate=2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"problem_type": "multi_label_classification"}, {"label_groups": {"noun": 3, "verb": 2}}, {"num_labels": 1}],
    ids=["labels", "several labels", "groups", "regression"],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_are_those_of_predict_videos(folder, video, tmp_path, changes, batch_size):
    other = write_video(tmp_path / "other.mp4", np.random.default_rng(1).integers(0, 256, (30, 48, 64, 3), np.uint8))
    labels = {} if "num_labels" in changes else {"id2label": {index: f"motion {index}" for index in range(5)}}
    model = make_model(tiny_config("factorised_encoder", **labels, **changes))
    processor = ViViTVideoProcessor.from_pretrained(folder, num_clips=2, num_crops=3)
    names = list(model.config.id2label.values())
    classify = pipeline(
        "video-classification", model=model, image_processor=processor, video_processor=processor, top_k=5
    )
    expected = predict_videos(model, processor, [video, str(other)], num_clips=2, num_crops=3)
    for result, one in zip(classify([video, str(other)], batch_size=batch_size), expected, strict=True):
        scores = dict(zip(names, one.probabilities.tolist(), strict=True))
        assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(scores, abs=1e-6)
    assert sum(entry["score"] for entry in classify(video, function_to_apply="softmax")) == pytest.approx(1)


def test_our_processor_gives_transformers_vivit_its_views(folder, video):
    config = VivitConfig(
        image_size=[24, 40],
        num_frames=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        tubelet_size=[2, 8, 8],
    )
    model, processor = VivitForVideoClassification(config).eval(), ViViTVideoProcessor.from_pretrained(folder)
    found = pipeline("video-classification", model=model, video_processor=processor)(video, num_frames=8)
    with torch.no_grad():
        expected = model(**processor(video)).logits[0].softmax(-1)
    assert [one["score"] for one in found] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)


def test_pipelines_of_other_models_are_those_of_transformers(video):
    config = VivitConfig(
        image_size=32, num_frames=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    processor = VivitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    arguments = {"model": VivitForVideoClassification(config).eval(), "image_processor": processor}
    expected = VideoClassificationPipeline(**arguments)(video, frame_sampling_rate=2)
    assert pipeline("video-classification", **arguments)(video, frame_sampling_rate=2) == expected
    assert pipeline("video-classification", **arguments)(video) != expected


def test_nothing_of_it_needs_torchvision_or_torchcodec(folder, video):
    """In a fresh interpreter where importing either is an error."""
    program = f"""
import sys
sys.modules["torchvision"] = sys.modules["torchcodec"] = None
import vivit_hf
from transformers import pipeline
print(pipeline("video-classification", model={str(folder)!r})({video!r}, top_k=1)[0]["label"])
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.startswith("motion ")
