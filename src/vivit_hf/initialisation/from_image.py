"""
Initialise a ViViT from an image ViT (section 3.4 of the paper): tubelet kernels, position embeddings, temporal weights,
and a report that accounts for every parameter of the ViViT and every weight of the ViT.

Official counterpart: google-research/scenic `projects/vivit/model_utils.py`, `initialise_from_train_state`.
"""

import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..configuration_vivit import ViViTConfig
from ..limits_vivit import check_choice
from ..loading_vivit import TRANSFORMERS_VIVIT_NAMES
from ..modeling_vivit import ViViTMLP, ViViTModel, ViViTPreTrainedModel
from .inflation import TUBELET_INITS, fold_layer_scales, image_to_video_position_embeddings


TEMPORAL_ATTENTION_INITS = ("zero_output", "zero", "copy", "random")
TEMPORAL_ENCODER_INITS = ("random", "zero_output", "copy_last")
POSITION_INITS = {"tile": "bicubic", "tile_linear": "align_corners_linear"}

# Settings that decide what the weights compute, but do not show in their shapes.
_SHARED_SETTINGS = ("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")

# Names of the norms in layers with LayerScale.
_LAYER_SCALE_NORMS = {r"\.norm1\.": ".layernorm_before.", r"\.norm2\.": ".layernorm_after."}
_LAYER_SCALES = {r"(.*)\.layer_scale1\.lambda1": r"\1.attention.o_proj", r"(.*)\.layer_scale2\.lambda1": r"\1.mlp.fc2"}

_UNUSED_VIT_KEYS = {
    r"pooler\.dense\.(weight|bias)": "pooler",
    r"classifier\.(weight|bias)": "classification head",
    r"embeddings\.mask_token": "mask token",
    r"decoder\.\d+\.(weight|bias)": "decoder of masked image modelling",
}


# Settings


def config_from_vit(vit_config: PretrainedConfig, **overrides: Any) -> ViViTConfig:
    """
    Return the configuration of a ViViT with the ViT's sizes, activation, LayerNorm epsilon, biases and dropout.

    Args:
        vit_config: the configuration of a plain ViT or DeiT.
        overrides: fields of `ViViTConfig`, such as `attention_type` and `num_frames`.

    Raises:
        ValueError: if `vit_config` is the configuration of another kind of model.
    """
    _check_is_vit(vit_config)
    patch_height, patch_width = _pair(vit_config.patch_size)
    time = 1 if overrides.get("embedding_type") in ("uniform_frame_sampling", "temporal_sampling") else 2
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size num_channels qkv_bias image_size"
    fields = {name: getattr(vit_config, name) for name in (*names.split(), "initializer_range", *_SHARED_SETTINGS)}
    return ViViTConfig(**{**fields, "tubelet_size": (time, patch_height, patch_width), **overrides})


def _check_is_vit(vit_config: Any) -> None:
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "image_size", "qkv_bias")
    if not isinstance(vit_config, PretrainedConfig) or not all(hasattr(vit_config, name) for name in needed):
        kind = getattr(vit_config, "model_type", None) or type(vit_config).__name__
        raise ValueError(
            f"A ViViT starts from a plain ViT or DeiT; expected its configuration (`vit.config`), got {kind!r}."
        )


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


# The report


@dataclasses.dataclass
class InitialisationReport:
    """
    The origin of every parameter of a ViViT, and the use of every weight of the ViT.

    `parameters` maps every parameter of the ViViT to "copied", "scaled" (by the ViT's LayerScale), "inflated",
    "resized", "tiled", "zeroed" or "newly initialised" ("resized, tiled" where both apply). `vit_keys` maps every
    weight of the ViT to "used" or to "deliberately unused (reason)". `settings` maps every setting that was carried
    over from the ViT to its values before and after.
    """

    parameters: dict[str, str]
    vit_keys: dict[str, str]
    settings: dict[str, tuple[Any, Any]]

    def counts(self) -> Counter[str]:
        """Return the number of parameters with each status."""
        return Counter(self.parameters.values())

    def newly_initialised(self) -> list[str]:
        """Return the names of the parameters that have no counterpart in the ViT."""
        return [name for name, status in self.parameters.items() if status == "newly initialised"]

    def to_markdown(self) -> str:
        """Return a table of counts and the names of parameters that were not simply copied, for a model card."""
        lines = ["| | parameters |", "| --- | --- |"]
        lines += [f"| {status} | {count} |" for status, count in sorted(self.counts().items())]
        unused = [f"`{name}`" for name, status in self.vit_keys.items() if status != "used"]
        lines += ["", f"ViT weights used: {len(self.vit_keys) - len(unused)} of {len(self.vit_keys)}."]
        if unused:
            lines += [f"Deliberately unused: {', '.join(unused)}."]
        for status in sorted(set(self.parameters.values()) - {"copied"}):
            names = [name for name, value in self.parameters.items() if value == status]
            lines += ["", f"{status.capitalize()}: {', '.join(f'`{name}`' for name in _shorten(names))}."]
        if self.settings:
            changed = [f"`{name}` {old!r} -> {new!r}" for name, (old, new) in self.settings.items()]
            lines += ["", f"Carried over from the ViT: {', '.join(changed)}."]
        return "\n".join(lines)

    def __str__(self) -> str:
        return ", ".join(f"{count} {status}" for status, count in sorted(self.counts().items()))


def _shorten(names: list[str]) -> list[str]:
    """Merge `encoder.layer.0.x`, `encoder.layer.1.x`, ... into `encoder.layer.N.x`."""
    return list(dict.fromkeys(re.sub(r"\.layer\.\d+\.", ".layer.N.", name) for name in names))


# The entry point


@torch.no_grad()
def initialise_from_vit(
    vivit: ViViTPreTrainedModel,
    vit: PreTrainedModel,
    *,
    tubelet_init: str = "central_frame",
    temporal_attention_init: str = "zero_output",
    temporal_encoder_init: str | None = None,
    position_init: str = "tile",
) -> InitialisationReport:
    """
    Initialise a ViViT of any variant from an image ViT; changes `vivit` in place.

    Activation, LayerNorm epsilon and dropout, which decide what the weights compute, are carried over from the ViT's
    configuration to `vivit` and its configuration.

    Args:
        vivit: a `ViViTModel` or `ViViTForVideoClassification`; parameters without a counterpart in the ViT keep their
            values.
        vit: transformers' `ViTModel`, `ViTForImageClassification` or the like, with as many layers of the same width.
            LayerScale is folded into the output projections, which is equivalent.
        tubelet_init: "central_frame" (the paper's best), "filter_inflation" or "approximate_rank_pooling".
        temporal_attention_init: Model 3 only. "zero_output" copies query, key and value and zeroes the output
            projection: the layer starts as a purely spatial one, and all of its weights learn. "zero" follows the paper
            literally and starts from the same function, but hardly learns: while value and output projection are both
            zero, neither they nor query and key get a gradient, so only the output bias ever changes. "copy" follows
            the official code (attention copied, LayerNorm new); "random" keeps the initialisation.
        temporal_encoder_init: Model 2 only. "random", "zero_output" or "copy_last". "zero_output" zeroes the output
            projections and position embeddings, so that the encoder starts as the identity up to its final LayerNorm,
            which starts without scale and bias: with `temporal_pooling="mean"`, the pooled output starts as the mean
            over time of the ViT's normalised features, and all weights learn. "copy_last" does the same to copies of
            the ViT's last layers. Both need a pooling over time without a class token. The default is "zero_output"
            with a `temporal_pooling` other than "cls", else "random".
        position_init: "tile" repeats over time, after bicubic resizing if the grid differs; "tile_linear" resizes like
            the official code (linear between aligned corners).

    Returns:
        An `InitialisationReport`.

    Raises:
        TypeError: if an argument is not a transformers model, or the two are in the wrong order.
        ValueError: if sizes differ, an option is unknown or does not apply to the model, or a weight of the ViT has no
            place in the ViViT. The ViViT is then unchanged.
    """
    if not isinstance(vivit, ViViTPreTrainedModel) or not isinstance(vit, PreTrainedModel):
        raise TypeError(
            "Expected a ViViT and then a loaded image ViT, such as `ViTModel.from_pretrained(...)`, got "
            f"{type(vivit).__name__} and {type(vit).__name__}."
        )
    _check_is_vit(vit.config)
    model: ViViTModel = vivit.base_model
    config = model.config
    if temporal_encoder_init is None:
        starts_as_identity = config.num_temporal_layers and config.temporal_pooling not in (None, "cls")
        temporal_encoder_init = "zero_output" if starts_as_identity else "random"
    _check_options(config, tubelet_init, temporal_attention_init, temporal_encoder_init, position_init)
    weights, source_names = _canonical_weights(vit)
    _check_sizes(config, vit.config, weights)

    scales = {n: re.sub(p, t, n) for n in weights for p, t in _LAYER_SCALES.items() if re.fullmatch(p, n)}
    filler = _Filler(model, fold_layer_scales(weights, scales), scales)
    _fill_embeddings(filler, vit.config, tubelet_init, POSITION_INITS[position_init])
    for index in range(config.num_hidden_layers):
        filler.copy_layer(f"encoder.layer.{index}", f"encoder.layer.{index}", temporal_attention_init)
    filler.copy("layernorm.weight")
    filler.copy("layernorm.bias")
    if temporal_encoder_init == "copy_last":
        _copy_last_layers(filler, config)
    if temporal_encoder_init != "random":
        _silence_temporal_layers(filler, config)
    account = filler.account(source_names)

    # Change the ViViT only now that everything is known to fit.
    settings = _carry_settings(vivit, vit.config)
    filler.write()
    prefix = "" if vivit is model else f"{vivit.base_model_prefix}."
    parameters = {
        name: filler.status.get(name.removeprefix(prefix), "newly initialised") for name, _ in vivit.named_parameters()
    }
    return InitialisationReport(parameters, account, settings)


def _check_options(config: ViViTConfig, tubelet: str, attention: str, encoder: str, position: str) -> None:
    for name, value, allowed in (
        ("tubelet_init", tubelet, TUBELET_INITS),
        ("temporal_attention_init", attention, TEMPORAL_ATTENTION_INITS),
        ("temporal_encoder_init", encoder, TEMPORAL_ENCODER_INITS),
        ("position_init", position, POSITION_INITS),
    ):
        check_choice(name, value, allowed)
    if attention == "zero" and config.attention_type == "factorised_self_attention":
        warnings.warn(
            "`temporal_attention_init='zero'` sets value and output projection of the temporal attention to zero. "
            "Neither gets a gradient while the other is zero, so only the output bias will ever learn; 'zero_output' "
            "starts from the same function and learns.",
            stacklevel=3,
        )
    if problem := _problem_of_temporal_encoder(config, encoder):
        raise ValueError(f"`temporal_encoder_init={encoder!r}` {problem}.")


def _problem_of_temporal_encoder(config: ViViTConfig, encoder: str) -> str | None:
    if encoder == "random":
        return None
    if config.attention_type != "factorised_encoder" or not config.num_temporal_layers:
        return (
            f"needs a temporal encoder, but the model has `attention_type={config.attention_type!r}` and "
            f"`num_temporal_layers={config.num_temporal_layers}`"
        )
    if config.pooling_over_time == "cls":
        return (
            "with a class token over time: the temporal layers start without effect, so it would give the same logits "
            "for every video; use `temporal_pooling='mean'` or `temporal_encoder_init='random'`"
        )
    if encoder == "zero_output":
        return None
    if config.num_temporal_layers > config.num_hidden_layers:
        return (
            f"needs {config.num_temporal_layers} layers for the temporal encoder, but the ViT has "
            f"{config.num_hidden_layers}"
        )
    spatial = config.num_attention_heads, config.intermediate_size
    temporal = (config.temporal_num_attention_heads or spatial[0], config.temporal_intermediate_size or spatial[1])
    if spatial != temporal:
        return f"needs the ViT's heads and MLP width {spatial} in the temporal encoder, which has {temporal}"
    return None


def _canonical_weights(vit: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the ViT's weights under our names, and a map from these names to its own."""
    weights, sources = {}, {}
    for source, tensor in vit.state_dict().items():
        name = re.sub(rf"^{vit.base_model_prefix}\.", "", source)
        for pattern, target in {**TRANSFORMERS_VIVIT_NAMES, **_LAYER_SCALE_NORMS}.items():
            name = re.sub(pattern, target, name)
        weights[name], sources[name] = tensor, source
    return weights, sources


def _check_sizes(config: ViViTConfig, vit_config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> None:
    if "embeddings.distillation_token" in weights:
        raise ValueError(
            "The image model has a distillation token (a distilled DeiT), which a ViViT cannot use; use an image model "
            "without one."
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
        ours, theirs = getattr(config, name), getattr(vit_config, name, None)
        if ours != theirs:
            raise ValueError(
                f"`{name}` is {ours} in the ViViT and {theirs} in the ViT; build the ViViT with `config_from_vit`."
            )
    if tuple(config.tubelet_size[1:]) != _pair(vit_config.patch_size):
        raise ValueError(
            f"The ViViT's patches are {tuple(config.tubelet_size[1:])} (height, width) and the ViT's "
            f"{_pair(vit_config.patch_size)}; set `tubelet_size` to match."
        )
    if getattr(vit_config, "qkv_bias", True) and not config.qkv_bias:
        raise ValueError("The ViT has biases for query, key and value; the ViViT was built with `qkv_bias=False`.")


def _carry_settings(vivit: ViViTPreTrainedModel, vit_config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Carry activation, epsilon and dropout over to the ViViT; return the settings that changed."""
    config = vivit.config
    wanted = ViViTConfig(**{name: getattr(vit_config, name) for name in _SHARED_SETTINGS})
    changed = {}
    for name in _SHARED_SETTINGS:
        old, new = getattr(config, name), getattr(wanted, name)
        if old != new:
            setattr(config, name, new)
            changed[name] = (old, new)
    for module in vivit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
        elif isinstance(module, nn.Dropout):
            module.p = config.hidden_dropout_prob
        elif isinstance(module, ViViTMLP):
            module.activation = ACT2FN[config.hidden_act]
    return changed


class _Filler:
    """Collect the values of a ViViT's parameters before writing them, and account for both models' weights."""

    def __init__(self, model: ViViTModel, weights: Mapping[str, torch.Tensor], layer_scales: Mapping[str, str]):
        self.parameters = dict(model.named_parameters())
        self.model = model
        self.weights = weights
        self.values: dict[str, torch.Tensor | float] = {}
        self.status: dict[str, str] = {}
        self.used: set[str] = set(layer_scales)
        self.scaled = set(layer_scales.values())

    def take(self, source: str) -> torch.Tensor:
        """Return a weight of the ViT and mark it as used."""
        if source not in self.weights:
            raise ValueError(f"The ViT has no weight {source!r}, which a ViViT needs.")
        self.used.add(source)
        return self.weights[source]

    def fill(self, name: str, value: torch.Tensor | float, status: str) -> None:
        parameter = self.parameters[name]
        if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
            raise ValueError(
                f"{name} is {tuple(parameter.shape)} in the ViViT, but the ViT gives {tuple(value.shape)}."
            )
        self.values[name], self.status[name] = value, status

    def write(self) -> None:
        for name, value in self.values.items():
            self.parameters[name].copy_(torch.as_tensor(value))

    def copy(self, name: str, source: str | None = None) -> None:
        source = source or name
        self.fill(name, self.take(source), "scaled" if source.rpartition(".")[0] in self.scaled else "copied")

    def copy_module(self, name: str, source: str) -> None:
        """Copy every parameter of a module; a bias that the ViT does not have becomes zero, which is equivalent."""
        for parameter in [key for key in self.parameters if key.startswith(f"{name}.")]:
            origin = source + parameter.removeprefix(name)
            if origin not in self.weights and origin.endswith("_proj.bias"):
                self.fill(parameter, 0.0, "zeroed")
            else:
                self.copy(parameter, origin)

    def copy_layer(self, name: str, source: str, temporal_attention_init: str) -> None:
        if self.model.config.attention_type != "factorised_self_attention":
            return self.copy_module(name, source)
        self.copy_module(f"{name}.layernorm_space", f"{source}.layernorm_before")
        self.copy_module(f"{name}.attention_space", f"{source}.attention")
        self.copy_module(f"{name}.layernorm_after", f"{source}.layernorm_after")
        self.copy_module(f"{name}.mlp", f"{source}.mlp")
        time = f"{name}.attention_time"
        if temporal_attention_init in ("copy", "zero_output"):
            self.copy_module(time, f"{source}.attention")
        zeroed = {"zero": f"{time}.", "zero_output": f"{time}.o_proj."}.get(temporal_attention_init)
        if zeroed is not None:
            for parameter in [key for key in self.parameters if key.startswith(zeroed)]:
                self.fill(parameter, 0.0, "zeroed")
        return None

    def account(self, source_names: Mapping[str, str]) -> dict[str, str]:
        """Return the use of every weight of the ViT, by its own name."""
        account, strays = {}, []
        for name, source in source_names.items():
            reasons = [why for pattern, why in _UNUSED_VIT_KEYS.items() if re.fullmatch(pattern, name)]
            if name in self.used:
                account[source] = "used"
            elif name == "embeddings.cls_token":
                account[source] = f"deliberately unused (no class token with pooling={self.model.config.pooling!r})"
            elif reasons:
                account[source] = f"deliberately unused ({reasons[0]})"
            else:
                strays.append(source)
        if strays:
            raise ValueError(
                f"{len(strays)} weights of the image model have no place in a ViViT: {', '.join(strays[:8])}"
                f"{', ...' if len(strays) > 8 else ''}. Only plain ViTs can be used."
            )
        return account


def _fill_embeddings(filler: _Filler, vit_config: PretrainedConfig, tubelet_init: str, mode: str) -> None:
    config, projection = filler.model.config, "embeddings.patch_embeddings.projection"
    kernel = filler.take(f"{projection}.weight")
    if config.embedding_type == "tubelet":
        filler.fill(f"{projection}.weight", TUBELET_INITS[tubelet_init](kernel, config.tubelet_size[0]), "inflated")
    else:
        filler.copy(f"{projection}.weight")
    filler.copy(f"{projection}.bias")
    if "embeddings.cls_token" in filler.parameters:
        filler.copy("embeddings.cls_token")

    patch_height, patch_width = _pair(vit_config.patch_size)
    height, width = _pair(vit_config.image_size)
    old_grid = (height // patch_height, width // patch_width)
    new_grid = filler.model.embeddings.grid
    positions = filler.take("embeddings.position_embeddings")
    old_prefix_tokens = positions.shape[1] - math.prod(old_grid)
    if old_prefix_tokens not in (0, 1):
        raise ValueError(
            f"The ViT has {positions.shape[1]} position embeddings, which is not a class token and a grid of "
            f"{old_grid}; its configuration says image_size={vit_config.image_size} and "
            f"patch_size={vit_config.patch_size}."
        )
    class_position = None
    if filler.model.embeddings.num_prefix_tokens:
        own = filler.parameters["embeddings.position_embeddings"][:, :1]
        class_position = positions[:, :1] if old_prefix_tokens else own
    value = image_to_video_position_embeddings(
        positions, new_grid, old_grid, old_prefix_tokens=old_prefix_tokens, class_position=class_position, mode=mode
    )
    changes = ["resized"] * (new_grid[1:] != old_grid) + ["tiled"] * (new_grid[0] > 1)
    filler.fill("embeddings.position_embeddings", value, ", ".join(changes) or "copied")


def _copy_last_layers(filler: _Filler, config: ViViTConfig) -> None:
    first = config.num_hidden_layers - config.num_temporal_layers
    for index in range(config.num_temporal_layers):
        layer = f"temporal_encoder.layer.{index}"
        filler.copy_module(layer, f"encoder.layer.{first + index}")


def _silence_temporal_layers(filler: _Filler, config: ViViTConfig) -> None:
    """Let the temporal encoder start as the identity, and its final LayerNorm without scale and bias."""
    for index in range(config.num_temporal_layers):
        layer = f"temporal_encoder.layer.{index}"
        for projection in ("attention.o_proj", "mlp.fc2"):
            filler.fill(f"{layer}.{projection}.weight", 0.0, "zeroed")
            filler.fill(f"{layer}.{projection}.bias", 0.0, "zeroed")
    filler.fill("temporal_embeddings.position_embeddings", 0.0, "zeroed")
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        filler.fill(f"temporal_layernorm.{name}", value, "newly initialised")
    if "temporal_pooler.query" in filler.parameters:
        filler.fill("temporal_pooler.query", 0.0, "zeroed")
