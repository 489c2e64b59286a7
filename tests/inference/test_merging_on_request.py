"""`optimize(merge_tokens=...)` merges the tokens of a trained model, says so, and can be undone."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_clips, make_model, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vivit_hf import StreamingClassifier, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference import blockwise_attention, decreasing_schedule, optimization, optimize, restore
from vivit_hf.inference.features import encode_clip_steps
from vivit_hf.inference.optimization import optimized
from vivit_hf.modeling_vivit import ViViTMergingEncoder, eager_attention_forward


MERGED = ["spatio_temporal", "factorised_encoder", "registers_mean_pooling", "registers_as_in_dinov2", "mean_pooling"]
ONEDNN_HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture(params=MERGED)
def case(request):
    return request.param


def types_of(model):
    return [type(module) for module in model.modules()]


# What a model computes


@torch.no_grad()
def test_outputs_are_those_of_a_model_that_is_configured_so(case):
    asked, configured = make_model(case_config(case)), make_model(case_config(case, merge_tokens=[5, 3]))
    clips = make_clips(asked.config)
    optimize(asked, merge_tokens=[5, 3])
    torch.testing.assert_close(asked(clips).logits, configured(clips).logits)
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        actual, expected = asked(clips, **options), configured(clips, **options)
        for name in ("logits", "hidden_states", "attentions"):
            torch.testing.assert_close(actual.get(name), expected.get(name))
    features, expected = asked.vivit(clips), configured.vivit(clips)
    torch.testing.assert_close(features.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(features.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_no_merged_tokens_are_equal_bit_for_bit(case):
    plain, twin = make_model(case_config(case)), make_model(case_config(case))
    optimize(plain)
    assert "no tokens are merged" in str(optimize(twin, merge_tokens=0))
    clips = make_clips(plain.config)
    assert torch.equal(twin(clips).logits, plain(clips).logits)


@pytest.mark.skipif(not ONEDNN_HAS_BFLOAT16, reason="oneDNN has no bfloat16 products on this CPU")
@pytest.mark.parametrize("has_amx", [True, False])
@torch.no_grad()
def test_bfloat16_with_laid_out_weights_and_either_attention(case, has_amx, monkeypatch):
    monkeypatch.setattr(optimization, "has_avx512", lambda: True)
    monkeypatch.setattr(optimization, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(optimization, "has_amx", lambda: has_amx)
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    plain = make_model(case_config(case, merge_tokens=4)).to(torch.bfloat16)
    twin = make_model(case_config(case))
    report = str(optimize(twin, dtype=torch.bfloat16, merge_tokens=4))
    assert "laid out for oneDNN" in report and "tokens merged from" in report
    assert twin.config._attn_implementation == ("sdpa" if has_amx else "blockwise")
    clips = make_clips(plain.config)
    torch.testing.assert_close(twin(clips).logits, plain(clips).logits, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
@torch.no_grad()
def test_merged_tokens_are_not_computed(case, monkeypatch):
    monkeypatch.setattr(optimization, "has_avx512", lambda: False)  # the counter does not count oneDNN's operations
    model = make_model(case_config(case, num_hidden_layers=6, attn_implementation="eager"))
    clips = make_clips(model.config)

    def multiply_adds():
        with FlopCounterMode(display=False) as counter:
            model(clips)
        return counter.get_total_flops()

    optimize(model)
    everything = multiply_adds()
    optimize(model, merge_tokens=100)
    assert multiply_adds() < 0.6 * everything


@pytest.mark.parametrize("scores", [1, 100, 800_000])
@torch.no_grad()
def test_attention_block_by_block_takes_the_bias(scores, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(blockwise_attention, "BLOCK_SCORES", scores)
    query, key, value = torch.randn(3, 2, 4, 11, 8)
    bias = torch.randint(1, 9, (2, 1, 1, 11)).log()
    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: calls.append(1))
    actual, _ = blockwise_attention.blockwise_attention_forward(torch.nn.Module(), query, key, value, bias, scaling=0.3)
    expected, _ = eager_attention_forward(torch.nn.Module().eval(), query, key, value, bias, scaling=0.3)
    torch.testing.assert_close(actual, expected)
    assert not calls


# The report, and the way back


def test_the_report_tells_that_outputs_change():
    report = str(optimize(make_model(tiny_config("spatio_temporal")), merge_tokens=[10, 20]))
    assert "tokens merged from 60 to 30 per clip, so outputs are no longer those of the plain model" in report
    report = str(optimize(make_model(tiny_config("factorised_encoder")), merge_tokens=4))
    assert "tokens merged from 15 to 7 per time step" in report
    assert "merged" not in str(optimize(make_model(tiny_config("spatio_temporal"))))


@torch.no_grad()
def test_restore_gives_the_plain_model_back_bit_for_bit(case):
    plain, twin = make_model(case_config(case)), make_model(case_config(case))
    optimize(twin, merge_tokens=4)
    assert list(twin.state_dict()) == list(plain.state_dict())
    restore(twin)
    assert types_of(twin) == types_of(plain) and str(twin) == str(plain)
    clips = make_clips(plain.config)
    assert torch.equal(twin(clips).logits, plain(clips).logits)


@torch.no_grad()
def test_optimising_again_starts_from_the_configured_tokens(case):
    plain, twin = make_model(case_config(case)), make_model(case_config(case))
    optimize(plain)
    optimize(twin, merge_tokens=4)
    optimize(twin)
    assert types_of(twin) == types_of(plain)
    configured, other = (make_model(case_config(case, merge_tokens=[2, 3])) for _ in range(2))
    clips = make_clips(plain.config)
    for merge_tokens in (5, 0):
        optimize(configured, merge_tokens=merge_tokens)
        assert configured.vivit.encoder.schedule == [merge_tokens] * 2
    restore(configured)
    assert configured.vivit.encoder.schedule == [2, 3] and torch.equal(configured(clips).logits, other(clips).logits)


@torch.no_grad()
def test_saved_files_and_copies(tmp_path):
    model = make_model(tiny_config("spatio_temporal"))
    clips = make_clips(model.config)
    plain = model(clips).logits
    optimize(model, merge_tokens=9)
    merged = model(clips).logits
    assert not torch.allclose(merged, plain, atol=1e-3)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(clips).logits, merged)
    restore(again)
    assert torch.equal(again(clips).logits, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(ViViTForVideoClassification.from_pretrained(tmp_path)(clips).logits, plain)


def test_models_that_need_the_whole_grid_are_refused_and_left_alone():
    for attention_type in ("factorised_self_attention", "factorised_dot_product_attention"):
        model = make_model(tiny_config(attention_type))
        optimize(model)
        before = types_of(model)
        with pytest.raises(ValueError, match=r"merge_tokens=4.*whole grid of tokens"):
            optimize(model, merge_tokens=4)
        assert types_of(model) == before


@pytest.mark.parametrize("value", [-1, [1, 2, 3], "many", 1.5])
def test_other_values_are_refused_and_the_model_is_left_alone(value):
    model = make_model(tiny_config("spatio_temporal"))
    before = types_of(model)
    with pytest.raises(ValueError, match="merge_tokens"):
        optimize(model, merge_tokens=value)
    assert types_of(model) == before


def test_code_that_optimises_for_itself_keeps_the_merging():
    """Also where nothing else has a faster class."""
    model = make_model(tiny_config("spatio_temporal", hidden_act="relu", pooling="mean"))
    optimize(model, merge_tokens=9)
    with optimized(model):
        assert model.vivit.encoder.schedule == [9, 9]
    assert type(model.vivit.encoder) is ViViTMergingEncoder


# Schedules


def test_a_decreasing_schedule_merges_as_many_tokens_but_earlier():
    assert decreasing_schedule(300, 12)[0] == 600 and decreasing_schedule(300, 12)[-1] == 0
    assert sum(decreasing_schedule(300, 12)) == pytest.approx(300 * 12, abs=6)
    assert decreasing_schedule(8, 5) == [16, 12, 8, 4, 0]
    assert all(np.diff(decreasing_schedule(13, 24)) <= 0)


def test_a_decreasing_schedule_fits_a_model():
    model = make_model(tiny_config("spatio_temporal", num_hidden_layers=4))
    assert "tokens merged from 60 to 40" in str(optimize(model, merge_tokens=decreasing_schedule(5, 4)))


# Streams and features


@torch.no_grad()
def test_a_stream_has_the_logits_of_whole_windows():
    model = make_model(tiny_config("factorised_encoder"))
    optimize(model, merge_tokens=3)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 40}}
    stream = StreamingClassifier(model, ViViTVideoProcessor(num_frames=8, frame_stride=1, **size))
    frames = np.random.default_rng(0).integers(0, 256, (20, 30, 50, 3), dtype=np.uint8)
    windows = stream.push(frames)
    assert len(windows) == 7 and model.vivit.encoder.schedule == [3, 3]
    for window in windows:
        clip = stream.processor(frames[window.first_frame :][:8], do_sample_frames=False)["pixel_values"]
        torch.testing.assert_close(window.logits, model(clip).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
@torch.no_grad()
def test_features_of_time_steps(case):
    """A vector per step, also where the tokens of several steps have merged."""
    model = make_model(case_config(case))
    clips, ids = make_clips(model.config), np.arange(16).reshape(2, 8)
    plain = encode_clip_steps(model, clips, ids, 2)
    optimize(model, merge_tokens=4)
    merged = encode_clip_steps(model, clips, ids, 2)
    assert merged.shape == plain.shape == (2, 4, 32)
    assert 1e-3 < (merged - plain).abs().mean() < plain.abs().mean()
