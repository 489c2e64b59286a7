"""
Initialise a ViViT from an image ViT (section 3.4 of the paper): tubelet kernels, position embeddings, temporal weights,
and a report that accounts for every parameter of the ViViT and every weight of the ViT.

Official counterpart: google-research/scenic `projects/vivit/model_utils.py`, `initialise_from_train_state`.
"""

import dataclasses
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..configuration_vivit import ViViTConfig
from ..limits_vivit import check_choice
from ..modeling_vivit import ViViTMLP, ViViTModel, ViViTPreTrainedModel
from .image_arrays import ImageSource
from .image_models import ImageStructure, image_structure, image_weights, why_unused
from .image_sources import read_image_config, read_image_source
from .inflation import TUBELET_INITS, fold_layer_scales, image_to_video_position_embeddings


TEMPORAL_ATTENTION_INITS = ("zero_output", "zero", "copy", "random")
TEMPORAL_ENCODER_INITS = ("random", "zero_output", "copy_last")
POSITION_INITS = ("tile", "tile_linear")

# Settings that decide what the weights compute, but do not show in their shapes.
_SHARED_SETTINGS = ("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")


# Settings


def config_from_vit(vit_config: PretrainedConfig | str | os.PathLike, **overrides: Any) -> ViViTConfig:
    """
    Return the configuration of a ViViT that computes per frame what an image model computes: its sizes, activation,
    LayerNorms, biases, register tokens and dropout, and mean pooling if it has no class token.

    Args:
        vit_config: the configuration of a ViT, DeiT, DINOv2 (with or without registers), CLIP or SigLIP; or a folder,
            Hub id or file of such a model, see `read_image_source`.
        overrides: fields of `ViViTConfig`, such as `attention_type` and `num_frames`.

    Raises:
        ValueError: if a ViViT cannot start from such a model; the message gives the reason.
    """
    if isinstance(vit_config, (str, os.PathLike)):
        vit_config = read_image_config(os.fspath(vit_config))
    structure = image_structure(vit_config)
    height, width = structure.image_size
    time = 1 if overrides.get("embedding_type") in ("uniform_frame_sampling", "temporal_sampling") else 2
    fields = {
        **structure.settings,
        "image_size": height if height == width else (height, width),
        "tubelet_size": (time, *structure.patch_size),
        "pooling": None if structure.has_class_token else "mean",
        **overrides,
    }
    if ViViTConfig(attention_type=overrides.get("attention_type", "spatio_temporal")).is_token_grid:
        fields["num_register_tokens"] = overrides.get("num_register_tokens", 0)
    return ViViTConfig(**fields)


def position_mode(structure: ImageStructure, position_init: str) -> str:
    """Return the mode of `resample_position_embeddings` for a `position_init`."""
    return structure.position_mode if position_init == "tile" else "align_corners_linear"


# The report


@dataclasses.dataclass
class InitialisationReport:
    """
    The origin of every parameter of a ViViT, and the use of every weight of the image model (the ViT).

    `parameters` maps every parameter of the ViViT to "copied", "scaled" (by the ViT's LayerScale), "inflated",
    "resized", "tiled", "zeroed" or "newly initialised" ("resized, tiled" where both apply). `vit_keys` maps every
    weight of the ViT, by its name in the model or file, to "used" or to "deliberately unused (reason)". `settings` maps
    every setting that was carried over from the ViT to its values before and after.
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

    def unused(self) -> dict[str, str]:
        """Return the weights of the ViT that the ViViT does not use, each with the reason."""
        matches = {name: re.fullmatch(r"deliberately unused \((.*)\)", use) for name, use in self.vit_keys.items()}
        return {name: match[1] for name, match in matches.items() if match}

    def to_markdown(self) -> str:
        """Return a table of counts and the names of parameters that were not simply copied, for a model card."""
        lines = ["| | parameters |", "| --- | --- |"]
        lines += [f"| {status} | {count} |" for status, count in sorted(self.counts().items())]
        unused = self.unused()
        lines += ["", f"ViT weights used: {len(self.vit_keys) - len(unused)} of {len(self.vit_keys)}."]
        if unused:
            lines += [f"Deliberately unused: {'; '.join(list_unused(unused, mark='`'))}."]
        for status in sorted(set(self.parameters.values()) - {"copied"}):
            names = [name for name, value in self.parameters.items() if value == status]
            lines += ["", f"{status.capitalize()}: {', '.join(f'`{name}`' for name in merge_layers(names))}."]
        if self.settings:
            changed = [f"`{name}` {old!r} -> {new!r}" for name, (old, new) in self.settings.items()]
            lines += ["", f"Carried over from the ViT: {', '.join(changed)}."]
        return "\n".join(lines)

    def __str__(self) -> str:
        return ", ".join(f"{count} {status}" for status, count in sorted(self.counts().items()))


def merge_layers(names: Iterable[str]) -> list[str]:
    """Merge `encoder.layer.0.x`, `encoder.layer.1.x`, ... into `encoder.layer.N.x`, also with `/` or `_` between."""
    return list(dict.fromkeys(re.sub(r"(?<=[._/])\d+(?=[./])", "N", name) for name in names))


def list_unused(unused: Mapping[str, str], mark: str = "", most: int = 4) -> list[str]:
    """Return "name (reason)" for unused weights; of more than `most` with one reason, the first and their number."""
    lines = []
    for reason in dict.fromkeys(unused.values()):
        names = [f"{mark}{name}{mark}" for name, why in unused.items() if why == reason]
        if len(names) > most:
            names = [f"{names[0]} and {len(names) - 1} more"]
        lines += [f"{name} ({reason})" for name in names]
    return lines


# The entry point


@torch.no_grad()
def initialise_from_vit(
    vivit: ViViTPreTrainedModel,
    vit: PreTrainedModel | str | os.PathLike | ImageSource,
    *,
    tubelet_init: str = "central_frame",
    temporal_attention_init: str = "zero_output",
    temporal_encoder_init: str | None = None,
    position_init: str = "tile",
) -> InitialisationReport:
    """
    Initialise a ViViT of any variant from an image model, "the ViT"; changes `vivit` in place.

    Activation, LayerNorm epsilon and dropout, which decide what the weights compute, are carried over from the ViT's
    configuration to `vivit` and its configuration. LayerScale is folded into the output projections, which is
    equivalent. Text towers and attention-pooling heads are left out, and named in the report.

    Args:
        vivit: a `ViViTModel` or `ViViTForVideoClassification`; parameters without a counterpart in the ViT keep their
            values.
        vit: transformers' `ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel`, `CLIPVisionModel`, `SiglipVisionModel`
            or the like, whole models with heads or text towers included; or a folder, Hub id or file of such a model,
            see `read_image_source`. It has as many layers of the same width as `vivit` (see `config_from_vit`). Models
            3 and 4 leave out its register tokens, with a warning.
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
        position_init: "tile" repeats over time, after resizing as the image model does it if the grid differs (bicubic;
            antialiased for DINOv2 with registers); "tile_linear" resizes like the official ViViT (linear between
            aligned corners).

    Returns:
        An `InitialisationReport`.

    Raises:
        TypeError: if an argument is not a transformers model, or the two are in the wrong order.
        ValueError: if sizes differ, an option is unknown or does not apply to the model, or a weight of the ViT has no
            place in the ViViT. The ViViT is then unchanged.
    """
    is_source = isinstance(vit, (PreTrainedModel, str, os.PathLike, ImageSource))
    if not isinstance(vivit, ViViTPreTrainedModel) or not is_source or isinstance(vit, ViViTPreTrainedModel):
        raise TypeError(
            "Expected a ViViT and then an image model, such as `ViTModel.from_pretrained(...)`, a folder or a Hub id, "
            f"got {type(vivit).__name__} and {type(vit).__name__}."
        )
    model: ViViTModel = vivit.base_model
    config = model.config
    if temporal_encoder_init is None:
        starts_as_identity = config.num_temporal_layers and config.temporal_pooling not in (None, "cls")
        temporal_encoder_init = "zero_output" if starts_as_identity else "random"
    _check_options(config, tubelet_init, temporal_attention_init, temporal_encoder_init, position_init)
    source = _as_source(vit)
    structure, weights = image_structure(source.vit.config), image_weights(source.vit)
    _check_sizes(config, structure, weights.tensors)

    filler = _Filler(model, fold_layer_scales(weights.tensors, weights.layer_scales), weights.layer_scales)
    _fill_embeddings(filler, structure, tubelet_init, position_mode(structure, position_init))
    for index in range(config.num_hidden_layers):
        filler.copy_layer(f"encoder.layer.{index}", f"encoder.layer.{index}", temporal_attention_init)
    for name in ("pre_layernorm", "layernorm"):
        filler.copy_module(name, name)
    if temporal_encoder_init == "copy_last":
        _copy_last_layers(filler, config)
    if temporal_encoder_init != "random":
        _silence_temporal_layers(filler, config)
    account = filler.account(weights.names, source)

    # Change the ViViT only now that everything is known to fit.
    settings = _carry_settings(vivit, structure)
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


def _as_source(vit: PreTrainedModel | str | os.PathLike | ImageSource) -> ImageSource:
    if isinstance(vit, PreTrainedModel):
        return ImageSource(vit, type(vit).__name__, {name: name for name in vit.state_dict()})
    return vit if isinstance(vit, ImageSource) else read_image_source(os.fspath(vit))


def _check_sizes(config: ViViTConfig, structure: ImageStructure, weights: Mapping[str, torch.Tensor]) -> None:
    if "embeddings.distillation_token" in weights:
        raise ValueError(
            "The image model has a distillation token (a distilled DeiT), which a ViViT cannot use; use an image model "
            "without one."
        )
    if config.pooling == "cls" and "embeddings.cls_token" not in weights:
        raise ValueError(
            "`pooling='cls'` needs a class token, which the image model does not have; use `pooling='mean'` (the "
            "default of `config_from_vit`), 'max' or 'sum'."
        )
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size num_channels pre_layernorm".split()
    for name in names if config.is_token_grid else [*names, "num_register_tokens"]:
        ours, theirs = getattr(config, name), structure.settings[name]
        if ours != theirs:
            raise ValueError(
                f"`{name}` is {ours} in the ViViT and {theirs} in the ViT; build the ViViT with `config_from_vit`."
            )
    if tuple(config.tubelet_size[1:]) != structure.patch_size:
        raise ValueError(
            f"The ViViT's patches are {tuple(config.tubelet_size[1:])} (height, width) and the ViT's "
            f"{structure.patch_size}; set `tubelet_size` to match."
        )
    for name, what in (("qkv_bias", "biases for query, key and value"), ("patch_bias", "a bias for its patches")):
        if structure.settings[name] and not getattr(config, name):
            raise ValueError(f"The ViT has {what}; the ViViT was built with `{name}=False`.")
    if structure.num_register_tokens and config.is_token_grid:
        warnings.warn(
            f"The {structure.num_register_tokens} register tokens of the image model are left out: the layers of "
            f"`attention_type='{config.attention_type}'` take the grid of tokens alone.",
            stacklevel=3,
        )


def _carry_settings(vivit: ViViTPreTrainedModel, structure: ImageStructure) -> dict[str, tuple[Any, Any]]:
    """Carry activation, epsilon and dropout over to the ViViT; return the settings that changed."""
    config = vivit.config
    wanted = ViViTConfig(**{name: structure.settings[name] for name in _SHARED_SETTINGS})
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
        """Copy a parameter; a bias of a projection that the ViT does not have becomes zero, which is equivalent."""
        source = source or name
        if source not in self.weights and source.endswith(("_proj.bias", ".projection.bias")):
            self.fill(name, 0.0, "zeroed")
        else:
            self.fill(name, self.take(source), "scaled" if source.rpartition(".")[0] in self.scaled else "copied")

    def copy_module(self, name: str, source: str) -> None:
        """Copy every parameter of a module."""
        for parameter in [key for key in self.parameters if key.startswith(f"{name}.")]:
            self.copy(parameter, source + parameter.removeprefix(name))

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

    def account(self, names: Mapping[str, str], source: ImageSource) -> dict[str, str]:
        """Return the use of every weight of the source, by its name there; `names` maps our names to the ViT's."""
        config = self.model.config
        left_out = {
            "embeddings.cls_token": f"no class token with pooling={config.pooling!r}",
            "embeddings.register_tokens": f"no register tokens with attention_type={config.attention_type!r}",
        }
        unused, used, strays = dict(source.unused), dict.fromkeys(source.folded, "used"), []
        for name, own in names.items():
            if own not in source.origins:  # made up by the reader, such as a position of zeros
                continue
            if name in self.used:
                used[source.origins[own]] = "used"
            elif reason := left_out.get(name) or why_unused(name):
                unused[source.origins[own]] = reason
            else:
                strays.append(source.origins[own])
        if strays:
            raise ValueError(
                f"{len(strays)} weights of the image model have no place in a ViViT: {', '.join(strays[:8])}"
                f"{', ...' if len(strays) > 8 else ''}."
            )
        return {**used, **{name: f"deliberately unused ({reason})" for name, reason in unused.items()}}


def _fill_embeddings(filler: _Filler, structure: ImageStructure, tubelet_init: str, mode: str) -> None:
    config, projection = filler.model.config, "embeddings.patch_embeddings.projection"
    kernel = filler.take(f"{projection}.weight")
    if config.embedding_type == "tubelet":
        filler.fill(f"{projection}.weight", TUBELET_INITS[tubelet_init](kernel, config.tubelet_size[0]), "inflated")
    else:
        filler.copy(f"{projection}.weight")
    if config.patch_bias:
        filler.copy(f"{projection}.bias")
    for name in ("embeddings.cls_token", "embeddings.register_tokens"):
        if name in filler.parameters:
            filler.copy(name)

    old_grid, new_grid = structure.grid, filler.model.embeddings.grid
    positions = filler.take("embeddings.position_embeddings")
    old_prefix_tokens = positions.shape[1] - math.prod(old_grid)
    if old_prefix_tokens not in (0, 1):
        raise ValueError(
            f"The ViT has {positions.shape[1]} position embeddings, which is not a class token and a grid of "
            f"{old_grid}; its configuration says image_size={structure.image_size} and "
            f"patch_size={structure.patch_size}."
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
