"""Pictures and videos of explanations: what is in them, and that files are whole."""

import os
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vivit_hf.explain import pictures, text
from vivit_hf.explain.explanation import Explanation
from vivit_hf.explain.pictures import draw_explanation, save_explanation
from vivit_hf.explain.relevance import Relevance


LABELS = [("walking the dog", 0.8), ("riding a bike", 0.15), ("juggling", 0.05)]


def make_frames(frames: int = 8, height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def make_explanation(steps: int = 4, labels: list[tuple[str, float]] = LABELS, **frames: int) -> Explanation:
    """One token of one step stands out."""
    space = torch.full((1, steps, 3, 5), 0.01)
    space[0, steps - 1, 1, 2] = 0.5
    space /= space.sum()
    relevance = Relevance(space, space.sum(dim=(2, 3)))
    target = labels[0][0] if labels else None
    return Explanation(make_frames(**frames), relevance, labels, "gradient", target)


def read_mp4(path) -> tuple[list[np.ndarray], str]:
    with av.open(str(path)) as container:
        [stream] = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 5
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, stream.codec_context.pix_fmt


def test_a_sheet_shows_frames_with_and_without_heat(tmp_path):
    explanation = make_explanation()
    path = save_explanation(tmp_path / "sheet.PNG", explanation)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 600
        np.testing.assert_array_equal(np.asarray(image), np.asarray(draw_explanation(explanation)))
    taller = draw_explanation(make_explanation(labels=[*LABELS, ("one more", 0.0)]))
    assert taller.width == image.width and image.height < taller.height


def test_a_sheet_of_a_long_clip_shows_some_steps():
    pictures = [draw_explanation(make_explanation(16, frames=32), max_steps) for max_steps in (4, 8, 16)]
    assert pictures[0].width < pictures[1].width < pictures[2].width
    with pytest.raises(ValueError, match="`max_steps=0` must be a whole number of at least 1"):
        draw_explanation(make_explanation(), max_steps=0)


def test_bars_have_the_length_of_their_scores():
    def dark(score: float) -> int:
        picture = np.asarray(draw_explanation(make_explanation(labels=[("a", score)])))
        return int((picture[-50:] == pictures._ACCENT).all(axis=-1).sum())

    full, half, none = dark(1.0), dark(0.5), dark(0.0)
    assert none == 0 and half / full == pytest.approx(0.5, abs=0.02)


def test_long_names_end_in_an_ellipsis():
    long = "a label " * 60
    short, cut = make_explanation(), make_explanation(labels=[(long, 0.9), ("b", 0.1)])
    assert draw_explanation(cut).width == draw_explanation(short).width
    shortened = text.shorten(long, lambda words: len(words) <= 20)
    assert shortened == "a label a label a..."
    assert text.shorten("short", lambda words: len(words) <= 20) == "short"


def test_an_mp4_has_every_frame(tmp_path):
    explanation = make_explanation()
    frames, pixel_format = read_mp4(save_explanation(tmp_path / "clip.mp4", explanation, fps=5))
    assert pixel_format == "yuv420p" and len(frames) == 8
    height, width = frames[0].shape[:2]
    assert height % 2 == width % 2 == 0 and width >= 320 and height >= 320
    # The last step has the heat, in the middle of the frame, and the tallest bar.
    middle = [frame[150:170, width // 2 - 10 : width // 2 + 10].astype(int) for frame in frames]
    redder = [float((one[..., 0] - one[..., 2]).mean()) for one in middle]
    assert min(redder[6:]) > max(redder[:6]) + 40


@pytest.mark.parametrize(("height", "width"), [(24, 40), (333, 501), (25, 31)])
def test_sizes_of_an_mp4_are_even(tmp_path, height, width):
    frames, _ = read_mp4(save_explanation(tmp_path / "clip.mp4", make_explanation(height=height, width=width), fps=5))
    assert len(frames) == 8 and frames[0].shape[0] % 2 == 0 and frames[0].shape[1] % 2 == 0


def test_a_gif_has_every_frame(tmp_path):
    path = save_explanation(tmp_path / "clip.gif", make_explanation(), fps=10)
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 8 and image.info["duration"] == 100
        assert image.info["loop"] == 0


@pytest.mark.parametrize("name", ["clip.avi", "clip", "clip.jpeg"])
def test_other_suffixes_are_refused(tmp_path, name):
    suffix = re.escape(os.path.splitext(name)[1])
    with pytest.raises(ValueError, match=rf"{name}: expected the suffix \.png, \.gif, \.mp4, got '{suffix}'"):
        save_explanation(tmp_path / name, make_explanation())
    with pytest.raises(ValueError, match="`fps` must be above 0, got 0"):
        save_explanation(tmp_path / "clip.mp4", make_explanation(), fps=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("what was there")
    broken = make_explanation()
    write = pictures.write_text
    count = 0

    def fail(*arguments, **named):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr(pictures, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        save_explanation(path, broken)
    assert path.read_text() == "what was there" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_explanation(path, broken)
    assert path.stat().st_size > 1000 and list(tmp_path.iterdir()) == [path]
