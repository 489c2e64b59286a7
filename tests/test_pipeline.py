"""From a saved folder and a video file to labels: the Auto classes and the pipeline, without torchvision."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForVideoClassification, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from video_files import write_video

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor


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


def expected_scores(folder, video):
    model = ViViTForVideoClassification.from_pretrained(folder)
    inputs = ViViTVideoProcessor.from_pretrained(folder)(video, return_tensors="pt")
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
    """This way transformers decodes itself, and gives the first frames of the file at the stride it is asked for."""
    model = AutoModelForVideoClassification.from_pretrained(folder)
    classify = pipeline(
        "video-classification", model=model, image_processor=ViViTVideoProcessor.from_pretrained(folder)
    )
    results = classify(video, top_k=5)
    assert len(results) == 5 and sum(entry["score"] for entry in results) == pytest.approx(1, abs=1e-5)


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
