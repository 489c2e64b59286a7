"""What is trained and how fast, checkpoints that are whole, and the trainer for clips."""

import json
import logging
import multiprocessing
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import ATTENTION_TYPES, tiny_config
from transformers import TrainerCallback, TrainingArguments
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.inference.metrics import classification_metrics
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.training import trainer as training
from vivit_hf.training.augmentation import ClipAugmentation
from vivit_hf.training.checkpoints import is_complete_checkpoint, last_complete_checkpoint
from vivit_hf.training.clips import StreamedClips, VideoClips
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.training.overfitting import overfit_one_batch
from vivit_hf.training.parameters import depths, freeze, gradient_norms, parameter_groups, part_of
from vivit_hf.training.trainer import ClipTrainer


def make(attention_type, **settings):
    torch.manual_seed(0)
    return ViViTForVideoClassification(tiny_config(attention_type, **settings))


# What is trained


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_freezing_all_but_the_head(attention_type):
    model = make(attention_type)
    frozen = freeze(model, "all_but_head")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert len(frozen) + 2 == len(list(model.parameters()))
    assert freeze(model, "none") == [] and all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_space_leaves_what_is_of_time():
    model = make("factorised_encoder")
    freeze(model, "spatial")
    trained = {name.split(".")[1] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"temporal_embeddings", "temporal_encoder", "temporal_layernorm", "weight", "bias"}
    model = make("factorised_encoder", temporal_pooling="attention", num_temporal_layers=0)
    freeze(model, "spatial")
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"vivit.temporal_pooler.query", "classifier.weight", "classifier.bias"}
    model = make("factorised_self_attention")
    freeze(model, "spatial")
    for name, parameter in model.named_parameters():
        is_trained = any(word in name for word in ("_time", "classifier", "position_embeddings"))
        assert parameter.requires_grad == is_trained, name


@pytest.mark.parametrize("attention_type", ["spatio_temporal", "factorised_dot_product_attention"])
def test_freezing_space_needs_parameters_of_time(attention_type):
    with pytest.raises(ValueError, match="leaves no temporal parameters to train"):
        freeze(make(attention_type), "spatial")
    with pytest.raises(ValueError, match="`freeze='half'` is not known"):
        freeze(make(attention_type), "half")


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_learning_rates_fall_from_layer_to_layer(attention_type):
    model = make(attention_type)
    found = depths(model)
    layers = model.config.num_hidden_layers
    is_factorised = attention_type == "factorised_encoder"
    total = layers + (model.config.num_temporal_layers if is_factorised else 0)
    assert found["classifier.weight"] == 0
    assert found["vivit.encoder.layer.0.mlp.fc1.weight"] == total
    assert {found[name] for name in found if name.startswith("vivit.embeddings.")} == {total + 1}
    assert found["vivit.layernorm.weight"] == (model.config.num_temporal_layers if is_factorised else 0)
    groups = parameter_groups(model, 0.1, 0.05, layer_decay=0.5)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rate_of[id(parameter)] == pytest.approx(0.1 * 0.5 ** found[name]), name
    assert groups[0]["lr"] == 0.1, "Trainer logs the rate of the first group"


def test_registers_and_the_first_layernorm_learn_like_the_embeddings():
    model = make("factorised_encoder", num_register_tokens=2, pre_layernorm=True)
    found = depths(model)
    names = ["vivit.embeddings.register_tokens", "vivit.pre_layernorm.weight", "vivit.pre_layernorm.bias"]
    assert {found[name] for name in names} == {found["vivit.embeddings.cls_token"]}
    assert {part_of(name) for name in names} == {"embeddings"}
    free = {
        id(one) for group in parameter_groups(model, 0.1, 0.05) if not group["weight_decay"] for one in group["params"]
    }
    assert {id(model.get_parameter(name)) for name in names} <= free
    assert set(names) <= set(freeze(model, "spatial"))


def test_norms_biases_and_positions_do_not_decay():
    model = make("factorised_encoder")
    freeze(model, "spatial")
    groups = parameter_groups(model, 0.1, 0.05)
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay_of
            continue
        is_free = name.endswith(("bias", "position_embeddings", "cls_token")) or "layernorm" in name
        assert decay_of[id(parameter)] == (0.0 if is_free else 0.05), name
    with pytest.raises(ValueError, match="layer_decay=0"):
        parameter_groups(model, 0.1, 0.0, layer_decay=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter is left"):
        parameter_groups(model, 0.1, 0.0)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_gradient_norms_per_part(attention_type):
    model = make(attention_type)
    config = model.config
    clips = torch.randn(2, config.num_frames, 3, *config.frame_size)
    model(clips, labels=torch.tensor([0, 1])).loss.backward()
    norms = gradient_norms(model)
    has_time = attention_type in ("factorised_encoder", "factorised_self_attention")
    assert set(norms) == {"embeddings", "encoder", "classifier", "total"} | ({"temporal"} if has_time else set())
    whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert torch.allclose(norms["total"], whole, rtol=1e-5)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    for part in set(parts.values()):
        grads = [one.grad.flatten() for name, one in model.named_parameters() if parts[name] == part]
        assert torch.allclose(norms[part], torch.cat(grads).norm(), rtol=1e-5)


@pytest.mark.parametrize("case", [*ATTENTION_TYPES, "average pooling"])
def test_every_parameter_has_a_gradient(case):
    """Several processes rely on it: `ddp_find_unused_parameters` is off."""
    settings = {"num_temporal_layers": 0} if case == "average pooling" else {}
    model = make("factorised_encoder" if settings else case, drop_path_rate=0.9, **settings).train()
    config = model.config
    model(torch.randn(2, config.num_frames, 3, *config.frame_size), labels=torch.tensor([0, -100])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# The trainer


LABELS = LabelMap({"": ("dark", "grey", "bright")})
GREYS = {"dark": 40, "grey": 120, "bright": 220}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos of each of three brightnesses, the last one of "grey" broken."""
    folder = tmp_path_factory.mktemp("grey")
    found = []
    for label, level in GREYS.items():
        for number in range(4):
            frames = np.clip(moving_frames(12, 32, 40) // 8 + level, 0, 255).astype(np.uint8)
            path = write_video(folder / f"{label}_{number}.mp4", frames)
            found.append(LabelledVideo(str(path), (label,), str(path)))
    (folder / "grey_3.mp4").write_bytes(b"broken")
    return found


def trainer_of(videos, folder, model=None, clips=VideoClips, **settings):
    config = tiny_config("factorised_encoder", **LABELS.config_fields())
    torch.manual_seed(0)
    model = model or ViViTForVideoClassification(config)
    height, width = config.frame_size
    processor = ViViTVideoProcessor(
        num_frames=config.num_frames, size={"shortest_edge": width}, crop_size={"height": height, "width": width}
    )
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    own = {name: arguments.pop(name) for name in ("layer_decay", "is_balanced", "averaging") if name in arguments}
    return ClipTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=clips(videos, processor, LABELS, augmentation=ClipAugmentation((height, width))),
        eval_dataset=VideoClips(videos, processor, LABELS, num_clips=2, num_crops=3),
        data_collator=ClipCollator(LABELS, mixup_alpha=0.2),
        processing_class=processor,
        label_map=LABELS,
        **own,
    )


def test_training_goes_on_past_a_damaged_file_and_names_it(videos, tmp_path):
    trainer = trainer_of(videos, tmp_path, max_steps=9)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 9 and np.isfinite(losses).all()
    assert list(trainer.all_damaged_files()["train"]) == [videos[7].video]
    assert trainer.all_damaged_files()["eval"] == {}
    trainer.evaluate()
    assert list(trainer.all_damaged_files()["eval"]) == [videos[7].video]


def test_the_log_has_the_gradient_of_each_part_before_clipping(videos, tmp_path):
    trainer = trainer_of(videos, tmp_path, max_steps=2, max_grad_norm=1e-3)
    trainer.train()
    entry = trainer.state.log_history[0]
    parts = [entry[f"grad_norm/{part}"] for part in ("embeddings", "encoder", "temporal", "classifier")]
    assert np.sqrt(np.square(parts).sum()) == pytest.approx(entry["grad_norm"], rel=1e-3)
    assert entry["grad_norm"] > 0.01


def test_gradient_norms_are_computed_for_the_log_alone(videos, tmp_path, monkeypatch):
    steps = []
    trainer = trainer_of(videos, tmp_path, max_steps=4, logging_steps=2)
    monkeypatch.setattr(training, "gradient_norms", lambda _: steps.append(trainer.state.global_step + 1) or {})
    trainer.train()
    assert steps == [2, 4]


def test_evaluation_averages_views_and_counts_what_can_be_read(videos, tmp_path):
    trainer = trainer_of(videos, tmp_path)
    metrics = trainer.evaluate()
    output = list(
        predict_videos(trainer.model, trainer.processing_class, [one.video for one in videos], num_clips=2, num_crops=3)
    )
    good = [one for one in output if one.error is None]
    assert len(good) == 11 and output[7].error
    targets = np.array([LABELS.encode(videos[one.index]).item() for one in good])
    expected = classification_metrics(np.stack([one.logits for one in good]), targets, LABELS)
    assert metrics["eval_top1"] == expected["top1"] and "eval_top5" not in metrics
    loss = -np.mean([np.log(one.probabilities[target]) for one, target in zip(good, targets, strict=True)])
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-5), "the mean over the videos that can be read"


def test_a_second_set_is_not_taken_for_the_first(videos, tmp_path):
    """Trainer keeps the loader of persistent workers under one name for all evaluation sets."""
    trainer = trainer_of(videos, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert len(trainer.predict(trainer.eval_dataset).predictions) == 12
    trainer.evaluate()
    other = VideoClips(videos[:5], trainer.processing_class, LABELS)
    assert trainer.evaluate(other)["eval_loss"] != trainer.evaluate()["eval_loss"]
    assert len(trainer.get_eval_dataloader(other).dataset) == 5


class CountProcesses(TrainerCallback):
    def __init__(self):
        self.counts = []

    def on_evaluate(self, *arguments, **settings):
        self.counts.append(len(multiprocessing.active_children()))


@pytest.mark.parametrize("evaluated", [VideoClips, StreamedClips])
@pytest.mark.parametrize("clips", [VideoClips, StreamedClips])
def test_no_process_stays_after_training_and_evaluation(videos, tmp_path, clips, evaluated):
    """Each would wait for another epoch with its memory, and end five seconds after it is dropped."""
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "eval_strategy": "steps"}
    trainer = trainer_of(videos[:8], tmp_path, **workers, eval_steps=1, clips=clips)
    if evaluated is StreamedClips:
        trainer.eval_dataset = StreamedClips(videos[:4], trainer.processing_class, LABELS, num_clips=2, num_crops=3)
    count = CountProcesses()
    trainer.add_callback(count)
    for use in (trainer.train, trainer.evaluate, partial(trainer.predict, trainer.eval_dataset), trainer.train):
        use()
        assert multiprocessing.active_children() == []
    # Workers of training, and those of an evaluation that are used again.
    assert len(count.counts) >= 8 and max(count.counts) == (4 if evaluated is VideoClips else 2)


def test_a_run_resumed_after_an_epoch_goes_on_to_the_bit_with_persistent_workers(videos, tmp_path):
    """Stochastic depth draws from the random numbers that starting workers would draw from as well."""

    def run(folder, resume=None):
        config = tiny_config("factorised_encoder", **LABELS.config_fields(), drop_path_rate=0.5)
        torch.manual_seed(0)
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        trainer = trainer_of(
            videos[:8],
            folder,
            ViViTForVideoClassification(config),
            **workers,
            save_strategy="epoch",
            max_steps=6,
        )
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4")) == whole and len(whole) == 6


def test_layer_decay_reaches_the_optimiser(videos, tmp_path):
    trainer = trainer_of(videos, tmp_path, layer_decay=0.5, optim="sgd", optim_args="momentum=0.9")
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD) and {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert len({group["lr"] for group in optimizer.param_groups}) > 3


def test_a_collapse_to_one_class_is_warned_of(videos, tmp_path, caplog):
    config = tiny_config("factorised_encoder", **LABELS.config_fields())
    model = ViViTForVideoClassification(config)
    with torch.no_grad():
        model.classifier.bias[2] = 50.0
    trainer = trainer_of([one for one in videos if "grey_3" not in one.video] * 2, tmp_path, model=model)
    logger = logging.getLogger("vivit_hf.training.trainer")
    logger.addHandler(caplog.handler)
    try:
        trainer.evaluate()
    finally:
        logger.removeHandler(caplog.handler)
    assert "Nearly all predictions on the validation videos are 'bright'" in caplog.text


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer_of(videos, folder, max_steps=4, save_steps=2, save_strategy="steps").train()
    return folder


def test_the_last_whole_checkpoint_is_found(checkpoints, tmp_path):
    assert last_complete_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(checkpoints, tmp_path, name, damage):
    shutil.copytree(checkpoints, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-4" / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    assert not is_complete_checkpoint(file.parent)
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_a_sharded_checkpoint_has_all_its_shards(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-4", folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_complete_checkpoint(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert is_complete_checkpoint(folder)


# One batch


def one_batch(model, labels):
    config = model.config
    clips = torch.randn(len(labels), config.num_frames, 3, *config.frame_size)
    return {"pixel_values": clips, "labels": torch.tensor(labels)}


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_one_batch_is_learnt_by_heart(attention_type):
    model = make(attention_type, **LABELS.config_fields(), drop_path_rate=0.5, hidden_dropout_prob=0.3)
    report = overfit_one_batch(
        model, one_batch(model, [0, 1, 2, 0]), LABELS, torch.optim.Adam, parameter_groups(model, 3e-3, 0.0)
    )
    assert report.is_reached and 0 < report.num_steps < 200 and report.last_loss < report.first_loss, str(report)
    assert not report.unmoved and not report.without_gradient
    assert "learnt by heart: accuracy 100.0%" in str(report)


def test_what_did_not_move_is_said():
    model = make("factorised_encoder", **LABELS.config_fields())
    batch = one_batch(model, [0, 1, 2, 0])
    batch["pixel_values"][:] = batch["pixel_values"][:1]  # clips that are alike cannot be told apart
    model.vivit.temporal_encoder.layer[0].mlp.fc2.weight.register_hook(torch.zeros_like)
    report = overfit_one_batch(model, batch, LABELS, torch.optim.SGD, parameter_groups(model, 1e-2, 0.0), num_steps=5)
    assert not report.is_reached and report.num_steps == 5
    name = "vivit.temporal_encoder.layer.0.mlp.fc2.weight"
    assert report.unmoved == [name] and report.without_gradient == [name]
    assert "NOT learnt" in str(report) and name in str(report)


def test_one_batch_with_groups_and_with_several_labels():
    for label_map, labels in (
        (LabelMap({"noun": ("pan", "lid"), "verb": ("open", "wash")}), [[0, 1], [1, 0], [1, 1]]),
        (LabelMap({"": ("a", "b", "c")}, True), [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
    ):
        model = make("factorised_encoder", **label_map.config_fields())
        report = overfit_one_batch(
            model, one_batch(model, labels), label_map, torch.optim.Adam, parameter_groups(model, 3e-3, 0.0)
        )
        assert report.is_reached, str(report)
