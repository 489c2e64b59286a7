"""The learning rates of the recipes, from step to step and for other batches and models; and that `small-data` fits."""

import json
import math

import numpy as np
import pytest
import torch
from moving_shapes import MOTIONS, Scene, write_video
from transformers import TrainingArguments, get_scheduler

from vivit_hf import demo_model_path
from vivit_hf.cli import finetune
from vivit_hf.training.finetuning import scale_learning_rate
from vivit_hf.training.finetuning_arguments import help_text
from vivit_hf.training.finetuning_parser import parse_arguments
from vivit_hf.training.recipes import RECIPES, REFERENCE_BATCH_SIZE


# Training videos, from the official configurations.
NUM_VIDEOS = {"k400-b": 214834, "k400-b-fe": 214834, "k400-l-fe": 214834, "ssv2-l-fe": 168913, "epic-l-fe": 67217}


def official_factors(num_videos: int, num_epochs: int) -> np.ndarray:
    """`compound_lr_scheduler` of google-research/scenic (train_lib_deprecated/lr_schedules.py, which the ViViT trainer
    uses), with 'cosine_decay * linear_warmup' as in the ViViT configurations: float64 (steps,)."""
    steps_per_epoch = num_videos // REFERENCE_BATCH_SIZE
    total, warmup = num_epochs * steps_per_epoch, int(2.5 * steps_per_epoch)
    step = np.arange(total)
    steps_per_cycle = total - int(warmup / (total / total))
    progress = np.maximum(0.0, step - warmup) / steps_per_cycle
    cosine = np.maximum(0.0, 0.5 * (1.0 + np.cos(math.pi * (progress % 1.0))))
    return cosine * np.minimum(1.0, step / warmup)


@pytest.mark.parametrize("name", NUM_VIDEOS)
def test_official_recipes_have_the_official_schedule(name, tmp_path):
    recipe = RECIPES[name].arguments
    expected = official_factors(NUM_VIDEOS[name], recipe["num_train_epochs"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    training = TrainingArguments(output_dir=str(tmp_path), warmup_steps=recipe["warmup_steps"], use_cpu=True)
    warmup = training.get_warmup_steps(len(expected))
    schedule = get_scheduler(recipe["lr_scheduler_type"], optimizer, warmup, len(expected))
    found = np.array([schedule.lr_lambdas[0](step) for step in range(len(expected))])
    # Half a step of warm-up is rounded up here and down there.
    np.testing.assert_allclose(found, expected, atol=1 / warmup)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-3) and found[-1] < 1e-8, "it ends at 0"


def scaled(recipe, batch, width, tmp_path):
    """The learning rate of a recipe for a batch and a hidden size, and what is printed about it."""
    argv = ["--recipe", recipe, "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    training = parse_arguments([*argv, "--per_device_train_batch_size", str(batch)]).training
    said = []
    scale_learning_rate(training, width, said.append)
    return training.learning_rate, said[0]


@pytest.mark.parametrize("name", NUM_VIDEOS)
def test_the_rate_of_sgd_is_proportional_to_the_batch(name, tmp_path):
    base = RECIPES[name].arguments["learning_rate"]
    found, said = scaled(name, 4, 192, tmp_path)
    assert found == pytest.approx(base / 16)
    assert said == f"Recipe {name}: learning rate {base:g} for 64 clips per step, so {base / 16:.3g} for 4."


def test_the_rate_of_adam_is_proportional_to_the_root_of_the_batch_and_to_the_inverse_of_the_width(tmp_path):
    found, said = scaled("small-data", 4, 192, tmp_path)
    assert found == pytest.approx(4e-4 / 4 * 4)
    assert said == (
        "Recipe small-data: learning rate 0.0004 for 64 clips per step and width 768, so 0.0004 for 4 and width 192."
    )
    assert scaled("small-data", 16, 768, tmp_path)[0] == pytest.approx(4e-4 / 2)


def test_few_labels_trains_on_from_its_probe_at_a_low_rate(tmp_path):
    """With DINOv2 ViT-S and the recipe's batch, at the rate that its trials chose."""
    batch = RECIPES["few-labels"].arguments["per_device_train_batch_size"]
    assert scaled("few-labels", batch, 384, tmp_path)[0] == pytest.approx(5e-5, rel=0.02)


# Fine-tuning in VideoMAE (Tong et al., 2022; github.com/MCG-NJU/VideoMAE): clips per step, width, and learning rate.
# Clips are GPUs * --batch_size * --num_sample, and the rate is --lr * clips / 256, by run_class_finetuning.py and
# scripts/{ucf101,ssv2,kinetics}/*/finetune.sh.
VIDEOMAE = {
    "UCF101": (8 * 16 * 2, 768, 5e-4),
    "Something-Something v2": (64 * 8, 768, 5e-4 * 512 / 256),
    "Kinetics-400": (64 * 6 * 2, 768, 5e-4 * 768 / 256),
    "Something-Something v2, ViT-S": (32 * 12 * 2, 384, 1e-3 * 768 / 256),
}


def test_the_rates_of_small_data_are_near_those_of_videomae():
    """Its authors chose them for very different batches and widths."""
    recipe = RECIPES["small-data"]
    ratios = {name: recipe.learning_rate(batch, width) / rate for name, (batch, width, rate) in VIDEOMAE.items()}
    assert all(0.9 < ratio < 1.7 for ratio in ratios.values()), ratios


def test_small_data_regularises_as_videomae_does_on_its_smallest_data():
    """Weight decay, layer decay and label smoothing are those of run_class_finetuning.py, drop path that of UCF101."""
    arguments = RECIPES["small-data"].arguments
    names = ("weight_decay", "layer_decay", "label_smoothing_factor", "drop_path_rate", "optim")
    assert [arguments[name] for name in names] == [0.05, 0.75, 0.1, 0.2, "adamw_torch"]


def test_the_help_describes_each_recipe():
    text = " ".join(help_text().split())
    assert all(f"{name} ({recipe.description})" in text for name, recipe in RECIPES.items())


# What happens to the frames of a shape that moves on, in classes that the demo model does not know.
COURSES = {
    "on": np.arange(16),
    "back": np.abs(8 - np.arange(16)),
    "halting": np.arange(16) // 4 * 4,
    "still": np.full(16, 8),
}


@pytest.mark.slow
def test_small_data_fits_a_small_training_set(tmp_path):
    """The packaged demo model learns 80 clips of a new task; with an eighth of the learning rate, it does not."""
    videos = tmp_path / "videos"
    for number in range(20):
        scene = Scene.draw(np.random.default_rng([5, number]), num_frames=16, height=64, width=64)
        frames = scene.render(list(MOTIONS)[number % 4], 16)
        for name, course in COURSES.items():
            path = videos / name / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, frames[course])
    argv = ["--train_dir", videos, "--validation_dir", videos, "--output_dir", tmp_path / "out"]
    argv += ["--model_name_or_path", demo_model_path(), "--recipe", "small-data", "--num_train_epochs", 12]
    argv += ["--num_clips", 1, "--num_crops", 1, "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu"]
    finetune.main([*map(str, argv), "--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true"])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] < 0.6 and results["eval_top1"] > 0.9
