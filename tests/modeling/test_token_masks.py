"""Masks over the tokens of Model 1: `attention_mask`, as transformers' Vivit takes it."""

import pytest
import torch
from masked_clips import STEPS, frame_mask_of
from tiny_models import case_config, make_clips, make_model, randomise, tiny_config, token_counts
from transformers import VivitConfig, VivitForVideoClassification

from vivit_hf import ViViTForVideoClassification
from vivit_hf.inference import optimize, restore
from vivit_hf.modeling_vivit import mask_tokens


@pytest.fixture(scope="module")
def native_pair(tmp_path_factory):
    """transformers' Vivit, and ours with its weights."""
    config = VivitConfig(
        num_frames=4, image_size=16, tubelet_size=[2, 8, 8], hidden_size=32, num_hidden_layers=2, num_labels=3,
        num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    native = randomise(VivitForVideoClassification(config)).eval()
    folder = tmp_path_factory.mktemp("native")
    native.save_pretrained(folder)
    return native, ViViTForVideoClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_masks_are_those_of_transformers_vivit(native_pair, implementation):
    native, ours = native_pair
    clips = make_clips(ours.config, 2)
    generator = torch.Generator().manual_seed(0)
    over_tokens = torch.rand(2, 9, generator=generator) > 0.4
    over_tokens[:, 0] = True
    per_query = torch.randn(2, 1, 9, 9, generator=generator)
    per_query[1, :, :, 5] = torch.finfo(torch.float32).min
    for model in native_pair:
        model.set_attn_implementation(implementation)
    masks = [over_tokens, over_tokens.long(), over_tokens.float(), per_query, None]
    if implementation == "sdpa":  # transformers' eager attention would add the truth values
        masks.append(per_query > -1)
    plain = ours(clips).logits
    for mask in masks:
        logits = ours(clips, attention_mask=mask).logits
        expected = native.vivit(clips, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(logits, native.classifier(expected[:, 0]), atol=1e-5, rtol=1e-5)
        assert mask is None or (logits - plain).abs().max() > 1e-3
        optimize(ours)
        torch.testing.assert_close(ours(clips, attention_mask=mask).logits, logits, atol=1e-5, rtol=1e-5)
        restore(ours)


@pytest.mark.parametrize("case", ["spatio_temporal", "registers_mean_pooling", "max_pooling_pre_logits"])
@torch.no_grad()
def test_a_mask_over_the_tokens_of_whole_steps_is_a_frame_mask(case):
    model = make_model(case_config(case))
    clips, (_, space, prefix) = make_clips(model.config, len(STEPS)), token_counts(model.config)
    tokens = torch.cat([STEPS.new_ones(5, prefix), STEPS.repeat_interleave(space, dim=1)], dim=1)
    expected = model(clips, frame_mask=frame_mask_of(model.config, STEPS))
    torch.testing.assert_close(model(clips, attention_mask=tokens.int()).logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_attention_masks_are_refused_where_they_have_no_meaning(variant):
    model = make_model(tiny_config(variant))
    clips, mask = make_clips(model.config), torch.ones(2, 8).bool()
    if variant != "spatio_temporal":
        with pytest.raises(ValueError, match=f"attention_type='{variant}'.*Use `frame_mask`"):
            model(clips, attention_mask=torch.ones(2, 61))
        return
    for shape in ((2, 60), (1, 61), (2, 4, 61, 61)):
        with pytest.raises(ValueError, match=r"\(batch, tokens\) = \(2, 61\).*\(2, 1, 61, 61\), but got"):
            model(clips, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match=r"without a `frame_mask`.*a `frame_mask`"):
        model(clips, attention_mask=torch.ones(2, 61), frame_mask=mask)
    with pytest.raises(ValueError, match="masks all tokens of a clip"):
        model(clips, attention_mask=torch.zeros(2, 61))
    assert mask_tokens(torch.ones(2, 61), torch.zeros(2, 61, 32)) is None
