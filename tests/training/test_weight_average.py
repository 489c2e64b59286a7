"""The moving average of the weights, and early stopping, of the trainer for clips."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from vivit_hf import ViViTForVideoClassification
from vivit_hf.data import LabelMap
from vivit_hf.training import ClipCollator, ClipTrainer
from vivit_hf.training.weight_average import AVERAGE_FILE


LABELS = LabelMap({"": ("dark", "grey", "bright")})
CONFIG = tiny_config("factorised_encoder", **LABELS.config_fields())


class Clips(Dataset):
    """Random clips in memory, as `VideoClips` has them."""

    def __init__(self, count=8, views=()):
        generator = torch.Generator().manual_seed(0)
        shape = (count, *views, CONFIG.num_frames, 3, *CONFIG.frame_size)
        self.clips = torch.randn(shape, generator=generator)

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {"pixel_values": self.clips[index], "labels": torch.tensor(index % 3), "index": index, "epoch": 0}


class Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_step_end(self, *arguments, **settings):
        self.steps.append({name: one.detach().double().numpy().copy() for name, one in self.model.named_parameters()})


def trainer_of(folder, decay=0.8, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    own = {"callbacks": settings.pop("callbacks", None), "compute_metrics": settings.pop("compute_metrics", None)}
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False}
    return ClipTrainer(
        model=ViViTForVideoClassification(CONFIG).to(dtype),
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=Clips(),
        eval_dataset=Clips(3, views=(1,)),
        data_collator=ClipCollator(LABELS),
        label_map=LABELS,
        ema_decay=decay,
        **{name: value for name, value in own.items() if value is not None},
    )


def weights_of(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def by_hand(start, steps, decay):
    """The average of each step, in double precision."""
    averages, average = [], {name: one.double().numpy() for name, one in start.items()}
    for step, weights in enumerate(steps):
        now = min(decay, (1 + step) / (10 + step))
        average = {name: now * one + (1 - now) * weights[name] for name, one in average.items()}
        averages.append(average)
    return averages


def assert_close(found, expected):
    for name, one in expected.items():
        np.testing.assert_allclose(found[name].double().numpy(), one, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("decay", [0.8, 0.15])
def test_training_ends_with_the_average_of_the_weights(tmp_path, decay):
    trainer = trainer_of(tmp_path, decay)
    start, weights = weights_of(trainer.model), Weights(trainer.model)
    trainer.add_callback(weights)
    trainer.train()
    assert_close(weights_of(trainer.model), by_hand(start, weights.steps, decay)[-1])
    name = "classifier.weight"
    assert not np.allclose(weights.steps[-1][name], trainer.model.get_parameter(name).detach().numpy(), atol=1e-4)


def test_evaluations_and_checkpoints_have_the_average_and_training_goes_on_with_the_weights(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(tmp_path / "ema", **settings)
    start, weights = weights_of(trainer.model), Weights(trainer.model)
    trainer.add_callback(weights)
    trainer.train()
    plain = trainer_of(tmp_path / "plain", decay=0.0)
    unaveraged = Weights(plain.model)
    plain.add_callback(unaveraged)
    plain.train()
    for name, one in unaveraged.steps[-1].items():
        assert np.array_equal(weights.steps[-1][name], one), name

    expected = by_hand(start, weights.steps, 0.8)[2]
    checkpoint = tmp_path / "ema" / "checkpoint-3"
    assert_close(load_file(checkpoint / "model.safetensors"), expected)
    scored = trainer_of(tmp_path / "scored", decay=0.0)
    scored.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert scored.evaluate()["eval_loss"] == pytest.approx(entry["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_average_to_the_bit(tmp_path, dtype):
    settings = {"save_strategy": "steps", "save_steps": 2, "dtype": dtype}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, one in weights_of(whole.model).items():
        assert torch.equal(one, resumed.model.get_parameter(name)), name
    stored = torch.load(tmp_path / "whole" / "checkpoint-4" / AVERAGE_FILE, weights_only=True)
    assert {one.dtype for one in stored["average"].values()} == {torch.float32}
    assert {one.dtype for one in stored["trained"].values()} == {dtype}


def test_the_best_model_is_the_average_of_its_step(tmp_path):
    losses = iter([1.0, 2.0, 3.0])
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    trainer = trainer_of(tmp_path, **settings, compute_metrics=lambda _: {"made_up": next(losses)})
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, one in weights_of(trainer.model).items():
        assert torch.equal(one, best[name]), name


def test_frozen_weights_are_not_averaged(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.vivit.requires_grad_(False)
    trainer.train()
    assert trainer.weight_average.trained().keys() == {"classifier.weight", "classifier.bias"}


# Early stopping


def stopped_at(folder, losses, resume=None, **settings):
    """Return the step of the end of a run whose evaluations, one per step, have these losses."""
    values = iter(losses)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **settings}
    settings |= {"metric_for_best_model": "made_up", "greater_is_better": False}
    trainer = trainer_of(
        folder,
        0.0,
        **settings,
        compute_metrics=lambda _: {"made_up": next(values)},
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step


def test_a_resumed_run_remembers_how_long_nothing_has_improved(tmp_path):
    losses = [1.0, 2.0, 3.0, 0.5, 0.4, 0.3]
    assert stopped_at(tmp_path / "whole", losses) == 3
    resume = str(tmp_path / "whole" / "checkpoint-2")
    assert stopped_at(tmp_path / "resumed", losses[2:], resume) == 3
