"""ViViTConfig: errors name the value, the expectation and the way out, whenever a value is set."""

import pytest
from tiny_models import tiny_config

from vivit_hf import ViViTConfig, ViViTModel


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
