"""The recipe for few labels, from an image ViT and from a ViViT, as a user runs it."""

import re

import pytest
import torch
from finetune_runs import run, write_data
from tiny_models import case_config, make_model

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.training.finetuning_parser import parse_arguments


FEW = {"recipe": "few-labels", "learning_rate": None, "max_steps": None, "num_train_epochs": 1, "frame_stride": None}
FITTED = re.compile(r"The classifier starts from logistic regression on (\d+) clips, (\d+)% of them right")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 + 4 videos of 4 motions and a small image ViT."""
    return write_data(tmp_path_factory.mktemp("data"))


def vivit_of(case, folder):
    make_model(case_config(case, image_size=32)).save_pretrained(folder)
    ViViTVideoProcessor(num_frames=8, frame_stride=1, size=34, crop_size=32).save_pretrained(folder)
    return folder


def test_an_image_vit_becomes_a_model_that_classifies(data, tmp_path, capsys):
    results = run(data, tmp_path, image_size=32, num_frames=None, **FEW)
    printed = capsys.readouterr().out
    assert "tokens of 36 views, 36 of them computed now" in printed  # 16 videos x 2 views, and 4 videos
    assert FITTED.search(printed)[1] == "32"
    model = ViViTForVideoClassification.from_pretrained(tmp_path).eval()
    config, processor = model.config, ViViTVideoProcessor.from_pretrained(tmp_path)
    assert (config.temporal_pooling, config.num_temporal_layers, config.tubelet_size[0]) == ("concatenate", 1, 1)
    assert (config.num_frames, config.grid_size[0], processor.frame_sampling) == (16, 16, "uniform")
    videos = sorted((data / "videos" / "test").rglob("*.mp4"))
    found = [config.id2label[int(one.logits.argmax())] for one in predict_videos(model, processor, videos)]
    right = [label == path.parent.name for label, path in zip(found, videos, strict=True)]
    assert sum(right) / len(right) == results["eval_top1"]
    assert results["eval_protocol"].startswith("1 clip x 1 crop of 16 frames, spread over the video")


def test_given_arguments_override_the_recipe(data, tmp_path, capsys):
    given = {"num_cached_views": 1, "temporal_pooling": "mean", "num_temporal_layers": 2, "frame_stride": 1}
    run(data, tmp_path, image_size=32, **{**FEW, **given})
    printed = capsys.readouterr().out
    assert FITTED.search(printed)[1] == "16" and "of their mean" in printed
    model = ViViTForVideoClassification.from_pretrained(tmp_path)
    assert (model.config.temporal_pooling, model.config.num_temporal_layers, model.config.num_frames) == ("mean", 2, 4)
    processor = ViViTVideoProcessor.from_pretrained(tmp_path)
    assert (processor.frame_sampling, processor.frame_stride) == ("clip", 1)


def test_the_classifier_can_start_at_random(data, tmp_path, capsys):
    run(data, tmp_path, image_size=32, classifier_init="random", num_cached_views=1, **FEW)
    assert not FITTED.search(capsys.readouterr().out)


def test_a_resumed_run_does_not_fit_the_classifier_again(data, tmp_path, capsys):
    settings = {**FEW, "image_size": 32, "num_cached_views": 1, "save_strategy": "epoch"}
    run(data, tmp_path, **settings)
    capsys.readouterr()
    run(data, tmp_path, **{**settings, "num_train_epochs": 2})
    assert not FITTED.search(capsys.readouterr().out)


def test_a_vivit_with_a_factorised_encoder_keeps_its_structure(data, tmp_path, capsys):
    vivit = vivit_of("factorised_encoder", tmp_path / "vivit")
    settings = {"model_name_or_path": vivit, "num_frames": None, "num_cached_views": 2}
    run(data, tmp_path / "out", **settings, **FEW)
    assert FITTED.search(capsys.readouterr().out)[1] == "32"
    before, after = (ViViTForVideoClassification.from_pretrained(folder) for folder in (vivit, tmp_path / "out"))
    assert after.config.num_temporal_layers == 2 and after.config.temporal_pooling is None
    assert ViViTVideoProcessor.from_pretrained(tmp_path / "out").frame_sampling == "clip"
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        is_frozen = not name.startswith(("vivit.temporal", "classifier"))
        assert old.shape != new.shape or torch.equal(old, new) == is_frozen, name


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_self_attention", "factorised_dot_product_attention"])
def test_other_variants_are_refused_with_a_way_out(data, tmp_path, case):
    vivit = vivit_of(case, tmp_path / "vivit")
    freezing = {} if case == "factorised_self_attention" else {"freeze": "all_but_head"}
    message = "--cache_features needs Model 2.* It comes from the recipe few-labels: use another one"
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path / "out", model_name_or_path=vivit, num_frames=None, **FEW, **freezing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_features": False, "num_cached_views": 1}, "--classifier_init probe .*: add --cache_features"),
        ({"freeze": "none"}, "--cache_features stores the outputs of frozen weights: add --freeze spatial"),
        ({"classifier_init": "zero"}, "--classifier_init zero: expected one of random, probe"),
        ({"frame_sampling": "dense"}, "--frame_sampling dense: expected one of clip, uniform"),
        ({"frame_sampling": "uniform", "frame_stride": 2}, "--frame_stride and --frame_sampling set the same"),
        ({"problem_type": "multi_label_classification"}, "give --classifier_init random for several labels"),
    ],
)
def test_what_does_not_go_together_is_named(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, image_size=32, **{**FEW, **changes})


def test_a_stream_is_refused(data, tmp_path):
    names = {"train_dir": None, "validation_dir": None, "train_val_split": 0}
    stream = {"dataset_name": data / "videos", "train_split_name": "train", "streaming": True}
    message = "--streaming does not go with --cache_features.* It comes from the recipe few-labels"
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, image_size=32, **{**FEW, **names, **stream, "max_steps": 2})


def test_without_scikit_learn_the_error_names_the_extra(data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(ValueError, match=r"requires scikit-learn: run `pip install 'vivit-hf\[probe\]'`"):
        parse_arguments(["--recipe", "few-labels", "--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu"])


def test_a_class_without_training_clips_gets_the_smallest_logit(data, tmp_path):
    labels = sorted(path.name for path in (data / "videos" / "train").iterdir())
    (tmp_path / "labels.txt").write_text("\n".join([*labels, "no motion"]))
    settings = {"labels_file": tmp_path / "labels.txt", "image_size": 32, "num_cached_views": 1}
    run(data, tmp_path / "out", **settings, **{**FEW, "learning_rate": 0.0})
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out")
    place = model.config.label2id["no motion"]
    assert not model.classifier.weight[place].any() and model.classifier.bias[place] < 0
