"""ViViTConfig: the paper's sizes, many spellings, JSON there and back, and errors that help for all that cannot be."""

import copy
import functools
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_models import ATTENTION_TYPES, CASES, case_config, tiny_config
from transformers import AutoConfig

from vivit_hf import ViViTConfig, ViViTModel


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


# What cannot be

WRONG = [
    # values of the wrong kind or range: the name, the value, and what was expected
    ({"num_frames": 0}, r"`num_frames=0` must be a whole number of at least 1"),
    ({"num_frames": -8}, r"`num_frames=-8`.*at least 1"),
    ({"num_channels": 0}, r"`num_channels=0`.*at least 1"),
    ({"hidden_size": -1}, r"`hidden_size=-1`.*at least 1"),
    ({"num_hidden_layers": 0}, r"`num_hidden_layers=0`.*at least 1"),
    ({"num_attention_heads": 0}, r"`num_attention_heads=0`.*at least 1"),
    ({"intermediate_size": 0}, r"`intermediate_size=0`.*at least 1"),
    ({"num_temporal_layers": -1}, r"`num_temporal_layers=-1`.*at least 0"),
    ({"num_register_tokens": -1}, r"`num_register_tokens=-1`.*at least 0"),
    ({"num_register_tokens": 10**6}, r"`num_register_tokens=1,000,000` is too large"),
    (
        {"num_register_tokens": 1, "attention_type": "factorised_self_attention"},
        "`num_register_tokens=1` does not go with `attention_type='factorised_self_attention'`",
    ),
    ({"temporal_num_attention_heads": 0}, r"`temporal_num_attention_heads=0`.*at least 1"),
    ({"temporal_intermediate_size": -4}, r"`temporal_intermediate_size=-4`.*at least 1"),
    ({"representation_size": 0}, r"`representation_size=0`.*at least 1"),
    ({"num_frames": 8.0}, r"`num_frames=8.0` must be of type int\."),
    ({"num_frames": "8"}, r"`num_frames='8'`"),
    ({"num_frames": None}, r"`num_frames=None`"),
    ({"num_frames": True}, r"`num_frames=True`"),
    ({"hidden_size": 32.5}, r"`hidden_size=32.5`"),
    ({"hidden_dropout_prob": 1.0}, r"`hidden_dropout_prob=1.0` must be a probability of at least 0 and below 1"),
    ({"attention_probs_dropout_prob": -0.1}, r"`attention_probs_dropout_prob=-0.1`.*probability"),
    ({"drop_path_rate": 1.5}, r"`drop_path_rate=1.5`.*probability"),
    ({"drop_path_rate": float("nan")}, r"`drop_path_rate=nan`.*probability"),
    ({"layer_norm_eps": 0.0}, r"`layer_norm_eps=0.0` must be a number above 0"),
    ({"initializer_range": -0.02}, r"`initializer_range=-0.02` must be a number above 0"),
    ({"qkv_bias": "yes"}, r"`qkv_bias='yes'`"),
    # sizes
    ({"image_size": 0}, r"`image_size=0`.*at least 1"),
    ({"image_size": (24, -40)}, r"`image_size=\(24, -40\)`.*at least 1"),
    ({"image_size": (24, 40, 3)}, r"`image_size=\(24, 40, 3\)`.*\(height, width\)"),
    ({"image_size": (24.0, 40)}, r"`image_size=\(24.0, 40\)` must be of type int \| list\[int\]"),
    ({"tubelet_size": (2, 8)}, r"`tubelet_size=\(2, 8\)` must be three numbers of at least 1: \(time, height, width\)"),
    ({"tubelet_size": 16}, r"`tubelet_size=16`"),
    ({"tubelet_size": (2, 0, 8)}, r"`tubelet_size=\(2, 0, 8\)`.*at least 1"),
    (
        {"tubelet_size": (9, 8, 8)},
        r"\(9, 8, 8\)` is larger than the clip .*\(8, 24, 40\) in time: 9 > 8. Use a smaller",
    ),
    ({"tubelet_size": (2, 25, 8)}, r"larger than the clip .* in height: 25 > 24. Use a smaller"),
    ({"tubelet_size": (2, 8, 41)}, r"larger than the clip .* in width: 41 > 40. Use a smaller"),
    # combinations
    (
        {"num_attention_heads": 5},
        r"`hidden_size=32` does not divide into `num_attention_heads=5`.*num_attention_heads=4`",
    ),
    (
        {"attention_type": "factorised_encoder", "temporal_num_attention_heads": 3},
        r"`hidden_size=32` does not divide into `temporal_num_attention_heads=3`.*use for example",
    ),
    (
        {"attention_type": "factorised_dot_product_attention", "num_attention_heads": 1},
        r"`num_attention_heads=1` is odd.*Model 4.*use an even number",
    ),
    (
        {"attention_type": "factorised_dot_product_attention", "hidden_size": 30, "num_attention_heads": 3},
        r"`num_attention_heads=3` is odd.*use an even number",
    ),
    (
        {"attention_type": "factorised_self_attention", "pooling": "cls"},
        r"`pooling='cls'`.*'factorised_self_attention'.*use `pooling='mean'`",
    ),
    (
        {"attention_type": "factorised_dot_product_attention", "pooling": "token"},
        r"`pooling='cls'`.*'factorised_dot_product_attention'.*use `pooling='mean'`",
    ),
    (
        {"embedding_type": "uniform_frame_sampling", "tubelet_size": (2, 8, 8)},
        r"`tubelet_size=\(2, 8, 8\)` spans 2 frames.*use \(1, height, width\), or `embedding_type='tubelet'`",
    ),
    (
        {"embedding_type": "uniform_frame_sampling", "tubelet_size": (1, 8, 8), "num_sampled_frames": 9},
        r"`num_sampled_frames=9` is more than .*`num_frames=8`; sample at most 8",
    ),
    (
        {"embedding_type": "uniform_frame_sampling", "tubelet_size": (1, 8, 8), "num_sampled_frames": 0},
        r"`num_sampled_frames=0`.*at least 1",
    ),
    ({"num_sampled_frames": 4}, r"`num_sampled_frames=4` has no meaning with `embedding_type='tubelet'`.*leave it out"),
    # words, with the nearest one
    ({"attention_type": "factorised_encode"}, r"'factorised_encode'` is not known. Did you mean 'factorised_encoder'"),
    (
        {"attention_type": "divided_space_time"},
        r"'divided_space_time'` is not known.*Expected one of 'spatio_temporal'",
    ),
    ({"attention_order": "time-space"}, r"'time-space'` is not known. Did you mean 'time_space'"),
    ({"embedding_type": "tubelets"}, r"'tubelets'` is not known. Did you mean 'tubelet'"),
    ({"pooling": "average"}, r"`pooling='average'` is not known.*Expected one of 'cls', 'mean', 'max', 'sum'"),
    ({"temporal_pooling": "average"}, r"`temporal_pooling='average'` is not known.*'concatenate', 'attention'"),
    (
        {"attention_type": "spatio_temporal", "temporal_pooling": "mean"},
        r"`temporal_pooling='mean'` has no meaning with .*'spatio_temporal'.*use `attention_type='factorised_encoder'`",
    ),
    (
        {"attention_type": "factorised_encoder", "temporal_pooling": "cls", "num_temporal_layers": 0},
        r"`temporal_pooling='cls'` needs a temporal encoder.*use 'mean'",
    ),
    ({"pooling": "Max"}, r"`pooling='Max'` is not known. Did you mean 'max'"),
    ({"hidden_act": "gelu_tanh_pytorch"}, r"`hidden_act='gelu_tanh_pytorch'` is not known. Did you mean 'gelu"),
    ({"attention_type": 3}, r"`attention_type=3`"),
    ({"problem_type": "classification"}, r"`problem_type='classification'`"),
]


def wrong_id(wrong):
    return ",".join(f"{name}={value}" for name, value in wrong.items()) if isinstance(wrong, dict) else ""


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=wrong_id)
def test_what_cannot_be_is_a_value_error_that_names_the_value_and_the_way_out(wrong, message):
    fields = {"attention_type": "spatio_temporal", **wrong}
    if "tubelet_size" not in wrong:
        fields["tubelet_size"] = (1 if "embedding_type" in wrong else 2, 8, 8)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny_config(**fields)


def single_values():
    """The wrong values above that are wrong whatever the other fields hold."""
    combinations = ("larger than the clip", "does not divide", "has no meaning", "spans")
    for wrong, message in WRONG:
        if len(wrong) == 1 and not any(words in message for words in combinations):
            yield *wrong.items(), message


@pytest.mark.parametrize(("field", "message"), [*single_values()], ids=lambda one: "=".join(map(str, one))[:40])
def test_a_wrong_value_is_refused_when_it_is_set_and_the_old_one_stays(field, message):
    name, value = field
    config = tiny_config("spatio_temporal")
    before = config.to_dict()
    for change in (lambda: setattr(config, name, value), lambda: config.update({name: value})):
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            change()
        assert type(caught.value) is ValueError
    assert config.to_dict() == before


@pytest.mark.parametrize("value", [-1, 1.5, "3", True, None, 10**9])
def test_a_wrong_number_of_labels_is_refused_when_it_is_set(value):
    config = tiny_config("spatio_temporal")
    with pytest.raises(ValueError, match="`num_labels="):
        config.num_labels = value
    assert config.num_labels == 5


def test_values_set_later_are_stored_as_given_at_construction():
    config = tiny_config("spatio_temporal")
    config.update({"attention_type": "factorized_encoder", "pooling": "gap", "image_size": (32, 48), "num_frames": 16})
    config.tubelet_size = (4, 8, 8)
    expected = tiny_config(
        "factorised_encoder", pooling="mean", image_size=(32, 48), num_frames=16, tubelet_size=(4, 8, 8)
    )
    assert config.to_dict() == {**expected.to_dict(), "num_temporal_layers": 4}
    assert (config.image_size, config.tubelet_size, config.grid_size) == ([32, 48], [4, 8, 8], (4, 4, 6))


def test_none_set_later_is_the_default_when_a_model_is_built():
    config = tiny_config("spatio_temporal")
    config.update({"attention_type": "factorised_self_attention", "pooling": None})
    assert ViViTModel(config).config.pooling == "mean"


def test_integers_pass_where_floats_are_expected():
    config = ViViTConfig(drop_path_rate=0, hidden_dropout_prob=0, layer_norm_eps=1, initializer_range=1)
    assert (config.drop_path_rate, config.hidden_dropout_prob, config.layer_norm_eps) == (0, 0, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_attention_heads", 5, "does not divide"),
        ("num_frames", "many", "`num_frames='many'`"),
        ("pooling", "average", "`pooling='average'`"),
        ("tubelet_size", [2, 64, 8], "larger than the clip"),
    ],
)
def test_a_wrong_value_set_later_is_caught_before_a_model_is_built_from_it(name, value, message):
    config = tiny_config("spatio_temporal")
    vars(config)[name] = value  # past the checks
    with pytest.raises(ValueError, match=message):
        ViViTModel(config)


def test_a_list_changed_in_place_is_caught_before_a_model_is_built_from_it():
    config = tiny_config("spatio_temporal")
    config.tubelet_size[1] = "8"
    with pytest.raises(ValueError, match=r"`tubelet_size=\[2, '8', 8\]` must be of type list\[int\]"):
        ViViTModel(config)


def test_a_wrong_combination_is_not_saved(tmp_path):
    config = tiny_config("spatio_temporal")
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="`hidden_size=32` does not divide into `num_attention_heads=5`"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


# There and back


def back_from_json(config, folder=None):
    if folder is None:
        return ViViTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_configuration_is_the_same_configuration(case, tmp_path):
    config = case_config(case, num_labels=3, drop_path_rate=0.3, problem_type="regression")
    again = back_from_json(config, tmp_path)
    assert type(again) is ViViTConfig
    strangers = {"transformers_version", "_name_or_path", "architectures"}
    written, read = ({k: v for k, v in c.to_dict().items() if k not in strangers} for c in (config, again))
    assert written == read
    for name in ViViTConfig.__annotations__:
        assert getattr(again, name) == getattr(config, name), name
    assert again.to_json_string() == back_from_json(again, tmp_path).to_json_string()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


_MODEL_2 = "factorised_encoder"


@st.composite
def configs(draw):
    attention_type = draw(st.sampled_from(ATTENTION_TYPES))
    grid = attention_type in ATTENTION_TYPES[2:]
    uniform = draw(st.booleans())
    tubelet = draw(st.tuples(*[st.integers(1, 8)] * 3))
    frames, *sides = (draw(st.integers(patch, 40)) for patch in tubelet)
    heads = draw(st.integers(1, 6)) * 2
    fields = {
        "attention_type": attention_type,
        "attention_order": draw(st.sampled_from(["space_time", "time_space"])),
        "embedding_type": "uniform_frame_sampling" if uniform else "tubelet",
        "tubelet_size": (1 if uniform else tubelet[0], *tubelet[1:]),
        "num_frames": frames,
        "image_size": draw(st.sampled_from([tuple(sides), list(sides), max(sides)])),
        "num_channels": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.integers(1, 8)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_temporal_layers": draw(st.integers(0, 4)),
        "temporal_num_attention_heads": draw(st.sampled_from([None, 1, heads])),
        "temporal_intermediate_size": draw(st.none() | st.integers(1, 64)),
        "pooling": draw(st.sampled_from([None, "mean", "max", "sum"] + ([] if grid else ["cls"]))),
        "temporal_pooling": draw(
            st.sampled_from([None, "mean", "max", "concatenate", "attention"] if attention_type == _MODEL_2 else [None])
        ),
        "representation_size": draw(st.none() | st.integers(1, 64)),
        "drop_path_rate": draw(st.floats(0, 0.99)),
        "hidden_dropout_prob": draw(st.floats(0, 0.99)),
        "qkv_bias": draw(st.booleans()),
        "patch_bias": draw(st.booleans()),
        "pre_layernorm": draw(st.booleans()),
        "num_register_tokens": 0 if grid else draw(st.integers(0, 4)),
        "num_labels": draw(st.integers(0, 5)),
        "problem_type": draw(st.sampled_from([None, "regression", "multi_label_classification"])),
    }
    if uniform:
        fields["num_sampled_frames"] = draw(st.none() | st.integers(1, frames))
    return fields


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=configs())
def test_any_valid_configuration_survives_json(fields):
    config = ViViTConfig(**fields)
    again = back_from_json(config)
    for name in (*ViViTConfig.__annotations__, "id2label", "label2id", "num_labels", "problem_type", "grid_size"):
        assert getattr(again, name) == getattr(config, name), name
    diff = ViViTConfig.from_dict(json.loads(config.to_json_string(use_diff=True)))
    assert diff.to_dict() == again.to_dict() == config.to_dict()
    for name in ("hidden_size", "num_frames", "num_channels", "num_labels"):
        assert getattr(again, name) == fields[name], name
    assert all(side >= 1 for side in config.grid_size)


# Overrides are one configuration with the rest


def test_overrides_are_validated_as_a_whole(tmp_path):
    tiny_config("spatio_temporal").save_pretrained(tmp_path)
    load = ViViTConfig.from_pretrained
    for loader in (load, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"larger than the clip .*\(1, 24, 40\) in time: 2 > 1"):
            loader(tmp_path, num_frames=1)
        # Each of the two alone would be an error.
        config = loader(tmp_path, hidden_size=30, num_attention_heads=5)
        assert (config.hidden_size, config.num_attention_heads) == (30, 5)
    # An explicit pooling stays; and so a stored class token has no place in a grid.
    with pytest.raises(ValueError, match="pooling='cls'"):
        load(tmp_path, attention_type="factorised_self_attention")
    assert load(tmp_path, attention_type="factorized_self_attention", pooling="gap").pooling == "mean"


def test_a_derived_class_validates_overrides_as_a_whole_too(tmp_path):
    class Derived(ViViTConfig):
        """As a user may write it, without `@strict`."""

    tiny_config("spatio_temporal").save_pretrained(tmp_path)
    assert Derived.from_pretrained(tmp_path, hidden_size=30, num_attention_heads=5).hidden_size == 30
    with pytest.raises(ValueError, match="`pooling='average'` is not known"):
        Derived(pooling="average")


def test_a_copied_or_pickled_configuration_is_equal_and_still_checks():
    config = tiny_config("spatio_temporal", id2label=STORED, label_groups={"a": 1, "b": 2}, dtype="bfloat16")
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again.to_diff_dict() == config.to_diff_dict()
        again.num_frames = 16
        assert again != config and config.num_frames == 8
        with pytest.raises(ValueError, match="`num_frames=0`"):
            again.num_frames = 0


def test_fields_of_transformers_are_value_errors_too(tmp_path):
    """Those that no ViViT has, such as rotary embeddings, in a file or an argument."""
    tiny_config("spatio_temporal").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "layer_types": ["no_such_type"]}))
    with pytest.raises(ValueError, match="layer_types") as caught:
        ViViTConfig.from_pretrained(tmp_path)
    assert type(caught.value) is ValueError


def test_attentions_can_be_asked_for_whatever_computes_them(tmp_path):
    config = tiny_config("spatio_temporal", output_attentions=True, attn_implementation="sdpa")
    ViViTModel(config).save_pretrained(tmp_path)
    assert ViViTModel.from_pretrained(tmp_path).config.output_attentions


def test_unused_keyword_arguments_are_given_back(tmp_path):
    tiny_config("spatio_temporal").save_pretrained(tmp_path)
    config, unused = ViViTConfig.from_pretrained(tmp_path, num_frames=4, foo=1, return_unused_kwargs=True)
    assert config.num_frames == 4 and unused == {"foo": 1}


def test_the_dictionary_of_the_caller_is_left_alone():
    config_dict = tiny_config("spatio_temporal", id2label={0: "a", 1: "b"}).to_dict()
    before = copy.deepcopy(config_dict)
    ViViTConfig.from_dict(config_dict, num_labels=3, num_frames=16)
    assert config_dict == before


# Labels

STORED = {0: "run", 1: "walk", 2: "sit"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, STORED),
        ({"num_labels": 3}, STORED),
        ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"num_labels": 4}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2", 3: "LABEL_3"}),
        ({"id2label": {0: "up", 1: "down"}}, {0: "up", 1: "down"}),
        ({"id2label": {"0": "up", "1": "down"}}, {0: "up", 1: "down"}),
        ({"label2id": {"up": 0, "down": 1}}, {0: "up", 1: "down"}),
        ({"id2label": {0: "up", 1: "down"}, "label2id": {"up": 0, "down": 1}, "num_labels": 2}, {0: "up", 1: "down"}),
    ],
)
def test_new_labels_replace_the_stored_ones_as_a_whole(tmp_path, overrides, expected):
    tiny_config("spatio_temporal", id2label=STORED).save_pretrained(tmp_path)
    for loader in (ViViTConfig.from_pretrained, AutoConfig.from_pretrained):
        config = loader(tmp_path, **overrides)
        assert config.id2label == expected
        assert config.label2id == {label: index for index, label in expected.items()}
        assert config.num_labels == len(expected)


def test_labels_that_contradict_each_other_are_an_error():
    stored = tiny_config("spatio_temporal", id2label=STORED).to_dict()
    for make in (functools.partial(ViViTConfig.from_dict, stored), ViViTConfig):
        with pytest.raises(ValueError, match="`num_labels=3` contradicts a label map of 2 labels"):
            make(num_labels=3, id2label={0: "up", 1: "down"})


@pytest.mark.parametrize("given_map", [{"id2label": STORED}, {"label2id": {"run": 0, "walk": 1, "sit": 2}}])
def test_a_new_configuration_gets_both_maps_from_one(given_map):
    config = ViViTConfig(**given_map)
    assert (config.num_labels, config.id2label) == (3, STORED)
    assert config.label2id == {"run": 0, "walk": 1, "sit": 2}


def test_labels_without_names_get_numbers():
    assert tiny_config("spatio_temporal", num_labels=2).label2id == {"LABEL_0": 0, "LABEL_1": 1}


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
