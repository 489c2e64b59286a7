"""
The values that the configuration and the processor accept, their aliases, and the largest sizes.

A `config.json` or `preprocessor_config.json` may come from a stranger, so sizes are compared with these limits before
memory or time is spent on them. They are far above those of any model in the literature.
"""

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, TypeVar

import numpy as np
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError


_Class = TypeVar("_Class", bound=type)

LIMITS: dict[str, int] = {
    "num_frames": 65_536,
    "num_sampled_frames": 65_536,
    "image_size": 16_384,  # pixels, of each side
    "size": 16_384,
    "crop_size": 16_384,
    "num_channels": 1_024,
    "num_register_tokens": 1_024,
    "hidden_size": 65_536,
    "num_hidden_layers": 1_000,
    "num_temporal_layers": 1_000,
    "num_attention_heads": 4_096,
    "temporal_num_attention_heads": 4_096,
    "intermediate_size": 1_048_576,
    "temporal_intermediate_size": 1_048_576,
    "decoder_hidden_size": 65_536,
    "decoder_num_hidden_layers": 1_000,
    "decoder_num_attention_heads": 4_096,
    "representation_size": 1_048_576,
    "num_labels": 262_144,
    "label_groups": 1_024,  # groups
    "frame_stride": 1_000_000,
    "num_clips": 1_000,
    "num_threads": 256,
}
# The largest vision transformer that has been described has 22 billion parameters.
MOST_PARAMETERS = 30_000_000_000
# Parameters that a checkpoint does not hold, so that loading creates them: a classifier, position embeddings.
MOST_NEW_PARAMETERS = 150_000_000
# frames x height x width x channels of one clip: 4 GiB in float32, for example 7,133 RGB frames of 224 x 224 pixels.
MOST_CLIP_VALUES = 1 << 30
MOST_LABEL_CHARACTERS = 4_096
# `frames_per_second`: from a frame in eleven days to a high-speed camera.
RATES = (1e-6, 1_000.0)
# Scales, such as `initializer_range`, `layer_norm_eps` and `rescale_factor`.
LARGEST_SCALE = 1e6
LARGEST_FLOAT = sys.float_info.max


_POOLING_ALIASES = {"token": "cls", "gap": "mean", "gmp": "max", "gsp": "sum"}
# US spellings and the names of google-research/scenic projects/vivit are accepted, and stored in the paper's form.
ALIASES = {
    "attention_type": {
        "spacetime": "spatio_temporal",
        "spatiotemporal": "spatio_temporal",
        "factorized_encoder": "factorised_encoder",
        "factorized_self_attention": "factorised_self_attention",
        "factorized_self_attention_block": "factorised_self_attention",
        "factorized_dot_product_attention": "factorised_dot_product_attention",
    },
    "embedding_type": {"3d_conv": "tubelet", "temporal_sampling": "uniform_frame_sampling"},
    "pooling": _POOLING_ALIASES,
    "temporal_pooling": _POOLING_ALIASES,
    # Both compute the tanh approximation in separate operations; the fused one is the same function.
    "hidden_act": {"gelu_fast": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"},
}
# Fields with the same name and meaning in transformers' own `VivitConfig`.
TRANSFORMERS_VIVIT_FIELDS = (
    "image_size num_frames tubelet_size num_channels hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size hidden_act hidden_dropout_prob attention_probs_dropout_prob initializer_range layer_norm_eps "
    "qkv_bias id2label label2id problem_type dtype torch_dtype output_hidden_states output_attentions return_dict"
).split()


def check_value(name: str, value: Any, is_good: bool, expected: str) -> None:
    """Raise ValueError unless the value is good."""
    if not is_good:
        raise ValueError(f"`{name}={value!r}` must be {expected}.")


def is_number(value: Any, *kinds: type) -> bool:
    """Return whether `value` is a number, or of one of these kinds, and not a bool."""
    return isinstance(value, kinds or (int, float, np.number)) and not isinstance(value, bool)


def check_positive_integer(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer of at least `least`."""
    is_good = is_number(value, int, np.integer) and value >= least
    check_value(name, value, is_good, f"a whole number of at least {least}")
    return int(value)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer from `least` to `LIMITS[name]`."""
    check_limit(name, check_positive_integer(name, value, least))
    return int(value)


def check_positive_number(name: str, value: Any, least: float = 0.0, most: float = LARGEST_FLOAT) -> float:
    """Return `value` as a float; raise ValueError unless it is a finite number above 0, from `least` to `most`."""
    is_good = is_number(value) and 0 < value <= most and value >= least
    lower = f"of at least {least:g}" if least else "above 0"
    check_value(name, value, is_good, f"a number {lower}" + (f" and at most {most:g}" if most < LARGEST_FLOAT else ""))
    return float(value)


check_scale = functools.partial(check_positive_number, most=LARGEST_SCALE)


def check_probability(name: str, value: Any) -> float:
    """Return `value` as a float; raise ValueError unless it is at least 0 and below 1."""
    is_good = is_number(value) and 0 <= value < 1
    check_value(name, value, is_good, "a probability of at least 0 and below 1")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Return `value` as a bool; raise ValueError unless it is True or False."""
    check_value(name, value, isinstance(value, (bool, np.bool_)), "True or False")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """Return `value`, or what it is an alias of; raise ValueError unless that is one of `choices`."""
    choices, aliases = tuple(choices), aliases or {}
    known = [*choices, *aliases]
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        expected = f" Expected one of {', '.join(map(repr, choices))}." if len(choices) < 10 else ""
        raise ValueError(f"`{name}={value!r}` is not known.{hint}{expected}")
    return aliases.get(value, value)


def check_limit(name: str, value: int, limit: int | None = None) -> None:
    """Raise ValueError if a size is above its limit, by default `LIMITS[name]`."""
    most = LIMITS[name] if limit is None else limit
    if value > most:
        raise ValueError(f"`{name}={value:,}` is too large; the limit is {most:,} (see SECURITY.md).")


def check_clip(name: str, num_frames: int, height: int, width: int, channels: int = 3) -> None:
    """Raise ValueError if a clip has more than `MOST_CLIP_VALUES` values; `name` lists the fields that set its size."""
    values = num_frames * height * width * channels
    if values > MOST_CLIP_VALUES:
        raise ValueError(
            f"{name} give a clip of {num_frames} frames of {height} x {width} pixels in {channels} channels, "
            f"{values:,} values; the limit is {MOST_CLIP_VALUES:,} (see SECURITY.md)."
        )


def check_labels(id2label: Any) -> dict[int, str]:
    """Return `id2label` (a mapping or a list) with integer keys; ValueError unless it names the outputs from 0 on."""
    if isinstance(id2label, (list, tuple)):
        id2label = dict(enumerate(id2label))
    if not isinstance(id2label, dict):
        raise ValueError(f"`id2label` must map numbers to names, got {type(id2label).__name__}.")
    check_limit("num_labels", len(id2label))
    labels: dict[int, str] = {}
    for index, label in id2label.items():
        if isinstance(index, bool) or not str(index).isdecimal() or len(str(index)) > 9:
            raise ValueError(f"`id2label` must map numbers to names, got the number {str(index)[:40]!r}.")
        if not isinstance(label, str) or len(label) > MOST_LABEL_CHARACTERS:
            got = f"one of {len(label):,} characters" if isinstance(label, str) else repr(label)[:40]
            raise ValueError(
                f"`id2label[{index}]` must be a name of at most {MOST_LABEL_CHARACTERS:,} characters, got {got}."
            )
        labels[int(index)] = label
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(
            f"`id2label` must name the outputs from 0 to {len(labels) - 1}, got numbers {list(id2label)[:8]}."
        )
    return labels


def check_image_size(name: str, value: Any) -> Any:
    """Return one side, or [height, width]; raise ValueError unless each side is from 1 to the limit."""
    sides = [value, value] if isinstance(value, int) else [*value]
    is_good = len(sides) == 2 and min(sides) >= 1
    check_value(name, value, is_good, "one number of at least 1, or two: (height, width)")
    check_limit(name, max(sides))
    return value if isinstance(value, int) else sides


def check_tubelet_size(name: str, value: Any) -> list[int]:
    """Return [time, height, width]; raise ValueError unless these are three numbers of at least 1."""
    is_good = len(value) == 3 and min(value) >= 1
    check_value(name, value, is_good, "three numbers of at least 1: (time, height, width)")
    return [*value]


def check_merge_tokens(name: str, value: Any) -> int | list[int]:
    """Return `value`; raise ValueError unless it is a whole number of at least 0, or a list of these."""
    if isinstance(value, (list, tuple)):
        return [check_positive_integer(name, one, least=0) for one in value]
    return check_positive_integer(name, value, least=0)


def check_optimization(name: str, value: Any) -> dict[str, Any]:
    """Return `value`; raise ValueError unless it has the form that `vivit-hf tune` writes."""
    names = ("name", "weights", "device", "dtype", "merge_tokens", "int8_inputs", "measured")
    is_good = isinstance(value, dict) and sorted(map(str, value)) == sorted(names)
    check_value(name, value, is_good, f"what `vivit-hf tune` writes, with the fields {', '.join(names)}")
    for key in ("name", "weights", "device"):  # they are printed, and written on model cards
        is_word = isinstance(value[key], str) and re.fullmatch(r"[\w-]{1,100}", value[key], re.ASCII)
        check_value(f"{name}.{key}", value[key], bool(is_word), "up to 100 letters, digits, '-' and '_'")
    check_choice(f"{name}.dtype", value["dtype"], ("float32", "bfloat16"))
    if value["merge_tokens"] is not None:
        check_merge_tokens(f"{name}.merge_tokens", value["merge_tokens"])
    inputs, measured = value["int8_inputs"], value["measured"]
    check_value(f"{name}.int8_inputs", inputs, inputs is None or isinstance(inputs, dict), "scales by layer")
    for layer, scale in (inputs or {}).items():
        is_pair = isinstance(scale, (list, tuple)) and len(scale) == 2
        is_pair = is_pair and is_number(scale[0]) and is_number(scale[1], int)
        is_good = is_pair and 0 < scale[0] <= LARGEST_SCALE and 0 <= scale[1] < 256
        expected = "[scale, zero point from 0 to 255], or null for scales per token"
        check_value(f"{name}.int8_inputs.{layer}", scale, scale is None or is_good, expected)
    is_good = isinstance(measured, dict) and all(
        is_number(one) and abs(one) <= LARGEST_FLOAT for one in measured.values()
    )
    check_value(f"{name}.measured", measured, is_good, "numbers by name")
    return value


def check_label_groups(name: str, value: Any) -> dict[str, int]:
    """Return `value`; raise ValueError unless these are the sizes of at least two groups of labels."""
    is_good = len(value) >= 2 and min(value.values()) >= 1
    check_value(name, value, is_good, "the sizes of at least two groups by name, such as {'noun': 300, 'verb': 97}")
    check_limit(name, len(value))
    return value


def groups_in_order(groups: dict[str, int], id2label: dict[int, str]) -> dict[str, int]:
    """Sort groups by their labels if these are named "group: label": config.json has groups in alphabetical order."""
    first = {group: min([i for i in id2label if id2label[i].startswith(f"{group}: ")], default=-1) for group in groups}
    return groups if -1 in first.values() else {group: groups[group] for group in sorted(groups, key=first.__getitem__)}


def check_grouped_labels(groups: dict[str, int], id2label: dict[int, str], problem_type: str | None) -> None:
    """Raise ValueError unless the groups fit the labels and the kind of problem, and keep their order when saved."""
    total = sum(groups.values())
    if len(id2label) != total:
        raise ValueError(
            f"`label_groups={groups}` are {total} labels, but there are {len(id2label)} (`num_labels`, or the label "
            "map). Change one of the two."
        )
    loaded = groups_in_order(dict(sorted(groups.items())), id2label)
    if [*loaded] != [*groups]:
        raise ValueError(
            f"`label_groups={groups}` would be loaded in the order {[*loaded]}, as config.json sorts by name. Name the "
            "labels 'group: label' in `id2label`, or give groups and outputs in alphabetical order."
        )
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"`problem_type={problem_type!r}` does not go with `label_groups`: each group is a single-label "
            "classification. Leave `problem_type` out."
        )


def settle_labels(config_dict: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Drop all stored labels if there are new ones, since a mix would mislabel classes; and what was fitted on them."""
    stored = config_dict.get("id2label")
    new_maps = overrides.get("id2label") is not None or overrides.get("label2id") is not None
    new_count = isinstance(stored, (dict, list)) and overrides.get("num_labels") not in (None, len(stored))
    groups = overrides.get("label_groups")
    new_groups = groups is not None and groups != config_dict.get("label_groups")
    if new_maps or new_count or new_groups:
        for name in ("id2label", "label2id", "label_groups"):
            config_dict.pop(name, None)
    new_problem = overrides.get("problem_type") not in (None, config_dict.get("problem_type"))
    if new_maps or new_count or new_groups or new_problem:
        config_dict.pop("calibration", None)


# Fields of dataclasses that check their values


def setting(default: Any, check: Callable[..., Any], **options: Any) -> Any:
    """
    Return a dataclass field; `check(name, value, **options)` returns the value to store, or raises a ValueError.

    None passes without a check where it is the default.
    """

    def checked(name: str, value: Any) -> Any:
        return None if value is None and default is None else check(name, value, **options)

    return field(default=default, metadata={"check": checked})


def with_value_errors(cls: _Class) -> _Class:
    """Make a `@strict` class raise ValueErrors that name field and value, in place of the errors of `@strict`."""

    def converted(method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any) -> None:
            try:
                method(self, *args)
            except StrictDataclassClassValidationError as error:
                raise ValueError(str(error.__cause__)) from None
            except StrictDataclassFieldValidationError as error:
                name, value = args
                expected = inspect.formatannotation(self.__dataclass_fields__[name].type)
                reason = f"must be of type {expected}." if isinstance(error.__cause__, TypeError) else error.__cause__
                raise ValueError(f"`{name}={value!r}` {reason}") from None

        return wrapper

    for name in ("__setattr__", "validate"):
        setattr(cls, name, converted(getattr(cls, name)))
    return cls
