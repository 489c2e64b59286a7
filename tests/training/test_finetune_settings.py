"""Settings files, the help, and failures after training."""

import dataclasses

import finetune
import pytest
from finetune_runs import run, write_data
from transformers import AutoImageProcessor

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.configuration_vivit import ATTENTION_TYPES, EMBEDDING_TYPES, TEMPORAL_POOLINGS
from vivit_hf.data.annotations import FORMATS
from vivit_hf.inference.views import AVERAGINGS
from vivit_hf.initialisation.from_image import TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS, TUBELET_INITS
from vivit_hf.training import finetuning_parser
from vivit_hf.training.finetuning_arguments import (
    TRAINER_ARGUMENTS,
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    help_text,
)
from vivit_hf.training.finetuning_parser import FineTuningArguments, parse_arguments
from vivit_hf.training.parameters import FREEZINGS
from vivit_hf.training.trainer import ClipTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast", "learning_rate: expected float, got 'fast'"),
        ("num_frames: 1e1", "num_frames: expected int, got '1e1'"),
        ("num_frames: 16.5", "num_frames: expected int, got 16.5"),
        ("num_frames: true", "num_frames: expected int, got True"),
        ("bf16: perhaps", "bf16: expected true or false, got 'perhaps'"),
        ("weight_decay: null", "weight_decay: null is not allowed here"),
        ("tubelet_size: [2, 16, 16]", r"tubelet_size: expected one value, got the list \[2, 16, 16\]"),
        ("recipe: {name: small-data}", "recipe: expected one value, got {'name': 'small-data'}"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: expected one of linear, cosine, .* got 'cosin'"),
        ("learning_rates: 1", "there is no argument 'learning_rates'; did you mean 'learning_rate'?"),
        ("outputdir: x", "there is no argument 'outputdir'; did you mean 'output_dir'?"),
        ("zzzzzzzz: x", "there is no argument 'zzzzzzzz'$"),
        ("- a\n- b", "expected names of arguments with their values"),
    ],
)
def test_a_settings_file_that_cannot_be_meant_names_file_and_key(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit, match=f"settings.yaml: {message}"):
        finetune.main([str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "advice"), [("tensorboard", r"pip install 'vivit-hf\[training\]'"), ("wandb", "pip install wandb")]
)
def test_a_log_that_is_not_installed_is_named_before_anything_is_read(data, tmp_path, monkeypatch, name, advice):
    monkeypatch.setattr(finetuning_parser, "get_available_reporting_integrations", lambda: ["mlflow"])
    message = f"finetune: --report_to {name}: it is not known or not installed; run `{advice}`"
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, report_to=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save", "eval"])
def test_numbers_of_steps_without_effect_are_refused(data, tmp_path, name):
    with pytest.raises(SystemExit, match=f"finetune: --{name}_steps 2 has no effect with --{name}_strategy epoch"):
        run(data, tmp_path, **{f"{name}_steps": 2, f"{name}_strategy": None})


def test_values_of_a_settings_file_have_the_types_of_the_arguments(tmp_path):
    (tmp_path / "settings.yaml").write_text(
        "learning_rate: 1e-4\nnum_frames: '16'\nbf16: 'no'\nhorizontal_flip: yes\nuse_cpu: true\nresize: null\n"
        "max_grad_norm: 1\nlr_scheduler_kwargs: {min_lr: 1e-5}\nreport_to: [none]\nlabel_names: labels\n"
        "average_tokens_across_devices: false\nrecipe: small-data"
    )
    argv = [str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "out")]
    model, data, augmentation, training = parse_arguments(argv)
    assert (training.learning_rate, model.num_frames, training.bf16, data.resize) == (1e-4, 16, False, None)
    assert type(training.max_grad_norm) is float and augmentation.horizontal_flip == "True"
    assert training.label_names == ["labels"] and training.average_tokens_across_devices is False


def test_the_help_has_our_arguments_first_and_all_of_them_on_demand(capsys):
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            finetune.main([option])
        assert not ended.value.code
        texts.append(capsys.readouterr().out)
    short, everything = texts
    ours = (ModelArguments, DataArguments, AugmentationArguments)
    for name in [name for one in ours for name in one.__dataclass_fields__] + ["recipe", "learning_rate", "output_dir"]:
        assert f"  --{name} " in short, name
    assert "--help-all" in short and short.count("\n") < 200
    places = [short.index(f"\n  --{name} ") for name in ("model_name_or_path", "train_dir", "recipe", "learning_rate")]
    assert places == sorted(places)
    for field in dataclasses.fields(FineTuningArguments):
        assert not field.init or f"  --{field.name}" in everything, field.name
    assert "--torch_empty_cache_steps" in everything and "--torch_empty_cache_steps" not in short


def test_the_help_names_every_choice_and_only_arguments_that_exist():
    """It spells them out, so that it need not import torch."""
    words = set(help_text().replace(",", " ").split())
    for choices in (ATTENTION_TYPES, EMBEDDING_TYPES, TUBELET_INITS, TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS):
        assert words >= set(choices)
    assert words >= {*FORMATS, *FREEZINGS, *AVERAGINGS, *TEMPORAL_POOLINGS}
    assert TRAINER_ARGUMENTS.keys() <= {field.name for field in dataclasses.fields(FineTuningArguments)}


# What fails after training


def test_what_would_fail_after_training_is_refused_before_it(data, tmp_path, monkeypatch):
    run(data, tmp_path / "first", max_steps=1)
    processor = ViViTVideoProcessor.from_pretrained(tmp_path / "first", frame_sampling="uniform")
    processor.save_pretrained(tmp_path / "first")
    monkeypatch.setattr(ClipTrainer, "train", lambda *_, **__: pytest.fail("it trains"))
    given = {"model_name_or_path": tmp_path / "first", "num_frames": None, "frame_stride": None}
    for changes, message in (
        ({"frame_stride": 2}, "`frame_stride=2` has no effect with frame_sampling='uniform'"),
        ({"num_clips": 4}, "frame_sampling='uniform' spreads one clip over the whole video, got num_clips=4"),
        ({"num_crops": 2}, "`num_crops=2` must be 1 or 3"),
        ({"averaging": "votes"}, "--averaging votes: expected one of probabilities, logits"),
        ({"save_batch_picture": tmp_path / "no" / "p.png"}, r"--save_batch_picture .*p\.png: there is no such folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(data, tmp_path / "out", **{**given, **changes})


@pytest.mark.parametrize("extra", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("culprit", ["evaluate", "log_metrics"])
def test_whatever_fails_after_training_the_model_is_saved(data, tmp_path, monkeypatch, culprit, extra):
    def fail(self, *arguments, **settings):
        if culprit == "evaluate" and self.is_in_train:
            return {}
        raise RuntimeError("no more")

    monkeypatch.setattr(ClipTrainer, culprit, fail)
    with pytest.raises(RuntimeError, match="no more"):
        run(data, tmp_path, max_steps=1, **extra)
    model, processor = (
        ViViTForVideoClassification.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    assert model(**processor(str(data / "videos" / "test" / "up_left" / "000.mp4"))).logits.shape == (1, 4)


def test_an_evaluation_that_fails_during_training_leaves_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **settings):
        raise RuntimeError("no score")

    with monkeypatch.context() as patch:
        patch.setattr(ClipTrainer, "_metrics", fail)
        with pytest.raises(RuntimeError, match="no score"):
            run(data, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    run(data, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert f"Resuming from {tmp_path / 'checkpoint-1'}" in capsys.readouterr().out
