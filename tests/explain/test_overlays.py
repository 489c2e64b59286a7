"""Pictures of where the model looked: what is in them, and that files are whole."""

import os
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import case_config, make_clips, make_model, token_counts

import vivit_hf.explain.overlays
from vivit_hf import ViViTModel, ViViTVideoProcessor
from vivit_hf.explain.overlays import Explanation, draw_explanation, draw_overlay, explain_clip, save_explanation
from vivit_hf.explain.relevance import Relevance, attention_rollout, gradient_relevance
from vivit_hf.frame_sampling import sample_frames_uniformly


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


# Heat


def test_heat_lies_where_the_map_is_high():
    frames = make_frames()
    even, high = np.ones((4, 3, 5), np.float32), np.ones((4, 3, 5), np.float32)
    high[2, 1, 3] = 20
    without, with_heat = draw_overlay(frames, even), draw_overlay(frames, high)
    assert with_heat.dtype == np.uint8 and with_heat.shape == frames.shape
    changed = (without != with_heat).any(axis=-1)
    # A step covers its two frames; heat runs out half a token beside the token.
    assert changed[4:6, 8:16, 24:32].all()
    assert not changed[[0, 1, 2, 3, 6, 7]].any()
    assert not changed[4:6, :4].any() and not changed[4:6, :, :20].any() and not changed[4:6, :, 36:].any()
    hottest = with_heat[4, 11:13, 27:29].reshape(-1, 3).mean(axis=0)
    assert hottest[0] > 190 and hottest[0] > hottest[2] + 60  # light yellow over whatever was there


def test_heat_depends_on_shares_and_not_on_their_scale():
    frames, values = make_frames(), np.random.default_rng(1).random((4, 3, 5), np.float32)
    np.testing.assert_array_equal(draw_overlay(frames, values), draw_overlay(frames, torch.from_numpy(values * 1e-3)))


def test_a_nearly_even_map_is_not_made_to_look_sharp():
    frames = np.full((8, 24, 40, 3), 128, np.uint8)
    values = 1 + 0.01 * np.random.default_rng(1).random((4, 3, 5), np.float32)
    assert np.abs(draw_overlay(frames, values).astype(int) - 128).max() < 6


def test_more_heat_is_lighter():
    frames, values = np.full((1, 24, 400, 3), 60, np.uint8), np.linspace(0, 2, 50, dtype=np.float32).reshape(1, 1, 50)
    lightness = draw_overlay(frames, values)[0, 12] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > -1).all() and lightness[-1] > lightness[0] + 100


def test_a_map_of_zeros_has_no_heat():
    frames = make_frames()
    zeros, even = np.zeros((4, 3, 5)), np.ones((4, 3, 5))
    np.testing.assert_array_equal(draw_overlay(frames, zeros), draw_overlay(frames, even))


@pytest.mark.parametrize(
    ("frames", "space_map", "message"),
    [
        (make_frames().astype(float), np.ones((4, 3, 5)), r"`frames` must be uint8 .*got float64 \(8, 24, 40, 3\)"),
        (make_frames()[0], np.ones((4, 3, 5)), r"`frames` must be uint8 .*got uint8 \(24, 40, 3\)"),
        ([], np.ones((4, 3, 5)), "`frames` must be uint8 .*got list"),
        (make_frames(), np.ones((3, 3, 5)), r"a time that divides the 8 frames, got \(3, 3, 5\)"),
        (make_frames(), np.ones((1, 4, 3, 5)), r"must be \(time, height, width\).*got \(1, 4, 3, 5\)"),
        (make_frames(), -np.ones((4, 3, 5)), r"finite and not negative, got -1\.0"),
        (make_frames(), np.full((4, 3, 5), np.nan), "finite and not negative, got nan"),
    ],
)
def test_what_cannot_be_drawn_is_named(frames, space_map, message):
    with pytest.raises(ValueError, match=message):
        draw_overlay(frames, space_map)


# Explaining a clip


@pytest.fixture
def processor():
    return ViViTVideoProcessor(num_frames=8, size={"height": 24, "width": 40}, crop_size={"height": 24, "width": 40})


@pytest.mark.parametrize("method", ["rollout", "gradient"])
def test_an_explanation_has_what_the_model_saw_and_says(case, method, processor, tmp_path):
    config = case_config(case, id2label=dict(enumerate(["a", "b", "c", "d", "e"])))
    model, video = make_model(config).train(), make_frames()
    clips = processor(video)["pixel_values"]
    explanation = explain_clip(model, processor, clips, method, top_k=3)
    assert model.training
    seen = video
    if config.embedding_type == "uniform_frame_sampling":
        seen = video[sample_frames_uniformly(8, config.num_sampled_frames).tolist()]
    np.testing.assert_array_equal(explanation.frames, seen)
    expected = (attention_rollout if method == "rollout" else gradient_relevance)(model, clips)
    torch.testing.assert_close(explanation.relevance.space, expected.space)
    with torch.no_grad():
        scores = model.eval()(clips).logits[0].softmax(-1)
    best = scores.argsort(descending=True)[:3].tolist()
    assert [label for label, _ in explanation.labels] == ["abcde"[index] for index in best]
    assert [score for _, score in explanation.labels] == pytest.approx(scores[best].tolist())
    assert explanation.target == (None if method == "rollout" else "abcde"[best[0]])
    assert len(explanation.frames) % token_counts(config)[0] == 0
    save_explanation(tmp_path / "sheet.png", explanation)


def test_the_class_to_explain_can_be_chosen(model, processor):
    [clip] = processor(make_frames())["pixel_values"]
    explanation = explain_clip(model, processor, clip, "gradient", class_index=2)
    torch.testing.assert_close(explanation.relevance.space, gradient_relevance(model, clip[None], 2).space)
    assert explanation.target == "LABEL_2" and len(explanation.labels) == 5


def test_what_fills_no_patch_is_not_shown(variant):
    config = case_config(variant, num_frames=9, image_size=(30, 44))
    processor = ViViTVideoProcessor(num_frames=9, do_resize=False, do_center_crop=False)
    video = make_frames(9, 30, 44)
    explanation = explain_clip(make_model(config), processor, processor(video)["pixel_values"])
    np.testing.assert_array_equal(explanation.frames, video[:8, :24, :40])


def test_grey_clips_are_shown_in_grey(variant):
    config = case_config(variant, num_channels=1)
    processor = ViViTVideoProcessor(image_mean=0.5, image_std=0.5)
    explanation = explain_clip(make_model(config), processor, make_clips(config, batch=1))
    assert explanation.frames.shape == (8, 24, 40, 3)
    assert (explanation.frames == explanation.frames[..., :1]).all()


def test_models_without_labels_are_drawn_without_a_chart(variant, processor, tmp_path):
    config = case_config(variant)
    clips = make_clips(config, batch=1)
    with_labels = draw_explanation(explain_clip(make_model(config), processor, clips))
    for model in (make_model(config, ViViTModel), make_model(case_config(variant, num_labels=0))):
        explanation = explain_clip(model, processor, clips)
        assert explanation.labels == []
        assert draw_explanation(explanation).height < with_labels.height
        save_explanation(tmp_path / "clip.mp4", explanation)
        with pytest.raises(TypeError, match="There are no classes to explain"):
            explain_clip(model, processor, clips, "gradient")


def test_a_regression_shows_its_values(variant, processor):
    config = case_config(variant, problem_type="regression")
    model, clips = make_model(config), make_clips(config, batch=1)
    model.classifier.bias.data += torch.arange(5.0) * 3 - 6
    explanation = explain_clip(model, processor, clips)
    with torch.no_grad():
        assert [score for _, score in explanation.labels] == pytest.approx(
            sorted(model(clips).logits[0].tolist(), reverse=True), rel=1e-5
        )
    draw_explanation(explanation)


def test_groups_of_labels_have_their_own_probabilities(processor):
    config = case_config("factorised_encoder", num_labels=5, label_groups={"noun": 3, "verb": 2})
    explanation = explain_clip(make_model(config), processor, make_clips(config, batch=1), "gradient")
    assert sum(score for _, score in explanation.labels) == pytest.approx(2)
    assert explanation.target == explanation.labels[0][0]


def test_wrong_requests_are_named(model, processor, clips):
    with pytest.raises(ValueError, match="`method` must be one of rollout, gradient, got 'saliency'"):
        explain_clip(model, processor, clips[:1], "saliency")
    with pytest.raises(ValueError, match="Rollout is of no class: leave out class_index=1"):
        explain_clip(model, processor, clips[:1], class_index=1)
    with pytest.raises(ValueError, match="takes one clip, got 2"):
        explain_clip(model, processor, clips)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        explain_clip(model, processor, clips[:1], top_k=0)
    with pytest.raises(ValueError, match=r"`class_index=7` must be one whole number from 0 to 4"):
        explain_clip(model, processor, clips[:1], "gradient", class_index=7)
    with pytest.raises(ValueError, match=r"expects clips of \(8, 24, 40\)"):
        explain_clip(model, processor, clips[0, :4])


# Files


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
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        draw_explanation(make_explanation(), max_steps=0)


def test_bars_have_the_length_of_their_scores():
    def dark(score: float) -> int:
        picture = np.asarray(draw_explanation(make_explanation(labels=[("a", score)])))
        return int((picture[-50:] == vivit_hf.explain.overlays._ACCENT).all(axis=-1).sum())

    full, half, none = dark(1.0), dark(0.5), dark(0.0)
    assert none == 0 and half / full == pytest.approx(0.5, abs=0.02)


def test_long_names_end_in_an_ellipsis():
    long = "a label " * 60
    short, cut = make_explanation(), make_explanation(labels=[(long, 0.9), ("b", 0.1)])
    assert draw_explanation(cut).width == draw_explanation(short).width
    shortened = vivit_hf.explain.overlays._shortened(long, lambda text: len(text) <= 20)
    assert shortened == "a label a label a..."
    assert vivit_hf.explain.overlays._shortened("short", lambda text: len(text) <= 20) == "short"


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
    with pytest.raises(ValueError, match=rf"{name}: a picture can have the suffix \.png, \.gif, \.mp4, not '{suffix}'"):
        save_explanation(tmp_path / name, make_explanation())
    with pytest.raises(ValueError, match="`fps` must be above 0, got 0"):
        save_explanation(tmp_path / "clip.mp4", make_explanation(), fps=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("what was there")
    broken = make_explanation()
    write = vivit_hf.explain.overlays._write
    count = 0

    def fail(*arguments, **named):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr(vivit_hf.explain.overlays, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        save_explanation(path, broken)
    assert path.read_text() == "what was there" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_explanation(path, broken)
    assert path.stat().st_size > 1000 and list(tmp_path.iterdir()) == [path]


def test_pillow_without_fonts_of_any_size_will_do(tmp_path, monkeypatch):
    fonts = vivit_hf.explain.overlays.ImageFont
    small = getattr(fonts, "load_default_imagefont", fonts.load_default)()

    def load_default(*size):
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")  # as Pillow 10.0 does
        return small

    monkeypatch.setattr(fonts, "load_default", load_default)
    monkeypatch.setattr(
        vivit_hf.explain.overlays, "_font", vivit_hf.explain.overlays._font.__wrapped__
    )  # past its cache
    for name in ("sheet.png", "clip.mp4"):
        assert save_explanation(tmp_path / name, make_explanation(labels=[("足球 é", 0.9), ("b", 0.1)])).is_file()
