"""What a model gives besides its logits: hidden states and attentions of every layer, in the documented order."""

import pytest
import torch
from tiny_models import (
    ATTENTION_TYPES,
    case_config,
    checkpoint_activations,
    make_clips,
    make_model,
    num_temporal_class_tokens,
    tiny_config,
    token_counts,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from vivit_hf import ViViTForVideoClassification, ViViTModel
from vivit_hf.modeling_vivit import (
    ViViTDotProductAttention,
    ViViTSpatialDotProductAttention,
    ViViTTemporalDotProductAttention,
)


IMPLEMENTATIONS = ["eager", "sdpa"]
BATCH = 2


def make(case, implementation="eager"):
    config = case_config(case, attn_implementation=implementation)
    return make_model(config).double(), make_clips(config, batch=BATCH).double()


def documented_shapes(config):
    """(last_hidden_state, hidden_states, attentions) as the docstring of ViViTModel has them."""
    (time, space, prefix), hidden, heads = token_counts(config), config.hidden_size, config.num_attention_heads
    layers = config.num_hidden_layers
    if config.attention_type == "spatio_temporal":
        tokens = prefix + time * space
        stream = (BATCH, tokens, hidden)
        return stream, [stream] * (layers + 1), [(BATCH, heads, tokens, tokens)] * layers
    if config.attention_type == "factorised_encoder":
        tokens = prefix + space
        states = [(BATCH * time, tokens, hidden)] * (layers + 1)
        attentions = [(BATCH * time, heads, tokens, tokens)] * layers
        if not config.num_temporal_layers:
            return (BATCH, time, hidden), states, attentions
        tokens, heads = num_temporal_class_tokens(config) + time, config.temporal_num_attention_heads or heads
        states += [(BATCH, tokens, hidden)] * (config.num_temporal_layers + 1)
        attentions += [(BATCH, heads, tokens, tokens)] * config.num_temporal_layers
        return (BATCH, tokens, hidden), states, attentions
    states = [(BATCH, time, space, hidden)] * (layers + 1)
    if config.attention_type == "factorised_dot_product_attention":
        heads //= 2
    per_layer = [(BATCH * space, heads, time, time), (BATCH * time, heads, space, space)]
    if config.attention_type == "factorised_self_attention" and config.attention_order == "space_time":
        per_layer.reverse()
    return (BATCH, time * space, hidden), states, per_layer * layers


def shapes(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_states_and_attentions_are_complete_and_in_the_documented_order(unmerged_case, implementation):
    model, clips = make(unmerged_case, implementation)
    last, hidden_states, attentions = documented_shapes(model.config)
    outputs = model(clips, output_hidden_states=True, output_attentions=True)
    features = model.vivit(clips, output_hidden_states=True, output_attentions=True)
    assert features.last_hidden_state.shape == last
    assert features.pooler_output.shape == (BATCH, model.config.representation_size or model.config.hidden_size)
    for each in (outputs, features):
        assert isinstance(each.hidden_states, tuple) and isinstance(each.attentions, tuple)
        assert shapes(each.hidden_states) == hidden_states
        assert shapes(each.attentions) == attentions
    plain = model(clips)
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(outputs.logits, plain.logits, atol=1e-10, rtol=0)


def test_hidden_states_are_what_the_layers_take_and_give(unmerged_case):
    model, clips = make(unmerged_case)
    vivit, expected = model.vivit, []
    for encoder in (vivit.encoder, vivit.temporal_encoder):
        if encoder is not None:
            encoder.layer[0].register_forward_pre_hook(lambda module, args: expected.append(args[0]))
            for layer in encoder.layer:
                layer.register_forward_hook(lambda module, args, output: expected.append(output))
    outputs = vivit(clips, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(expected)
    for actual, tensor in zip(outputs.hidden_states, expected, strict=True):
        assert torch.equal(actual, tensor)
    norm = vivit.layernorm if vivit.temporal_layernorm is None else vivit.temporal_layernorm
    if model.config.attention_type == "factorised_encoder" and vivit.temporal_encoder is None:
        tokens = vivit.pool(norm(outputs.hidden_states[-1]))
    else:
        tokens = norm(outputs.hidden_states[-1])
    torch.testing.assert_close(tokens.reshape(outputs.last_hidden_state.shape), outputs.last_hidden_state)


EQUATIONS = {
    ViViTDotProductAttention: "bqhd,bkhd->bhqk",
    ViViTSpatialDotProductAttention: "btqhd,btkhd->bthqk",
    ViViTTemporalDotProductAttention: "bqshd,bkshd->bshqk",
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attentions_are_the_softmax_of_queries_and_keys_and_sum_to_one(unmerged_case, implementation):
    model, clips = make(unmerged_case, implementation)
    expected = []

    def record(module, args):
        query, key = args[:2]
        scores = torch.einsum(EQUATIONS[type(module)], query, key) / query.shape[-1] ** 0.5
        expected.append(scores.softmax(-1).flatten(0, scores.ndim - 4))

    for module in model.modules():
        if isinstance(module, ViViTDotProductAttention):
            module.register_forward_pre_hook(record)
    attentions = model(clips, output_attentions=True).attentions
    assert len(attentions) == len(expected) > 0
    for actual, weights in zip(attentions, expected, strict=True):
        torch.testing.assert_close(actual, weights, atol=1e-10, rtol=0)
        torch.testing.assert_close(actual.sum(-1), torch.ones_like(actual[..., 0]))
        assert actual.std() > 1e-3, "uniform attention shows nothing"


def test_the_configuration_can_ask_for_them(unmerged_case):
    model, clips = make(unmerged_case)
    _, hidden_states, attentions = documented_shapes(model.config)
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    for forward in (model, model.vivit):
        outputs = forward(clips)
        assert shapes(outputs.hidden_states) == hidden_states and shapes(outputs.attentions) == attentions
    outputs = model(clips, output_hidden_states=False, output_attentions=False)
    assert outputs.hidden_states is None and outputs.attentions is None


def test_the_gradient_reaches_every_hidden_state_and_attention(case):
    """What attribution methods read: gradients with respect to the recorded tensors themselves."""
    model, clips = make(case)
    outputs = model(clips, output_hidden_states=True, output_attentions=True)
    recorded = {
        f"{what}[{index}]": tensor
        for what in ("hidden_states", "attentions")
        for index, tensor in enumerate(outputs[what])
    }
    for tensor in recorded.values():
        tensor.retain_grad()
    outputs.logits[0, 0].backward()
    without = [name for name, tensor in recorded.items() if tensor.grad is None or not tensor.grad.any()]
    assert not without


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_they_come_under_gradient_checkpointing_too(case, use_reentrant):
    model, clips = make(case)
    expected = model(clips, output_hidden_states=True, output_attentions=True)
    checkpoint_activations(model.train(), {"use_reentrant": use_reentrant})
    outputs = model(clips, output_hidden_states=True, output_attentions=True)
    outputs.logits.sum().backward()
    for what in ("hidden_states", "attentions"):
        assert len(outputs[what]) == len(expected[what])
        for actual, tensor in zip(outputs[what], expected[what], strict=True):
            torch.testing.assert_close(actual, tensor, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "flags", [{}, {"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}]
)
def test_a_tuple_holds_what_the_dictionary_holds(case, flags):
    model, clips = make(case)
    for forward, kwargs, kind in (
        (model, {"labels": torch.tensor([1, 4])}, ImageClassifierOutput),
        (model, {}, ImageClassifierOutput),
        (model.vivit, {}, BaseModelOutputWithPooling),
    ):
        as_dict = forward(clips, **kwargs, **flags)
        as_tuple = forward(clips, return_dict=False, **kwargs, **flags)
        assert type(as_dict) is kind and type(as_tuple) is tuple
        assert (
            len(as_tuple)
            == len(as_dict.to_tuple())
            == (2 if kwargs or kind is BaseModelOutputWithPooling else 1) + len(flags)
        )
        for one, other in zip(as_tuple, as_dict.to_tuple(), strict=True):
            if isinstance(one, tuple):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            else:
                assert torch.equal(one, other)


def test_the_configuration_can_ask_for_tuples(variant):
    model, clips = make(variant)
    expected = model(clips, labels=torch.tensor([1, 4])).to_tuple()
    model.config.return_dict = False
    actual = model(clips, labels=torch.tensor([1, 4]))
    assert type(actual) is tuple and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert type(model.vivit(clips)) is tuple
    assert type(model(clips, return_dict=True)) is ImageClassifierOutput


def test_pooling_is_what_the_configuration_says(case):
    model, clips = make(case)
    outputs = model.vivit(clips)
    tokens = outputs.last_hidden_state
    if case == "registers_mean_pooling":
        tokens = tokens[:, model.config.num_register_tokens :]
    pooled = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens.mean(1),
        "max": lambda: tokens.max(1).values,
        "sum": lambda: tokens.sum(1),
        "attention": lambda: attention_pooled(tokens, model.vivit.temporal_pooler.query),
    }["mean" if case == "average_pool_baseline" else model.config.temporal_pooling or model.config.pooling]()
    if model.config.representation_size:
        pooled = torch.tanh(pooled @ model.vivit.pre_logits.weight.T + model.vivit.pre_logits.bias)
    torch.testing.assert_close(outputs.pooler_output, pooled, atol=1e-10, rtol=0)
    logits = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(clips).logits, logits, atol=1e-10, rtol=0)


def attention_pooled(tokens, query):
    """Attention of a single query, whose keys and values are the tokens themselves."""
    return torch.nn.functional.scaled_dot_product_attention(query.expand(len(tokens), 1, -1), tokens, tokens)[:, 0]


ALLOWED = [
    (attention_type, pooling)
    for attention_type in ATTENTION_TYPES
    for pooling in ("cls", "mean", "max", "sum")
    if pooling != "cls" or attention_type in ("spatio_temporal", "factorised_encoder")
]


@pytest.mark.parametrize(("attention_type", "pooling"), ALLOWED)
def test_every_pooling_works_where_it_is_allowed(attention_type, pooling):
    config = tiny_config(attention_type, pooling=pooling)
    model = make_model(config, ViViTModel)
    assert ("embeddings.cls_token" in dict(model.named_parameters())) == (pooling == "cls")
    assert model(make_clips(config)).pooler_output.shape == (2, config.hidden_size)


# Pooling over time


@pytest.mark.parametrize("num_temporal_layers", [0, 2])
@pytest.mark.parametrize("temporal_pooling", ["cls", "mean", "max", "sum", "concatenate", "attention"])
def test_time_is_pooled_without_its_class_token_while_space_keeps_its_own(temporal_pooling, num_temporal_layers):
    if (temporal_pooling, num_temporal_layers) == ("cls", 0):
        return  # refused by the configuration
    config = tiny_config(
        "factorised_encoder", temporal_pooling=temporal_pooling, num_temporal_layers=num_temporal_layers
    )
    model, clips = make_model(config).double(), make_clips(config).double()
    outputs = model.vivit(clips)
    tokens = outputs.last_hidden_state
    assert model.vivit.embeddings.cls_token is not None
    assert tokens.shape == (2, 4 + (temporal_pooling == "cls"), 32)
    expected = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens.mean(1),
        "max": lambda: tokens.max(1).values,
        "sum": lambda: tokens.sum(1),
        "concatenate": lambda: torch.stack([torch.cat(list(steps)) for steps in tokens]),
        "attention": lambda: attention_pooled(tokens, model.vivit.temporal_pooler.query),
    }[temporal_pooling]()
    torch.testing.assert_close(outputs.pooler_output, expected, atol=1e-10, rtol=0)
    logits = expected @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(clips).logits, logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(model.classify_steps(model.vivit.encode_steps(clips)), logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_temporal_pooling_of_its_own_may_equal_the_default(pooling):
    one = make_model(tiny_config("factorised_encoder", pooling=pooling))
    other = make_model(tiny_config("factorised_encoder", pooling=pooling, temporal_pooling=pooling))
    assert torch.equal(one(make_clips(one.config)).logits, other(make_clips(one.config)).logits)


def test_concatenated_steps_keep_their_order_and_may_be_represented():
    config = tiny_config(
        "factorised_encoder", temporal_pooling="concatenate", num_temporal_layers=0, representation_size=12
    )
    model, clips = make_model(config), make_clips(config)
    assert model.vivit.pre_logits.weight.shape == (12, 4 * 32) and model.classifier.weight.shape == (5, 12)
    flipped = clips.unflatten(1, (4, 2)).flip(1).flatten(1, 2)
    assert (model(clips).logits - model(flipped).logits).abs().max() > 1e-2


def test_concatenation_fixes_the_number_of_time_steps_and_says_so(tmp_path):
    model = make_model(tiny_config("factorised_encoder", temporal_pooling="concatenate"))
    with pytest.raises(ValueError, match=r"fixes the number of time steps: .* take 4, and the new sizes give 6"):
        model.resize_position_embeddings(num_frames=12)
    assert model.config.num_frames == 8 and model.vivit.temporal_embeddings.grid == (4, 1, 1)
    longer = make_clips(model.config, num_frames=12)
    with pytest.raises(ValueError, match="fixes the number of time steps: the model takes 4, but got 6"):
        model(longer, interpolate_pos_encoding=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the new sizes give 2"):
        ViViTForVideoClassification.from_pretrained(tmp_path, num_frames=4)
    model.resize_position_embeddings(num_frames=9, image_size=(32, 48))  # still 4 steps
    assert model(make_clips(model.config)).logits.shape == (2, 5)


def test_a_new_learned_query_starts_as_the_mean():
    config = tiny_config("factorised_encoder", temporal_pooling="attention")
    model = ViViTModel(config)
    outputs = model(make_clips(config))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))
    outputs.pooler_output.square().sum().backward()
    assert model.temporal_pooler.query.grad.abs().max() > 1e-3


def test_registers_follow_the_class_token_and_are_never_pooled():
    model, clips = make("registers_mean_pooling")
    outputs = model.vivit(clips)
    patches = outputs.last_hidden_state[:, model.config.num_register_tokens :]
    torch.testing.assert_close(outputs.pooler_output, patches.mean(dim=1))
    model = make_model(tiny_config("spatio_temporal", num_register_tokens=2)).double()
    outputs = model.vivit(clips)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    before = model.vivit(clips, output_hidden_states=True).hidden_states[0]
    assert torch.equal(before[:, 1:3], model.vivit.embeddings.register_tokens.expand(BATCH, -1, -1))


def test_the_first_layernorm_sees_every_token():
    model, clips = make("pre_layernorm_as_in_clip")
    vivit = model.vivit
    tokens, prefix = vivit.embeddings(clips)
    embedded = torch.cat([prefix.expand(BATCH, -1, -1), tokens.flatten(1, 2)], dim=1)
    first = vivit(clips, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(first, vivit.pre_layernorm(embedded))
