"""Fine-tuning as users start it, on miniature data."""

import csv
import json
import logging
import re
import shutil
import sys

import finetune
import numpy as np
import pytest
import torch
from finetune_runs import EXAMPLES, losses, run, settings_for, start, to_argv, write_data
from hub_server import HubServer
from moving_shapes import MOTIONS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForVideoClassification, ViTForImageClassification

from vivit_hf import ViViTForVideoClassification
from vivit_hf.training import finetuning
from vivit_hf.training.finetuning_parser import parse_arguments
from vivit_hf.training.recipes import RECIPES


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


# The whole way


def test_from_an_image_vit_to_a_model_that_classifies(data, tmp_path):
    """As a user would: a settings file, the command line, a folder of results."""
    settings = settings_for(data, tmp_path / "out", num_clips=1, num_crops=3, mixup_alpha=0.2)
    settings |= {"report_to": "[tensorboard]", "save_batch_picture": str(tmp_path / "batch.png")}
    settings |= {"learning_rate": "1e-3", "horizontal_flip": "auto"}
    text = "\n".join(f"{name}: {value}" for name, value in settings.items())
    (tmp_path / "settings.yaml").write_text(text + "\nresize: null\nclass_weights: no\n")
    process = start([sys.executable, EXAMPLES / "finetune.py", tmp_path / "settings.yaml", "--num_clips", "2"])
    assert process.returncode == 0, process.stderr[-3000:]
    printed = process.stdout
    noises = ("LOAD REPORT", "pin_memory", "not sharded", "Loading weights", "Writing model")
    assert not [noise for noise in noises if noise in process.stderr]
    assert "16 videos to train on, 4 for validation, 4 classes" in printed
    assert "Training on 1 process(es), device type cpu" in printed
    assert "No horizontal flips: 4 class names mention a side or a turn (down_left, down_right" in printed
    assert re.search(r"vit: \d+ copied, 1 inflated, \d+ newly initialised parameters", printed)

    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    assert json.loads((out / "eval_results.json").read_text())["eval_top1"] == results["eval_top1"]
    assert 0 <= results["eval_top1"] <= 1 and "eval_top5" not in results, "four classes cannot be wrong in five"
    assert results["eval_majority_class_accuracy"] == 0.25 and 0 <= results["eval_balanced_accuracy"] <= 1
    assert "Near chance: top-1 accuracy" in printed
    assert results["train_damaged_files"] == results["eval_damaged_files"] == 0
    assert results["eval_protocol"].startswith("2 clips x 3 crops of 4 frames, stride 2, ")
    assert (results["train_samples"], results["eval_samples"]) == (16, 4)
    assert json.loads((out / "train_results.json").read_text())["train_loss"] > 0
    card = (out / "README.md").read_text()
    assert "2 clips x 3 crops" in card and f"| top1 | {results['eval_top1']:.4f} |" in card and "model-index" in card
    assert any(path.name.startswith("events.out.tfevents") for path in out.rglob("*"))
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0]["learning_rate"] == pytest.approx(1e-3) and log[0]["grad_norm/temporal"] > 0

    model, processor = AutoModelForVideoClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert model.config.label2id == {name: index for index, name in enumerate(sorted(MOTIONS))}
    logits = model(**processor(str(data / "videos" / "test" / "up_left" / "000.mp4"))).logits
    assert logits.shape == (1, 4)
    with Image.open(tmp_path / "batch.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 4 * 32 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "four rows of frames"


VARIANTS = {
    "spatio_temporal": {},
    "factorised_encoder": {"num_temporal_layers": 1, "gradient_accumulation_steps": 2, "freeze": "spatial"},
    "factorised_self_attention": {"gradient_checkpointing": True, "temporal_attention_init": "copy"},
    "factorised_dot_product_attention": {"bf16": True, "tubelet_init": "filter_inflation", "layer_decay": 0.7},
}


@pytest.mark.parametrize("attention_type", VARIANTS)
def test_every_variant_with_one_option_or_another(data, tmp_path, attention_type):
    results = run(data, tmp_path, attention_type=attention_type, **VARIANTS[attention_type])
    assert np.isfinite(results["train_loss"])
    model = ViViTForVideoClassification.from_pretrained(tmp_path)
    assert model.config.attention_type == attention_type and model.dtype == torch.float32


def test_training_goes_through_torch_compile(data, tmp_path):
    results = run(data, tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager")
    plain = run(data, tmp_path / "plain")
    assert results["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-4)
    ViViTForVideoClassification.from_pretrained(tmp_path / "compiled")


def test_a_vivit_goes_on_with_its_classifier_if_the_classes_are_the_same(data, tmp_path, capsys):
    run(data, tmp_path / "first", freeze="spatial", max_steps=1, max_train_samples=8)
    first = ViViTForVideoClassification.from_pretrained(tmp_path / "first")
    order = ["up_right", "up_left", "down_right", "down_left"]
    first.config.id2label, first.config.label2id = dict(enumerate(order)), {name: i for i, name in enumerate(order)}
    first.save_pretrained(tmp_path / "turned")
    shutil.copy(tmp_path / "first" / "preprocessor_config.json", tmp_path / "turned")
    run(
        data,
        tmp_path / "second",
        model_name_or_path=tmp_path / "turned",
        max_steps=1,
        learning_rate=0.0,
        num_frames=None,
    )
    assert "the same 4 classes, so its classifier is kept" in capsys.readouterr().out
    second = ViViTForVideoClassification.from_pretrained(tmp_path / "second")
    assert list(second.config.id2label.values()) == order
    assert torch.equal(second.classifier.weight, first.classifier.weight)

    few = tmp_path / "few"
    for name in ("up_left", "up_right"):
        shutil.copytree(data / "videos" / "train" / name, few / name)
    run(
        data,
        tmp_path / "third",
        model_name_or_path=tmp_path / "turned",
        train_dir=few,
        validation_dir=None,
        max_steps=1,
    )
    assert "a new classifier for 2 classes" in capsys.readouterr().out
    assert ViViTForVideoClassification.from_pretrained(tmp_path / "third").config.id2label == {
        0: "up_left",
        1: "up_right",
    }


def test_a_model_can_be_evaluated_only(data, tmp_path):
    run(data, tmp_path / "trained", max_steps=3)
    changes = {"model_name_or_path": tmp_path / "trained", "do_eval": True, "num_frames": None}
    results = run(data, tmp_path / "out", **changes)
    trained = json.loads((tmp_path / "trained" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)
    assert results["eval_top1"] == trained["eval_top1"] and "train_loss" not in results
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_classifier_that_is_new_on_purpose_is_not_reported(data, tmp_path, caplog):
    ViTForImageClassification.from_pretrained(data / "vit", num_labels=7).save_pretrained(tmp_path / "classifier")
    shutil.copytree(data / "videos" / "train" / "up_left", tmp_path / "few" / "up_left")
    shutil.copytree(data / "videos" / "train" / "up_right", tmp_path / "few" / "up_right")
    loading = logging.getLogger("transformers.modeling_utils")
    caplog.clear()
    loading.addHandler(caplog.handler)
    try:
        run(data, tmp_path / "four", model_name_or_path=tmp_path / "classifier", max_steps=1)
        given = {"model_name_or_path": tmp_path / "four", "train_dir": tmp_path / "few", "validation_dir": None}
        run(data, tmp_path / "two", **given, max_steps=1)
    finally:
        loading.removeHandler(caplog.handler)
    assert "LOAD REPORT" not in caplog.text
    weights = load_file(tmp_path / "classifier" / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if ".layernorm_after." not in name}
    save_file(lacking, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"does not fit a plain ViT in 2 places: .*layernorm_after"):
        run(data, tmp_path / "lacking", model_name_or_path=tmp_path / "classifier")


def test_a_preset_starts_from_nothing(data, tmp_path, capsys):
    run(data, tmp_path, model_name_or_path="vivit-tiny", max_steps=1, num_frames=4, image_size=32)
    assert "vivit-tiny: new weights" in capsys.readouterr().out


# Data


def write_table(path, rows, header):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def files_of(data):
    return [(str(path), path.parent.name) for path in sorted((data / "videos" / "train").glob("*/*.mp4"))]


def test_a_table_without_validation_is_split(data, tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", files_of(data), ["path", "label"])
    results = run(
        data,
        tmp_path / "out",
        train_dir=None,
        validation_dir=None,
        train_file=table,
        class_weights=True,
        balanced_sampling=True,
        cutmix_alpha=1.0,
        label_smoothing_factor=0.1,
    )
    assert "12 videos to train on, 4 for validation" in capsys.readouterr().out
    assert results["eval_samples"] == 4


def test_several_labels_per_video(data, tmp_path):
    rows = [(path, label.replace("_", "|")) for path, label in files_of(data)]
    table = write_table(tmp_path / "t.csv", rows, ["path", "labels"])
    results = run(
        data,
        tmp_path / "out",
        train_dir=None,
        validation_dir=None,
        train_file=table,
        validation_file=table,
        problem_type="multi_label_classification",
        label_separator="|",
    )
    assert 0 < results["eval_map"] <= 1 and "eval_top1" not in results
    config = ViViTForVideoClassification.from_pretrained(tmp_path / "out").config
    assert list(config.id2label.values()) == ["down", "left", "right", "up"]
    assert config.problem_type == "multi_label_classification"


def test_epic_kitchens_has_two_heads(data, tmp_path):
    videos = tmp_path / "epic" / "P01"
    videos.mkdir(parents=True)
    shutil.copy(files_of(data)[0][0], videos / "P01_01.MP4")
    names = "video_id start_timestamp stop_timestamp verb_class noun_class".split()
    rows = [("P01_01", f"00:00:00.{n}0", f"00:00:01.{n}0", n % 3, 7 * n) for n in range(8)]
    table = write_table(tmp_path / "EPIC_100_train.csv", rows, names)
    given = {"train_dir": None, "validation_dir": None, "train_file": table, "validation_file": table}
    results = run(data, tmp_path / "out", **given, video_root=tmp_path / "epic", label_smoothing_factor=0.2)
    for name in ("top1", "top5", "noun_top1", "noun_top5", "verb_top1", "verb_top5", "action_top1", "action_top5"):
        assert 0 <= results[f"eval_{name}"] <= 1
    assert results["eval_top1"] == results["eval_action_top1"]
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert model.config.label_groups == {"noun": 300, "verb": 97} and model.classifier.out_features == 397


def test_kinetics_and_something_something(data, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    kinetics, something = [], []
    for number, (path, label) in enumerate(files_of(data)):
        shutil.copy(path, folder / f"id{number}_000001_000011.mp4")
        shutil.copy(path, folder / f"{number}.webm")
        kinetics.append((label, f"id{number}", 1, 11, "train"))
        something.append({"id": str(number), "label": "x", "template": f"Moving [something] {label[-4:]}"})
    kinetics.append(("up_left", "gone", 1, 11, "train"))
    table = write_table(tmp_path / "k400.csv", kinetics, ["label", "youtube_id", "time_start", "time_end", "split"])
    given = {"train_dir": None, "validation_dir": None, "video_root": folder, "max_steps": 1}
    run(data, tmp_path / "k400", **given, train_file=table, missing_videos="skip")
    assert "12 videos to train on, 4 for validation, 4 classes" in capsys.readouterr().out
    (tmp_path / "train.json").write_text(json.dumps(something))
    labels = {f"Moving something {label}": str(index) for index, label in enumerate(("ight", "left"))}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    run(data, tmp_path / "ssv2", **given, train_file=tmp_path / "train.json", labels_file=tmp_path / "labels.json")
    config = ViViTForVideoClassification.from_pretrained(tmp_path / "ssv2").config
    assert list(config.id2label.values()) == ["Moving something ight", "Moving something left"]


def test_data_sets_as_the_hub_has_them(data, tmp_path, capsys):
    given = {"train_dir": None, "validation_dir": None, "dataset_name": data / "videos"}
    results = run(data, tmp_path / "whole", **given)
    assert results["eval_samples"] == 4
    assert "16 videos to train on, 4 for validation, 4 classes" in capsys.readouterr().out
    results = run(data, tmp_path / "stream", **given, streaming=True, max_steps=3)
    assert len(losses(tmp_path / "stream")) == 3 and 0 <= results["eval_top1"] <= 1
    labels = [
        ViViTForVideoClassification.from_pretrained(tmp_path / name).config.id2label for name in ("whole", "stream")
    ]
    assert labels[0] == labels[1] == dict(enumerate(sorted(MOTIONS)))
    with pytest.raises(SystemExit, match="A streamed data set has no length: give --max_steps"):
        run(data, tmp_path / "endless", **given, streaming=True, max_steps=-1)


def test_a_damaged_file_is_named_and_counted(data, tmp_path):
    train = tmp_path / "train"
    shutil.copytree(data / "videos" / "train", train)
    broken = train / "up_left" / "002.mp4"
    broken.write_bytes(broken.read_bytes()[:100])
    results = run(data, tmp_path / "out", train_dir=train, max_steps=8)
    assert results["train_damaged_files"] == 1 and results["eval_damaged_files"] == 0
    assert len(losses(tmp_path / "out")) == 8
    report = json.loads((tmp_path / "out" / "damaged_files.json").read_text())
    assert list(report["train"]) == [str(broken)] and report["train"][str(broken)] and report["eval"] == {}


def test_data_without_a_readable_video_end_the_command_with_a_message(data, tmp_path):
    """The error comes from a worker, with its traceback."""
    for name in ("a/1.mp4", "b/2.mp4"):
        (tmp_path / "train" / name).parent.mkdir(parents=True)
        (tmp_path / "train" / name).write_bytes(b"no video")
    given = {"train_dir": tmp_path / "train", "validation_dir": None, "train_val_split": 0}
    with pytest.raises(SystemExit) as ended:
        run(data, tmp_path / "out", **given, dataloader_num_workers=1)
    message = ended.value.code
    assert message.startswith("finetune: 11 videos in a row cannot be read") and "Traceback" not in message


def wrong_inputs(data, folder):
    """Arguments that cannot work, and what the error says."""
    rows = files_of(data)
    one_class = write_table(folder / "one.csv", rows[:4], ["path", "label"])
    no_label = write_table(folder / "column.csv", rows, ["path", "sort"])
    gone = write_table(folder / "gone.csv", [*rows, ("nowhere.mp4", "up_left")], ["path", "label"])
    validation = write_table(folder / "validation.csv", [(rows[0][0], "sideways")], ["path", "label"])
    few = write_table(folder / "few.csv", rows[:1], ["path", "label"])
    empty = write_table(folder / "empty.csv", [], ["path", "label"])
    (folder / "nothing").mkdir()
    table = {"train_dir": None, "validation_dir": None}
    whole = write_table(folder / "all.csv", rows, ["path", "label"])
    return {
        "no classes": ({**table, "train_dir": folder / "nothing"}, r"nothing: there are no class folders"),
        "one class": (
            {**table, "train_file": one_class},
            r"training data: at least 2 labels are needed, each only once; got down_left",
        ),
        "empty split": ({**table, "train_file": whole, "validation_file": empty}, r"empty\.csv: there are no videos"),
        "unknown label": (
            {**table, "train_file": whole, "validation_file": validation},
            r"validation\.csv:2: the label 'sideways' is not among the 4",
        ),
        "missing from validation": (
            {**table, "train_file": whole, "validation_file": few},
            r"3 of the 4 classes of the training split have no video .*few\.csv:2.*'down_right' \(.*all\.csv:6\)",
        ),
        "no column": ({**table, "train_file": no_label}, r"column\.csv:1: there is no column of labels named label"),
        "no such video": ({**table, "train_file": gone}, r"gone\.csv:18: there is no file .*nowhere\.mp4"),
        "no such folder": ({**table, "train_dir": folder / "nowhere"}, r"nowhere: there is no such file or folder"),
        "no data": (table, r"--train_dir, --train_file or --dataset_name; got none"),
        "two sources": ({"train_file": whole}, r"got --train_dir, --train_file"),
    }


CASES = (
    "no classes, one class, empty split, unknown label, missing from validation, no column, no such video, "
    "no such folder, no data, two sources"
).split(", ")


@pytest.mark.parametrize("case", CASES)
def test_input_that_cannot_work_is_an_error_before_a_model_is_loaded(data, tmp_path, monkeypatch, case):
    changes, message = wrong_inputs(data, tmp_path)[case]

    def load(*arguments):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(finetuning, "build_model", load)
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "config.json").exists()


def test_settings_that_cannot_work(data, tmp_path, capsys):
    for changes, message in (
        ({"freeze": "spatial", "attention_type": "spatio_temporal"}, "leaves no temporal parameters to train"),
        ({"lora_rank": 2, "freeze": "all_but_head"}, "leave --freeze out"),
        ({"scale_jitter": "0.9"}, "expected two factors such as 0.9,1.33"),
        ({"horizontal_flip": "perhaps"}, "yes, no or auto"),
        ({"resume_from_checkpoint": str(tmp_path)}, "there is no complete checkpoint"),
        ({"model_name_or_path": str(tmp_path / "no_model")}, "no_model"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(data, tmp_path / "out", **changes)
    for argv in (["--recipe", "k700"], ["--output_dir", "x", "--no_such_thing", "1"], ["--train_dir", "x"]):
        with pytest.raises(SystemExit):
            finetune.main(argv)
    errors = capsys.readouterr().err
    assert (
        "expected one of k400-b, k400-b-fe" in errors
        and "no_such_thing" in errors
        and "--output_dir is required" in errors
    )


# Recipes

# Data, learning rate, epochs, stride, resize, crop, drop path, smoothing, mixup, layers, magnitude, colour, views.
OFFICIAL = {
    "k400-b": (0.1, 30, 2, 256, 224, None, None, None, None, None, (0.8, 0.1), (4, 3)),
    "k400-b-fe": (0.05, 30, 2, 256, 224, None, None, None, None, None, (0.8, 0.1), (4, 3)),
    "k400-l-fe": (0.1, 30, 2, 256, 224, None, None, None, None, None, (0.8, 0.1), (4, 3)),
    "k600-l-fe": (0.05, 30, 2, 256, 224, None, None, None, None, None, (0.8, 0.1), (4, 3)),
    "ssv2-l-fe": (0.4, 35, 1, 288, 256, 0.3, 0.3, 0.3, 2, 20, (None, None), (4, 3)),
    "epic-l-fe": (0.5, 50, 1, 256, 224, 0.2, 0.2, 0.1, 2, 15, (None, None), (4, 1)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipes_are_the_official_ones(name):
    given = {**RECIPES[name].arguments, **RECIPES[name].model}
    given["resize"] = given["resize_ratio"] * given["image_size"]
    keys = "learning_rate num_train_epochs frame_stride resize image_size drop_path_rate label_smoothing_factor"
    keys += " mixup_alpha rand_augment_layers rand_augment_magnitude"
    colours = (given.get("colour_jitter"), given.get("colour_drop"))
    views = (given["num_clips"], given["num_crops"])
    assert (*(given.get(key) for key in keys.split()), colours, views) == OFFICIAL[name]
    shared = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
    shared |= {"weight_decay": 0.0, "num_frames": 32, "scale_jitter": "0.9,1.33", "horizontal_flip": "auto"}
    assert {key: given[key] for key in shared} == shared
    assert given["warmup_steps"] * given["num_train_epochs"] == pytest.approx(2.5)
    assert given["per_device_train_batch_size"] == 64 and given["tubelet_init"] == "central_frame"
    assert given["attention_type"] == ("spatio_temporal" if name == "k400-b" else "factorised_encoder")
    if name != "k400-b":
        assert given["num_temporal_layers"] == (24 if name in ("k400-l-fe", "k600-l-fe") else 4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_understood_and_explicit_arguments_beat_it(name, tmp_path):
    argv = ["--recipe", name, "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    _, data, augmentation, training = parse_arguments([*argv, "--per_device_train_batch_size", "4"])
    assert training.learning_rate == RECIPES[name].arguments["learning_rate"] and training.scales_learning_rate
    assert augmentation.scale_jitter == RECIPES[name].arguments.get("scale_jitter")
    assert data.num_clips == RECIPES[name].arguments.get("num_clips", 1)

    given = [
        "--learning_rate",
        "0.3",
        "--num_clips",
        "1",
        "--scale_jitter",
        "0.5,2",
        "--gradient_accumulation_steps",
        "8",
    ]
    _, data, augmentation, training = parse_arguments([*argv, *given])
    assert (training.learning_rate, data.num_clips, augmentation.scale_jitter) == (0.3, 1, "0.5,2")
    assert not training.scales_learning_rate


def test_a_recipe_runs(data, tmp_path):
    """Its optimiser, augmentation and views, on a model and clips that are small."""
    results = run(
        data,
        tmp_path,
        recipe="ssv2-l-fe",
        learning_rate=None,
        resize=36,
        image_size=32,
        num_temporal_layers=1,
        num_train_epochs=1,
    )
    assert results["eval_protocol"].startswith("4 clips x 3 crops of 4 frames, stride 2, resized to short side 36")


# Why it fails


def test_one_batch_can_be_learnt_by_heart(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(data, tmp_path, overfit_one_batch=True, learning_rate=3e-3, freeze="none", mixup_alpha=0.5)
    assert ended.value.code == 0
    assert "One batch was learnt by heart: accuracy 100.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run(data, tmp_path, overfit_one_batch=True, learning_rate=1e-9, overfit_steps=3)
    assert ended.value.code == 1
    assert re.search(r"One batch was NOT learnt[\s\S]*trained parameters did not move", capsys.readouterr().out)


# The Hub


def test_the_model_is_pushed_with_its_scores(data, tmp_path):
    settings = settings_for(
        data, tmp_path / "out", push_to_hub=True, hub_model_id="tester/moves", hub_private_repo=True, hub_endpoint=True
    )
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / "home", "hf_writer"), "HF_HUB_OFFLINE": "0"}
        process = start([sys.executable, EXAMPLES / "finetune.py", *to_argv(settings)], **environment)
        assert process.returncode == 0, process.stderr[-3000:]
        assert "Uploaded to tester/moves." in process.stdout
        repository = hub.repositories["tester/moves"]
    assert repository.private
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(repository.files)
    assert b"class EndpointHandler" in repository.files["handler.py"] and "requirements.txt" in repository.files
    card = repository.files["README.md"].decode()
    assert "| top1 |" in card and "1 clip x 1 crop of 4 frames" in card and "model-index" in card


def test_a_repository_that_the_hub_refuses_is_an_error_before_training(data, tmp_path):
    settings = settings_for(data, tmp_path / "out", push_to_hub=True, hub_model_id="reader/moves")
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / "home", "hf_reader"), "HF_HUB_OFFLINE": "0"}
        process = start([sys.executable, "-m", "vivit_hf", "finetune", *to_argv(settings)], **environment)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "finetune: --push_to_hub: the Hub does not accept reader/moves: 403" in process.stderr
    assert "The model and its clips" not in process.stdout
