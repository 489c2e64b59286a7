"""
Makes a ViViT of any variant from an image ViT: transformers' (Hub id or folder), timm's, or an original JAX `.npz`.

    python conversion/convert_vit_checkpoint.py --source google/vit-base-patch16-224-in21k \\
        --attention-type factorised_encoder --output DIR

Every array of the source is used or named as deliberately unused, or the conversion stops and names it. What was
written is loaded again and run against the ViT. Needs neither JAX nor timm.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from conversion_tools import (
    Result,
    add_size_argument,
    beside_and_renamed,
    count_parameters,
    describe_processor,
    make_parser,
    one_or_pair,
    progress,
    read_labels,
    run,
    save,
    set_labels,
)
from parity import compare, frozen, image_outputs, image_reference

from vivit_hf import ViViTForVideoClassification
from vivit_hf.configuration_vivit import ATTENTION_ORDERS, ATTENTION_TYPES, EMBEDDING_TYPES, POOLINGS
from vivit_hf.conversion.image_sources import read_image_source
from vivit_hf.initialisation.from_image import (
    POSITION_INITS,
    TEMPORAL_ATTENTION_INITS,
    TEMPORAL_ENCODER_INITS,
    TUBELET_INITS,
    config_from_vit,
    initialise_from_vit,
)
from vivit_hf.initialisation.model_processor import processor_for


# Options that are fields of the configuration; those that are not given are left to its defaults.
_CONFIG_OPTIONS = (
    "attention_type attention_order num_frames tubelet_size embedding_type num_sampled_frames num_temporal_layers "
    "pooling"
).split()


def convert(args: argparse.Namespace) -> Result:
    inits = {
        "tubelet_init": args.tubelet_init,
        "temporal_attention_init": args.temporal_attention_init,
        "position_init": args.position_init,
    }
    with progress(steps=5) as begin, beside_and_renamed(args.output) as folder:
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
        not_used = re.compile(r"deliberately unused \((.*)\)")
        unused = {
            source.origins[key]: match[1]
            for key, status in report.vit_keys.items()
            if (match := not_used.fullmatch(status))
        }
        source.vit = vit = None  # room for what follows

        begin("writing")
        name = args.push_to_hub or Path(args.output).name
        save(model, processor, folder, name, base_model=args.source, report=report)
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
            begin("loading what was written, and running it")
            del model
            model = frozen(ViViTForVideoClassification.from_pretrained(folder))
            result.parity = compare(image_outputs(model, reference), reference.expected, reference.what)
        del model
    return result


def _config(args: argparse.Namespace, vit_config: Any) -> Any:
    fields = {name: value for name in _CONFIG_OPTIONS if (value := getattr(args, name)) is not None}
    if args.image_size:
        fields["image_size"] = one_or_pair(args.image_size)
    labels = read_labels(args.labels) if args.labels else None
    if labels and args.num_labels is not None and args.num_labels != len(labels):
        raise ValueError(f"{args.labels} names {len(labels)} labels, but --num-labels is {args.num_labels}.")
    config = config_from_vit(vit_config, **fields, num_labels=len(labels) if labels else args.num_labels or 0)
    if labels:
        set_labels(config, labels)
    return config


def _changes(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if status != "newly initialised")


def parse_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    source = parser.add_argument_group("source")
    source.add_argument("--source", required=True, help="Hub id or folder, .safetensors of timm, or .npz of a JAX ViT")
    source.add_argument("--num-heads", type=int, help="attention heads, for weights of timm that do not tell")

    model = parser.add_argument_group("model")
    model.add_argument("--attention-type", default="spatio_temporal", help=f"the variant: {', '.join(ATTENTION_TYPES)}")
    model.add_argument("--attention-order", choices=ATTENTION_ORDERS, help="Model 3: which attention comes first")
    model.add_argument("--num-frames", type=int, default=32, help="frames in a clip")
    model.add_argument(
        "--tubelet-size", type=int, nargs=3, metavar=("T", "H", "W"), help="default: 2 and the ViT's patch"
    )
    add_size_argument(model, "--image-size", "one side, or height and width (default: the ViT's)")
    model.add_argument("--embedding-type", choices=EMBEDDING_TYPES, help="tokens of tubelets or of sampled frames")
    model.add_argument("--num-sampled-frames", type=int, help="uniform frame sampling: frames to sample")
    model.add_argument("--num-temporal-layers", type=int, help="Model 2: layers of the temporal encoder")
    model.add_argument("--pooling", choices=POOLINGS, help="how tokens are pooled (default: the variant's way)")
    model.add_argument("--labels", metavar="FILE", help="class names: JSON list or map, or one per line")
    model.add_argument("--num-labels", type=int, help="classes, if there are no names; without either, no classifier")

    inits = parser.add_argument_group("initialisation (section 3.4 of the paper)")
    inits.add_argument("--tubelet-init", choices=TUBELET_INITS, default="central_frame", help="tubelet kernels")
    inits.add_argument(
        "--temporal-attention-init", choices=TEMPORAL_ATTENTION_INITS, default="zero_output", help="Model 3"
    )
    inits.add_argument("--temporal-encoder-init", choices=TEMPORAL_ENCODER_INITS, default="random", help="Model 2")
    inits.add_argument("--position-init", choices=POSITION_INITS, default="tile", help="position embeddings")
    inits.add_argument("--seed", type=int, default=0, help="of what is newly initialised")

    processor = parser.add_argument_group("processor (mean, standard deviation and resampling are the image model's)")
    processor.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="short side before the crop (default: in the image model's ratio if it crops, else 256 for 224)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(convert, parse_options(make_parser(__doc__)), argv)


if __name__ == "__main__":
    sys.exit(main())
