"""The notebooks run from top to bottom, and show what is stored in them."""

import base64
import importlib.util
import re

import nbformat
import pytest
from paths import ROOT


pytestmark = pytest.mark.slow


FOLDER = ROOT / "docs" / "notebooks"
NAMES = ["classify_and_explain.ipynb", "finetune_on_a_folder.ipynb", "long_video.ipynb"]
NUMBER = re.compile(r"\d[\d.:]*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook):
    """Return what each cell of code prints, with the whitespace of tables collapsed, and its pictures; not training."""
    texts, pictures = [], []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "vivit-hf finetune" not in cell.source:
            texts.append(" ".join("".join(output.get("text", "") for output in cell.outputs).split()))
            data = [output.get("data", {}) for output in cell.outputs]
            pictures.append([base64.b64decode(one["image/png"]) for one in data if "image/png" in one])
    return texts, pictures


def numbers(text):
    return [float(number) for number in NUMBER.findall(text) if number.count(".") < 2 and number[-1].isdigit()]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_is_stored(runner, name):
    texts, pictures = shown(nbformat.read(FOLDER / name, as_version=4))
    texts_today, pictures_today = shown(runner.run_notebook(FOLDER / name))
    assert [NUMBER.sub("#", text) for text in texts_today] == [NUMBER.sub("#", text) for text in texts]
    assert [len(one) for one in pictures_today] == [len(one) for one in pictures]
    assert all(len(picture) < 200_000 for one in (*pictures, *pictures_today) for picture in one)
    if name == "finetune_on_a_folder.ipynb":  # training rounds differently on other machines
        (accuracy,) = re.findall(r"right: \d+ of 60 \(([\d.]+)%; chance is 25%\)", " ".join(texts_today))
        assert float(accuracy) >= 80
    else:
        for today, stored in zip(texts_today, texts, strict=True):
            assert numbers(today) == pytest.approx(numbers(stored), abs=0.03)


def test_every_notebook_is_tried():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == NAMES
