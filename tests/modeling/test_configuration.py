"""ViViTConfig: the paper's sizes, many spellings, and configurations of other models."""

import pytest
from tiny_models import ATTENTION_TYPES, tiny_config

from vivit_hf import ViViTConfig


# Defaults and presets


def test_the_default_is_b_16x2_with_joint_attention():
    config = ViViTConfig()
    expected = {
        "attention_type": "spatio_temporal",
        "attention_order": "space_time",
        "embedding_type": "tubelet",
        "tubelet_size": [2, 16, 16],
        "num_frames": 32,
        "image_size": 224,
        "num_channels": 3,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_temporal_layers": 4,
        "pooling": "cls",
        "temporal_pooling": None,
        "representation_size": None,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.grid_size == (16, 14, 14)
    assert config.model_type == "vivit_hf"


BASE, LARGE = (768, 12, 12, 3072), (1024, 24, 16, 4096)
PRESETS = {
    "vivit-b-16x2": (BASE, "spatio_temporal", None),
    "vivit-b-16x2-fe": (BASE, "factorised_encoder", 4),
    "vivit-b-16x2-fe-average-pool": (BASE, "factorised_encoder", 0),
    "vivit-b-16x2-fsa": (BASE, "factorised_self_attention", None),
    "vivit-b-16x2-fdpa": (BASE, "factorised_dot_product_attention", None),
    "vivit-l-16x2": (LARGE, "spatio_temporal", None),
    "vivit-l-16x2-fe": (LARGE, "factorised_encoder", 24),
    "vivit-l-16x2-fe-average-pool": (LARGE, "factorised_encoder", 0),
    "vivit-l-16x2-fe-ssv2": (LARGE, "factorised_encoder", 4),
    "vivit-l-16x2-fe-epic-kitchens": (LARGE, "factorised_encoder", 4),
    "vivit-l-16x2-fsa": (LARGE, "factorised_self_attention", None),
    "vivit-l-16x2-fdpa": (LARGE, "factorised_dot_product_attention", None),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_the_paper(name):
    (hidden, layers, heads, mlp), attention_type, num_temporal_layers = PRESETS[name]
    config = ViViTConfig.from_preset(name)
    assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
    assert (config.num_attention_heads, config.intermediate_size) == (heads, mlp)
    assert config.attention_type == attention_type
    if num_temporal_layers is not None:
        assert config.num_temporal_layers == num_temporal_layers
    side = 256 if name.endswith("ssv2") else 224  # the SSv2 recipe crops 256
    assert (config.num_frames, config.frame_size, config.tubelet_size) == (32, (side, side), [2, 16, 16])


def test_no_preset_is_left_untested():
    assert set(ViViTConfig.presets) == {*PRESETS, "vivit-tiny"}


def test_the_tiny_preset_is_a_factorised_encoder_of_16_small_frames():
    config = ViViTConfig.from_preset("vivit-tiny")
    assert (config.attention_type, config.num_frames, config.frame_size) == ("factorised_encoder", 16, (64, 64))


def test_a_preset_takes_overrides_and_validates_them():
    config = ViViTConfig.from_preset("vivit-b-16x2-fe", num_frames=16, num_labels=7)
    assert (config.num_frames, config.num_labels, config.num_temporal_layers) == (16, 7, 4)
    with pytest.raises(ValueError, match="num_frames=0"):
        ViViTConfig.from_preset("vivit-b-16x2-fe", num_frames=0)


def test_an_unknown_preset_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"'vivit-b-16x2-ef'; did you mean 'vivit-b-16x2-fe'\?.*vivit-tiny"):
        ViViTConfig.from_preset("vivit-b-16x2-ef")


# Spellings


@pytest.mark.parametrize(
    ("name", "given_value", "stored"),
    [
        ("attention_type", "spacetime", "spatio_temporal"),
        ("attention_type", "factorized_encoder", "factorised_encoder"),
        ("attention_type", "factorized_self_attention", "factorised_self_attention"),
        ("attention_type", "factorized_self_attention_block", "factorised_self_attention"),
        ("attention_type", "factorized_dot_product_attention", "factorised_dot_product_attention"),
        ("embedding_type", "3d_conv", "tubelet"),
        ("embedding_type", "temporal_sampling", "uniform_frame_sampling"),
        ("pooling", "token", "cls"),
        ("pooling", "gap", "mean"),
        ("pooling", "gmp", "max"),
        ("pooling", "gsp", "sum"),
        ("hidden_act", "gelu_fast", "gelu_pytorch_tanh"),
        ("hidden_act", "gelu_new", "gelu_pytorch_tanh"),
    ],
)
def test_other_spellings_are_stored_in_the_papers_form(name, given_value, stored):
    assert getattr(ViViTConfig(**{name: given_value}), name) == stored
    from_file = ViViTConfig.from_dict({"model_type": "vivit_hf", name: given_value})
    assert getattr(from_file, name) == stored


def test_the_official_names_of_poolings_are_known_over_time_too():
    assert tiny_config("factorised_encoder", temporal_pooling="gap").temporal_pooling == "mean"


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_pooling_is_by_default_what_the_variant_has_place_for(attention_type):
    grid = attention_type in ("factorised_self_attention", "factorised_dot_product_attention")
    assert tiny_config(attention_type).pooling == ("mean" if grid else "cls")


def test_uniform_frame_sampling_has_2d_patches_and_half_of_the_frames_by_default():
    config = ViViTConfig(embedding_type="uniform_frame_sampling")
    assert (config.tubelet_size, config.num_sampled_frames) == ([1, 16, 16], 16)
    assert config.grid_size == (16, 14, 14)


def test_the_grid_drops_what_does_not_fill_a_patch_and_knows_the_official_rounding():
    config = tiny_config("spatio_temporal", num_frames=9, image_size=(31, 47), tubelet_size=(4, 8, 16))
    assert config.grid_size == (2, 3, 2)
    assert config.grid_size_of(13, 64, 64) == (3, 8, 4)
    uniform = tiny_config("spatio_temporal", embedding_type="uniform_frame_sampling", num_frames=8)
    assert uniform.grid_size == (4, 3, 5) and uniform.grid_size_of(3, 24, 40) == (3, 3, 5)


# Configurations of others


def test_a_configuration_of_transformers_vivit_is_model_1_with_a_class_token():
    from transformers import VivitConfig

    native = VivitConfig(image_size=64, num_frames=8, tubelet_size=[4, 8, 8], hidden_size=48, num_attention_heads=4)
    config = ViViTConfig.from_dict(native.to_dict())
    assert (config.attention_type, config.pooling, config.hidden_act) == ("spatio_temporal", "cls", "gelu_pytorch_tanh")
    assert (config.image_size, config.num_frames, config.tubelet_size) == (64, 8, [4, 8, 8])
    assert (config.hidden_size, config.layer_norm_eps) == (48, native.layer_norm_eps)
    assert config.to_dict()["model_type"] == "vivit_hf"


def test_the_outputs_are_named_from_0_on():
    assert ViViTConfig(id2label=["run", "sit"]).id2label == {0: "run", 1: "sit"}
    assert ViViTConfig(id2label={"1": "sit", "0": "run"}).num_labels == 2
    for wrong in ({1: "run", 2: "sit"}, {0: "run", 2: "sit"}):
        with pytest.raises(ValueError, match="`id2label` must name the outputs from 0 to 1, got"):
            ViViTConfig(id2label=wrong)


def test_a_folder_without_a_configuration_is_no_model_of_defaults(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        ViViTConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="has a list as its configuration, expected a JSON object"):
        ViViTConfig.from_pretrained(tmp_path)


def test_a_configuration_of_another_kind_of_model_is_refused_by_name():
    with pytest.raises(ValueError, match="model of type 'videomae', not a ViViT"):
        ViViTConfig.from_dict({"model_type": "videomae"})


def test_a_saved_configuration_keeps_the_order_of_its_groups_of_labels(tmp_path):
    names = {0: "verb: put", 1: "verb: take", 2: "verb: open", 3: "noun: pan", 4: "noun: cup"}
    config = ViViTConfig(label_groups={"verb": 3, "noun": 2}, id2label=names)
    config.save_pretrained(tmp_path)
    again = ViViTConfig.from_pretrained(tmp_path)
    assert list(again.label_groups.items()) == [("verb", 3), ("noun", 2)] and again.id2label == names
