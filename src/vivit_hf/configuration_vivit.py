"""Configuration of ViViT (Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, arXiv:2103.15691)."""

import difflib
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .calibration_vivit import check_calibration, check_calibration_of
from .frame_sampling import sample_frames_uniformly
from .limits_vivit import (
    ALIASES,
    MOST_PARAMETERS,
    TRANSFORMERS_VIVIT_FIELDS,
    check_choice,
    check_clip,
    check_count,
    check_grouped_labels,
    check_image_size,
    check_label_groups,
    check_labels,
    check_limit,
    check_merge_tokens,
    check_optimization,
    check_positive_number,
    check_probability,
    check_scale,
    check_tubelet_size,
    check_value,
    groups_in_order,
    setting,
    settle_labels,
    with_value_errors,
)
from .model_files import AutoClassMixin, named_json_errors
from .presets_vivit import PRESETS


ATTENTION_TYPES = (
    "spatio_temporal",
    "factorised_encoder",
    "factorised_self_attention",
    "factorised_dot_product_attention",
)
EMBEDDING_TYPES = ("tubelet", "uniform_frame_sampling")
ATTENTION_ORDERS = ("space_time", "time_space")
POOLINGS = ("cls", "mean", "max", "sum")
TEMPORAL_POOLINGS = (*POOLINGS, "concatenate", "attention")
DTYPES = ("float32", "float16", "bfloat16", "float64")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@with_value_errors
@strict
class ViViTConfig(AutoClassMixin, PretrainedConfig):
    r"""
    Configuration of a ViViT. The default is ViViT-B/16x2 on 32 frames of 224x224 with joint attention (Model 1).

    Args:
        image_size (`int` or `(int, int)`, defaults to 224): Height and width of a frame in pixels; one number for both.
        num_frames (`int`, defaults to 32): Frames in a clip.
        num_channels (`int`, defaults to 3): Colour channels of a frame.
        attention_type (`str`, defaults to `"spatio_temporal"`):
            `"spatio_temporal"` (Model 1, section 3.3), `"factorised_encoder"` (Model 2),
            `"factorised_self_attention"` (Model 3) or `"factorised_dot_product_attention"` (Model 4).
        attention_order (`str`, defaults to `"space_time"`):
            Model 3 only: the order of the two attentions in a layer, `"space_time"` as in the paper or `"time_space"`
            as in the official configurations.
        embedding_type (`str`, defaults to `"tubelet"`):
            `"tubelet"` (non-overlapping spatio-temporal patches) or `"uniform_frame_sampling"` (2D patches of
            `num_sampled_frames` frames), section 3.2.
        tubelet_size (`(int, int, int)`, defaults to `(2, 16, 16)`):
            Time, height and width of a patch. As in the official code, frames and pixels left over at the end of a
            side are dropped. Uniform frame sampling has a time of 1 and defaults to `(1, 16, 16)`.
        num_sampled_frames (`int`, *optional*, defaults to `num_frames // 2` with uniform frame sampling):
            Number of frames to sample. For some values of `num_frames` the official rounding takes one frame more;
            `grid_size` tells.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, layers, heads and MLP width. In Model 2 these describe the spatial encoder; the temporal encoder has
            the same width.
        num_temporal_layers (`int`, defaults to 4):
            Model 2 only: layers of the temporal encoder. 0 is the paper's average-pool baseline (Table 1).
        temporal_num_attention_heads, temporal_intermediate_size (`int`, *optional*):
            Model 2 only: heads and MLP width of the temporal encoder; by default those of the spatial encoder.
        pooling (`str`, *optional*):
            `"cls"` (class token), `"mean"`, `"max"` or `"sum"`. The default is `"cls"` for Models 1 and 2, and `"mean"`
            for Models 3 and 4, which have no class token.
        temporal_pooling (`str`, *optional*):
            Model 2 only: how the tokens of the time steps become one vector. The default is `pooling`, or `"mean"`
            without a temporal encoder. The temporal encoder has a class token only with `"cls"`; the spatial encoder
            follows `pooling`. In addition to the values of `pooling` there are `"concatenate"`,
            (batch, time * hidden), which keeps the order of the steps and fixes their number, and `"attention"`, a
            mean weighted by the similarity of each token to a learned query.
        representation_size (`int`, *optional*): Width of a dense layer with tanh between pooling and classifier.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`):
            The default is the tanh-approximated GELU of the official code in one operation. `gelu_fast` and `gelu_new`
            are the same function and are stored under this name.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout in [0, 1).
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth: the rate grows linearly from 0 in the first layer of an encoder to this value in its last.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of all LayerNorms.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value have biases.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.
        num_register_tokens (`int`, defaults to 0):
            Models 1 and 2: learned tokens after the class token. They take part in attention but are never pooled, as
            in DINOv2 with registers (Darcet et al., "Vision Transformers Need Registers", ICLR 2024).
        pre_layernorm (`bool`, defaults to `False`): Whether a LayerNorm precedes the first layer, as in CLIP.
        patch_bias (`bool`, defaults to `True`): Whether the patch embedding has a bias; CLIP's has none.
        merge_tokens (`int` or `list[int]`, *optional*):
            Models 1 and 2: how many tokens each layer of the (spatial) encoder merges into similar ones, in training as
            well: one number, or one per layer (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023). At most
            half of a layer's tokens are merged. For a model that was trained without merging, see
            `vivit_hf.inference.optimize`.
        optimization (`dict`, *optional*): The setting of `vivit-hf tune`, see `vivit_hf.inference.optimize`.
        label_groups (`dict`, *optional*):
            Names and sizes of several classifications that share one output, in the order of the output, such as
            `{"noun": 300, "verb": 97}` for EPIC-Kitchens. `num_labels` is the sum of the sizes; the loss is the mean of
            the groups' losses.
        calibration (`dict`, *optional*): What `vivit-hf evaluate --calibrate` stores, see `Calibration`. Logits stay
            plain.
        mask_ratio (`float`, defaults to 0.9): `ViViTForPreTraining` only: share of the places to mask.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads (`int`, *optional*):
            `ViViTForPreTraining` only: width, layers and heads of its decoder. By default it has half of the encoder's
            heads, each of the same size, and a quarter of its layers.

    Raises:
        ValueError: for values and combinations that no model can have. Values are checked whenever a field is set,
            combinations when the configuration is built or saved and before a model is built from it.

    Source: the paper, and google-research/scenic `projects/vivit/model.py` and `configs/`.
    """

    model_type = "vivit_hf"
    _auto_class = "AutoConfig"
    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    if TYPE_CHECKING:  # None is replaced when a configuration is made
        id2label: Any
        label2id: Any
        tubelet_size: Any
        num_sampled_frames: Any
        pooling: Any

    image_size: int | list[int] | tuple[int, ...] = setting(224, check_image_size)
    num_frames: int = setting(32, check_count)
    num_channels: int = setting(3, check_count)
    attention_type: str = setting(
        "spatio_temporal", check_choice, choices=ATTENTION_TYPES, aliases=ALIASES["attention_type"]
    )
    attention_order: str = setting("space_time", check_choice, choices=ATTENTION_ORDERS)
    embedding_type: str = setting("tubelet", check_choice, choices=EMBEDDING_TYPES, aliases=ALIASES["embedding_type"])
    tubelet_size: list[int] | tuple[int, ...] | None = setting(None, check_tubelet_size)  # type: ignore[no-redef]
    num_sampled_frames: int | None = setting(None, check_count)  # type: ignore[no-redef]
    hidden_size: int = setting(768, check_count)
    num_hidden_layers: int = setting(12, check_count)
    num_attention_heads: int = setting(12, check_count)
    intermediate_size: int = setting(3072, check_count)
    num_temporal_layers: int = setting(4, check_count, least=0)
    temporal_num_attention_heads: int | None = setting(None, check_count)
    temporal_intermediate_size: int | None = setting(None, check_count)
    pooling: str | None = setting(None, check_choice, choices=POOLINGS, aliases=ALIASES["pooling"])  # type: ignore[no-redef]
    temporal_pooling: str | None = setting(
        None, check_choice, choices=TEMPORAL_POOLINGS, aliases=ALIASES["temporal_pooling"]
    )
    representation_size: int | None = setting(None, check_count)
    hidden_act: str = setting("gelu_pytorch_tanh", check_choice, choices=ACT2FN, aliases=ALIASES["hidden_act"])
    hidden_dropout_prob: float | int = setting(0.0, check_probability)
    attention_probs_dropout_prob: float | int = setting(0.0, check_probability)
    drop_path_rate: float | int = setting(0.0, check_probability)
    layer_norm_eps: float | int = setting(1e-6, check_scale)
    qkv_bias: bool = True
    initializer_range: float | int = setting(0.02, check_scale)
    num_register_tokens: int = setting(0, check_count, least=0)
    pre_layernorm: bool = False
    patch_bias: bool = True
    merge_tokens: int | list[int] | tuple[int, ...] | None = setting(None, check_merge_tokens)
    optimization: dict[str, Any] | None = setting(None, check_optimization)
    label_groups: dict[str, int] | None = setting(None, check_label_groups)
    calibration: dict[str, Any] | None = setting(None, check_calibration)
    problem_type: str | None = setting(None, check_choice, choices=PROBLEM_TYPES)
    mask_ratio: float | int = setting(0.9, check_positive_number, most=0.999)
    decoder_hidden_size: int | None = setting(None, check_count)
    decoder_num_hidden_layers: int | None = setting(None, check_count)
    decoder_num_attention_heads: int | None = setting(None, check_count)

    def __post_init__(self, **kwargs: Any) -> None:
        self._fill_in_defaults()
        if self.id2label is None and self.label2id is not None:
            if not isinstance(self.label2id, dict):
                raise ValueError(f"`label2id` must map names to numbers, got {type(self.label2id).__name__}.")
            self.id2label = {str(index): label for label, index in self.label2id.items()}
        if self.id2label is not None:
            self.id2label = check_labels(self.id2label)
            num_labels = kwargs.pop("num_labels", None)
            if num_labels not in (None, len(self.id2label)):
                raise ValueError(
                    f"`num_labels={num_labels}` contradicts a label map of {len(self.id2label)} labels; give one."
                )
            self.label2id = {label: index for index, label in self.id2label.items()}
            if self.label_groups is not None:
                self.label_groups = groups_in_order(self.label_groups, self.id2label)
        elif self.label_groups is not None:
            kwargs.setdefault("num_labels", sum(self.label_groups.values()))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check and set an attribute; aliases become the paper's words, tuples the lists that a JSON file gives."""
        if name == "num_labels":
            check_count(name, value, least=0)
        elif name in self.__dataclass_fields__ and (check := self.__dataclass_fields__[name].metadata.get("check")):
            value = check(name, value)
        super().__setattr__(name, value)

    def _fill_in_defaults(self) -> None:
        """Set the fields whose default depends on other fields."""
        is_uniform = self.embedding_type == "uniform_frame_sampling"
        if self.tubelet_size is None:
            self.tubelet_size = [1, 16, 16] if is_uniform else [2, 16, 16]
        if self.num_sampled_frames is None and is_uniform:
            self.num_sampled_frames = max(1, self.num_frames // 2)
        if self.pooling is None:
            self.pooling = "mean" if self.is_token_grid else "cls"

    # Derived sizes

    @property
    def is_token_grid(self) -> bool:
        """Whether layers see tokens as (batch, time, space, hidden): Models 3 and 4."""
        return self.attention_type in ("factorised_self_attention", "factorised_dot_product_attention")

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """(time, height, width) of the token grid of one clip."""
        return self.grid_size_of(self.num_frames, *self.frame_size)

    def grid_size_of(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(time, height, width) of the token grid of a clip of `num_frames` frames of `height` x `width` pixels."""
        patch_time, patch_height, patch_width = self.tubelet_size
        if self.embedding_type == "uniform_frame_sampling":
            time = len(sample_frames_uniformly(num_frames, self.num_sampled_frames))
        else:
            time = num_frames // patch_time
        return time, height // patch_height, width // patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before those of the grid: class token and registers."""
        return int(self.pooling == "cls") + self.num_register_tokens

    @property
    def merging_schedule(self) -> list[int]:
        """Number of tokens to merge in each layer of the (spatial) encoder."""
        if isinstance(self.merge_tokens, (list, tuple)):
            return [*self.merge_tokens]
        return [self.merge_tokens or 0] * self.num_hidden_layers

    @property
    def decoder_sizes(self) -> tuple[int, int, int]:
        """(width, layers, heads) of the decoder of `ViViTForPreTraining`."""
        half = (self.num_attention_heads + 1) // 2
        width = self.decoder_hidden_size or half * (self.hidden_size // self.num_attention_heads)
        layers = self.decoder_num_hidden_layers or max(1, self.num_hidden_layers // 4)
        return width, layers, self.decoder_num_attention_heads or half

    @property
    def pooling_over_time(self) -> str:
        """Pooling of Model 2 over time: `temporal_pooling`, or its default."""
        if self.temporal_pooling is not None:
            return self.temporal_pooling
        return self.pooling if self.num_temporal_layers else "mean"

    @property
    def pooled_size(self) -> int:
        """Width of the pooled tokens: `hidden_size`, or time * `hidden_size` with `temporal_pooling="concatenate"`."""
        return self.hidden_size * (self.grid_size[0] if self.temporal_pooling == "concatenate" else 1)

    # Validation

    def check(self) -> None:
        """Check every field and their combinations, as a model does before it is built; ValueError if one is wrong."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name))
        self.validate()

    def validate_combinations(self) -> None:
        """Part of `@strict`: raise ValueError for a combination of values that no model can have."""
        self._fill_in_defaults()
        self._check_sizes()
        if self.label_groups is not None:
            check_grouped_labels(self.label_groups, self.id2label, self.problem_type)
        check_calibration_of(self)
        check_limit("parameters", self._num_parameters(), MOST_PARAMETERS)
        self._check_heads()
        if self.is_token_grid and self.pooling == "cls":
            raise ValueError(
                f"`pooling='cls'` needs a class token, which `attention_type='{self.attention_type}'` does not have; "
                "use `pooling='mean'` (the official one), 'max' or 'sum'."
            )
        self._check_temporal_pooling()
        for name, unset in (("num_register_tokens", 0), ("merge_tokens", None)):
            if self.is_token_grid and getattr(self, name) != unset:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` does not go with `attention_type={self.attention_type!r}`, whose "
                    f"layers take the whole grid of tokens and no others; use {unset}, or Model 1 or 2."
                )
        if len(self.merging_schedule) != self.num_hidden_layers:
            raise ValueError(
                f"`merge_tokens={self.merge_tokens}` has {len(self.merging_schedule)} numbers, but there are "
                f"`num_hidden_layers={self.num_hidden_layers}`; give one number per layer, or one for all."
            )

    def validate_output_attentions(self) -> None:
        """Part of `@strict`: allow `output_attentions`, which our layers support with every implementation."""

    def _check_sizes(self) -> None:
        check_clip("`num_frames` and `image_size`", self.num_frames, *self.frame_size, self.num_channels)
        if self.embedding_type == "uniform_frame_sampling":
            if self.tubelet_size[0] != 1:
                raise ValueError(
                    f"`tubelet_size={tuple(self.tubelet_size)}` spans {self.tubelet_size[0]} frames, but uniform frame "
                    "sampling has 2D patches; use (1, height, width), or `embedding_type='tubelet'`."
                )
            if self.num_sampled_frames > self.num_frames:
                raise ValueError(
                    f"`num_sampled_frames={self.num_sampled_frames}` is more than the clip's "
                    f"`num_frames={self.num_frames}`; sample at most {self.num_frames} or take longer clips."
                )
        elif self.num_sampled_frames is not None:
            raise ValueError(
                f"`num_sampled_frames={self.num_sampled_frames}` has no meaning with `embedding_type='tubelet'`; "
                "leave it out, or use `embedding_type='uniform_frame_sampling'`."
            )
        clip = (self.num_frames, *self.frame_size)
        for axis, patch, side in zip(("time", "height", "width"), self.tubelet_size, clip, strict=True):
            if patch > side:
                raise ValueError(
                    f"`tubelet_size={tuple(self.tubelet_size)}` is larger than the clip (frames, height, width) = "
                    f"{clip} in {axis}: {patch} > {side}. Use a smaller tubelet or a larger clip."
                )

    def _check_heads(self) -> None:
        decoder_width, _, decoder_heads = self.decoder_sizes
        for prefix, width, heads in (
            ("", self.hidden_size, self.num_attention_heads),
            ("temporal_", self.hidden_size, self.temporal_num_attention_heads),
            ("decoder_", decoder_width, decoder_heads),
        ):
            if heads is not None and width % heads:
                divisors = [n for n in range(1, 2 * heads + 1) if width % n == 0]
                nearest = min(divisors, key=lambda n: abs(n - heads))
                of = "decoder_" if prefix == "decoder_" else ""
                raise ValueError(
                    f"`{of}hidden_size={width}` does not divide into `{prefix}num_attention_heads={heads}` heads; "
                    f"use for example `{prefix}num_attention_heads={nearest}`."
                )
        if self.attention_type == "factorised_dot_product_attention" and self.num_attention_heads % 2:
            raise ValueError(
                f"`num_attention_heads={self.num_attention_heads}` is odd, but factorised dot-product attention "
                "(Model 4) gives half of the heads to time and half to space; use an even number."
            )

    def _check_temporal_pooling(self) -> None:
        if self.temporal_pooling is None:
            return
        if self.attention_type != "factorised_encoder":
            raise ValueError(
                f"`temporal_pooling={self.temporal_pooling!r}` has no meaning with `attention_type="
                f"{self.attention_type!r}`, which pools all tokens at once; leave it out and use `pooling`, or use "
                "`attention_type='factorised_encoder'`."
            )
        if self.temporal_pooling == "cls" and not self.num_temporal_layers:
            raise ValueError(
                "`temporal_pooling='cls'` needs a temporal encoder, whose class token it pools, but "
                "`num_temporal_layers=0`; use 'mean' or another pooling, or add temporal layers."
            )

    def _num_parameters(self) -> int:
        """Return the number of parameters with classifier and decoder, biases and LayerNorms aside."""
        hidden, inner = self.hidden_size, self.intermediate_size
        time, height, width = self.grid_size
        attentions = 2 if self.attention_type == "factorised_self_attention" else 1
        layers = self.num_hidden_layers * hidden * (4 * attentions * hidden + 2 * inner)
        decoder, decoder_layers, _ = self.decoder_sizes
        layers += decoder_layers * decoder * (4 * decoder + 2 * inner * decoder // hidden)
        if self.attention_type == "factorised_encoder":
            inner = self.temporal_intermediate_size or inner
            layers += self.num_temporal_layers * hidden * (4 * hidden + 2 * inner)
        tokens = time * height * width + self.num_register_tokens
        embeddings = hidden * (math.prod(self.tubelet_size) * self.num_channels + tokens)
        features = self.representation_size or 0
        return layers + embeddings + self.pooled_size * features + (features or self.pooled_size) * self.num_labels

    # Loading and presets

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ViViTConfig":
        """
        Return the configuration called `name` (see `ViViTConfig.presets`), with any field overridden.

        `vivit-b-16x2` and `vivit-l-16x2` are the paper's sizes with joint attention; the suffixes `-fe`, `-fsa`,
        `-fdpa` and `-fe-average-pool` are the other variants. The large factorised encoder has 24 temporal layers, as
        trained on Kinetics; `vivit-l-16x2-fe-ssv2` and `vivit-l-16x2-fe-epic-kitchens` have 4, as on these data sets.
        `vivit-tiny` (factorised encoder, 16 frames of 64x64) is for trying things out.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"No preset is called {name!r}; did you mean {nearest!r}? There are: {', '.join(PRESETS)}."
            )
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        with named_json_errors(pretrained_model_name_or_path, "config.json"):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:  # transformers would use the defaults
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or an empty one.")
        return cls.translate(config_dict, pretrained_model_name_or_path), kwargs

    @classmethod
    def translate(cls, config_dict: dict[str, Any], source: Any = "This configuration") -> dict[str, Any]:
        """
        Return our fields for the contents of a `config.json`. The configuration of a transformers Vivit becomes that of
        Model 1 with a class token.

        Raises:
            ValueError: for another kind of model, and for values that transformers could not handle.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"{source} has a {type(config_dict).__name__} as its configuration, expected a JSON object."
            )
        for name in config_dict:
            if name.startswith("__") or callable(getattr(cls, name, None)):
                raise ValueError(f"`{name}` in {source} is the name of a method or of a class attribute, not a field.")
        for name in ("dtype", "torch_dtype"):
            if config_dict.get(name) is not None:
                check_choice(name, str(config_dict[name]).removeprefix("torch."), DTYPES)
        for name in ("id2label", "label2id"):
            if isinstance(config_dict.get(name), (dict, list)):
                check_limit("num_labels", len(config_dict[name]))
        for name, kinds, expected in (
            ("quantization_config", (str, int, float, list), "a JSON object"),
            ("transformers_weights", (int, float, list, dict), "the name of a file"),
        ):
            check_value(name, config_dict.get(name), not isinstance(config_dict.get(name), kinds), expected)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "vivit":
            known = {name: config_dict[name] for name in TRANSFORMERS_VIVIT_FIELDS if name in config_dict}
            known.setdefault("hidden_act", "gelu_fast")
            return {**known, "attention_type": "spatio_temporal", "pooling": "cls"}
        if model_type != cls.model_type:
            raise ValueError(
                f"{source} holds a model of type {model_type!r}, not a ViViT ({cls.model_type!r}, or transformers' "
                "'vivit'). Convert an image model first with `vivit-hf convert vit`."
            )
        # The user chooses the attention implementation, not the author of a file.
        return {name: value for name, value in config_dict.items() if not name.endswith("attn_implementation")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but validate overrides together with the other fields instead of setting them later."""
        config_dict = dict(cls.translate(config_dict))
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in CONFIG_FIELDS}
        settle_labels(config_dict, overrides)
        try:
            return super().from_dict({**config_dict, **overrides}, **kwargs)
        except (AttributeError, KeyError, TypeError) as error:  # from what transformers does with fields we do not have
            raise ValueError(f"The configuration has a value that cannot be set: {error}.") from error


CONFIG_FIELDS = frozenset({*ViViTConfig.__annotations__, "id2label", "label2id", "num_labels"})
