"""An explanation holds what the model saw and predicts, for every variant."""

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_clips, make_model, token_counts

from vivit_hf import ViViTModel, ViViTVideoProcessor
from vivit_hf.explain.explanation import explain_clip
from vivit_hf.explain.pictures import draw_explanation, save_explanation
from vivit_hf.explain.relevance import attention_rollout, gradient_relevance
from vivit_hf.frame_sampling import sample_frames_uniformly


def make_frames(frames: int = 8, height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


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
    with pytest.raises(ValueError, match=r"`method='saliency'` is not known\. Expected one of 'rollout', 'gradient'"):
        explain_clip(model, processor, clips[:1], "saliency")
    with pytest.raises(ValueError, match="Rollout does not depend on a class: leave out class_index=1"):
        explain_clip(model, processor, clips[:1], class_index=1)
    with pytest.raises(ValueError, match="takes one clip, got 2"):
        explain_clip(model, processor, clips)
    with pytest.raises(ValueError, match="`top_k=0` must be a whole number of at least 1"):
        explain_clip(model, processor, clips[:1], top_k=0)
    with pytest.raises(ValueError, match=r"`class_index=7` must be one whole number from 0 to 4"):
        explain_clip(model, processor, clips[:1], "gradient", class_index=7)
    with pytest.raises(ValueError, match=r"expects clips of \(8, 24, 40\)"):
        explain_clip(model, processor, clips[0, :4])
