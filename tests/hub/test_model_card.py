"""The text of the model card, and the parts of an existing card that it keeps. For the Hub: test_hub_roundtrip.py."""

import logging

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import make_model, tiny_config

from vivit_hf import ViViTForPreTraining, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor, write_model_card
from vivit_hf.hub import push
from vivit_hf.hub.model_card import VARIANTS, read_distillation, read_initialisation
from vivit_hf.hub.push import known_origin


def test_every_variant_is_named(variant, tmp_path):
    text = write_model_card(tmp_path, make_model(tiny_config(variant))).read_text(encoding="utf-8")
    assert VARIANTS[variant] in text and f"`{variant}`" in text
    assert ModelCard(text).data.pipeline_tag == "video-classification"
    assert "## Initialisation" not in text


@pytest.mark.parametrize("model_class", [ViViTModel, ViViTForVideoClassification])
def test_a_model_without_classifier_is_for_features(tmp_path, model_class):
    model = make_model(tiny_config("spatio_temporal", num_labels=0), model_class)
    text = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    assert ModelCard(text).data.pipeline_tag == "feature-extraction"
    assert "AutoModel.from_pretrained" in text and "| labels |" not in text and "classes" not in text


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "distinguishes 5 classes and assigns one of them to any video"),
        (
            {"label_groups": {"noun": 3, "verb": 2}},
            "distinguishes 5 classes and assigns one of each group (noun, verb)",
        ),
        ({"problem_type": "multi_label_classification"}, "gives any video a probability for each of 5 labels"),
        ({"problem_type": "regression"}, "gives 5 numbers for any video"),
    ],
)
def test_the_limits_name_the_answers_of_the_problem(tmp_path, changes, answer):
    model = make_model(tiny_config("spatio_temporal", **{"num_labels": 5, **changes}))
    assert answer in write_model_card(tmp_path, model).read_text(encoding="utf-8")


def test_a_pretrained_model_is_for_fine_tuning_and_features(tmp_path):
    model = make_model(tiny_config("factorised_encoder", mask_ratio=0.75), ViViTForPreTraining)
    text = write_model_card(tmp_path, model, repo_id="tester/masked").read_text(encoding="utf-8")
    assert ModelCard(text).data.pipeline_tag == "feature-extraction"
    assert "vivit-hf finetune --train_dir videos/train --model_name_or_path tester/masked" in text
    assert 'ViViTModel.from_pretrained("tester/masked")' in text
    assert "| pretraining | tube masks over 75% of the places |" in text


def test_a_base_model_that_is_a_folder_is_in_the_text_alone(model, tmp_path):
    path = write_model_card(tmp_path, model, base_model=str(tmp_path), report="14 newly initialised")
    read = ModelCard.load(path)
    assert read.data.base_model is None and f"Started from `{tmp_path}`." in read.text
    assert "Newly initialised parameters must be trained" in read.text


def test_one_name_need_not_be_a_list(model, tmp_path):
    path = write_model_card(tmp_path, model, datasets="kinetics400", metrics="accuracy", tags="sport")
    data = ModelCard.load(path).data
    assert (data.datasets, data.metrics) == (["kinetics400"], ["accuracy"]) and data.tags[-1] == "sport"


def test_writing_again_changes_only_what_was_written_here(model, tmp_path):
    path = write_model_card(tmp_path, model, base_model="org/vit", report="| copied | 3 |", tags=["mine"])
    first = path.read_text(encoding="utf-8")
    assert write_model_card(tmp_path, model).read_text(encoding="utf-8") == first
    path.write_text(first.replace("license: apache-2.0", "license: mit") + "\nBy me.\n", encoding="utf-8")
    second = write_model_card(tmp_path, model, repo_id="org/name").read_text(encoding="utf-8")
    assert 'pipeline("video-classification", model="org/name")' in second and "| copied | 3 |" in second
    assert "license: mit" in second and second.endswith("\nBy me.\n") and second.count("Started from") == 1
    assert "license: bsd" in write_model_card(tmp_path, model, license="bsd").read_text(encoding="utf-8")


def test_the_task_follows_the_model_unless_somebody_chose_another(tmp_path):
    features, classifier = (make_model(tiny_config("spatio_temporal", num_labels=number)) for number in (0, 3))
    for model, task in ((features, "feature-extraction"), (classifier, "video-classification")):
        path = write_model_card(tmp_path, model)
        assert ModelCard.load(path).data.pipeline_tag == task
    path.write_text(path.read_text(encoding="utf-8").replace("video-classification", "robotics", 1), encoding="utf-8")
    assert ModelCard.load(write_model_card(tmp_path, features)).data.pipeline_tag == "robotics"


def test_somebody_elses_card_keeps_its_text_and_gets_the_missing_metadata(model, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [swimming]\n---\n# Swimmers\n\nAll mine.\n", encoding="utf-8")
    read = ModelCard.load(write_model_card(tmp_path, model, metrics=["accuracy"]))
    assert read.text.strip() == "# Swimmers\n\nAll mine."
    assert read.data.tags == ["swimming", "vivit", "video-classification", "vision"]
    assert read.data.metrics == ["accuracy"] and read.data.library_name == "transformers"


def test_a_card_that_cannot_be_read_is_left_as_it_is(model, tmp_path, caplog):
    broken = "---\ntags: [a\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken, encoding="utf-8")
    logging.getLogger("vivit_hf").addHandler(caplog.handler)
    try:
        path = write_model_card(tmp_path, model)
    finally:
        logging.getLogger("vivit_hf").removeHandler(caplog.handler)
    assert path.read_text(encoding="utf-8") == broken
    assert str(path) in caplog.text and "left as it is" in caplog.text
    assert read_initialisation(tmp_path) == (None, None)


@pytest.mark.parametrize("name", ["pipe | name", "plain"])
def test_a_label_does_not_break_the_table(tmp_path, name):
    model = make_model(tiny_config("spatio_temporal", id2label={0: name, 1: "other"}))
    row = next(line for line in write_model_card(tmp_path, model).read_text().splitlines() if "| labels |" in line)
    assert row.replace("\\|", "").count("|") == 3


def test_where_a_converted_folder_came_from_goes_with_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model, base_model="org/vit", report="| copied | 3 |")
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path)
    base_model, report = known_origin(loaded, "org/new")
    (tmp_path / "new").mkdir()
    text = write_model_card(tmp_path / "new", loaded, base_model=base_model, report=report).read_text(encoding="utf-8")
    loaded.name_or_path = "runs/that/are/gone"
    assert known_origin(loaded, "org/new") == (None, None)
    assert base_model == "org/vit" and text.count("Started from") == 1 and "| copied | 3 |" in text


def test_only_our_own_classes_take_their_files_along(model, tmp_path):
    class Mine(ViViTForVideoClassification):
        pass

    class MyProcessor(ViViTVideoProcessor):
        pass

    model.save_pretrained(tmp_path / "ours")
    mine = Mine.from_pretrained(tmp_path / "ours")
    mine.save_pretrained(tmp_path / "mine")
    MyProcessor().save_pretrained(tmp_path / "mine")
    assert (tmp_path / "ours" / "modeling_vivit.py").exists()
    assert not (tmp_path / "mine" / "test_model_card.py").exists()
    assert mine.config.auto_map == {"AutoConfig": "configuration_vivit.ViViTConfig"}


def test_results_stand_in_text_and_metadata_with_their_views(model, tmp_path):
    scores, views = {"top1": 0.8125, "top5": 1.0}, "4 clips x 3 crops of 32 frames"
    path = write_model_card(tmp_path, model, repo_id="org/name", datasets="org/clips", results=scores, protocol=views)
    read = ModelCard.load(path)
    assert "| top1 | 0.8125 |" in read.text and f"Views per video: {views}." in read.text
    found = {result.metric_name: result for result in read.data.eval_results}
    assert found[f"top1 ({views})"].metric_value == 0.8125
    assert {result.dataset_type for result in found.values()} == {"org/clips"}
    first = path.read_text(encoding="utf-8")
    assert write_model_card(tmp_path, model, repo_id="org/name").read_text(encoding="utf-8") == first
    again = write_model_card(tmp_path, model, repo_id="org/name", results={"map": 0.5}).read_text(encoding="utf-8")
    assert "| map | 0.5000 |" in again and "0.8125" not in again


def test_a_card_keeps_the_teacher_until_it_is_removed(model, tmp_path):
    assert read_distillation(tmp_path) is None
    write_model_card(tmp_path, model, distillation="Distilled from `big`.")
    text = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    assert text.count("## Distillation\n\nDistilled from `big`.") == 1
    assert read_distillation(tmp_path) == "Distilled from `big`."
    assert "Distill" not in write_model_card(tmp_path, model, distillation="").read_text(encoding="utf-8")
    assert read_distillation(tmp_path) is None


def test_a_pushed_folder_keeps_its_teacher(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model, distillation="Distilled from `big`.")
    uploaded = []

    class Hub:
        def __init__(self, token):
            pass

        def hf_hub_download(self, *arguments, **settings):
            raise EntryNotFoundError("no card")

    def upload(api, repo_id, paths, **settings):
        uploaded.append(next(path for path in paths if path.name == "README.md").read_text(encoding="utf-8"))

    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(push, "_create_repo", lambda api, name, private: name)
    monkeypatch.setattr(push, "upload", upload)
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path)
    loaded.push_to_hub("me/small")
    loaded.push_to_hub("me/small", distillation="")
    assert ["Distilled from `big`." in text for text in uploaded] == [True, False]
