"""Comparing models and searching features for the page, without it: sentences, other models, and hostile paths."""

import importlib
import os

import numpy as np
import pytest
from served_page import SPACE, serving, write_clip
from tiny_models import make_model, tiny_config
from typer.testing import CliRunner

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.cli.app import app


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return {name: importlib.import_module(name) for name in ("jobs", "answers", "similar", "comparison")}


@pytest.fixture
def compare(modules):
    return lambda *answers, known: modules["comparison"].compare(("A", "B"), answers, known)


def test_agreement_is_said_in_one_sentence(compare):
    both = (["up", "down"], ["up", "down"])
    assert compare(["up"], ["up"], known=both) == "The models agree: both say 'up'."
    assert compare(["up"], ["down"], known=both) == "The models differ: 'A' says 'up'; 'B' says 'down'."
    unknown = compare(["none of these"], ["up"], known=([*both[0], "none of these"], both[1]))
    assert unknown == "The models differ: 'A' says 'none of these'; 'B' says 'up'. 'B' cannot say 'none of these'."


def test_labels_written_otherwise_are_the_same(compare):
    text = compare(["playing_guitar"], ["Playing guitar"], known=(["playing_guitar"], ["Playing guitar"]))
    assert text == "The models agree: both say 'playing_guitar'."


def test_several_labels_and_groups_agree_in_part(compare):
    known = (["a", "b", "c"], ["a", "b", "c"])
    text = compare(["a", "b"], ["b", "c"], known=known)
    assert text == "The models agree in part: both say 'b'; only 'A' says 'a'; only 'B' says 'c'."
    assert compare([], ["b"], known=known) == "The models differ: 'B' says 'b'; 'A' gives no label."
    known = (["noun: pan", "verb: cut"], ["noun: pan", "verb: dry"])
    text = compare(["noun: pan", "verb: cut"], ["noun: pan", "verb: dry"], known=known)
    assert text.startswith("The models agree in part: both say 'noun: pan'; only 'A' says 'verb: cut'; only 'B'")
    assert text.endswith("'A' cannot say 'verb: dry'. 'B' cannot say 'verb: cut'.")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A model in a folder, and its features of two videos."""
    folder = tmp_path_factory.mktemp("library")
    for cls in (ViViTForVideoClassification, ViViTVideoProcessor):
        cls.from_pretrained(demo_model_path()).save_pretrained(folder / "model")
    for number, motion in enumerate(("up_left", "down_right")):
        write_clip(folder / f"{motion}.mp4", motion, seed=number)
    files = [str(folder / f"{motion}.mp4") for motion in ("up_left", "down_right")]
    options = ["--model", str(folder / "model"), "--workers", "0", "--per-step"]
    result = CliRunner().invoke(app, ["embed", *files, *options, "--output", str(folder / "features.parquet")])
    assert result.exit_code == 0, result.output
    return folder


def search(modules, library, video, **fields):
    given = {"features": (str(library / "features.parquet"),), **fields}
    job = modules["jobs"].Job("search", str(video), (), modules["jobs"].Limits(), **given)
    *_, last = modules["answers"].answer(job)
    return last["matches"]


def test_the_video_itself_is_the_most_similar_with_its_moment(modules, library):
    first, second = search(modules, library, library / "down_right.mp4")
    assert (first["name"], second["name"]) == ("down_right.mp4", "up_left.mp4")
    assert 1 >= first["score"] > second["score"] and 0 <= first["time"] <= 2
    assert first["picture"] is None  # no folder is allowed


def test_pictures_come_from_allowed_folders_only(modules, library, tmp_path):
    (first, _) = search(modules, library, library / "down_right.mp4", folders=(str(library),))
    assert first["picture"].startswith("data:image/jpeg;base64,")
    (first, _) = search(modules, library, library / "down_right.mp4", folders=(str(tmp_path),))
    assert first["picture"] is None


def test_no_link_and_no_dots_lead_out_of_an_allowed_folder(modules, library, tmp_path):
    shown_path = modules["similar"].shown_path
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    os.symlink(library / "up_left.mp4", allowed / "link.mp4")
    os.symlink(library, allowed / "folder")
    own = write_clip(allowed / "own.mp4", "up_left")
    assert shown_path(str(own), [str(allowed)]) == own.resolve()
    for file in (
        allowed / "link.mp4",
        allowed / "folder" / "up_left.mp4",
        f"{allowed}/../{library.name}/up_left.mp4",
        f"{allowed}-other/own.mp4",
        allowed,
        "/dev/zero",
        f"file://{own}",
        f"{own}\0.png",
    ):
        assert shown_path(str(file), [str(allowed)]) is None, file


def test_names_show_no_path_of_the_server(modules):
    shown_names = modules["similar"].shown_names
    assert shown_names(["/srv/secret/a/1.mp4", "/srv/secret/b/1.mp4"]) == ("a/1.mp4", "b/1.mp4")
    assert shown_names(["/srv/secret/1.mp4"]) == ("1.mp4",)
    assert shown_names(["/srv/x/y/z/1.mp4", "/home/me/2.mp4"]) == ("z/1.mp4", "me/2.mp4")
    assert shown_names(["https://host/path/1.mp4", "s3://bucket/2.mp4"]) == ("1.mp4", "2.mp4")


def test_features_of_another_model_are_refused_by_name(modules, library, tmp_path):
    make_model(tiny_config("factorised_encoder")).save_pretrained(tmp_path / "other")
    ViViTVideoProcessor(num_frames=8, size={"shortest_edge": 40}, crop_size=(24, 40)).save_pretrained(
        tmp_path / "other"
    )
    for model, message in (
        (tmp_path / "other", f"other' is not the model that the features come from ('{library / 'model'}')"),
        (tmp_path / "nowhere", "nowhere', cannot be loaded"),
    ):
        with pytest.raises(modules["jobs"].UserError) as caught:
            search(modules, library, library / "up_left.mp4", features_model=str(model))
        assert message in str(caught.value)


def test_a_file_without_features_is_refused_by_name(modules, library):
    with pytest.raises(modules["jobs"].UserError, match=r"Cannot search: .*up_left\.mp4 is not a Parquet file"):
        search(modules, library, library / "up_left.mp4", features=(str(library / "up_left.mp4"),))


@pytest.mark.slow
def test_a_page_with_features_that_cannot_be_searched_does_not_start(tmp_path):
    served = serving(tmp_path, SPACE / "app.py", "--features", str(tmp_path / "nowhere.parquet"))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended: True.*nowhere\.parquet"), served:
        pass


def test_pictures_have_three_frames(modules, library):
    made = modules["similar"].picture_of(library / "up_left.mp4", np.nan, np.nan, None)
    assert made is not None and len(made) < 100_000
    assert modules["similar"].picture_of(library / "features.parquet", np.nan, np.nan, None) is None
