"""`vivit-hf finetune --teacher`: its arguments, refusals, card, resuming, and several processes."""

import json
import shutil
import sys

import finetune
import pytest
import torch
from finetune_runs import EXAMPLES, losses, run, settings_for, start, to_argv, write_data
from labelled_videos import TORCHRUN
from safetensors.torch import load_file
from teachers import write_videomae

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.training.distillation import DISTILLATION_FILE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos, an image ViT, and a teacher for the videos."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    names = sorted(path.name for path in (folder / "videos" / "train").iterdir())
    write_videomae(folder / "teacher", tuple(reversed(names)))
    return folder


def refusal(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(argv)
    return str(stopped.value), capsys.readouterr().out


def test_the_card_names_the_teacher_until_a_run_without_one(data, tmp_path):
    run(data, tmp_path, teacher=data / "teacher", distillation_temperature=2.5)
    card = (tmp_path / "README.md").read_text()
    assert f"## Distillation\n\nDistilled from `{data / 'teacher'}`" in card
    assert "with temperature 2.5 and weight 0.5." in card
    run(data, tmp_path, resume_from_checkpoint="no")
    assert "Distill" not in (tmp_path / "README.md").read_text()


def test_a_checkpoint_of_another_teacher_is_not_resumed(data, tmp_path, capsys):
    run(data, tmp_path, teacher=data / "teacher", max_steps=1)
    stored = json.loads((tmp_path / "checkpoint-1" / DISTILLATION_FILE).read_text())
    assert stored == {"teacher": str(data / "teacher"), "temperature": 3.0, "weight": 0.5}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path, max_steps=2)))
    assert f"checkpoint-1 was trained with --teacher {data / 'teacher'} --distillation_temperature 3.0" in message
    given = {"teacher": data / "teacher", "distillation_weight": 0.9, "max_steps": 2}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path, **given)))
    assert "--distillation_weight 0.5, unlike this run: give another --output_dir" in message
    run(data, tmp_path / "plain", max_steps=1)
    given = {"teacher": data / "teacher", "max_steps": 2}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path / "plain", **given)))
    assert "checkpoint-1 was trained without --teacher, unlike this run" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"distillation_temperature": 0.0}, "--distillation_temperature 0.0: expected a positive number"),
        ({"distillation_temperature": "nan"}, "--distillation_temperature nan: expected a positive number"),
        ({"distillation_weight": 0.0}, "--distillation_weight 0.0: expected a share above 0 and at most 1"),
        ({"distillation_weight": 1.5}, "--distillation_weight 1.5: expected a share above 0 and at most 1"),
        ({"distillation_weight": 0.9}, "--distillation_temperature and --distillation_weight need a --teacher"),
    ],
)
def test_settings_without_a_meaning_are_refused_before_the_data_are_read(data, tmp_path, capsys, given, expected):
    message, printed = refusal(capsys, to_argv(settings_for(data, tmp_path, **given)))
    assert expected in message and "videos to train on" not in printed


def test_stored_tokens_have_no_pixels_for_a_teacher(data, tmp_path, capsys):
    run(data, tmp_path / "start")
    given = {"model_name_or_path": tmp_path / "start", "freeze": "spatial", "cache_features": True}
    argv = to_argv(settings_for(data, tmp_path / "out", **given, teacher=data / "teacher"))
    message, _ = refusal(capsys, argv)
    assert "--teacher does not go with --cache_features: a teacher sees pixels, which stored tokens do not" in message


def test_evaluation_alone_takes_no_teacher(data, tmp_path, capsys):
    run(data, tmp_path / "start")
    given = {"model_name_or_path": tmp_path / "start", "do_eval": True, "teacher": data / "teacher"}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path / "out", **given)))
    assert "--teacher needs training videos: leave it or --do_eval out" in message


def test_a_teacher_without_the_labels_is_refused_before_a_video_is_read(data, tmp_path, capsys):
    videos = tmp_path / "videos"
    shutil.copytree(data / "videos", videos)
    for file in videos.glob("*/*/*.mp4"):
        file.write_bytes(b"broken")
    for split in ("train", "test"):
        (videos / split / "up_left").rename(videos / split / "jumping")
    given = {"train_dir": videos / "train", "validation_dir": videos / "test", "teacher": data / "teacher"}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path / "out", **given)))
    assert "has no output for 1 of the 4 labels: 'jumping'" in message


@pytest.mark.parametrize(
    "given",
    [
        {"lora_rank": 2, "ema_decay": 0.5},
        {"bf16": True, "cutmix_alpha": 1.0, "class_weights": True},
        {"dtype": "bfloat16", "gradient_accumulation_steps": 2},
        {"freeze": "spatial", "image_size": 64},
        {"streaming": True},
    ],
    ids=["LoRA", "bf16", "bfloat16", "freeze", "stream"],
)
def test_a_teacher_goes_with_the_other_arguments(data, tmp_path, given):
    if "streaming" in given:
        given = {**given, "train_dir": None, "validation_dir": None, "dataset_name": data / "videos"}
    run(data, tmp_path, teacher=data / "teacher", distillation_weight=1.0, **given)
    assert len(losses(tmp_path)) == 2 and all(0 < one < 20 for one in losses(tmp_path))
    student = ViViTForVideoClassification(ViViTConfig.from_pretrained(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == student.state_dict().keys()


@pytest.mark.slow
def test_two_processes_distil_like_one(data, tmp_path):
    plain = {"max_steps": 4, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1}
    plain |= {"teacher": data / "teacher", "distillation_weight": 0.7}
    one = settings_for(data, tmp_path / "one", **plain)
    two = settings_for(data, tmp_path / "two", per_device_train_batch_size=2, ddp_backend="gloo", **plain)
    for command, settings in (([sys.executable], one), (TORCHRUN, two)):
        process = start([*command, EXAMPLES / "finetune.py", *to_argv(settings)])
        assert process.returncode == 0, process.stderr[-3000:]
    assert "Training on 2 process(es)" in process.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-4, msg=name)
