"""The learning rates of the official recipes, step by step."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, get_scheduler

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
