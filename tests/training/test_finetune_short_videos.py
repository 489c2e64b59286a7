"""`vivit-hf finetune --short_video_policy mask` on videos of different lengths, as whole runs in this process."""

import json
import shutil
import sys

import pytest
import torch
from finetune_runs import losses, run, settings_for, start, to_argv, write_data
from labelled_videos import TORCHRUN
from safetensors.torch import load_file
from tiny_models import make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.cli.pretrain import main


LENGTHS = (4, 1, 3, 2)  # a clip has 4 frames


def write_videos(folder, sizes):
    """Write 8 + 4 videos of these (height, width), three in four too short for a clip, and an image ViT."""
    write_data(folder)
    shutil.rmtree(folder / "videos")
    for number in range(12):
        split, label = ("train", "test")[number >= 8], ("even", "odd")[number % 2]
        path = folder / "videos" / split / label / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = sizes[number // 2 % 2]
        frames = moving_frames(LENGTHS[number // 2 % 4] + 10, height, width)[10 * (number % 2) :]
        write_video(path, frames[: LENGTHS[number // 2 % 4]])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("data"), ((32, 44), (44, 32)))


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """In the size of the crop, so that every random clip of a video is the same."""
    return write_videos(tmp_path_factory.mktemp("square"), ((32, 32), (32, 32)))


MASKED = {"frame_stride": 1, "resize": 32, "short_video_policy": "mask"}
GROUPED = {**MASKED, "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
FROZEN = {
    **MASKED,
    "freeze": "spatial",
    "num_temporal_layers": 1,
    "temporal_pooling": "mean",
    "max_steps": None,
    "num_train_epochs": 3,
    "save_strategy": "no",
}


def test_a_trained_model_answers_alike_alone_and_in_a_batch(data, variant, tmp_path, capsys):
    results = run(data, tmp_path, attention_type=variant, num_clips=2, num_crops=3, **GROUPED)
    output = capsys.readouterr().out
    assert "given: " in output and "frame_stride 1, short_video_policy mask, " in output
    assert "Batches by length: 6 of 8 videos have fewer than the 4 frames of a clip, 1 to 4 of them visible." in output
    assert results["eval_samples"] == 4 and len(losses(tmp_path)) == 2
    model = ViViTForVideoClassification.from_pretrained(tmp_path)
    processor = ViViTVideoProcessor.from_pretrained(tmp_path)
    assert processor.short_video_policy == "mask"
    videos = [str(path) for path in sorted((data / "videos").rglob("*.mp4"))]
    batch = processor(videos)
    with torch.no_grad():
        together = model(**batch).logits
        for row, video in zip(together, videos, strict=True):
            torch.testing.assert_close(model(**processor(video)).logits[0], row, atol=1e-5, rtol=1e-5)


def test_the_policy_of_a_model_is_kept_unless_another_is_given(data, tmp_path, capsys):
    run(data, tmp_path / "one", max_steps=1, **MASKED)
    start = {"model_name_or_path": tmp_path / "one", "num_frames": None, "frame_stride": None, "max_steps": 1}
    capsys.readouterr()
    run(data, tmp_path / "two", **start)
    shown = next(line for line in capsys.readouterr().out.splitlines() if "short_video_policy mask" in line)
    assert shown.startswith(f"  {tmp_path / 'one'}: ")
    assert ViViTVideoProcessor.from_pretrained(tmp_path / "two").short_video_policy == "mask"
    run(data, tmp_path / "three", **start, short_video_policy="loop")
    assert "given: short_video_policy loop" in capsys.readouterr().out
    assert ViViTVideoProcessor.from_pretrained(tmp_path / "three").short_video_policy == "loop"


@pytest.mark.parametrize("changes", [{}, {**FROZEN, "cache_features": True}], ids=["not cached", "cached"])
def test_short_videos_that_are_errors_are_replaced_and_named(data, tmp_path, changes):
    """2 of the 8 training videos and 2 of the 4 validation videos have a single frame, and a clip has 2."""
    results = run(data, tmp_path, **{**MASKED, **changes, "num_frames": 2, "short_video_policy": "error"})
    damaged = json.loads((tmp_path / "damaged_files.json").read_text())
    assert results["eval_damaged_files"] == len(damaged["eval"]) == 2 and damaged["train"]
    assert all("needs 2 frames and the video has 1" in reason for reason in damaged["train"].values())


@pytest.mark.parametrize("caching", [False, True], ids=["not cached", "cached"])
def test_a_resumed_run_has_the_same_losses(data, tmp_path, caching):
    settings = {
        **GROUPED,
        "max_steps": 5,
        "mixup_alpha": 0.3,
        "gradient_accumulation_steps": 2,
        "horizontal_flip": "yes",
    }
    if caching:
        settings |= {**FROZEN, "cache_features": True, "num_cached_views": 2, "max_steps": 5, "num_train_epochs": None}
    run(data, tmp_path / "whole", **settings)
    saved = {**settings, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    run(data, tmp_path / "parts", **saved)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-5")
    run(data, tmp_path / "parts", **saved)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5


def test_stored_tokens_have_the_losses_of_pixels_to_the_bit_and_another_policy_makes_them_stale(
    square, tmp_path, capsys
):
    plain = run(square, tmp_path / "plain", **FROZEN)
    results = run(square, tmp_path / "cached", cache_features=True, **FROZEN)
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain") and len(losses(tmp_path / "plain")) == 6
    assert results["eval_loss"] == plain["eval_loss"]
    files = list((tmp_path / "cached" / "feature_cache").rglob("*.safetensors"))
    assert len(files) == 12 and all("frame_mask" in load_file(file) for file in files)
    capsys.readouterr()
    run(square, tmp_path / "cached", cache_features=True, resume_from_checkpoint="no", **FROZEN)
    assert "tokens of 12 views, 0 of them computed now" in capsys.readouterr().out
    filled = {**FROZEN, "short_video_policy": "repeat_last", "resume_from_checkpoint": "no"}
    run(square, tmp_path / "cached", cache_features=True, **filled)
    output = capsys.readouterr().out
    assert "stored tokens are stale and removed; changed: processor" in output
    assert "tokens of 12 views, 12 of them computed now" in output
    assert losses(tmp_path / "cached") != losses(tmp_path / "plain")


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"bf16": True}, {"dataloader_num_workers": 2}])
def test_training_with_masks_is_the_same(data, variant, tmp_path, changes):
    settings = {**MASKED, "attention_type": variant, "max_steps": 2}
    run(data, tmp_path / "plain", **settings)
    run(data, tmp_path / "changed", **settings, **changes)
    tolerance = 0.05 if "bf16" in changes else 1e-6
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


def test_a_vivit_teaches_with_masks(data, tmp_path, capsys):
    run(data, tmp_path / "teacher", max_steps=1, **MASKED)
    capsys.readouterr()
    run(data, tmp_path / "student", max_steps=2, teacher=tmp_path / "teacher", **MASKED)
    assert "2 of its 2 labels, short clips masked" in capsys.readouterr().out


def test_one_batch_is_learnt_by_heart(data, tmp_path, capsys):
    settings = {
        **MASKED,
        "overfit_one_batch": True,
        "learning_rate": 1e-2,
        "save_batch_picture": tmp_path / "batch.png",
    }
    with pytest.raises(SystemExit) as exit_:
        run(data, tmp_path, **settings)
    assert exit_.value.code == 0 and "learnt by heart" in capsys.readouterr().out
    assert (tmp_path / "batch.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_video_policy": "fill"}, r"--short_video_policy fill: expected one of repeat_last, loop, mask, error"),
        ({**GROUPED, "short_video_policy": None}, r"group_by_length: with --short_video_policy repeat_last, all clips"),
        ({"train_sampling_strategy": "sequential"}, "expected one of random, group_by_length"),
        (
            {**MASKED, "attention_type": "spatio_temporal", "merge_tokens": "1"},
            r"takes no `frame_mask`: it merges tokens.*use short_video_policy='repeat_last'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_errors(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, **changes)
    assert not list(tmp_path.glob("*.safetensors"))


def test_pretraining_refuses_a_start_that_masks_unless_it_fills_short_clips(data, tmp_path):
    model = make_model(tiny_config("factorised_encoder", image_size=32, num_frames=4))
    model.save_pretrained(tmp_path / "start")
    ViViTVideoProcessor(num_frames=4, frame_stride=1, size=36, crop_size=32, short_video_policy="mask").save_pretrained(
        tmp_path / "start"
    )
    settings = {"output_dir": tmp_path / "out", "model_name_or_path": tmp_path / "start", "use_cpu": True}
    settings |= {"max_steps": 1, "report_to": "none", "dataloader_num_workers": 0, "disable_tqdm": True}
    argv = [str(data / "videos"), *to_argv(settings)]
    with pytest.raises(SystemExit, match=r"short_video_policy='mask', but pretraining takes no `frame_mask`.*Give"):
        main(argv)
    assert not (tmp_path / "out").exists()
    main([*argv, "--short_video_policy", "repeat_last"])
    stored = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert stored["short_video_policy"] == "repeat_last"
    with pytest.raises(SystemExit, match="--short_video_policy mask: expected one of repeat_last, loop, error"):
        main([*argv, "--short_video_policy", "mask"])


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_batch(data, tmp_path):
    settings = {**GROUPED, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    one = settings_for(data, tmp_path / "one", **{**settings, "per_device_train_batch_size": 4})
    two = settings_for(data, tmp_path / "two", **settings, ddp_backend="gloo")
    for command, given in (([sys.executable], one), (TORCHRUN, two)):
        process = start([*command, "-m", "vivit_hf", "finetune", *to_argv(given)])
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.count("Batches by length: 6 of 8 videos") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    scores = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], abs=2e-4)
