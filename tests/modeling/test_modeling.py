"""What the models compute: the same by every path, with a gradient for every parameter, and the paper's numbers."""

import collections
import copy
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    ATTENTION_TYPES,
    CASES,
    case_config,
    checkpoint_activations,
    make_clips,
    make_model,
    randomise,
    tiny_config,
)

from vivit_hf import ViViTForVideoClassification, ViViTModel, sample_frames_uniformly
from vivit_hf.modeling_vivit import ViViTDropPath


def run_and_backward(model, clips, **kwargs):
    """Logits, and the gradient of a random direction of them by parameter name."""
    model.zero_grad()
    logits = model(clips, **kwargs).logits
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3))
    (logits * direction).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(actual, expected, atol=1e-10):
    logits, gradients = actual
    torch.testing.assert_close(logits, expected[0], atol=atol, rtol=atol)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], atol=atol, rtol=atol, msg=lambda m, n=name: f"{n}: {m}")


def changed(one, other):
    return (one - other).abs().max().item()


# One result by every path


def test_sdpa_is_eager_in_output_and_gradient(case):
    config = case_config(case, attn_implementation="eager")
    model, clips = make_model(config).double(), make_clips(config).double()
    eager = run_and_backward(model, clips)
    model.set_attn_implementation("sdpa")
    calls = []
    handle = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or handle(*a, **k)
        )
        sdpa = run_and_backward(model, clips)
    assert calls, "the SDPA path did not run"
    assert_same(sdpa, eager)


@pytest.mark.parametrize("case", [*ATTENTION_TYPES, "time_space"])
def test_flex_attention_is_eager_in_output(case, monkeypatch):
    """In output only: it has no backward on a CPU. Run as the plain function that is compiled elsewhere."""
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as integration

    calls = []
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: calls.append(1) or flex.flex_attention(*args, **kwargs),
    )
    config = case_config(case, attn_implementation="flex_attention", hidden_size=64)
    model, clips = make_model(config), make_clips(config)
    with torch.no_grad():
        actual = model(clips).logits
        assert calls
        model.set_attn_implementation("eager")
        torch.testing.assert_close(actual, model(clips).logits, atol=1e-5, rtol=1e-5)


def test_the_implementation_that_was_asked_for_is_the_one_that_runs(variant):
    """Through transformers' registry: whatever else is registered there (flash, xformers, ...) is called alike."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shapes = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None and module.is_causal is False
        assert query.ndim == key.ndim == value.ndim == 4, "no kernel takes a fifth axis"
        assert kwargs["scaling"] == pytest.approx(query.shape[-1] ** -0.5)
        assert kwargs["dropout"] == (0.25 if module.training else 0.0)
        shapes.append(query.shape)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    config = tiny_config(variant, attention_probs_dropout_prob=0.25)
    model, clips = make_model(config), make_clips(config)
    expected = model(clips).logits
    model.set_attn_implementation("spy")
    model.train()(clips)
    shapes.clear()
    torch.testing.assert_close(model.eval()(clips).logits, expected)
    per_layer = 1 if variant in ATTENTION_TYPES[:2] else 2
    assert len(shapes) == model.config.num_hidden_layers * per_layer + (2 if variant == "factorised_encoder" else 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(case, use_reentrant):
    config = case_config(case, drop_path_rate=0.4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model, clips = make_model(config).double().train(), make_clips(config, batch=4).double()
    runs = []
    layers = [model.vivit.encoder.layer[0].mlp.fc1, model.vivit.encoder.layer[-1].mlp.fc1]
    if model.vivit.temporal_encoder is not None:
        layers.append(model.vivit.temporal_encoder.layer[0].mlp.fc1)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: runs.append(module))

    torch.manual_seed(7)
    plain = run_and_backward(model, clips)
    assert len(runs) == len(layers)
    runs.clear()
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    torch.manual_seed(7)
    checkpointed = run_and_backward(model, clips)

    assert all(runs.count(layer) == 2 for layer in layers), "a layer is not computed again"
    assert_same(checkpointed, plain)
    torch.manual_seed(8)
    assert changed(run_and_backward(model, clips)[0], plain[0]) > 1e-3, "nothing was random: the test shows nothing"


@pytest.mark.parametrize("initialised", [True, False], ids=["as initialised", "anywhere"])
def test_every_parameter_receives_a_gradient(case, initialised):
    """All but the key biases: they move every score of a row alike, which a softmax cannot see."""
    config = case_config(case)
    model = ViViTForVideoClassification(config)
    model = (model if initialised else randomise(model)).double().eval()
    _, gradients = run_and_backward(model, make_clips(config).double())
    dead = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-12}
    assert dead == {name for name in gradients if name.endswith("k_proj.bias")}
    assert any(name.endswith("q_proj.bias") for name in gradients)


NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
# Inductor in float32: up to torch 2.9 it miscompiles some float64 on CPU.
COMPILED = [
    *(pytest.param(case, "aot_eager", torch.float64, 1e-10) for case in CASES),
    *(pytest.param(case, "inductor", torch.float32, 1e-5, marks=NEEDS_COMPILER) for case in ATTENTION_TYPES),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend", "dtype", "tolerance"), COMPILED)
def test_compiles_as_one_graph_with_the_same_output_and_gradients(case, backend, dtype, tolerance):
    torch.compiler.reset()
    config = case_config(
        case, num_hidden_layers=1, num_temporal_layers=min(1, CASES[case].get("num_temporal_layers", 1))
    )
    model, clips = make_model(config).to(dtype), make_clips(config).to(dtype)
    expected = run_and_backward(model, clips)
    actual = run_and_backward(torch.compile(model, fullgraph=True, backend=backend), clips)
    original = {name.removeprefix("_orig_mod."): gradient for name, gradient in actual[1].items()}
    assert_same((actual[0], original), expected, atol=tolerance)


@pytest.mark.slow
def test_compiles_as_one_graph_for_training_with_chance_and_for_every_output(variant):
    torch.compiler.reset()
    config = tiny_config(
        variant, num_hidden_layers=2, num_temporal_layers=1, drop_path_rate=0.5, hidden_dropout_prob=0.1
    )
    model, clips = make_model(config).double(), make_clips(config, batch=8).double()
    kwargs = {"labels": torch.arange(8) % 5, "output_hidden_states": True, "output_attentions": True}
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager", dynamic=False)
    torch.manual_seed(7)
    expected = model(clips, **kwargs)
    torch.manual_seed(7)
    actual = compiled(clips, **kwargs)
    torch.testing.assert_close(actual.to_tuple(), expected.to_tuple(), atol=1e-10, rtol=0)
    assert changed(compiled(clips, **kwargs).logits, actual.logits) > 1e-3
    larger = make_clips(config, num_frames=12, image_size=(32, 48)).double()
    model.eval()
    expected = model(larger, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(compiled(larger, interpolate_pos_encoding=True).logits, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str)
def test_half_precision(case, dtype, tolerance, implementation):
    config = case_config(case, attn_implementation=implementation)
    model, clips = make_model(config), make_clips(config)
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        full = model(clips, labels=labels)
        half = copy.deepcopy(model).to(dtype)
        for inputs in (clips, clips.to(dtype)):  # clips are cast to the dtype of the weights
            outputs = half(inputs, labels=labels, output_hidden_states=True, output_attentions=True)
            assert outputs.logits.dtype == dtype and outputs.loss.dtype == torch.float32
            assert {tensor.dtype for tensor in (*outputs.hidden_states, *outputs.attentions)} == {dtype}
            difference = changed(outputs.logits.float(), full.logits) / full.logits.abs().max().item()
            assert difference < tolerance
    assert half.vivit(clips).pooler_output.dtype == half.vivit(clips).last_hidden_state.dtype == dtype


def test_double_precision(case):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    full = model(clips).logits
    double = model.double()(clips.double())
    assert double.logits.dtype == torch.float64
    assert 0 < changed(double.logits, full.double()) < 1e-4 * full.abs().max()


def test_autocast_trains(variant):
    config = tiny_config(variant)
    model, clips = make_model(config), make_clips(config)
    expected, _ = run_and_backward(model, clips)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clips, labels=torch.tensor([1, 2])).loss
        logits = model(clips).logits
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert changed(logits.float(), expected) < 0.1 * expected.abs().max()
    assert all(
        parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters()
    )


# What is saved


def test_saved_and_reloaded_every_bit_is_the_same(case, tmp_path):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    again, info = ViViTForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(clips).logits, model(clips).logits)
    assert not again.training


PLAIN_LAYER = [
    *("layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
    *(f"attention.{projection}_proj" for projection in "qkvo"),
]
MODEL_3_LAYER = [
    "layernorm_after",
    *("mlp.fc1", "mlp.fc2"),
    *(
        name
        for axis in ("space", "time")
        for name in (f"layernorm_{axis}", *(f"attention_{axis}.{p}_proj" for p in "qkvo"))
    ),
]


def test_the_names_in_saved_files_never_change(variant):
    grid = variant in ATTENTION_TYPES[2:]
    config = tiny_config(variant, num_hidden_layers=1, num_temporal_layers=1, representation_size=8)
    modules = ["vivit.embeddings.patch_embeddings.projection", "vivit.layernorm", "vivit.pre_logits", "classifier"]
    layer = MODEL_3_LAYER if variant == "factorised_self_attention" else PLAIN_LAYER
    modules += [f"vivit.encoder.layer.0.{name}" for name in layer]
    expected = {"vivit.embeddings.position_embeddings"} | (set() if grid else {"vivit.embeddings.cls_token"})
    if variant == "factorised_encoder":
        modules += [f"vivit.temporal_encoder.layer.0.{name}" for name in layer] + ["vivit.temporal_layernorm"]
        expected |= {f"vivit.temporal_embeddings.{name}" for name in ("cls_token", "position_embeddings")}
    expected |= {f"{module}.{name}" for module in modules for name in ("weight", "bias")}
    assert set(ViViTForVideoClassification(config).state_dict()) == expected


def test_without_qkv_bias_there_is_none(variant):
    config = tiny_config(variant, qkv_bias=False)
    names = set(make_model(config).state_dict())
    assert not any(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in names)
    assert any(name.endswith("o_proj.bias") for name in names)
    assert make_model(config)(make_clips(config)).logits.shape == (2, 5)


# Time, and the batch


def with_permuted_time(clips, config, permutation):
    """Whole tubelets, or the frames that uniform frame sampling takes, in another order."""
    if config.embedding_type == "uniform_frame_sampling":
        frames = sample_frames_uniformly(config.num_frames, config.num_sampled_frames)
        clips = clips.clone()
        clips[:, frames] = clips[:, frames[permutation]]
        return clips
    return clips.unflatten(1, (-1, config.tubelet_size[0]))[:, permutation].flatten(1, 2)


BASELINES = {
    "average_pool_baseline": {},
    "average_pool_baseline, uniform frames": {"embedding_type": "uniform_frame_sampling"},
    "average_pool_baseline, mean pooling": {"pooling": "mean"},
}


@pytest.mark.parametrize("case", [*CASES, *list(BASELINES)[1:]])
def test_the_order_of_time_matters_to_all_but_the_average_pool_baseline(case):
    config = case_config(case.split(",")[0], **BASELINES.get(case, {}))
    model, clips = make_model(config).double(), make_clips(config).double()
    shuffled = with_permuted_time(clips, config, torch.tensor([2, 0, 3, 1]).numpy())
    assert not torch.equal(shuffled, clips)
    difference = changed(model(shuffled).logits, model(clips).logits)
    if case in BASELINES:
        assert difference < 1e-10
        assert changed(model(clips.flip(3)).logits, model(clips).logits) > 1e-3  # but it sees something
    else:
        assert difference > 1e-3


def test_the_frames_that_uniform_sampling_leaves_out_are_not_seen():
    config = case_config("uniform_frames")
    model, clips = make_model(config), make_clips(config)
    seen = set(sample_frames_uniformly(8, 4).tolist())
    assert len(seen) == 4
    for frame in range(8):
        other = clips.clone()
        other[:, frame] += 1
        assert (changed(model(other).logits, model(clips).logits) > 1e-4) == (frame in seen), frame


def test_examples_of_a_batch_do_not_see_each_other(case):
    config = case_config(case)
    model, clips = make_model(config).double(), make_clips(config, batch=3).double()
    logits = model(clips).logits
    assert changed(logits[0], logits[1]) > 1e-3
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(clips[order]).logits, logits[order], atol=1e-10, rtol=0)
    for index in range(3):
        torch.testing.assert_close(model(clips[index : index + 1]).logits[0], logits[index], atol=1e-10, rtol=0)


# Stochastic depth


def test_drop_path_drops_whole_examples_and_divides_by_what_it_keeps():
    drop_path = ViViTDropPath(0.3).train()
    dropped = drop_path(torch.ones(20_000, 2, 3, dtype=torch.float64))
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / 0.7))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    branch = torch.randn(4, 2, 3)
    assert torch.equal(drop_path.eval()(branch), branch)
    assert torch.equal(ViViTDropPath(0.0).train()(branch), branch)


def test_the_drop_path_rate_grows_linearly_from_none(case):
    temporal = min(3, CASES[case].get("num_temporal_layers", 3))
    model = ViViTModel(case_config(case, num_hidden_layers=5, num_temporal_layers=temporal, drop_path_rate=0.4))
    assert [layer.drop_path.rate for layer in model.encoder.layer] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    if model.temporal_encoder is not None:
        assert [layer.drop_path.rate for layer in model.temporal_encoder.layer] == pytest.approx([0, 0.2, 0.4])


def test_drop_path_is_off_in_evaluation_and_drawn_for_every_residual_in_training(variant):
    config = tiny_config(variant, drop_path_rate=0.5)
    model, clips = make_model(config), make_clips(config, batch=16)
    without = make_model(tiny_config(variant))
    assert torch.equal(model(clips).logits, without(clips).logits)
    assert not torch.equal(model.train()(clips).logits, model(clips).logits)

    kept = []
    layer = model.vivit.encoder.layer[-1]
    layer.drop_path.register_forward_hook(lambda module, args, output: kept.append(output.flatten(1).any(dim=1)))
    model(clips)
    residuals = 3 if variant == "factorised_self_attention" else 2
    assert len(kept) == residuals
    assert len({tuple(example.tolist()) for example in kept}) == residuals, "residuals share one draw"
    assert all(0 < example.float().mean() < 1 for example in kept)


def test_dropout_is_where_the_official_model_has_it(variant):
    """Behind the position embeddings, behind every attention, and twice in the MLP; with the configured probability."""
    model = make_model(tiny_config(variant, hidden_dropout_prob=0.3)).train()
    calls = collections.Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.3
            kind = re.sub(r".*?(temporal_)?encoder\.(layer\.\d+\.)?", lambda m: "layer " if m[2] else "encoder ", name)
            module.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    model(make_clips(model.config))
    attentions = 2 if variant == "factorised_self_attention" else 1
    encoders, layers = (2, 4) if variant == "factorised_encoder" else (1, 2)
    assert calls == {"encoder dropout": encoders, "layer dropout": layers * attentions, "layer mlp.dropout": 2 * layers}


# Wrong input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 6, 3, 24, 40), r"expects clips of \(8, 24, 40\) \(frames, height, width\), but got \(6, 24, 40\)"),
        ((2, 8, 3, 40, 24), r"expects clips of \(8, 24, 40\).*but got \(8, 40, 24\).*interpolate_pos_encoding=True"),
        ((2, 3, 8, 24, 40), r"\(2, 3, 8, 24, 40\) have 8 channels in the third place, but the model expects 3"),
        ((8, 3, 24, 40), r"must be \(batch, frames, channels, height, width\), but got \(8, 3, 24, 40\)"),
        ((1, 2, 8, 3, 24, 40), r"must be \(batch, frames.*but got \(1, 2, 8, 3, 24, 40\)"),
    ],
)
def test_a_wrong_shape_is_an_error_that_prints_both(model, shape, message):
    for forward in (model, model.vivit):
        with pytest.raises(ValueError, match=message):
            forward(torch.zeros(shape))


def test_raw_frames_lists_and_nothing_are_errors(model):
    with pytest.raises(ValueError, match=r"uint8 look like raw frames.*floats in \[-1, 1\]"):
        model(torch.zeros(2, 8, 3, 24, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(batch, frames.*but got list"):
        model([torch.zeros(8, 3, 24, 40)])
    with pytest.raises(ValueError, match=r"`pixel_values` is missing"):
        model()


def test_interpolation_does_not_excuse_a_clip_without_a_whole_patch(model):
    with pytest.raises(ValueError, match=r"clip of \(1, 24, 40\).*no whole patch of \(2, 8, 8\)"):
        model(torch.zeros(2, 1, 3, 24, 40), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match=r"clip of \(8, 7, 40\)"):
        model(torch.zeros(2, 8, 3, 7, 40), interpolate_pos_encoding=True)
