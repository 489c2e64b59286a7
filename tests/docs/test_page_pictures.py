"""The pictures of the documentation are small, and those that functions of the package draw look as they do today."""

import importlib.util

import matplotlib
import pytest
from packaging.version import Version
from page_runner import looks_like
from pages import PICTURES, ROOT
from PIL import Image


ALL = sorted([*PICTURES.glob("*.png"), *(ROOT / "benchmarks" / "results").rglob("*.png")])


def load(name):
    spec = importlib.util.spec_from_file_location(f"picture_of_{name}", PICTURES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("picture", ALL, ids=lambda path: path.name)
def test_pictures_are_small_and_fit_a_page(picture):
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert 350 <= image.width <= 1500


@pytest.mark.skipif(Version(matplotlib.__version__) < Version("3.11"), reason="older ones arrange texts otherwise")
@pytest.mark.parametrize("name", ["sampling", "attention"])
def test_pictures_look_as_the_package_draws_them_today(name, tmp_path):
    drawn = load(name).main(tmp_path)
    assert looks_like(PICTURES / drawn.name, drawn), f"python docs/pictures/draw.py {name}"


def test_the_attention_that_is_drawn_is_that_of_the_paper():
    """How many of the 48 tokens of 4 frames, and of the class tokens, one token sees in each attention."""
    seen = [[int(tokens.sum()) for _, tokens in attentions] for _, attentions in load("attention").patterns()]
    assert seen == [[49], [13, 5], [12, 4], [4, 12]]


def test_frames_outside_the_clip_are_not_drawn_as_its_frames(tmp_path, monkeypatch):
    """The picture shows the indices that the package's functions choose."""
    module, shown = load("sampling"), []
    draw = module.Sheet.strip
    monkeypatch.setattr(module.Sheet, "strip", lambda self, chosen: (shown.append(chosen.tolist()), draw(self, chosen)))
    module.main(tmp_path)
    assert shown == [[4, 6, 8, 10, 12, 14, 16, 18], [2, 4, 7, 9, 12, 14, 16, 19], [3, 5, 8, 11, 13, 16, 19, 21]]
