"""A ViViT starts from an image ViT: it computes what the ViT computes, and all of its weights can learn."""

import warnings

import pytest
import torch
from tiny_models import make_clips, randomise
from transformers import ViTConfig, ViTModel
from vit_models import make_dinov2, make_vit, make_vivit

from vivit_hf import ViViTForVideoClassification, ViViTModel
from vivit_hf.initialisation.from_image import config_from_vit, initialise_from_vit


# Equality with transformers' ViT


def compare_spatial_tokens(vit, num_frames):
    """Model 2: each tubelet's spatial class token equals the ViT's class token for its central frame."""
    config = config_from_vit(
        vit.config, attention_type="factorised_encoder", num_frames=num_frames, num_temporal_layers=1
    )
    vivit = ViViTModel(config).eval()
    initialise_from_vit(vivit, vit)
    clips = make_clips(config, batch=1)
    with torch.no_grad():
        ours = vivit.encode_space(*vivit.embeddings(clips))
        frames = [vit(clips[:, index]).last_hidden_state[:, 0] for index in range(1, num_frames, 2)]
    torch.testing.assert_close(ours, torch.stack(frames, dim=1), atol=1e-5, rtol=0)


def compare_single_tubelet(vit):
    """Model 1 on one tubelet: all tokens equal the ViT's for its central frame."""
    vivit = ViViTModel(config_from_vit(vit.config, num_frames=2)).eval()
    initialise_from_vit(vivit, vit)
    clips = make_clips(vivit.config, batch=1)
    with torch.no_grad():
        ours, theirs = vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_equals_transformers_vit_on_the_central_frame():
    compare_spatial_tokens(make_vit(), num_frames=8)
    compare_single_tubelet(make_vit())


def test_layer_scale_is_folded_exactly():
    vit = make_dinov2(intermediate_size=48)
    assert vit.state_dict()["encoder.layer.0.layer_scale1.lambda1"].std() > 0.1
    compare_spatial_tokens(vit, num_frames=8)
    compare_single_tubelet(vit)
    report = initialise_from_vit(ViViTModel(config_from_vit(vit.config, num_frames=2)), vit)
    assert report.counts()["scaled"] == 2 * 4 and report.vit_keys["encoder.layer.1.layer_scale2.lambda1"] == "used"


@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_model_3_with_zero_output_equals_the_stack_without_temporal_attention(order):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", attention_order=order)
    initialise_from_vit(vivit, vit)
    compare_with_spatial_stack(vivit, vit, make_clips(vivit.config))


def compare_with_spatial_stack(vivit, vit, clips):
    with torch.no_grad():
        ours = vivit(clips).last_hidden_state
        tokens, _ = vivit.embeddings(clips)
        grid = tokens.flatten(0, 1)
        for layer in vit.layers:
            grid = layer(grid)
        theirs = vit.layernorm(grid).unflatten(0, tokens.shape[:2]).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def in21k_layout(folder):
    """Save a B/16 with random weights in the exact file layout of google/vit-base-patch16-224-in21k."""
    config = ViTConfig()
    assert (config.hidden_size, config.hidden_act, config.layer_norm_eps) == (768, "gelu", 1e-12)
    torch.manual_seed(0)
    vit = ViTModel(config).eval()
    for name, parameter in vit.named_parameters():
        if "position" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    vit.save_pretrained(folder)
    return vit


def test_full_size_base_model_equals_transformers_vit(tmp_path):
    from safetensors.torch import load_file

    in21k_layout(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight", "pooler.dense.weight"} <= names
    vit = ViTModel.from_pretrained(tmp_path).eval()
    compare_spatial_tokens(vit, num_frames=4)
    compare_single_tubelet(vit)
    vivit = ViViTModel(config_from_vit(vit.config, attention_type="factorised_self_attention", num_frames=4)).eval()
    initialise_from_vit(vivit, vit)
    compare_with_spatial_stack(vivit, vit, make_clips(vivit.config, batch=1))


# What learns


def train_ten_steps(vivit, weight_decay=0.0):
    before = {name: parameter.detach().clone() for name, parameter in vivit.named_parameters()}
    optimiser = torch.optim.AdamW(vivit.parameters(), lr=1e-3, weight_decay=weight_decay)
    clips, labels = make_clips(vivit.config, batch=4), torch.tensor([0, 1, 0, 1])
    vivit.train()
    for _ in range(10):
        optimiser.zero_grad()
        vivit(clips, labels=labels).loss.backward()
        optimiser.step()
    return {name for name, parameter in vivit.named_parameters() if not torch.equal(parameter, before[name])}


def temporal_names(vivit):
    return {name for name, _ in vivit.named_parameters() if "attention_time." in name}


@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_with_zero_output_every_temporal_weight_learns(order):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", ViViTForVideoClassification, attention_order=order)
    initialise_from_vit(vivit, vit)
    moved = train_ten_steps(vivit)
    still = {name for name in temporal_names(vivit) - moved if "k_proj.bias" not in name}
    assert not still and temporal_names(vivit)


def test_with_zero_almost_nothing_learns_and_a_warning_says_so():
    """The paper's initialisation has this property; the warning is there for it."""
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", ViViTForVideoClassification)
    with pytest.warns(UserWarning, match="only the output bias will ever learn"):
        initialise_from_vit(vivit, vit, temporal_attention_init="zero")
    moved = train_ten_steps(vivit) & temporal_names(vivit)
    assert moved == {f"vivit.encoder.layer.{index}.attention_time.o_proj.bias" for index in range(2)}


@pytest.mark.parametrize("init", ["zero_output", "zero"])
def test_zero_and_zero_output_start_without_temporal_attention(init):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialise_from_vit(vivit, vit, temporal_attention_init=init)
    clips = make_clips(vivit.config)
    with torch.no_grad():
        whole = vivit(clips).last_hidden_state
        for layer in vivit.encoder.layer:
            randomise(layer.layernorm_time)  # without effect while the temporal attention outputs zero
        assert torch.equal(vivit(clips).last_hidden_state, whole)


# The temporal encoder


def test_copy_last_starts_as_an_average_over_time():
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_encoder", pooling="mean")
    torch.nn.init.ones_(vivit.temporal_layernorm.weight)
    torch.nn.init.zeros_(vivit.temporal_layernorm.bias)
    report = initialise_from_vit(vivit, vit, temporal_encoder_init="copy_last")
    clips = make_clips(vivit.config)
    with torch.no_grad():
        steps = vivit.encode_space(*vivit.embeddings(clips))
        expected = torch.nn.functional.layer_norm(steps, steps.shape[-1:], eps=vivit.config.layer_norm_eps).mean(dim=1)
        pooled = vivit(clips).pooler_output
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)
    name = "temporal_encoder.layer.1.attention.q_proj.weight"
    assert report.parameters[name] == "copied"
    assert torch.equal(vivit.state_dict()[name], vit.state_dict()["layers.1.attention.q_proj.weight"])


@pytest.mark.parametrize("init", [None, "zero_output", "copy_last"])
def test_with_temporal_pooling_the_encoder_starts_as_a_mean_of_class_tokens_and_learns(init):
    """Up to the final LayerNorm, without scale and bias, the pooled output is the mean of the ViT's class tokens."""
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_encoder", ViViTForVideoClassification, temporal_pooling="mean")
    report = initialise_from_vit(vivit, vit, temporal_encoder_init=init)
    clips = make_clips(vivit.config)
    with torch.no_grad():
        frames = [vit(clips[:, index]).last_hidden_state[:, 0] for index in range(1, 8, 2)]  # the central frames
        steps = torch.stack(frames, dim=1).double()  # (batch, time, hidden)
        centred = steps - steps.mean(dim=-1, keepdim=True)
        variances = centred.square().mean(dim=-1, keepdim=True) + vivit.config.layer_norm_eps
        expected = (centred / variances.sqrt()).mean(dim=1)
        pooled = vivit.vivit(clips).pooler_output
    torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=0)
    assert expected.std(dim=0).mean() > 1e-2  # differs from clip to clip
    copied = report.parameters["vivit.temporal_encoder.layer.0.attention.q_proj.weight"]
    assert copied == ("copied" if init == "copy_last" else "newly initialised")
    assert report.parameters["vivit.temporal_embeddings.position_embeddings"] == "zeroed"

    temporal = {name: one for name, one in vivit.named_parameters() if ".temporal_" in name}
    optimiser, with_gradient = torch.optim.SGD(vivit.parameters(), lr=0.1), set()
    for _ in range(2):
        optimiser.zero_grad()
        vivit(clips, labels=torch.tensor([0, 1])).loss.backward()
        with_gradient |= {name for name, one in temporal.items() if one.grad.abs().max() > 0}
        optimiser.step()
    # The softmax over keys does not see a bias that all of them share.
    assert {name for name in temporal if "k_proj.bias" not in name} <= with_gradient


def test_with_features_of_one_scale_the_pooled_output_is_their_mean_itself():
    """A ViT whose final LayerNorm has neither scale nor bias gives steps that the temporal one leaves as they are."""
    vit = make_vit()
    torch.nn.init.ones_(vit.layernorm.weight)
    torch.nn.init.zeros_(vit.layernorm.bias)
    vivit = make_vivit(vit, "factorised_encoder", temporal_pooling="attention")
    initialise_from_vit(vivit, vit)
    clips = make_clips(vivit.config)
    with torch.no_grad():
        frames = [vit(clips[:, index]).last_hidden_state[:, 0] for index in range(1, 8, 2)]
        pooled = vivit(clips).pooler_output
    torch.testing.assert_close(pooled, torch.stack(frames).mean(dim=0), atol=1e-5, rtol=0)


def test_temporal_pooling_may_start_random_and_without_encoder():
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_encoder", temporal_pooling="mean")
    before = vivit.temporal_encoder.layer[0].mlp.fc2.weight.clone()
    initialise_from_vit(vivit, vit, temporal_encoder_init="random")
    assert torch.equal(vivit.temporal_encoder.layer[0].mlp.fc2.weight, before) and before.any()
    config = config_from_vit(
        vit.config,
        attention_type="factorised_encoder",
        num_frames=8,
        num_temporal_layers=0,
        temporal_pooling="concatenate",
    )
    probe = ViViTModel(config).eval()
    initialise_from_vit(probe, vit)
    clips = make_clips(config)
    with torch.no_grad():
        frames = [vit(clips[:, index]).last_hidden_state[:, 0] for index in range(1, 8, 2)]
        torch.testing.assert_close(probe(clips).pooler_output, torch.cat(frames, dim=1), atol=1e-5, rtol=0)


def test_copy_last_is_refused_with_a_class_token():
    vit = make_vit()
    with pytest.raises(ValueError, match="same logits for every video; use `temporal_pooling='mean'`"):
        initialise_from_vit(make_vivit(vit, "factorised_encoder"), vit, temporal_encoder_init="copy_last")
