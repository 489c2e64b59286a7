"""Training that diverges ends in an error by name, and nothing that is not finite is trained from, scored or saved."""

import json

import pytest
import torch
from finetune_runs import run, write_data
from safetensors.torch import load_file
from tiny_models import make_model, tiny_config
from transformers import TrainingArguments

from vivit_hf import NonFiniteError, ViViTForVideoClassification
from vivit_hf.cli import pretrain
from vivit_hf.data.labels import LabelMap
from vivit_hf.training.trainer import ClipTrainer


DIVERGING = {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0, "max_steps": 6, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """A trained model with a weight that is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    run(data, folder, max_steps=1)
    model = ViViTForVideoClassification.from_pretrained(folder)
    with torch.no_grad():
        model.vivit.layernorm.weight[3] = float("nan")
    model.save_pretrained(folder)
    return folder


def saved_weights(folder):
    return [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logging_steps": 1}, "gradients are NaN or infinite"),
        (
            {"logging_steps": 100, "validation_dir": None, "train_val_split": 0},
            r"the weights vivit\..* NaN or infinite",
        ),
        ({"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 3}, "The output of the ViViTFor.*diverged"),
    ],
    ids=["log", "save", "evaluation"],
)
def test_a_run_that_diverges_ends_in_an_error_and_saves_nothing_of_it(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=f"^finetune: .*{message}"):
        run(data, tmp_path, **DIVERGING, save_steps=6, **changes)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "all_results.json").exists()
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path))


@pytest.mark.slow
def test_an_adapter_that_diverges_is_not_saved(data, tmp_path):
    """Nothing is logged, evaluated or saved before the end."""
    changes = {"lora_rank": 2, "logging_steps": 100, "validation_dir": None, "train_val_split": 0}
    with pytest.raises(SystemExit, match=r"^finetune: .*the weights .* NaN or infinite"):
        run(data, tmp_path, **DIVERGING, save_steps=100, **changes)
    assert not (tmp_path / "adapter").exists() and saved_weights(tmp_path) == []


@pytest.mark.slow
def test_pretraining_that_diverges_ends_in_an_error(data, tmp_path):
    argv = ["--model_name_or_path", "vivit-tiny", "--num_frames", "4", "--image_size", "32", "--use_cpu"]
    argv += ["--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]
    argv += [text for name, value in DIVERGING.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit, match=r"^pretrain: Training has diverged: at step \d, gradients are NaN"):
        pretrain.main([str(data / "videos"), *argv, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"do_eval": True}], ids=str)
def test_weights_that_are_not_finite_are_refused_at_the_start(data, broken, tmp_path, changes):
    with pytest.raises(SystemExit, match=r"^finetune: The weights of .*NaN or infinite.*\(vivit\.layernorm\.weight\)"):
        run(data, tmp_path, model_name_or_path=broken, num_frames=None, **changes)
    assert not list(tmp_path.glob("*.json"))


def test_scores_that_are_not_finite_are_an_error_of_the_trainer(tmp_path):
    labels = LabelMap({"": tuple("abcde")})
    model = make_model(tiny_config("factorised_encoder", **labels.config_fields()))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    clips = torch.randn(2, 1, model.config.num_frames, 3, *model.config.frame_size)
    items = [{"pixel_values": one, "labels": torch.tensor(index)} for index, one in enumerate(clips)]
    trainer = ClipTrainer(model, arguments, eval_dataset=items, label_map=labels)
    assert trainer.evaluate()["eval_samples"] == 2
    with torch.no_grad():
        model.classifier.weight[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"So do its weights \(classifier\.weight\)"):
        trainer.evaluate()
    with pytest.raises(
        NonFiniteError, match=r"the weights classifier\.weight are NaN or infinite .*learning_rate=5e-05"
    ):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))
    assert json.dumps(trainer.state.log_history, allow_nan=False)
