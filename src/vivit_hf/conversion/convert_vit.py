"""`vivit-hf convert vit`: initialise a ViViT of any variant from an image model."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..data.labels import LabelMap
from ..initialisation.from_image import config_from_vit, initialise_from_vit
from ..initialisation.image_sources import read_image_source
from ..initialisation.model_processor import describe_processor, processor_for
from ..modeling_vivit import ViViTForVideoClassification
from .image_parity import image_outputs, image_reference
from .label_files import set_labels
from .parity import compare, frozen
from .results import Result, save, whole_folder
from .terminal import progress


# Options that are fields of the configuration; if not given, the configuration's default applies.
_CONFIG_OPTIONS = (
    "attention_type attention_order num_frames image_size tubelet_size embedding_type num_sampled_frames "
    "num_temporal_layers pooling temporal_pooling"
).split()


def convert(args: argparse.Namespace) -> Result:
    """Convert an image model, and compare the outputs of the ViT and of the ViViT that was written."""
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
        report = initialise_from_vit(model, source, temporal_encoder_init=args.temporal_encoder_init, **inits)
        processor = processor_for(model.config, source.processor_settings, resize=args.resize)

        begin("running the ViT")
        reference = None if args.skip_parity else image_reference(vit, model.config, **inits)
        del source.vit, vit  # free memory for the next steps

        begin("writing")
        save(args, folder, model, processor, base_model=args.source, report=report)
        unused = report.unused()
        result = Result(
            output=args.output,
            model=f"{model.config.attention_type}, from {source.kind}",
            mapped=len(report.vit_keys) - len(unused),
            unused=unused,
            newly_initialised=report.newly_initialised(),
            changes=_changes(report.counts()),
            num_parameters=model.num_parameters(),
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
    labels = LabelMap.from_file(args.labels) if args.labels else None
    count = len(labels.names) if labels else args.num_labels or 0
    if args.num_labels not in (None, count):
        raise ValueError(f"{args.labels} names {counted(count, 'label')}, but --num-labels is {args.num_labels}.")
    config = config_from_vit(vit_config, **fields, num_labels=count)
    if labels:
        set_labels(config, labels)
    return config


def _changes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if status != "newly initialised")
