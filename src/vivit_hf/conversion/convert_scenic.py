"""`vivit-hf convert scenic`: convert flax checkpoints of google-research/scenic."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..initialisation.model_processor import describe_processor, processor_for
from ..initialisation.weight_files import ConversionError, read_json
from ..modeling_vivit import ViViTForVideoClassification
from .label_files import find_labels, set_labels
from .parity import chosen_steps, compare, frozen, random_clip, tokens_and_logits
from .results import Result, save, whole_folder
from .scenic_checkpoint import read_scenic_checkpoint
from .scenic_reference import official_forward
from .scenic_releases import RELEASES
from .scenic_weights import config_from_scenic, state_dict_from_scenic
from .terminal import progress


def convert(args: argparse.Namespace) -> Result:
    """Convert a checkpoint, and compare what was written with a transcription of the official model."""
    release = RELEASES.get(args.model)
    with progress(steps=5) as begin, whole_folder(args.output) as folder:
        begin(f"reading {args.checkpoint}")
        model_config = release.model_config if release else _model_config(args.model_config)
        params = read_scenic_checkpoint(args.checkpoint)
        config = _config(args, model_config, params)

        begin("mapping")
        with torch.device("meta"):
            model = ViViTForVideoClassification(config)
        model.load_state_dict(state_dict_from_scenic(params, config), strict=True, assign=True)
        frame_stride = release.frame_stride if release else 2
        processor = processor_for(config, resize=args.resize, frame_stride=frame_stride)

        begin("writing")
        origin = f"Converted from the official checkpoint `{Path(args.checkpoint).name}` of google-research/scenic."
        card = {"datasets": release.datasets} if release else {}
        save(args, folder, model, processor, report=origin, **card)
        result = Result(
            output=args.output,
            model=", ".join(filter(None, (config.attention_type, counted(config.num_labels, "label"), args.model))),
            mapped=len(params),
            num_parameters=model.num_parameters(),
            processor=describe_processor(processor),
            card=card,
        )
        del model  # free memory for the reference
        if not args.skip_parity:
            begin("running the reference")
            clip = random_clip(config)
            steps = chosen_steps(config)
            video = clip.permute(0, 1, 3, 4, 2)  # (batch, frames, height, width, channels)
            tokens, logits = official_forward(params, model_config, video, steps, torch.float32)
            del params
            begin("loading and running the result")
            model = frozen(ViViTForVideoClassification.from_pretrained(folder))
            what = f"all tokens' embeddings, and logits from time steps {steps} = those of the official code"
            result.parity = compare(tokens_and_logits(model, clip), {"tokens": tokens, "logits": logits}, what)
            del model
    return result


def _model_config(path: str) -> Mapping[str, Any]:
    model_config = read_json(path)
    if not isinstance(model_config, dict):
        raise ConversionError(f"{path} holds a {type(model_config).__name__}; expected an official configuration.")
    return model_config.get("model", model_config)


def _config(args: argparse.Namespace, model_config: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> ViViTConfig:
    release = RELEASES.get(args.model)
    if "output_projection/bias" not in params:
        raise ConversionError(
            f"{args.checkpoint} has no classifier (output_projection/bias); it has {sorted(params)[:5]}."
        )
    num_labels = len(params["output_projection/bias"])
    if release and num_labels != release.num_labels:
        raise ConversionError(f"{args.checkpoint} has {num_labels} outputs, but {args.model} has {release.num_labels}.")
    num_frames = args.num_frames or (release.num_frames if release else 32)
    image_size = args.image_size or (release.image_size if release else 224)
    try:
        config = config_from_scenic(model_config, num_frames=num_frames, image_size=image_size, num_labels=num_labels)
    except KeyError as error:
        raise ConversionError(f"{args.model_config}: the model configuration has no entry {error}.") from error
    if (labels := find_labels(args.labels, release, num_labels)) is not None:
        set_labels(config, labels)
    return config
