"""`vivit-hf convert vit`: initialise a ViViT of any variant from an image ViT."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..configuration_vivit import ATTENTION_ORDERS, ATTENTION_TYPES, EMBEDDING_TYPES, POOLINGS, ViViTConfig
from ..initialisation.from_image import (
    POSITION_INITS,
    TEMPORAL_ATTENTION_INITS,
    TEMPORAL_ENCODER_INITS,
    TUBELET_INITS,
    InitialisationReport,
    config_from_vit,
    initialise_from_vit,
)
from ..initialisation.model_processor import processor_for
from ..modeling_vivit import ViViTForVideoClassification
from .command import add_size_argument, make_parser, progress, run
from .image_parity import image_outputs, image_reference
from .image_sources import read_image_source
from .label_files import read_labels, set_labels
from .parity import compare, frozen
from .processors import describe_processor
from .results import Result, count_parameters, save, whole_folder


# Options that are fields of the configuration; if not given, the configuration's default applies.
_CONFIG_OPTIONS = (
    "attention_type attention_order num_frames image_size tubelet_size embedding_type num_sampled_frames "
    "num_temporal_layers pooling"
).split()
_NOT_USED = re.compile(r"deliberately unused \((.*)\)")  # in an `InitialisationReport`


def convert(args: argparse.Namespace) -> Result:
    """Convert an image ViT, and compare the outputs of the ViT and of the ViViT that was written."""
    inits = {
        "tubelet_init": args.tubelet_init,
        "temporal_attention_init": args.temporal_attention_init,
        "position_init": args.position_init,
    }
    with progress(steps=5) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.source}")
        source = read_image_source(args.source, args.num_heads)
        vit = frozen(source.vit)

        begin("initialising the ViViT")
        torch.manual_seed(args.seed)
        model = frozen(ViViTForVideoClassification(_config(args, vit.config)))
        report = initialise_from_vit(model, vit, temporal_encoder_init=args.temporal_encoder_init, **inits)
        processor = processor_for(model.config, source.processor_settings, resize=args.resize)

        begin("running the ViT")
        reference = None if args.skip_parity else image_reference(vit, model.config, **inits)
        del source.vit, vit  # free memory for the next steps

        begin("writing")
        name = args.push_to_hub or Path(args.output).name
        save(model, processor, folder, name, base_model=args.source, report=report)
        unused = _unused(report, source.origins)
        result = Result(
            output=args.output,
            model=f"{model.config.attention_type}, from {source.kind}",
            mapped=len({*source.origins.values(), *source.folded} - set(unused)),
            unused={**source.unused, **unused},
            newly_initialised=report.newly_initialised(),
            changes=_changes(report.counts()),
            num_parameters=count_parameters(model),
            processor=describe_processor(processor),
            notes=source.notes,
        )
        if reference is not None:
            begin("loading and running the result")
            del model
            model = frozen(ViViTForVideoClassification.from_pretrained(folder))
            result.parity = compare(image_outputs(model, reference), reference.expected, reference.what)
        del model
    return result


def _config(args: argparse.Namespace, vit_config: Any) -> ViViTConfig:
    fields = {name: value for name in _CONFIG_OPTIONS if (value := getattr(args, name)) is not None}
    labels = read_labels(args.labels) if args.labels else None
    if labels and args.num_labels is not None and args.num_labels != len(labels):
        raise ValueError(f"{args.labels} names {len(labels)} labels, but --num-labels is {args.num_labels}.")
    config = config_from_vit(vit_config, **fields, num_labels=len(labels) if labels else args.num_labels or 0)
    if labels:
        set_labels(config, labels)
    return config


def _unused(report: InitialisationReport, origins: Mapping[str, str]) -> dict[str, str]:
    """Return the arrays of the source that the ViViT does not use, with the reasons."""
    matches = {origins[key]: _NOT_USED.fullmatch(status) for key, status in report.vit_keys.items()}
    return {name: match[1] for name, match in matches.items() if match}


def _changes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if status != "newly initialised")


def command_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = make_parser(
        "Make a ViViT of any variant from an image ViT: a Hub id or folder of transformers or timm, a .safetensors "
        "file of timm, or a JAX .npz.",
        prog,
    )
    source = parser.add_argument_group("source")
    source.add_argument("--source", required=True, help="Hub id or folder, timm's .safetensors, or .npz of a JAX ViT")
    source.add_argument("--num-heads", type=int, help="attention heads, if timm's weights do not determine them")

    model = parser.add_argument_group("model")
    model.add_argument("--attention-type", default="spatio_temporal", help=f"the variant: {', '.join(ATTENTION_TYPES)}")
    model.add_argument("--attention-order", choices=ATTENTION_ORDERS, help="Model 3: which attention comes first")
    model.add_argument("--num-frames", type=int, default=32, help="frames in a clip")
    model.add_argument(
        "--tubelet-size", type=int, nargs=3, metavar=("T", "H", "W"), help="default: 2 and the ViT's patch"
    )
    add_size_argument(model, "--image-size", "one side, or height and width (default: the ViT's)")
    model.add_argument("--embedding-type", choices=EMBEDDING_TYPES, help="tokens of tubelets or of sampled frames")
    model.add_argument("--num-sampled-frames", type=int, help="number of frames for uniform frame sampling")
    model.add_argument("--num-temporal-layers", type=int, help="Model 2: layers of the temporal encoder")
    model.add_argument("--pooling", choices=POOLINGS, help="how to pool tokens (default: depends on the variant)")
    model.add_argument("--labels", metavar="FILE", help="class names: JSON list or map, or one per line")
    model.add_argument("--num-labels", type=int, help="number of classes without names; with neither, no classifier")

    inits = parser.add_argument_group("initialisation (section 3.4 of the paper)")
    inits.add_argument("--tubelet-init", choices=TUBELET_INITS, default="central_frame", help="tubelet kernels")
    inits.add_argument(
        "--temporal-attention-init", choices=TEMPORAL_ATTENTION_INITS, default="zero_output", help="Model 3"
    )
    inits.add_argument("--temporal-encoder-init", choices=TEMPORAL_ENCODER_INITS, default="random", help="Model 2")
    inits.add_argument("--position-init", choices=POSITION_INITS, default="tile", help="position embeddings")
    inits.add_argument("--seed", type=int, default=0, help="seed for newly initialised weights")

    processor = parser.add_argument_group("processor (mean, standard deviation and resampling are the image model's)")
    processor.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="short side before the crop (default: in the image model's ratio if it crops, else 256 for 224)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return run(convert, command_parser(prog), argv)
