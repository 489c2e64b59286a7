"""
ViViT in PyTorch (Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, arXiv:2103.15691).

Shapes are written in the words batch, time, space, hidden: a clip of `num_frames` frames becomes a grid of
time x space tokens (space = height x width, in patches), ordered time, then height, then width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .auto_class import AutoClassMixin
from .configuration_vivit import ViViTConfig
from .embeddings_vivit import ViViTEmbeddings, ViViTTemporalEmbeddings, check_frame_size, prepend_class_token
from .fast_paths_vivit import is_watched
from .layers_vivit import (
    LAYERS,
    ViViTDotProductAttention,
    ViViTEncoder,
    ViViTFactorisedSelfAttentionLayer,
    ViViTLayer,
)
from .loading_vivit import CheckpointMixin
from .loss_vivit import infer_problem_type, video_classification_loss


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens.mean(dim=1),
    "max": lambda tokens: tokens.amax(dim=1),
    "sum": lambda tokens: tokens.sum(dim=1),
}


# What transformers passes to any model; `return_dict` is left in place by some of its wrappers.
_TRANSFORMERS_ARGUMENTS = frozenset({*TransformersKwargs.__annotations__, "return_dict"})


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """TypeError for arguments that no forward knows; None stands for one that was not given, as peft hands it over."""
    for name, value in kwargs.items():
        if value is not None and name not in _TRANSFORMERS_ARGUMENTS:
            raise TypeError(
                f"forward() got an unexpected argument {name!r}. A ViViT takes `pixel_values`, "
                "`interpolate_pos_encoding`, `labels` (with a classifier), and what transformers passes to every model."
            )


class ViViTPreTrainedModel(AutoClassMixin, CheckpointMixin, PreTrainedModel):
    """Loading, saving and initialisation that the ViViT models share."""

    config: ViViTConfig
    config_class = ViViTConfig
    base_model_prefix = "vivit"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "ViViTEmbeddings",
        "ViViTTemporalEmbeddings",
        "ViViTLayer",
        "ViViTFactorisedSelfAttentionLayer",
        "ViViTFactorisedDotProductAttentionLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        # The temporal embeddings are the input of Model 2's second encoder.
        "hidden_states": [ViViTLayer, ViViTFactorisedSelfAttentionLayer, ViViTTemporalEmbeddings],
        "attentions": ViViTDotProductAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ViViTEmbeddings, ViViTTemporalEmbeddings)):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)

    @torch.no_grad()
    def resize_position_embeddings(
        self,
        num_frames: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_sampled_frames: int | None = None,
    ) -> None:
        """
        Interpolates the position embeddings for clips of another length or size, and changes the configuration to it.

        Args:
            num_frames: frames in a clip from now on; unchanged if None.
            image_size: pixels of a frame, one number or (height, width); unchanged if None.
            num_sampled_frames: for uniform frame sampling, the frames to sample; unchanged if None.

        Raises:
            ValueError: if the configuration would not be valid with the new sizes, or the weights are offloaded.
        """
        sizes = {"num_frames": num_frames, "image_size": image_size, "num_sampled_frames": num_sampled_frames}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        new_config = ViViTConfig.from_dict(self.config.to_dict(), **sizes)
        model = self.base_model
        for embeddings in (model.embeddings, model.temporal_embeddings):
            if embeddings is not None:
                embeddings.resize(new_config.grid_size)
        for name in sizes:
            setattr(self.config, name, getattr(new_config, name))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.patch_embeddings


class ViViTModel(ViViTPreTrainedModel):
    """
    ViViT without a classifier, for features.

    | variant | `last_hidden_state` | `pooler_output` |
    | --- | --- | --- |
    | Model 1 | (batch, 1 + time * space, hidden), class token first; no 1 unless `pooling="cls"` | (batch, hidden) |
    | Model 2 | the temporal encoder's (batch, 1 + time, hidden), likewise | (batch, hidden) |
    | Model 2, `num_temporal_layers=0` | one pooled token per time step: (batch, time, hidden) | their mean |
    | Models 3, 4 | (batch, time * space, hidden) | (batch, hidden) |

    `last_hidden_state` is behind the final LayerNorm; `pooler_output` is its pooling, and with `representation_size`
    the dense layer and tanh behind that.

    `hidden_states` are the input of the first layer and the output of every layer, before the final LayerNorm: in
    Model 2 those of the spatial encoder, (batch * time, 1 + space, hidden), then those of the temporal one,
    (batch, 1 + time, hidden); in Models 3 and 4 (batch, time, space, hidden). Where transformers lets
    `output_hidden_states` be an index, count from the front: its negative ones do not know of the second encoder.

    `attentions` come in the order of computation. Model 1: (batch, heads, tokens, tokens) per layer. Model 2: the same
    with batch * time, then the temporal encoder's. Model 3: per layer (batch * space, heads, time, time) and
    (batch * time, heads, space, space) in the configured order. Model 4: per layer time, then space, each with half of
    the heads. Asking for them works with every attention implementation.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        config.check()
        self.embeddings = ViViTEmbeddings(config)
        self.encoder = ViViTEncoder(config, LAYERS[config.attention_type], config.num_hidden_layers)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_embeddings: Any = None
        self.temporal_encoder: Any = None
        self.temporal_layernorm: Any = None
        if config.attention_type == "factorised_encoder" and config.num_temporal_layers:
            self.temporal_embeddings = ViViTTemporalEmbeddings(config)
            make_layer = functools.partial(ViViTLayer, temporal=True)
            self.temporal_encoder = ViViTEncoder(config, make_layer, config.num_temporal_layers)
            self.temporal_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_logits = None
        if config.representation_size is not None:
            self.pre_logits = nn.Linear(config.hidden_size, config.representation_size)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), floats in [-1, 1] as `ViViTVideoProcessor` makes
                them; cast to the dtype of the weights.
            interpolate_pos_encoding: take clips of other lengths and sizes than the configured ones, with position
                embeddings interpolated for this call.
            pooled_only: spare what only `last_hidden_state` would need. Where a class token is pooled, it alone leaves
                the last layer, and `last_hidden_state` is (batch, 1, hidden); `pooler_output` is the same. Asking for
                hidden states or attentions, or a hook on what would be spared, overrules it.
            output_hidden_states, output_attentions, return_dict: as everywhere in transformers.

        Raises:
            ValueError: if the clip does not have the expected shape; the message prints both.
        """
        _check_arguments(kwargs)
        if pixel_values is None:
            raise ValueError("`pixel_values` is missing; expected (batch, frames, channels, height, width).")
        tokens, class_token = self.embeddings(pixel_values, interpolate_pos_encoding)
        output_attentions = bool(kwargs.get("output_attentions"))
        is_recorded = any(
            kwargs.get(name) or getattr(self.config, name) for name in ("output_attentions", "output_hidden_states")
        )
        encode = ENCODERS[self.config.attention_type]
        last_hidden_state, pooled = encode(self, tokens, class_token, output_attentions, is_recorded, pooled_only)
        if self.pre_logits is not None:
            pooled = self.pre_logits(pooled).tanh()
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, hidden)."""
        return POOLINGS[self.config.pooling](tokens)

    def encode(
        self,
        encoder: ViViTEncoder,
        layernorm: nn.Module,
        tokens: torch.Tensor,
        output_attentions: bool,
        every_token: bool,
    ) -> torch.Tensor:
        """An encoder and its LayerNorm; unless every token is wanted or watched, only the class token leaves them."""
        num_tokens = None
        if not every_token and self.config.pooling == "cls":
            num_tokens = None if is_watched((encoder, layernorm, *encoder.layer[-1].modules())) else 1
        return layernorm(encoder(tokens, output_attentions, num_tokens))

    def encode_spatio_temporal(
        self,
        tokens: torch.Tensor,
        class_token: torch.Tensor | None,
        output_attentions: bool = False,
        is_recorded: bool = False,
        pooled_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 1 (section 3.3.1): every token attends to every other."""
        tokens = tokens.flatten(1, 2)  # (batch, time, space, hidden) -> (batch, time * space, hidden)
        tokens = prepend_class_token(tokens, class_token)  # -> (batch, 1 + time * space, hidden)
        every_token = is_recorded or not pooled_only
        tokens = self.encode(self.encoder, self.layernorm, tokens, output_attentions, every_token)
        return tokens, self.pool(tokens)

    def encode_factorised_encoder(
        self,
        tokens: torch.Tensor,
        class_token: torch.Tensor | None,
        output_attentions: bool = False,
        is_recorded: bool = False,
        pooled_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 2 (section 3.3.2): an encoder over the space of each time step, then one over time."""
        tokens = self.encode_space(tokens, class_token, output_attentions, is_recorded)  # (batch, time, hidden)
        if self.temporal_encoder is None:
            return tokens, tokens.mean(dim=1)  # the average-pool baseline, whatever the pooling over space
        return self.encode_time(tokens, output_attentions, is_recorded or not pooled_only)

    def encode_space(
        self,
        tokens: torch.Tensor,
        class_token: torch.Tensor | None,
        output_attentions: bool = False,
        every_token: bool = False,
    ) -> torch.Tensor:
        """Model 2's spatial encoder: (batch, time, space, hidden) -> a pooled token per step, (batch, time, hidden)."""
        steps = tokens.shape[:2]
        tokens = tokens.flatten(0, 1)  # (batch, time, space, hidden) -> (batch * time, space, hidden)
        tokens = prepend_class_token(tokens, class_token)  # -> (batch * time, 1 + space, hidden)
        tokens = self.encode(self.encoder, self.layernorm, tokens, output_attentions, every_token)
        return self.pool(tokens).unflatten(0, steps)  # (batch * time, hidden) -> (batch, time, hidden)

    def encode_steps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Model 2: a clip of any whole number of tubelets, (batch, frames, channels, height, width), becomes a token per
        time step, (batch, time, hidden). No step sees another, so that they can be kept and put together again.

        Raises:
            ValueError: for frames that are not of the configured size, or fewer than a tubelet has.
        """
        check_frame_size(pixel_values, self.config)
        return self.encode_space(*self.embeddings(pixel_values, interpolate_pos_encoding=True))

    def encode_time(
        self, tokens: torch.Tensor, output_attentions: bool = False, every_token: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model 2's temporal encoder: (batch, time, hidden) -> (batch, 1 + time, hidden), pooled (batch, hidden)."""
        tokens = self.temporal_embeddings(tokens)  # -> (batch, 1 + time, hidden)
        tokens = self.encode(self.temporal_encoder, self.temporal_layernorm, tokens, output_attentions, every_token)
        return tokens, self.pool(tokens)

    def encode_token_grid(
        self,
        tokens: torch.Tensor,
        class_token: torch.Tensor | None,
        output_attentions: bool = False,
        is_recorded: bool = False,
        pooled_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Models 3 and 4 (sections 3.3.3 and 3.3.4): layers that see the grid, and so no class token."""
        tokens = self.layernorm(self.encoder(tokens, output_attentions))
        tokens = tokens.flatten(1, 2)  # (batch, time, space, hidden) -> (batch, time * space, hidden)
        return tokens, self.pool(tokens)


ENCODERS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "spatio_temporal": ViViTModel.encode_spatio_temporal,
    "factorised_encoder": ViViTModel.encode_factorised_encoder,
    "factorised_self_attention": ViViTModel.encode_token_grid,
    "factorised_dot_product_attention": ViViTModel.encode_token_grid,
}


class ViViTForVideoClassification(ViViTPreTrainedModel):
    """ViViT with a linear classifier on its pooled output; without labels (`num_labels=0`) it gives that output."""

    _auto_class = "AutoModelForVideoClassification"

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vivit = ViViTModel(config)
        features = config.representation_size or config.hidden_size
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), floats in [-1, 1].
            labels: classes (batch,) of int64 or, as mixup makes them, class probabilities (batch, num_labels) of
                floats under `problem_type="single_label_classification"`; 0 and 1 (batch, num_labels) of floats under
                `"multi_label_classification"`; values under `"regression"`. With `label_groups` one class per group
                (batch, groups), or class probabilities per group. See `video_classification_loss`.
            interpolate_pos_encoding: as in `ViViTModel`.
            num_items_in_batch: elements of the labels of all batches that make one optimiser step, as `Trainer` counts
                them, so that accumulated gradients are those of the whole batch.

        Returns:
            `loss` if there are labels, `logits` (batch, num_labels), `hidden_states` and `attentions` if asked for.
        """
        pooled_only = not is_watched((self.vivit,))  # a hook there wants the features that it would get without us
        outputs = self.vivit(pixel_values, interpolate_pos_encoding, pooled_only, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss, groups = None, self.config.label_groups
        if labels is not None:
            if self.config.problem_type is None:  # kept, as in transformers, so that pipelines know the activation
                self.config.problem_type = infer_problem_type(labels, self.config.num_labels, groups is not None)
            sizes = None if groups is None else tuple(groups.values())
            loss = video_classification_loss(logits, labels, self.config.problem_type, num_items_in_batch, sizes)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def classify_steps(self, tokens: torch.Tensor) -> torch.Tensor:
        """Model 2: logits (batch, num_labels) of the tokens (batch, time, hidden) that `vivit.encode_steps` gives."""
        vivit = self.vivit
        pooled = tokens.mean(dim=1) if vivit.temporal_encoder is None else vivit.encode_time(tokens, False, False)[1]
        if vivit.pre_logits is not None:
            pooled = vivit.pre_logits(pooled).tanh()
        return self.classifier(pooled)

    def split_logits(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits (..., num_labels) of each of the `label_groups` by its name, (..., size of the group)."""
        if self.config.label_groups is None:
            raise ValueError("This model has one group of labels: its logits are not to be split.")
        groups = self.config.label_groups
        return dict(zip(groups, logits.split(list(groups.values()), dim=-1), strict=True))


__all__ = ["ViViTForVideoClassification", "ViViTModel", "ViViTPreTrainedModel"]
