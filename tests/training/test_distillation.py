"""Distillation: the clips and labels of a teacher, training with one, and what is refused."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import (
    GROUPS,
    LABELS,
    MEAN,
    SEVERAL,
    SHUFFLED,
    SMALL,
    STD,
    divergence,
    names_of,
    write_processor,
    write_videomae,
)
from tiny_models import make_model, randomise, tiny_config
from torch.utils.data import Dataset
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data import LabelMap
from vivit_hf.training import ClipCollator, ClipTrainer
from vivit_hf.training.distillation import Distillation, load_teacher


say = partial(print, file=sys.stderr)


# Teachers

STUDENT = ViViTVideoProcessor(
    num_frames=8, frame_stride=1, size={"shortest_edge": 40}, crop_size={"height": 24, "width": 40}
)


def write_vivit(folder, config, **settings):
    model = make_model(config)
    model.save_pretrained(folder)
    height, width = config.frame_size
    crop = {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    ViViTVideoProcessor(num_frames=config.num_frames, **crop, **settings).save_pretrained(folder)
    return model


def random_frames(count=8):
    """uint8 (frames, channels, height, width) in the size of the student."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 24, 40), generator=generator, dtype=torch.uint8)


def student_clip(frames):
    return STUDENT.rescale_and_normalize(frames)[None]


def by_hand(frames, places, size):
    """The pixels that a teacher's own processor would make of these frames."""
    images = frames[places].float() / 255
    if frames.shape[-2:] != size:
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((images - mean) / std)[None]


def test_a_videomae_gives_its_own_predictions_in_the_order_of_the_students_labels(tmp_path):
    model = write_videomae(tmp_path)
    teacher = load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    frames = random_frames()
    with torch.no_grad():
        expected = model(by_hand(frames, [1, 3, 5, 7], (32, 32))).logits
    assert expected.std() > 0.1
    found = teacher.logits(student_clip(frames))
    torch.testing.assert_close(found, expected[:, [2, 3, 0]], rtol=1e-4, atol=1e-5)


def write_timesformer(folder):
    config = TimesformerConfig(image_size=32, patch_size=16, num_frames=2, **SMALL, **names_of(SHUFFLED))
    model = randomise(TimesformerForVideoClassification(config)).eval()
    model.save_pretrained(folder)
    write_processor(folder)
    return model, [2, 6], (32, 32)


def write_vjepa2(folder):
    sizes = {"hidden_size": 24, "pred_hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1}
    config = VJEPA2Config(crop_size=32, patch_size=16, frames_per_clip=8, **sizes, **names_of(SHUFFLED))
    model = randomise(VJEPA2ForVideoClassification(config)).eval()
    model.save_pretrained(folder)
    write_processor(folder, "video_preprocessor_config.json")
    return model, list(range(8)), (32, 32)


def write_videoprism(folder):
    module = pytest.importorskip("transformers.models.videoprism")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_spatial_layers": 1}
    sizes |= {"num_temporal_layers": 1, "num_auxiliary_layers": 1, "image_size": 36, "num_frames": 4}
    config = module.VideoPrismVisionConfig(**sizes, **names_of(SHUFFLED))
    model = randomise(module.VideoPrismForVideoClassification(config)).eval()
    model.save_pretrained(folder)
    write_processor(folder, "video_preprocessor_config.json")
    return model, [1, 3, 5, 7], (36, 36)


def write_other_vivit(folder):
    config = tiny_config("spatio_temporal", num_frames=4, **names_of(SHUFFLED))
    return write_vivit(folder, config, image_mean=MEAN, image_std=STD), [1, 3, 5, 7], (24, 40)


@pytest.mark.parametrize("write", [write_timesformer, write_vjepa2, write_videoprism, write_other_vivit])
def test_other_teachers_see_their_own_frames_and_pixels(tmp_path, write):
    model, places, size = write(tmp_path)
    teacher = load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    frames = random_frames()
    with torch.no_grad():
        expected = model(by_hand(frames, places, size)).logits.squeeze(1)
    assert expected.std() > 0.05
    torch.testing.assert_close(teacher.logits(student_clip(frames)), expected[:, [2, 3, 0]], rtol=1e-4, atol=1e-5)


def test_transformers_own_vivit_follows_its_processor(tmp_path):
    config = VivitConfig(image_size=32, num_frames=4, tubelet_size=[2, 16, 16], **SMALL, **names_of(SHUFFLED))
    model = randomise(VivitForVideoClassification(config)).eval()
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "VivitImageProcessor", "offset": True, "rescale_factor": 1 / 127.5}
    write_processor(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3, crop_size=32, **settings)
    teacher = load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    frames = random_frames()
    images = torch.nn.functional.interpolate(frames[1::2].float(), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model((((images / 127.5 - 1) - 0.5) / 0.5)[None]).logits
    torch.testing.assert_close(teacher.logits(student_clip(frames)), expected[:, [2, 3, 0]], rtol=1e-4, atol=1e-4)


def test_clips_stay_as_they_are_if_teacher_and_student_take_the_same(tmp_path):
    write_vivit(tmp_path, tiny_config("factorised_encoder", **names_of(SHUFFLED)))
    teacher = load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    clip = student_clip(random_frames())
    assert torch.equal(teacher.pixel_values(clip), clip)


@pytest.mark.parametrize("label_map", [SEVERAL, GROUPS], ids=["several labels", "groups"])
def test_a_teacher_of_the_same_kind_of_labels_is_matched_by_name(tmp_path, label_map):
    if label_map is SEVERAL:
        theirs, order = LabelMap({"": SHUFFLED}, has_several=True), [2, 3, 0]
    else:
        theirs, order = LabelMap({"verb": ("open", "put", "take"), "noun": ("cup", "pan")}), [4, 3, 2, 1, 0]
    model = write_vivit(tmp_path, tiny_config("factorised_encoder", **theirs.config_fields()))
    clip = student_clip(random_frames())
    with torch.no_grad():
        expected = model(clip).logits[:, order]
    torch.testing.assert_close(load_teacher(str(tmp_path), STUDENT, label_map, say=say).logits(clip), expected)


def test_loading_a_teacher_leaves_the_random_numbers_alone(tmp_path):
    write_videomae(tmp_path)
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    assert torch.equal(torch.randn(3), expected)


# Refused teachers


def refuse(folder, message, label_map=LABELS, processor=STUDENT):
    with pytest.raises(ValueError, match=message):
        load_teacher(str(folder), processor, label_map, say=say)


def test_a_teacher_without_one_of_the_labels_is_refused(tmp_path):
    write_videomae(tmp_path, ("dark", "white", "bright"))
    refuse(tmp_path, "no output for 1 of the 3 labels: 'grey'. Labels are matched by name, and it has 'dark', 'white'")


def test_a_teacher_with_a_label_twice_is_refused(tmp_path):
    write_videomae(tmp_path, ("dark", "grey", "bright", "grey"))
    refuse(tmp_path, "no single output for 1 of the 3 labels: 'grey'")


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (SEVERAL, "predicts one label per video, and the videos have any number of labels per video"),
        (GROUPS, "predicts one label per video, and the videos have the groups noun, verb"),
    ],
)
def test_a_teacher_of_another_kind_of_labels_is_refused(tmp_path, label_map, message):
    write_videomae(tmp_path, label_map.names)
    refuse(tmp_path, message, label_map)


def test_a_teacher_of_several_labels_does_not_teach_single_ones(tmp_path):
    write_videomae(tmp_path, problem_type="multi_label_classification")
    refuse(tmp_path, "predicts any number of labels per video, and the videos have one label per video")


def test_a_teacher_of_more_frames_is_refused(tmp_path):
    write_videomae(tmp_path, num_frames=16)
    refuse(tmp_path, "takes clips of 16 frames, and the student's have 8: give --num_frames 16 or more")


def test_a_teacher_without_a_processor_is_refused(tmp_path):
    write_videomae(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    refuse(tmp_path, "has no processor beside it, which tells the scaling of its pixels")


def test_a_teacher_whose_normalisation_is_unknown_is_refused(tmp_path):
    write_videomae(tmp_path)
    write_processor(tmp_path, image_mean=None)
    refuse(tmp_path, "its processor has no image_mean and image_std")


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("write", [write_videomae, lambda folder: write_other_vivit(folder)[0]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("classifier.bias"), "missing: classifier.bias"),
        (lambda weights: weights.update({"classifier.bias": torch.zeros(9)}), r"classifier.bias is \(9,\)"),
        (lambda weights: weights.update({"classifier.bias": torch.full((4,), torch.nan)}), "(?s)fails on a.*damaged"),
        (lambda weights: weights.update({"head.bias": torch.zeros(9)}), "head.bias"),
    ],
    ids=["missing", "other shape", "NaN", "left over"],
)
def test_a_teacher_whose_weights_do_not_fit_is_refused(tmp_path, write, change, message):
    write(tmp_path)
    rewrite_weights(tmp_path, change)
    refuse(tmp_path, message)


def test_a_damaged_file_of_weights_is_named(tmp_path):
    write_videomae(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(tmp_path, "model.safetensors is damaged")


def test_a_pretrained_model_without_a_classifier_is_no_teacher(tmp_path):
    config = VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **SMALL, **names_of(LABELS.names))
    VideoMAEForPreTraining(config).save_pretrained(tmp_path)
    write_processor(tmp_path)
    refuse(tmp_path, "its weights do not fit its config.json .*missing: classifier.bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": "many"}, "its config.json cannot be used: .*'num_frames' expected int"),
        ({"num_frames": 0}, "its config.json cannot be used: `num_frames=0` must be a whole number of at least 1"),
        ({"hidden_size": 10**9}, "`hidden_size=1,000,000,000` is too large; the limit is 65,536"),
        ({"hidden_size": 60_000}, "1 layers of width 60,000, as its config.json says, do not fit into the .* bytes"),
        ({"id2label": {"0": "dark", "2": "grey", "5": "bright"}}, "`id2label` must name the outputs from 0 to 2"),
        ({"num_attention_heads": 3}, "cannot be loaded: The hidden size 16 is not a multiple"),
        ({"num_hidden_layers": 2}, "its weights do not fit its config.json .*missing: "),
        ({"num_hidden_layers": 0}, "its weights do not fit its config.json .*no place for: "),
    ],
)
def test_a_configuration_that_fits_no_model_or_not_the_weights_is_refused(tmp_path, change, message):
    write_videomae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    refuse(tmp_path, message)


def test_the_weights_of_a_teacher_may_be_in_several_files(tmp_path):
    model = write_videomae(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    teacher = load_teacher(str(tmp_path), STUDENT, LABELS, say=say)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in teacher.model.state_dict().items())


def test_code_of_a_teacher_is_never_run(tmp_path):
    for model_type in ("my_model", "videomae"):
        folder = tmp_path / model_type
        write_videomae(folder)
        config = json.loads((folder / "config.json").read_text())
        code = dict.fromkeys(("AutoConfig", "AutoModelForVideoClassification"), "code.Mine")
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": code}))
        (folder / "code.py").write_text("raise SystemExit('this code was run')")
    refuse(tmp_path / "my_model", "has the model_type 'my_model'; expected .*videomae.*never run")
    teacher = load_teacher(str(tmp_path / "videomae"), STUDENT, LABELS, say=say)
    assert type(teacher.model) is VideoMAEForVideoClassification


def test_a_teacher_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):
        load_teacher(str(tmp_path / "missing"), STUDENT, LABELS, say=say)


def test_the_types_of_transformers_are_known():
    assert {"timesformer", "videomae", "vivit", "vjepa2"} <= set(MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES)


# Training

CONFIG = tiny_config("factorised_encoder", **LABELS.config_fields())


class Clips(Dataset):
    """Clips of coarse random patches in memory, as `VideoClips` has them; labels do not depend on the pixels."""

    def __init__(self, count=12, views=()):
        generator = torch.Generator().manual_seed(0)
        patches = 2 * torch.randn((count, *views, CONFIG.num_frames, 3, 3, 5), generator=generator)
        self.clips = patches.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)  # 24 x 40 pixels

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {"pixel_values": self.clips[index], "labels": torch.tensor(index % 3), "index": index, "epoch": 0}


@pytest.fixture(scope="module")
def distillation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = write_vivit(folder, tiny_config("spatio_temporal", **names_of(SHUFFLED)))
    with torch.no_grad():  # let it tell the clips apart
        model.classifier.weight *= 16
        model.classifier.bias -= model(Clips().clips).logits.mean(dim=0)
    model.save_pretrained(folder)
    return Distillation(load_teacher(str(folder), STUDENT, LABELS, say=say), str(folder), 1.0, 1.0)


def trainer_of(folder, distillation, mixup=0.0, **settings):
    torch.manual_seed(0)
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_strategy": "no"}
    arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False}
    arguments |= {"logging_steps": 1, "lr_scheduler_type": "constant"}
    return ClipTrainer(
        model=ViViTForVideoClassification(CONFIG),
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=Clips(),
        eval_dataset=Clips(4, views=(1,)),
        data_collator=ClipCollator(LABELS, mixup_alpha=mixup),
        label_map=LABELS,
        distillation=distillation,
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_student_learns_from_its_teacher_what_the_labels_do_not_say(tmp_path, distillation):
    trainer = trainer_of(tmp_path, distillation, max_steps=120, learning_rate=3e-4)
    clips = trainer.train_dataset.clips
    answers = distillation.teacher.logits(clips).argmax(dim=1)

    def agreement():
        with torch.no_grad():
            return (trainer.model.eval()(clips).logits.argmax(dim=1) == answers).float().mean().item()

    before = agreement()
    trainer.train()
    assert len(answers.unique()) == 3 and before < 0.5 and agreement() > 0.9


def test_training_leaves_the_teacher_as_it_was(tmp_path, distillation):
    model = distillation.teacher.model
    before = {name: one.clone() for name, one in model.state_dict().items()}
    trainer = trainer_of(tmp_path, distillation)
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not model.training and all(one.grad is None and not one.requires_grad for one in model.parameters())
    trained = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert trained == {id(one) for one in trainer.model.parameters()}
    assert load_file(tmp_path / "model.safetensors").keys() == trainer.model.state_dict().keys()


def test_the_first_loss_is_that_of_the_mixed_clips(tmp_path, distillation):
    own = replace(distillation, temperature=2.0, weight=0.25)
    trainer = trainer_of(tmp_path, own, mixup=0.4, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model.eval()(batch["pixel_values"]).logits
        theirs = own.teacher.logits(batch["pixel_values"])
    hard = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
    soft = 4 * divergence(theirs.double().numpy() / 2, logits.double().numpy() / 2).mean()
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0.75 * hard + 0.25 * soft, rel=1e-4)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path, distillation):
    given = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    whole = trainer_of(tmp_path / "one", distillation, **given)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, **given}
    accumulated = trainer_of(tmp_path / "two", distillation, **parts)
    whole.train()
    accumulated.train()
    assert losses_of(accumulated) == pytest.approx(losses_of(whole), rel=1e-4)


def test_accumulated_losses_of_mixed_clips_are_a_mean(tmp_path, distillation):
    given = {"per_device_train_batch_size": 2, "optim": "sgd", "mixup": 0.4}
    single = trainer_of(tmp_path / "one", distillation, max_steps=2, learning_rate=0.0, **given)
    accumulated = trainer_of(tmp_path / "two", distillation, max_steps=1, gradient_accumulation_steps=2, **given)
    single.train()
    accumulated.train()
    assert losses_of(accumulated)[0] == pytest.approx(np.mean(losses_of(single)), rel=1e-4)


def test_the_evaluation_loss_is_that_of_the_labels(tmp_path, distillation):
    plain, taught = (trainer_of(tmp_path, one).evaluate() for one in (None, distillation))
    assert taught["eval_loss"] == plain["eval_loss"]


def test_the_teacher_computes_in_the_dtype_of_the_run(tmp_path, distillation):
    dtypes = set()
    hook = distillation.teacher.model.classifier.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    trainer_of(tmp_path, distillation, max_steps=1, bf16=True).train()
    hook.remove()
    assert dtypes == {torch.bfloat16}


def test_a_resumed_run_has_the_same_losses_to_the_bit(tmp_path, distillation):
    settings = {"save_strategy": "steps", "save_steps": 2, "mixup": 0.3}  # 3 steps are an epoch
    whole = trainer_of(tmp_path / "whole", replace(distillation, weight=0.5), **settings)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", replace(distillation, weight=0.5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:] and len(losses_of(whole)) == 6
    for name, one in whole.model.named_parameters():
        assert torch.equal(one, resumed.model.get_parameter(name)), name
