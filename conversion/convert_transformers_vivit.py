"""
Converts transformers' own Vivit (Model 1) to ours, and ours back to transformers'.

    python conversion/convert_transformers_vivit.py --source google/vivit-b-16x2-kinetics400 --output DIR
    python conversion/convert_transformers_vivit.py --source DIR --to transformers --output OTHER_DIR

Both key layouts of transformers' files are read. The processor is the source's own if it has one, followed as it
stands; else it gives values in [-1, 1]. Source and result are run against each other.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from conversion_tools import (
    Result,
    beside_and_renamed,
    count_parameters,
    describe_processor,
    make_parser,
    progress,
    run,
    save,
    set_labels,
    value_range,
    warn,
)
from parity import chosen_steps, compare, frozen, random_clip, tokens_and_logits
from transformers import PreTrainedModel, VivitConfig, VivitForVideoClassification, VivitModel

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.conversion.weight_files import (
    ConversionError,
    check_weights,
    find_file,
    find_weights,
    has_processor,
    read_json,
    weight_names,
)
from vivit_hf.initialisation.model_processor import processor_for


# Fields that both configurations have under one name.
_SHARED_FIELDS = (
    "num_frames num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_dropout_prob "
    "attention_probs_dropout_prob initializer_range layer_norm_eps qkv_bias"
).split()
_PROCESSOR_FIELDS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor offset do_normalize image_mean "
    "image_std"
).split()
# One function under the names that the two sides publish it with.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_fast"}
# What a Model 1 must be for transformers' Vivit to compute the same.
_NEEDED = {
    "attention_type": "spatio_temporal",
    "embedding_type": "tubelet",
    "pooling": "cls",
    "representation_size": None,
}


def convert(args: argparse.Namespace) -> Result:
    config_file = find_file(args.source, "config.json")
    if config_file is None:
        raise ConversionError(f"{args.source} has no config.json, which says what kind of model it is.")
    model_type = read_json(config_file).get("model_type")
    expected = VivitConfig.model_type if args.to == "vivit_hf" else ViViTConfig.model_type
    if model_type != expected:
        raise ConversionError(f"{args.source} is of type {model_type!r}; --to {args.to} converts {expected!r} only.")
    check_weights(find_weights(args.source))
    return to_ours(args) if args.to == "vivit_hf" else to_transformers(args)


def to_ours(args: argparse.Namespace) -> Result:
    """transformers' Vivit as `ViViTForVideoClassification`; without a classifier, if the source has none."""
    with progress(steps=3) as begin, beside_and_renamed(args.output) as folder:
        begin(f"reading {args.source}")
        names = weight_names(find_weights(args.source))
        model = load_ours(args.source, **({} if "classifier.weight" in names else {"num_labels": 0}))
        processor = _processor_of(args.source, model.config)

        begin("writing")
        name = args.push_to_hub or Path(args.output).name
        origin = "The weights are those of transformers' Vivit, under other names."
        save(model, processor, folder, name, base_model=args.source, report=origin)
        unused = {name: "pooler, which the classifier does not use" for name in names if ".pooler." in f".{name}"}
        result = Result(
            output=args.output,
            model=f"{model.config.attention_type}, {model.config.num_labels} labels",
            mapped=len(names) - len(unused),
            unused=unused,
            num_parameters=count_parameters(model),
            processor=describe_processor(processor),
        )
        _check_count(result.mapped, model)
        del model
        if not args.skip_parity:
            begin("loading what was written, and running both")
            native = load_native(args.source, has_classifier="classifier.weight" in names)
            result.parity = _parity(load_ours(folder), native)
            del native
    return result


def to_transformers(args: argparse.Namespace) -> Result:
    """Our Model 1 as transformers' `VivitForVideoClassification`, or `VivitModel` if it has no labels."""
    with progress(steps=3) as begin, beside_and_renamed(args.output) as folder:
        begin(f"reading {args.source}")
        model = load_ours(args.source)
        config = native_config(model.config)
        with torch.device("meta"):
            native = VivitForVideoClassification(config) if model.config.num_labels else _headless(config)
        native.load_state_dict(native_state_dict(model), strict=True, assign=True)
        processor = _processor_of(args.source, model.config)

        begin("writing")
        native.save_pretrained(folder)
        settings = {name: getattr(processor, name) for name in _PROCESSOR_FIELDS}
        stored = json.dumps({"image_processor_type": "VivitImageProcessor", **settings}, indent=2)
        (folder / "preprocessor_config.json").write_text(stored + "\n", encoding="utf-8")
        notes = ["transformers' processor does not sample: give it the frames of a clip"]
        if model.config.drop_path_rate:
            notes.append(f"drop_path_rate={model.config.drop_path_rate} is left behind: Vivit has no stochastic depth")
        result = Result(
            output=args.output,
            model=f"transformers' {type(native).__name__}, {model.config.num_labels} labels",
            mapped=len(model.state_dict()),
            num_parameters=count_parameters(native),
            processor=describe_processor(processor),
            notes=notes,
        )
        del native
        if not args.skip_parity:
            begin("loading what was written, and running both")
            result.parity = _parity(model, load_native(folder, has_classifier=bool(model.config.num_labels)))
        del model
    return result


def load_ours(source: str | Path, **overrides: Any) -> ViViTForVideoClassification:
    """Raises a ConversionError for anything that is not in the source, or not in its shape."""
    model, info = ViViTForVideoClassification.from_pretrained(source, output_loading_info=True, **overrides)
    _check_loaded(source, info)
    return frozen(model)


def load_native(source: str | Path, has_classifier: bool) -> PreTrainedModel:
    options = {"output_loading_info": True, "dtype": torch.float32}
    if has_classifier:
        native, info = VivitForVideoClassification.from_pretrained(source, **options)
    else:
        native, info = VivitModel.from_pretrained(source, add_pooling_layer=False, **options)
    _check_loaded(source, info)
    return frozen(native)


def _check_loaded(source: str | Path, info: dict[str, Any]) -> None:
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"another shape: {name} is {tuple(there)}, config.json makes it {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ConversionError(f"{source} does not fit its config.json: {'; '.join(problems[:8])}.")


def _check_count(mapped: int, model: ViViTForVideoClassification) -> None:
    if mapped != len(model.state_dict()):
        raise ConversionError(f"{mapped} arrays were mapped to {len(model.state_dict())} of the model.")


def native_config(config: ViViTConfig) -> VivitConfig:
    """
    transformers' configuration of the same model.

    Raises:
        ConversionError: if transformers has no such model.
    """
    for name, needed in _NEEDED.items():
        if getattr(config, name) != needed:
            raise ConversionError(
                f"transformers' Vivit is Model 1 with a class token: it needs {name}={needed!r}, and this model has "
                f"{getattr(config, name)!r}."
            )
    native = VivitConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        image_size=config.image_size,
        tubelet_size=list(config.tubelet_size),
        hidden_act=_ACTIVATIONS.get(config.hidden_act, config.hidden_act),
    )
    if config.num_labels:
        set_labels(native, config.id2label)
    return native


def native_state_dict(model: ViViTForVideoClassification) -> dict[str, torch.Tensor]:
    """Our weights under the names that transformers' Vivit has in memory; it writes its file names by itself."""
    weights = {name.replace(".encoder.layer.", ".layers."): tensor for name, tensor in model.state_dict().items()}
    return weights if model.config.num_labels else {name.removeprefix("vivit."): t for name, t in weights.items()}


def _headless(config: VivitConfig) -> VivitModel:
    return VivitModel(config, add_pooling_layer=False)


def _processor_of(source: str, config: ViViTConfig) -> ViViTVideoProcessor:
    """The source's own processor if it has one; else one that gives [-1, 1]."""
    if not has_processor(source):
        warn(f"{source} has no preprocessor_config.json; the processor gives the [-1, 1] that the official models take")
        return processor_for(config)
    processor = processor_for(config, ViViTVideoProcessor.from_pretrained(source))
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


def parse_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    source = parser.add_argument_group("source")
    source.add_argument("--source", required=True, help="Hub id or folder of transformers' Vivit, or of ours")
    source.add_argument("--to", choices=("vivit_hf", "transformers"), default="vivit_hf", help="whose model to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(convert, parse_options(make_parser(__doc__)), argv)


if __name__ == "__main__":
    sys.exit(main())
