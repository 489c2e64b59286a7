"""`vivit-hf convert transformers`: convert transformers' own Vivit (Model 1) to ours, and back."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, VivitConfig, VivitForVideoClassification, VivitModel

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..initialisation.model_processor import describe_processor, processor_for, value_range
from ..initialisation.weight_files import ConversionError, find_weights, loading_problems, read_config, weight_names
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .parity import chosen_steps, compare, frozen, random_clip, tokens_and_logits
from .results import Result, read_processor, save, whole_folder
from .terminal import progress, warn


# Fields with the same name in both configurations.
_SHARED_FIELDS = (
    "num_frames num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_dropout_prob "
    "attention_probs_dropout_prob initializer_range layer_norm_eps qkv_bias"
).split()
_PROCESSOR_FIELDS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor offset do_normalize image_mean "
    "image_std"
).split()
# Functions with different names in published models of the two.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_fast"}
# Settings that transformers' Vivit cannot change.
_NEEDED = {
    "attention_type": "spatio_temporal",
    "embedding_type": "tubelet",
    "pooling": "cls",
    "representation_size": None,
    "num_register_tokens": 0,
    "pre_layernorm": False,
    "patch_bias": True,
}


def convert(args: argparse.Namespace) -> Result:
    """Convert in the direction of `--to`, and compare the outputs of source and result."""
    model_type = read_config(args.source).get("model_type")
    expected = VivitConfig.model_type if args.to == "vivit_hf" else ViViTConfig.model_type
    if model_type != expected:
        raise ConversionError(f"{args.source} is of type {model_type!r}; --to {args.to} converts {expected!r} only.")
    return to_ours(args) if args.to == "vivit_hf" else to_transformers(args)


def to_ours(args: argparse.Namespace) -> Result:
    """Convert to `ViViTForVideoClassification`, without a classifier if the source has none."""
    with progress(steps=3) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.source}")
        names = weight_names(find_weights(args.source))
        model = load_ours(args.source, **({} if "classifier.weight" in names else {"num_labels": 0}))
        processor = _processor_of(args.source, model.config)

        begin("writing")
        origin = "The weights are those of transformers' Vivit, under other names."
        save(args, folder, model, processor, base_model=args.source, report=origin)
        unused = {name: "pooler, which the classifier does not use" for name in names if ".pooler." in f".{name}"}
        result = Result(
            output=args.output,
            model=f"{model.config.attention_type}, {counted(model.config.num_labels, 'label')}",
            mapped=len(names) - len(unused),
            unused=unused,
            num_parameters=model.num_parameters(),
            processor=describe_processor(processor),
        )
        if result.mapped != len(model.state_dict()):
            raise ConversionError(f"{result.mapped} arrays were mapped, but the model has {len(model.state_dict())}.")
        del model
        if not args.skip_parity:
            begin("loading the result and running both")
            native = load_native(args.source, has_classifier="classifier.weight" in names)
            result.parity = _parity(load_ours(folder), native)
            del native
    return result


def to_transformers(args: argparse.Namespace) -> Result:
    """Convert to transformers' `VivitForVideoClassification`, or to `VivitModel` if the source has no labels."""
    with progress(steps=3) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.source}")
        model = load_ours(args.source)
        config = native_config(model.config)
        has_labels = model.config.num_labels > 0
        with torch.device("meta"):
            native = VivitForVideoClassification(config) if has_labels else VivitModel(config, add_pooling_layer=False)
        native.load_state_dict(native_state_dict(model), strict=True, assign=True)
        processor = _processor_of(args.source, model.config)

        begin("writing")
        native.save_pretrained(folder)
        settings = {name: getattr(processor, name) for name in _PROCESSOR_FIELDS}
        stored = json.dumps({"image_processor_type": "VivitImageProcessor", **settings}, indent=2)
        (folder / "preprocessor_config.json").write_text(stored + "\n", encoding="utf-8")
        notes = ["transformers' processor does not sample frames; give it the frames of a clip"]
        if rate := model.config.drop_path_rate:
            notes.append(f"drop_path_rate={rate} is lost, as transformers' Vivit has no stochastic depth")
        if model.config.label_groups:
            notes.append("label_groups are lost, as transformers' Vivit has one softmax over all labels")
        result = Result(
            output=args.output,
            model=f"transformers' {type(native).__name__}, {counted(model.config.num_labels, 'label')}",
            mapped=len(model.state_dict()),
            num_parameters=native.num_parameters(),
            processor=describe_processor(processor),
            notes=notes,
        )
        del native
        if not args.skip_parity:
            begin("loading the result and running both")
            result.parity = _parity(model, load_native(folder, has_classifier=has_labels))
        del model
    return result


def load_ours(source: str | Path, **overrides: Any) -> ViViTForVideoClassification:
    """Load a ViViT; raise a ConversionError if a weight is missing or has the wrong shape."""
    model, info = ViViTForVideoClassification.from_pretrained(source, output_loading_info=True, **overrides)
    _check_loaded(source, info)
    return frozen(model)


def load_native(source: str | Path, has_classifier: bool) -> PreTrainedModel:
    """Load transformers' Vivit in float32; raise a ConversionError if a weight is missing or has the wrong shape."""
    options = {"output_loading_info": True, "dtype": torch.float32}
    if has_classifier:
        native, info = VivitForVideoClassification.from_pretrained(source, **options)
    else:
        native, info = VivitModel.from_pretrained(source, add_pooling_layer=False, **options)
    _check_loaded(source, info)
    return frozen(native)


def _check_loaded(source: str | Path, info: dict[str, Any]) -> None:
    if problems := loading_problems(info):
        raise ConversionError(f"{source} does not fit its config.json: {'; '.join(problems[:8])}.")


def native_config(config: ViViTConfig) -> VivitConfig:
    """
    Return transformers' configuration of the same model.

    Raises:
        ConversionError: if transformers has no equivalent.
    """
    for name, needed in _NEEDED.items():
        if getattr(config, name) != needed:
            raise ConversionError(
                f"transformers' Vivit is always Model 1 with a class token; expected {name}={needed!r}, but this model "
                f"has {getattr(config, name)!r}."
            )
    labels = {"id2label": config.id2label, "label2id": config.label2id} if config.num_labels else {}
    return VivitConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        **labels,
        image_size=config.image_size,
        tubelet_size=list(config.tubelet_size),
        hidden_act=_ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        problem_type=config.problem_type,
    )


def native_state_dict(model: ViViTForVideoClassification) -> dict[str, torch.Tensor]:
    """Rename our weights to those of transformers' Vivit in memory; `save_pretrained` renames them for the file."""
    weights = {name.replace(".encoder.layer.", ".layers."): tensor for name, tensor in model.state_dict().items()}
    return weights if model.config.num_labels else {name.removeprefix("vivit."): t for name, t in weights.items()}


def _processor_of(source: str, config: ViViTConfig) -> ViViTVideoProcessor:
    """Return the source's own processor if it has one, else one with values in [-1, 1]."""
    if (stored := read_processor(source)) is None:
        return processor_for(config)
    processor = processor_for(config, stored)
    low, high = value_range(processor)
    if abs(low + 1) > 1e-3 or abs(high - 1) > 1e-3:
        warn(
            f"the processor follows {source}'s preprocessor_config.json: values in [{low:.3g}, {high:.3g}], not the "
            "[-1, 1] of the official models"
        )
    return processor


@torch.no_grad()
def _parity(ours: ViViTForVideoClassification, native: PreTrainedModel) -> str:
    clip = random_clip(ours.config)
    steps = chosen_steps(ours.config)
    base = native.base_model
    embedded = base.embeddings(clip)  # (batch, 1 + time * space, hidden)
    tokens = embedded[:, 1:].unflatten(1, (ours.config.grid_size[0], -1))
    hidden_states = torch.cat([embedded[:, :1], tokens[:, steps].flatten(1, 2)], dim=1)
    for layer in base.layers:
        hidden_states = layer(hidden_states)
    pooled = base.layernorm(hidden_states)[:, 0]
    logits = native.classifier(pooled) if hasattr(native, "classifier") else pooled
    what = f"all tokens' embeddings, and logits from time steps {steps} = transformers'"
    return compare(tokens_and_logits(ours, clip), {"tokens": tokens, "logits": logits}, what)
