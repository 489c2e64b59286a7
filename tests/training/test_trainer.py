"""Trainer: resume, best model, and the same gradients however a batch is cut into pieces and processes."""

import subprocess
import sys

import pytest
import torch
from paths import TESTS
from safetensors.torch import load_file, save_file
from tiny_models import ATTENTION_TYPES, tiny_config
from train_worker import CLIPS, PROBLEMS, Clips
from transformers import Trainer, TrainingArguments, VivitConfig, VivitForVideoClassification

from vivit_hf import ViViTForVideoClassification


pytestmark = pytest.mark.slow


WORKER = TESTS / "train_worker.py"
BATCH = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same three steps of 8 clips: at once, accumulated from pieces of 2, and on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    commands = {
        "whole": [sys.executable, WORKER, folder / "whole.pt", "--batch", BATCH],
        "accumulated": [sys.executable, WORKER, folder / "accumulated.pt", "--batch", 2, "--accumulation", 4],
        "distributed": [sys.executable, *torchrun, WORKER, folder / "distributed.pt", "--batch", BATCH // 2],
    }
    results = {}
    for name, command in commands.items():
        process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr[-3000:]
        results[name] = torch.load(folder / f"{name}.pt", weights_only=True)
    return results


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("run", ["accumulated", "distributed"])
def test_pieces_and_processes_train_like_the_whole_batch(runs, run, problem):
    whole, pieces = runs["whole"][problem], runs[run][problem]
    assert whole["world_size"] == 1
    assert pieces["world_size"] == (2 if run == "distributed" else 1)
    assert len(whole["losses"]) == 3 and len(set(whole["losses"])) == 3, "the loss does not move"
    assert pieces["losses"] == pytest.approx(whole["losses"], abs=2e-4)  # Trainer logs four digits
    for name, expected in whole["state_dict"].items():
        torch.testing.assert_close(pieces["state_dict"][name], expected, atol=2e-6, rtol=1e-4, msg=name)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name


@pytest.fixture(params=["spatio_temporal from a native file", *ATTENTION_TYPES])
def model_and_data(request, tmp_path):
    """Our own models, and one that came from transformers' Vivit, whose names must not come back."""
    torch.manual_seed(0)
    if request.param in ATTENTION_TYPES:
        config = tiny_config(request.param)
        return lambda: ViViTForVideoClassification(config), Clips(config, "single")
    config = tiny_config("spatio_temporal")
    native = VivitConfig(
        **{name: getattr(config, name) for name in ("image_size", "num_frames", "tubelet_size", "hidden_size")},
        **{name: getattr(config, name) for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")},
        num_labels=config.num_labels,
    )
    VivitForVideoClassification(native).save_pretrained(tmp_path / "native")
    return lambda: ViViTForVideoClassification.from_pretrained(tmp_path / "native"), Clips(config, "single")


def test_resume_goes_on_where_training_stopped(model_and_data, tmp_path):
    make_model, data = model_and_data
    start = weights(make_model())

    def fresh():
        model = make_model()
        model.load_state_dict(start)
        return model

    straight = fresh()
    Trainer(straight, arguments(tmp_path / "run"), train_dataset=data).train()
    names = set(load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors"))
    assert names == set(straight.state_dict())

    resumed = fresh()
    trainer = Trainer(resumed, arguments(tmp_path / "run"), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(weights(straight), weights(resumed))
    assert any(not torch.equal(start[name], value) for name, value in weights(resumed).items())


def test_the_best_model_is_really_loaded_at_the_end(model_and_data, tmp_path):
    make_model, data = model_and_data
    model = make_model()
    losses = iter([1.0, 2.0])  # the first checkpoint is the best by this account

    trainer = Trainer(
        model,
        arguments(
            tmp_path / "run",
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_made_up",
            greater_is_better=False,
        ),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda _: {"made_up": next(losses)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert_same(best, weights(model))
    assert any(not torch.equal(last[name], best[name]) for name in best)


def test_the_batches_hold_what_the_runs_rely_on():
    """Uneven gaps in every step, and no step without labels: otherwise the comparison above would prove little."""
    labels = Clips(tiny_config("factorised_encoder"), "single").labels
    counts = [(piece != -100).sum().item() for piece in labels.split(2)]
    assert CLIPS == 3 * BATCH and len(set(counts)) > 1 and min(map(sum, zip(*[iter(counts)] * 4, strict=True))) > 0


def test_a_checkpoint_with_foreign_names_would_not_go_unnoticed(tmp_path):
    """The danger the names guard against: Trainer's loader reads with strict=False."""
    model = ViViTForVideoClassification(tiny_config("spatio_temporal"))
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("encoder.layer", "layers"): tensor for name, tensor in state_dict.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="without a place in the model"):
        ViViTForVideoClassification.from_pretrained(tmp_path)
