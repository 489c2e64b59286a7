"""The report of an initialisation accounts for every weight, settings are carried over, and misfits are refused."""

import warnings

import pytest
import torch
from tiny_models import ATTENTION_TYPES, make_clips
from transformers import ResNetConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from vit_models import make_vit, make_vivit

from vivit_hf import ViViTForVideoClassification, ViViTModel
from vivit_hf.initialisation.from_image import TEMPORAL_ATTENTION_INITS, config_from_vit, initialise_from_vit


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("embedding_type", ["tubelet", "uniform_frame_sampling"])
@pytest.mark.parametrize("vit_class", [ViTModel, ViTForImageClassification, ViTForMaskedImageModeling])
def test_the_report_accounts_for_every_weight(attention_type, embedding_type, vit_class):
    vit = make_vit(vit_class, image_size=32)
    vivit = make_vivit(
        vit, attention_type, ViViTForVideoClassification, embedding_type=embedding_type, image_size=(24, 40)
    )
    before = {name: parameter.detach().clone() for name, parameter in vivit.named_parameters()}
    report = initialise_from_vit(vivit, vit)

    assert set(report.parameters) == set(before)
    assert set(report.vit_keys) == set(vit.state_dict())
    now = dict(vivit.named_parameters())
    allowed = {"copied", "inflated", "resized", "tiled", "resized, tiled", "zeroed", "newly initialised"}
    for name, status in report.parameters.items():
        assert status in allowed
        assert torch.equal(now[name], before[name]) == (status == "newly initialised"), (name, status)
        assert (status == "zeroed") == bool(now[name].abs().max() == 0) or status == "newly initialised", name
    positions = report.parameters["vivit.embeddings.position_embeddings"]
    assert positions == ("resized" if attention_type == "factorised_encoder" else "resized, tiled")
    kernel = report.parameters["vivit.embeddings.patch_embeddings.projection.weight"]
    assert kernel == ("inflated" if embedding_type == "tubelet" else "copied")
    unused = {name for name, status in report.vit_keys.items() if status != "used"}
    assert all("deliberately unused (" in report.vit_keys[name] for name in unused)
    assert not any("layer" in name or "position" in name for name in unused - {"vit.layernorm.weight"})
    assert "| copied |" in report.to_markdown() and "newly initialised" in str(report)


def test_a_stray_weight_is_an_error():
    vit = make_vit()
    vit.layers[0].attention.register_parameter("relative_bias", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="relative_bias"):
        initialise_from_vit(make_vivit(make_vit(), "spatio_temporal"), vit)


def test_an_error_leaves_the_vivit_unchanged():
    vit = make_vit(hidden_act="relu", layer_norm_eps=1e-3)
    vit.stray = torch.nn.Parameter(torch.zeros(3))
    vivit = ViViTModel(config_from_vit(vit.config, hidden_act="gelu", layer_norm_eps=1e-6))
    before = {name: value.clone() for name, value in vivit.state_dict().items()}
    with pytest.raises(ValueError, match="no place in a ViViT"):
        initialise_from_vit(vivit, vit)
    assert all(torch.equal(value, before[name]) for name, value in vivit.state_dict().items())
    assert (vivit.config.hidden_act, vivit.config.layer_norm_eps, vivit.layernorm.eps) == ("gelu", 1e-6, 1e-6)


def test_other_models_than_vits_are_refused():
    vit = make_vit()
    for config in (ResNetConfig(), vit):
        with pytest.raises(ValueError, match="A ViViT starts from a ViT, DeiT, DINOv2, CLIP or SigLIP"):
            config_from_vit(config)
    vivit = ViViTModel(config_from_vit(vit.config))
    for arguments in ((vit, vivit), (vivit, vivit), (vivit, vit.config)):
        with pytest.raises(TypeError, match="Expected a ViViT and then an image model"):
            initialise_from_vit(*arguments)
    for read in (config_from_vit, lambda source: initialise_from_vit(vivit, source)):
        with pytest.raises(OSError, match="there is no folder 'nowhere/vit'"):
            read("nowhere/vit")


def test_settings_are_carried_over():
    vit = make_vit(hidden_act="relu", layer_norm_eps=1e-3, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.125)
    config = config_from_vit(vit.config, num_frames=2)
    assert (config.hidden_act, config.layer_norm_eps, config.hidden_dropout_prob) == ("relu", 1e-3, 0.25)

    config = config_from_vit(make_vit().config, num_frames=2, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    vivit = ViViTModel(config).eval()
    report = initialise_from_vit(vivit, vit)
    assert report.settings["hidden_act"] == ("gelu_pytorch_tanh", "relu")
    assert vivit.config.attention_probs_dropout_prob == 0.125 and vivit.layernorm.eps == 1e-3
    assert {m.p for m in vivit.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    clips = make_clips(vivit.config)
    with torch.no_grad():
        torch.testing.assert_close(
            vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state, atol=1e-5, rtol=0
        )


def test_missing_qkv_biases_become_zeros():
    vit = make_vit(qkv_bias=False)
    assert config_from_vit(vit.config).qkv_bias is False
    vivit = ViViTModel(config_from_vit(vit.config, num_frames=2, qkv_bias=True)).eval()
    report = initialise_from_vit(vivit, vit)
    assert report.parameters["encoder.layer.0.attention.q_proj.bias"] == "zeroed"
    clips = make_clips(vivit.config)
    with torch.no_grad():
        torch.testing.assert_close(
            vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "option", ["tubelet_init", "temporal_attention_init", "temporal_encoder_init", "position_init"]
)
def test_unknown_options_name_the_known_ones(option):
    vit = make_vit()
    with pytest.raises(ValueError, match=rf"`{option}='nonsense'` is not known. Expected one of '"):
        initialise_from_vit(make_vivit(vit, "spatio_temporal"), vit, **{option: "nonsense"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "`hidden_size` is 24 in the ViViT and 48 in the ViT"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` is 2 in the ViViT and 3 in the ViT"),
        ({"patch_size": 4}, r"patches are \(8, 8\) .* and the ViT's \(4, 4\)"),
    ],
)
def test_other_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        initialise_from_vit(make_vivit(make_vit(), "spatio_temporal"), make_vit(**changes))


def test_every_temporal_attention_init_is_reported():
    vit = make_vit()
    seen = set()
    for init in TEMPORAL_ATTENTION_INITS:
        vivit = make_vivit(vit, "factorised_self_attention")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = initialise_from_vit(vivit, vit, temporal_attention_init=init)
        query, output = (
            report.parameters[f"encoder.layer.0.attention_time.{name}.weight"] for name in ("q_proj", "o_proj")
        )
        seen.add((query, output))
    assert seen == {
        ("copied", "zeroed"),
        ("zeroed", "zeroed"),
        ("copied", "copied"),
        ("newly initialised", "newly initialised"),
    }
