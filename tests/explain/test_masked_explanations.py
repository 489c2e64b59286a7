"""What the model saw of a short video: no heat and no picture for masked frames."""

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import SAMPLES, invoke
from tiny_models import case_config, make_clips, make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.explain import explain_clip, save_explanation
from vivit_hf.explain.pixels import to_uint8
from vivit_hf.explain.relevance import attention_rollout, gradient_relevance
from vivit_hf.modeling_vivit import visible_steps


METHODS = {"rollout": attention_rollout, "gradient": gradient_relevance}
CASES = [
    *("spatio_temporal", "factorised_encoder", "factorised_self_attention", "factorised_dot_product_attention"),
    *("average_pool_baseline", "uniform_frames", "mean_pooling", "temporal_mean_pooling", "temporal_attention_pooling"),
    *("max_pooling_pre_logits", "registers_mean_pooling", "merged_tokens_in_space"),
]


def relevance_of(method, model, clips, mask):
    if method == "rollout":
        return attention_rollout(model, clips, mask)
    return gradient_relevance(model, clips, 1, mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_masked_steps_have_no_relevance_and_masked_pixels_no_say(case, method):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    relevance = relevance_of(method, model, clips, mask)
    steps = visible_steps(mask, config)
    assert not relevance.time[~steps].any() and (relevance.time[steps] > 0).all()
    torch.testing.assert_close(relevance.space.sum(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(relevance.time, relevance.space.sum(dim=(2, 3)))
    other = torch.where(mask[:, :, None, None, None], clips, torch.rand_like(clips))
    torch.testing.assert_close(relevance_of(method, model, other, mask).space, relevance.space)
    plain = relevance_of(method, model, clips, None)
    torch.testing.assert_close(relevance.space[1], plain.space[1])
    assert not torch.allclose(relevance.space[0], plain.space[0], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_masked_clip_is_explained_as_the_shorter_model_explains_it(method):
    """Model 2 with the mean over time has no position embeddings in time: its configuration alone makes it shorter."""
    fields = {"attention_type": "factorised_encoder", "num_temporal_layers": 0, "temporal_pooling": "mean"}
    model, short = (make_model(tiny_config(**fields, num_frames=frames)) for frames in (8, 4))
    short.load_state_dict(model.state_dict())
    clips, mask = make_clips(model.config, 1), torch.arange(8)[None] < 4
    relevance = relevance_of(method, model, clips, mask)
    torch.testing.assert_close(relevance.space[:, :2], relevance_of(method, short, clips[:, :4], None).space)


@pytest.mark.parametrize("case", ["factorised_encoder", "uniform_frames"])
def test_pictures_show_the_frames_that_the_model_saw(case, tmp_path):
    """5 of 8 frames, in steps of 2: the third step shows frame 4 twice, and the fourth is left out."""
    config = case_config(case)
    model = make_model(config)
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=1, size=48, crop_size=config.frame_size)
    features = processor(moving_frames(5, 48, 80), short_video_policy="mask")
    explanation = explain_clip(model, processor, **features, top_k=2)
    clip = to_uint8(features["pixel_values"][0], processor)
    if case == "factorised_encoder":
        assert explanation.frame_numbers.tolist() == [0, 1, 2, 3, 4, 4] and explanation.relevance.space.shape[1] == 3
        np.testing.assert_array_equal(explanation.frames, clip[[0, 1, 2, 3, 4, 4]])
        num_pictures = 5
    else:  # frames 2, 3, 5 and 6 are sampled
        assert explanation.frame_numbers.tolist() == [0, 1] and explanation.relevance.space.shape[1] == 2
        np.testing.assert_array_equal(explanation.frames, clip[[2, 3]])
        num_pictures = 2
    save_explanation(tmp_path / "seen.gif", explanation)
    with PIL.Image.open(tmp_path / "seen.gif") as picture:
        assert picture.n_frames == num_pictures
    save_explanation(tmp_path / "seen.png", explanation)


def test_the_command_explains_a_short_video(tmp_path):
    folder = tmp_path / "model"
    ViViTForVideoClassification.from_pretrained(demo_model_path()).save_pretrained(folder)
    ViViTVideoProcessor.from_pretrained(demo_model_path(), short_video_policy="mask").save_pretrained(folder)
    path = write_video(tmp_path / "short.mp4", moving_frames(7, 48, 64))
    for method in METHODS:
        result = invoke("explain", path, "--model", folder, "--output", tmp_path / "seen.gif", "--method", method)
        assert result.exit_code == 0, result.stderr
        with PIL.Image.open(tmp_path / "seen.gif") as picture:
            assert picture.n_frames == 7
    assert invoke("explain", SAMPLES / "all.mp4", "--model", folder, "--output", tmp_path / "seen.gif").exit_code == 0
    with PIL.Image.open(tmp_path / "seen.gif") as picture:
        assert picture.n_frames == 16
