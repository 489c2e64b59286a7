"""ViViTConfig: JSON there and back, overrides as a whole, and labels."""

import copy
import functools
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_models import ATTENTION_TYPES, CASES, case_config, tiny_config
from transformers import AutoConfig

from vivit_hf import ViViTConfig, ViViTModel


STORED = {0: "run", 1: "walk", 2: "sit"}


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
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
