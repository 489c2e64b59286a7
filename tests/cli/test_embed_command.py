"""`vivit-hf embed`: features of files, folders and parts, by a ViViT or an image model."""

import shutil

import numpy as np
import pytest
import torch
from command_line import MOTIONS, SAMPLES, check_refusal, invoke, rows
from video_files import moving_frames, write_video
from vit_models import make_dinov2, make_vit

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import read_features, write_features


QUICK = ("--num-clips", 1, "--num-crops", 1, "--workers", 0)


def embed(output, *arguments):
    return invoke("embed", *arguments, "--output", output, *QUICK)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "features.parquet"


def test_vectors_are_the_pooled_output_of_the_model(output):
    result = embed(output, SAMPLES / "up_left.mp4", SAMPLES / "up_right.mp4")
    assert result.exit_code == 0 and "2 videos with a vector of 96 numbers" in result.stdout, result.stderr
    features = read_features(output)
    model = ViViTForVideoClassification.from_pretrained(demo_model_path()).eval()
    processor = ViViTVideoProcessor.from_pretrained(demo_model_path())
    for name, vector in zip(features.files, features.vectors, strict=True):
        with torch.no_grad():
            expected = model.vivit(processor(name)["pixel_values"]).pooler_output[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_the_file_says_where_its_vectors_come_from(output):
    assert embed(output, SAMPLES / "all.mp4", "--per-step", "--dtype", "bfloat16").exit_code == 0
    settings = read_features(output).settings
    assert settings["model"] == str(demo_model_path()) and settings["dtype"] == "bfloat16"
    assert len(settings["fingerprint"]["weights"]) == 64 and set(settings["versions"]) >= {"vivit_hf", "torch"}
    assert settings["num_steps"] == 8 and settings["hidden_size"] == 96 and settings["kind"] == "step"
    assert settings["views"] == {
        "num_frames": 16,
        "frame_sampling": "clip",
        "frame_stride": 1,
        "frames_per_second": None,
        "num_clips": 1,
        "num_crops": 1,
        "short_video_policy": "repeat_last",
        "on_error": "repeat_last",
    }


def test_folders_and_files_are_embedded_once_each_in_order(output):
    result = embed(output, SAMPLES, SAMPLES / "up_left.mp4")
    assert result.exit_code == 0
    assert list(read_features(output).files) == sorted(str(path) for path in SAMPLES.glob("*.mp4"))


def test_rows_of_a_csv_file_are_parts_of_videos(output, tmp_path):
    """In all.mp4 each motion lasts 4 seconds."""
    shutil.copy(SAMPLES / "all.mp4", tmp_path)
    lines = [f"all.mp4,{4 * place},{4 * place + 4}" for place in range(4)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,start,end", *lines]) + "\n")
    assert embed(output, tmp_path / "parts.csv").exit_code == 0
    parts = read_features(output)
    assert parts.files == (str(tmp_path / "all.mp4"),) * 4
    assert list(parts.starts) == [0, 4, 8, 12] and list(parts.ends) == [4, 8, 12, 16]
    model = ViViTForVideoClassification.from_pretrained(demo_model_path()).eval()
    with torch.no_grad():
        labels = model.classifier(torch.from_numpy(parts.vectors)).argmax(dim=-1)
    assert [model.config.id2label[label] for label in labels.tolist()] == MOTIONS


def test_a_list_of_paths_needs_no_class_folders(output, tmp_path):
    shutil.copy(SAMPLES / "up_left.mp4", tmp_path)
    (tmp_path / "list.txt").write_text("up_left.mp4\n")
    assert embed(output, tmp_path / "list.txt").exit_code == 0
    assert read_features(output).files == (str(tmp_path / "up_left.mp4"),)


def test_videos_that_cannot_be_read_are_named_and_skipped(output, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "list.csv").write_text("path,start,end\ngone.mp4,,\nbroken.mp4,1,2\n")
    sources = (SAMPLES / "up_left.mp4", tmp_path / "broken.mp4", tmp_path / "list.csv")
    result = embed(output, *sources, "--json")
    good, broken, gone, part = rows(result.stdout)
    assert result.exit_code == 1 and good == {"file": str(SAMPLES / "up_left.mp4")}
    assert "broken.mp4" in broken["error"] and "No such file" in gone["error"]
    assert (part["start"], part["end"]) == (1, 2) and "error" in part
    assert read_features(output).files == (str(SAMPLES / "up_left.mp4"),)
    again = embed(output, *sources)
    assert again.exit_code == 1 and "1 video with a vector" in again.stdout and "3 without features" in again.stdout
    assert "broken.mp4" in again.stdout and "gone.mp4" in again.stdout


def test_the_first_damaged_video_ends_the_command_if_that_is_wished(output, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    result = embed(output, tmp_path / "broken.mp4", SAMPLES / "up_left.mp4", "--on-error", "raise")
    assert result.exit_code == 1 and "broken.mp4" in result.stderr and not output.exists()


def test_a_lost_frame_is_repeated_or_leaves_the_video_out(output, one_frame_lost):
    assert embed(output, one_frame_lost).exit_code == 0
    result = embed(output, one_frame_lost, "--on-error", "skip")
    assert result.exit_code == 2 and "on_error 'repeat_last' -> 'raise'" in result.stderr
    assert embed(output, one_frame_lost, "--on-error", "skip", "--overwrite").exit_code == 1


def test_the_same_command_again_computes_nothing(output):
    assert embed(output, SAMPLES / "up_left.mp4").exit_code == 0
    before = output.stat().st_mtime_ns
    again = embed(output, SAMPLES / "up_left.mp4")
    assert again.exit_code == 0 and "1 video with" in again.stdout and output.stat().st_mtime_ns == before
    check_refusal(["embed", SAMPLES / "up_left.mp4", "--output", output], 2, "holds another run (num_clips 1 -> 4")
    assert output.stat().st_mtime_ns == before


def test_features_of_another_policy_for_short_videos_are_refused_by_its_name(output, tmp_path):
    folder = tmp_path / "model"
    ViViTForVideoClassification.from_pretrained(demo_model_path()).save_pretrained(folder)
    processor = ViViTVideoProcessor.from_pretrained(demo_model_path())
    processor.save_pretrained(folder)
    short = write_video(tmp_path / "short.mp4", moving_frames(7, 48, 64))
    arguments = ("embed", short, "--model", folder, "--output", output, "--workers", 0)
    assert invoke(*arguments).exit_code == 0
    repeated = read_features(output)
    ViViTVideoProcessor.from_dict({**processor.to_dict(), "short_video_policy": "mask"}).save_pretrained(folder)
    check_refusal(arguments, 2, "short_video_policy 'repeat_last' -> 'mask'")
    check_refusal((*arguments, "--per-step", "--overwrite"), 2, "leave out --per-step")
    assert read_features(output).settings == repeated.settings
    assert invoke(*arguments, "--overwrite").exit_code == 0
    masked = read_features(output)
    assert masked.settings["views"]["short_video_policy"] == "mask"
    assert np.abs(masked.vectors - repeated.vectors).max() > 1e-3
    write_features(tmp_path / "other.parquet", repeated)
    with pytest.raises(ValueError, match="differ in"):
        read_features([output, tmp_path / "other.parquet"])


def test_uniform_frames_have_one_clip(output):
    result = invoke("embed", SAMPLES / "all.mp4", "--output", output, "--frame-sampling", "uniform", "--per-step")
    assert result.exit_code == 0 and "1 clip x 3 crops of 16 frames, spread over the video" in result.stdout
    times = read_features(output).times[0]
    assert times[0] < 2 and times[-1] > 14 and (np.diff(times) > 1).all()
    arguments = ("embed", SAMPLES / "all.mp4", "--output", output, "--frame-sampling", "uniform", "--num-clips", 2)
    check_refusal(arguments, 2, "use num_clips=1")


# Image models


@pytest.mark.parametrize("make", [make_vit, make_dinov2])
def test_an_image_model_alone_gives_its_features_of_each_frame(output, tmp_path, make):
    vit = make()
    vit.save_pretrained(tmp_path / "image")
    path = write_video(tmp_path / "video.mp4", num_frames=30)
    arguments = ("embed", path, "--model", tmp_path / "image", "--num-frames", 5, "--num-crops", 1, "--workers", 0)
    result = invoke(*arguments, "--per-step", "--output", output)
    assert result.exit_code == 0 and "1 clip x 1 crop of 5 frames, spread over the video" in result.stdout, (
        result.stderr
    )
    features = read_features(output)
    processor = ViViTVideoProcessor(
        num_frames=5, frame_sampling="uniform", size={"shortest_edge": 27}, crop_size={"height": 24, "width": 24}
    )
    with torch.no_grad():
        tokens = vit(processor(path)["pixel_values"][0]).last_hidden_state[:, 0]  # (frames, hidden)
    np.testing.assert_allclose(features.vectors[0], tokens, atol=1e-5)
    np.testing.assert_allclose(features.times[0], np.array([5, 10, 15, 20, 25]) / 25, atol=1e-6)

    assert invoke(*arguments, "--output", tmp_path / "pooled.parquet").exit_code == 0
    np.testing.assert_allclose(read_features(tmp_path / "pooled.parquet").vectors[0], tokens.mean(dim=0), atol=1e-5)


def test_other_commands_take_no_image_model(tmp_path):
    make_vit().save_pretrained(tmp_path / "image")
    check_refusal(["classify", SAMPLES / "up_left.mp4", "--model", tmp_path / "image"], 2, "Cannot load the model")


# Wrong usage


def test_wrong_usage_is_refused_before_anything_is_written(output, tmp_path):
    video = SAMPLES / "up_left.mp4"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("name\na.mp4\n")
    for arguments, message in (
        ([video, "--output", tmp_path], "expected a file in an existing folder"),
        ([video, "--output", tmp_path / "no" / "f.parquet"], "expected a file in an existing folder"),
        (["-", "--output", output], "standard input"),
        ([tmp_path / "empty", "--output", output], "contains no video"),
        ([tmp_path / "bad.csv", "--output", output], "there is no column of paths"),
        ([video, "--output", output, "--num-crops", 2], "expected 1 or 3"),
        ([video, "--output", output, "--num-frames", 4], "--num-frames 4 is for image models"),
        ([video, "--output", output, "--model", tmp_path / "gone"], "there is no folder"),
        ([video, "--output", output, "--model", tmp_path / "empty"], "config.json"),
        ([video, "--output", output, "--dtype", "int8"], "is not one of"),
    ):
        check_refusal(["embed", *arguments], 2, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "empty"]
