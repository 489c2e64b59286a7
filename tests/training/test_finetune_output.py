"""What fine-tuning checks before training, resumes from, and leaves in its output folder."""

import json
import shutil
import warnings
from collections import namedtuple

import finetune
import pytest
import torch
from finetune_runs import losses, run, settings_for, to_argv, write_data
from safetensors.torch import load_file

from vivit_hf import ViViTForVideoClassification


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(data, folder, max_steps=1)
    return folder


def refusal(capsys, argv):
    """Run to an error that must come before training; return its message."""
    with pytest.raises(SystemExit) as ended:
        finetune.main(argv)
    printed = capsys.readouterr()
    return f"{ended.value.code}{printed.err}", printed.out


# The output folder


def test_an_output_folder_that_cannot_be_made_is_named(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        message, printed = refusal(capsys, to_argv(settings_for(data, output)))
        assert f"--output_dir {output}: the folder cannot be " in message
        assert "The model and its clips" not in printed, "before the model is built"


def test_a_full_disk_is_named_before_training(data, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message, printed = refusal(capsys, to_argv(settings_for(data, tmp_path / "out")))
    assert f"--output_dir {tmp_path / 'out'}: 0.0 MB are free on its disk" in message
    assert "train_loss" not in printed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    run(data, tmp_path / "out", max_steps=1)


# Resuming


@pytest.mark.parametrize("change", [{"num_frames": 8}, {"image_size": 64}, {"attention_type": "spatio_temporal"}])
def test_a_lora_checkpoint_of_another_model_is_not_resumed(data, tmp_path, capsys, change):
    given = {"lora_rank": 2, "image_size": 32, "attention_type": "factorised_encoder"}
    run(data, tmp_path, **given, max_steps=1)
    [(name, value)] = change.items()
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path, **{**given, **change}, max_steps=2)))
    assert f"checkpoint-1 has {name} {given.get(name, 4)}, this run {value}: give another --output_dir" in message


def test_a_lora_checkpoint_on_other_weights_is_not_resumed(data, trained, tmp_path, capsys):
    run(data, tmp_path / "out", lora_rank=2, max_steps=1, model_name_or_path=trained)
    shutil.copytree(trained, tmp_path / "other")
    given = {"lora_rank": 2, "max_steps": 2, "model_name_or_path": tmp_path / "other"}
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path / "out", **given)))
    assert f"checkpoint-1 was trained on top of {trained}, this run on {tmp_path / 'other'}" in message


def test_an_adapter_of_an_earlier_run_does_not_stay(data, tmp_path):
    run(data, tmp_path, lora_rank=2, max_steps=1)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    (tmp_path / "mine").mkdir()
    run(data, tmp_path, max_steps=1, resume_from_checkpoint="no")
    assert not (tmp_path / "adapter").exists() and (tmp_path / "mine").exists()


def test_a_checkpoint_with_an_adapter_of_another_kind_is_not_resumed(data, tmp_path, capsys):
    run(data, tmp_path, lora_rank=2, max_steps=1)
    file = tmp_path / "checkpoint-1" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "MAGIC"}))
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path, lora_rank=2, max_steps=2)))
    assert "checkpoint-1 has an adapter of peft_type 'MAGIC', expected 'LORA'" in message


def test_a_checkpoint_with_another_moving_average_is_not_resumed(data, trained, tmp_path, capsys):
    message, _ = refusal(capsys, to_argv(settings_for(data, trained, ema_decay=0.9, max_steps=2)))
    assert "checkpoint-1 was trained without --ema_decay, unlike this run" in message
    run(data, tmp_path, ema_decay=0.9, max_steps=1)
    message, _ = refusal(capsys, to_argv(settings_for(data, tmp_path, max_steps=2)))
    assert "checkpoint-1 was trained with --ema_decay, unlike this run" in message


def test_training_stops_early_with_the_best_model(data, tmp_path):
    given = {"early_stopping_patience": 1, "learning_rate": 1.0, "optim": "sgd", "eval_strategy": "epoch"}
    run(data, tmp_path, **given, max_steps=-1, num_train_epochs=20)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] < 80 and state["best_model_checkpoint"]
    best = load_file(tmp_path / state["best_model_checkpoint"] / "model.safetensors")
    assert all(torch.equal(one, best[name]) for name, one in load_file(tmp_path / "model.safetensors").items())


def test_lora_ends_with_the_averaged_adapter_of_the_best_checkpoint(data, trained, tmp_path):
    peft = pytest.importorskip("peft")
    given = {"lora_rank": 2, "ema_decay": 0.5, "early_stopping_patience": 1, "model_name_or_path": trained}
    run(data, tmp_path, **given, max_steps=-1, num_train_epochs=2)
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best_model_checkpoint"]
    model = peft.PeftModel.from_pretrained(ViViTForVideoClassification.from_pretrained(trained), best)
    expected = model.merge_and_unload().state_dict()
    for name, one in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(one, expected[name], msg=name)


def test_early_stopping_without_evaluations_is_said_to_have_no_effect(data, tmp_path, capsys):
    run(data, tmp_path, early_stopping_patience=1, eval_strategy="no")
    assert "no evaluations during training, so --early_stopping_patience has no effect" in capsys.readouterr().out


# Evaluation alone


def evaluation(output, model, **given):
    common = {"use_cpu": True, "report_to": "none", "dataloader_num_workers": 0, "do_eval": True}
    return to_argv({"model_name_or_path": model, "output_dir": output, **common, **given})


def test_a_model_is_scored_with_validation_videos_alone(data, trained, tmp_path):
    expected = json.loads((trained / "eval_results.json").read_text())
    rows = [f"{path},{path.parent.name}" for path in sorted((data / "videos" / "test").glob("*/*.mp4"))]
    (tmp_path / "test.csv").write_text("\n".join(["path,label", *rows]))
    for name, source in (
        ("dir", {"validation_dir": data / "videos" / "test"}),
        ("file", {"validation_file": tmp_path / "test.csv"}),
        ("hub", {"dataset_name": data / "videos"}),
        ("stream", {"dataset_name": data / "videos", "streaming": True}),
    ):
        finetune.main(evaluation(tmp_path / name, trained, **source))
        results = json.loads((tmp_path / name / "eval_results.json").read_text())
        assert results["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6), name
        assert results["eval_samples"] == 4


def test_a_subset_of_the_classes_is_scored(data, trained, tmp_path):
    shutil.copytree(data / "videos" / "test" / "up_left", tmp_path / "test" / "up_left")
    finetune.main(evaluation(tmp_path / "out", trained, validation_dir=tmp_path / "test"))
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_samples"] == 1


def test_evaluation_needs_a_trained_classifier_and_its_videos(data, trained, tmp_path, capsys):
    test = data / "videos" / "test"
    (tmp_path / "other" / "sideways").mkdir(parents=True)
    shutil.copy(test / "up_left" / "000.mp4", tmp_path / "other" / "sideways")
    model = ViViTForVideoClassification.from_pretrained(trained, num_labels=0)
    model.save_pretrained(tmp_path / "headless")
    for model, given, expected in (
        (data / "vit", {"validation_dir": test}, "--do_eval scores a fine-tuned ViViT"),
        ("vivit-tiny", {"validation_dir": test}, "--do_eval scores a fine-tuned ViViT"),
        (tmp_path / "headless", {"validation_dir": test}, "--do_eval scores a fine-tuned ViViT"),
        (trained, {"validation_dir": tmp_path / "other"}, "the label 'sideways' is not among the 4"),
        (trained, {"train_dir": test, "train_val_split": 0}, "--do_eval: there are no validation videos"),
    ):
        message, printed = refusal(capsys, evaluation(tmp_path / "out", model, **given))
        assert expected in message
        assert "eval_loss" not in printed


# Streams


@pytest.mark.parametrize("option", ["class_weights", "balanced_sampling"])
def test_options_that_count_labels_are_refused_for_streams_before_a_model_is_built(data, tmp_path, capsys, option):
    given = {"train_dir": None, "validation_dir": None, "dataset_name": data / "videos", "streaming": True}
    message, printed = refusal(capsys, to_argv(settings_for(data, tmp_path, **given, **{option: True})))
    assert f"--{option} counts the labels of the training videos, which a stream" in message
    assert "The model and its clips" not in printed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"horizontal_flip": "perhaps"}, "--horizontal_flip perhaps: expected yes, no or auto"),
        ({"scale_jitter": "0.9"}, "--scale_jitter 0.9: expected two factors such as 0.9,1.33"),
        ({"averaging": "votes"}, "--averaging votes: expected one of probabilities, logits"),
        ({"freeze": "half"}, "--freeze half: expected one of none, spatial, all_but_head"),
        ({"dtype": "int8"}, "--dtype int8: expected one of float32, bfloat16"),
        (
            {"problem_type": "regression"},
            "--problem_type regression: expected one of single_label_classification, multi_",
        ),
        ({"lora_rank": -1}, "--lora_rank -1: expected a positive rank"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0: expected 0 for no average, or a decay below 1"),
        ({"early_stopping_patience": -1}, "--early_stopping_patience -1: expected a number of evaluations, or 0"),
        ({"layer_decay": 0.0}, "--layer_decay 0.0: expected a factor above 0 and at most 1"),
    ],
)
def test_words_that_do_not_exist_are_refused_before_the_data_are_read(data, tmp_path, capsys, given, expected):
    message, printed = refusal(capsys, to_argv(settings_for(data, tmp_path, **given)))
    assert expected in message and "videos to train on" not in printed


def test_lora_with_gradient_checkpointing_does_not_warn_of_renamed_arguments(data, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(data, tmp_path, lora_rank=2, gradient_checkpointing=True)
    assert not [one for one in caught if "gradient_checkpointing" in str(one.message)]
    assert len(losses(tmp_path)) == 2
