"""Token merging: the matching of the paper, what stays exact, what is conserved, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import case_config, checkpoint_activations, make_clips, make_model, tiny_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vivit_hf import ViViTConfig, ViViTForPreTraining, ViViTForVideoClassification, ViViTModel
from vivit_hf.modeling_vivit import BIASED_ATTENTION, ViViTTokenMerging, eager_attention_forward


MERGED = ["spatio_temporal", "factorised_encoder", "registers_mean_pooling", "registers_as_in_dinov2", "mean_pooling"]
GRIDS = ["factorised_self_attention", "factorised_dot_product_attention"]


# The matching, as a loop over tokens


def merge_slowly(tokens, keys, sizes, num_prefix_tokens, num_merged):
    """
    One sequence, as in section 3 of the paper: tokens (n, hidden), keys (n, heads, head_dim), sizes (n,) ->
    the merged tokens, their sizes, and the place of every token's successor.
    """
    keys = keys.mean(axis=1)
    set_a, set_b = range(num_prefix_tokens, len(tokens), 2), range(num_prefix_tokens + 1, len(tokens), 2)
    edges = []
    for a in set_a:
        cosines = [keys[a] @ keys[b] / np.linalg.norm(keys[a]) / np.linalg.norm(keys[b]) for b in set_b]
        if cosines:
            edges.append((max(cosines), a, set_b[int(np.argmax(cosines))]))
    edges = sorted(edges, reverse=True)[: min(num_merged, len(set_b))]
    gone = {a: b for _, a, b in edges}
    order = [*range(num_prefix_tokens), *(a for a in set_a if a not in gone), *set_b]
    merged, merged_sizes = [], []
    for place in order:
        group = [place, *(a for a, b in gone.items() if b == place)]
        merged.append(sum(sizes[one] * tokens[one] for one in group) / sum(sizes[one] for one in group))
        merged_sizes.append(sum(sizes[one] for one in group))
    successors = [order.index(gone.get(place, place)) for place in range(len(tokens))]
    return np.array(merged), merged_sizes, successors


@given(prefix=st.integers(0, 3), tokens=st.integers(1, 14), merged=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_tokens_merge_as_in_a_loop_over_them(prefix, tokens, merged, seed):
    random = np.random.default_rng(seed)
    count = prefix + tokens
    hidden, keys = random.normal(size=(2, count, 5)), random.normal(size=(2, count, 3, 4))
    sizes = random.integers(1, 6, size=(2, count))
    merging = ViViTTokenMerging(prefix, merged)
    actual, actual_sizes, successors = merging(*(torch.from_numpy(one) for one in (hidden, keys, sizes)))
    for index in range(2):
        expected = merge_slowly(hidden[index], keys[index], sizes[index], prefix, merged)
        np.testing.assert_allclose(actual[index].numpy(), expected[0], atol=1e-12)
        assert actual_sizes[index].tolist() == expected[1]
        places = list(range(count)) if successors is None else successors[index].tolist()
        assert places == expected[2]


def test_tokens_of_size_one_need_no_sizes():
    hidden, key = torch.randn(2, 9, 6), torch.randn(2, 9, 2, 3)
    ones = torch.ones(2, 9, dtype=torch.int64)
    merging = ViViTTokenMerging(1, 3)
    for actual, expected in zip(merging(hidden, key, None), merging(hidden, key, ones), strict=True):
        assert torch.equal(actual, expected)


# What stays as it is


@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_without_merged_tokens_the_outputs_are_equal_bit_for_bit(case):
    plain, merging = (make_model(case_config(case, merge_tokens=merge_tokens)) for merge_tokens in (None, 0))
    clips = make_clips(plain.config)
    assert torch.equal(merging(clips).logits, plain(clips).logits)
    assert torch.equal(merging.vivit(clips).last_hidden_state, plain.vivit(clips).last_hidden_state)


def doubled_clips(config):
    """Clips whose patches come in equal pairs of neighbours."""
    clips = make_clips(config)
    pairs = clips.unflatten(-1, (-1, 2, config.tubelet_size[2]))  # (..., pairs, 2, patch width)
    return pairs[..., :1, :].expand_as(pairs).flatten(-3)


def doubled_pair(case, **fields):
    """A plain model, a model that merges half of the tokens in its first layer, and clips of equal pairs of patches."""
    config = case_config(case, image_size=(24, 32), num_hidden_layers=3, **fields)
    time, height, width = config.grid_size
    half = height * width * (time if config.attention_type == "spatio_temporal" else 1) // 2
    schedule = {**config.to_dict(), "merge_tokens": [half, 0, 0]}
    pair = make_model(config), make_model(ViViTConfig.from_dict(schedule))
    for model in pair:
        torch.nn.init.zeros_(model.vivit.embeddings.position_embeddings)
        model.set_attn_implementation(fields.get("attn_implementation", "sdpa"))
    return *pair, doubled_clips(config)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_merged_copies_give_the_logits_of_all_tokens(case, implementation):
    plain, merging, clips = doubled_pair(case, attn_implementation=implementation)
    torch.testing.assert_close(merging(clips).logits, plain(clips).logits, atol=1e-4, rtol=0)
    expected = plain.vivit(clips).last_hidden_state
    torch.testing.assert_close(merging.vivit(clips).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", MERGED)
def test_merged_copies_give_the_gradients_of_all_tokens(case):
    plain, merging, clips = doubled_pair(case)
    for model in (plain, merging):
        model.double()
        (model(clips.double()).logits * torch.arange(5)).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in merging.named_parameters():
        if not name.endswith("embeddings.position_embeddings"):  # these would tell the copies apart
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


@torch.no_grad()
def test_merged_copies_in_bfloat16():
    plain, merging, clips = (one.to(torch.bfloat16) for one in doubled_pair("spatio_temporal"))
    torch.testing.assert_close(merging(clips).logits, plain(clips).logits, atol=0.1, rtol=0.1)


def recorded_merges(model, clips):
    """What each layer's merging returned: tokens, sizes and successors."""
    found = []
    layers = model.base_model.encoder.layer
    handles = [layer.merging.register_forward_hook(lambda *call: found.append(call[2])) for layer in layers]
    model(clips)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_sizes_sum_to_the_number_of_tokens_after_every_layer(case):
    config = case_config(case, num_hidden_layers=3, merge_tokens=[3, 0, 4])
    time, height, width = config.grid_size
    count = height * width * (time if config.attention_type == "spatio_temporal" else 1)
    prefix = config.num_prefix_tokens
    for (tokens, sizes, _), left in zip(
        recorded_merges(make_model(config), make_clips(config)), (3, 3, 7), strict=True
    ):
        assert tokens.shape[1] == sizes.shape[1] == prefix + count - left
        assert sizes.dtype == torch.int64 and (sizes[:, :prefix] == 1).all()
        assert (sizes.sum(dim=1) == prefix + count).all()


@torch.no_grad()
def test_more_than_half_of_the_tokens_never_merge():
    config = tiny_config("spatio_temporal", merge_tokens=1000)  # 60 tokens and the class token
    remaining = [tokens.shape[1] for tokens, *_ in recorded_merges(make_model(config), make_clips(config))]
    assert remaining == [31, 16]


@torch.no_grad()
def test_mean_pooling_weighs_merged_tokens_by_their_size():
    config = tiny_config("spatio_temporal", pooling="mean", num_hidden_layers=1, merge_tokens=20)
    model, clips = make_model(config, ViViTModel), make_clips(config)
    ((_, sizes, _),) = recorded_merges(model, clips)
    assert sizes.max() > 2
    merged = []
    model.encoder.layer[0].register_forward_hook(lambda *call: merged.append(call[2][0]))
    pooled = model(clips).pooler_output
    expected = np.average(
        model.layernorm(merged[0]).numpy(), axis=1, weights=np.repeat(sizes[..., None].numpy(), 32, axis=2)
    )
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-5)


# Outputs, training, files


@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_hidden_states_and_attentions_have_the_tokens_of_their_layer(case):
    config = case_config(case, merge_tokens=[4, 3], attn_implementation="sdpa")
    model, clips = make_model(config), make_clips(config)
    outputs = model(clips, output_hidden_states=True, output_attentions=True)
    count = outputs.hidden_states[0].shape[1]
    assert [one.shape[1] for one in outputs.hidden_states[:3]] == [count, count - 4, count - 7]
    assert [one.shape[-2:] for one in outputs.attentions[:2]] == [(count, count), (count - 4, count - 4)]
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    torch.testing.assert_close(outputs.logits, model(clips).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_checkpointing_gives_the_same_gradients(case, use_reentrant):
    model = make_model(case_config(case, merge_tokens=4)).train()
    clips, labels = make_clips(model.config), torch.tensor([1, 3])

    def gradients():
        model.zero_grad()
        model(clips, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    assert all(one.abs().max() > 0 for one in expected if one.ndim > 1)
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    for actual, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_a_few_steps_of_training_lower_the_loss(case):
    torch.manual_seed(0)
    model = ViViTForVideoClassification(case_config(case, merge_tokens=5)).train()
    clips, labels = make_clips(model.config, batch=4), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(clips, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_masked_pretraining_predicts_every_place(case):
    model = ViViTForPreTraining(case_config(case, merge_tokens=2, mask_ratio=0.5)).train()
    clips = make_clips(model.config)
    outputs = model(clips)
    time, height, width = model.config.grid_size
    assert outputs.logits.shape[1:3] == (time, height * width // 2)
    outputs.loss.backward()
    assert all(one.grad is not None for one in model.vivit.encoder.parameters())
    remaining = [tokens.shape[1] for tokens, *_ in recorded_merges(model, clips)]
    per_sequence = height * width - height * width // 2
    whole = per_sequence * (time if case == "spatio_temporal" else 1)
    assert remaining == [1 + whole - 2, 1 + whole - 4]


@pytest.mark.parametrize("merge_tokens", [4, [5, 2]])
@torch.no_grad()
def test_a_saved_model_merges_again(tmp_path, merge_tokens):
    model = make_model(tiny_config("spatio_temporal", merge_tokens=merge_tokens))
    plain = make_model(tiny_config("spatio_temporal"))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["merge_tokens"] == merge_tokens
    again = ViViTForVideoClassification.from_pretrained(tmp_path)
    clips = make_clips(model.config)
    assert again.vivit.encoder.schedule == model.config.merging_schedule
    assert torch.equal(again(clips).logits, model(clips).logits)
    off = ViViTForVideoClassification.from_pretrained(tmp_path, merge_tokens=None)
    assert torch.equal(off(clips).logits, plain(clips).logits)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
@torch.no_grad()
def test_compiling_and_exporting(case):
    model = make_model(case_config(case, merge_tokens=4))
    clips = make_clips(model.config)
    expected = model(clips).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(clips).logits, expected)
    torch.testing.assert_close(torch.export.export(model, (clips,)).module()(clips).logits, expected)


# What is refused


@pytest.mark.parametrize("case", GRIDS)
def test_models_that_need_the_whole_grid_do_not_merge(case):
    with pytest.raises(ValueError, match=f"merge_tokens=4.*{case}.*whole grid"):
        case_config(case, merge_tokens=4)


@pytest.mark.parametrize("value", [-1, True, 2.5, "4", [1, -1], [1, True], [[1], 2]])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="merge_tokens"):
        tiny_config("spatio_temporal", merge_tokens=value)


def test_a_schedule_has_one_number_per_layer():
    with pytest.raises(ValueError, match=r"merge_tokens=\[1, 2, 3\].*has 3 numbers.*num_hidden_layers=2"):
        tiny_config("spatio_temporal", merge_tokens=[1, 2, 3])


@torch.no_grad()
def test_attention_that_takes_no_bias_is_refused_by_name():
    model = make_model(tiny_config("spatio_temporal", merge_tokens=4))
    clips = make_clips(model.config)
    ALL_ATTENTION_FUNCTIONS.register("without_bias", eager_attention_forward)
    try:
        for name in ("without_bias", "flex_attention"):
            model.config._attn_implementation = name
            with pytest.raises(ValueError, match=f"attn_implementation='{name}'.*set_attn_implementation"):
                model(clips)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["without_bias"]
    assert not any("flash" in name or "flex" in name for name in BIASED_ATTENTION)
