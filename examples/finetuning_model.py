"""The model of `finetune.py`: a ViViT, a preset, or an image ViT that becomes a ViViT; with its processor."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from finetuning_data import DataArguments
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from vivit_hf import (
    InitialisationReport,
    ViViTConfig,
    ViViTForVideoClassification,
    ViViTVideoProcessor,
    config_from_vit,
    initialise_from_vit,
)
from vivit_hf.configuration_vivit import ATTENTION_TYPES, EMBEDDING_TYPES
from vivit_hf.image_initialisation import TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS, TUBELET_INITS
from vivit_hf.labels import LabelMap
from vivit_hf.training import FREEZINGS, LORA_TARGETS, untrained_modules


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_IMAGE_TYPES = ("vit", "vit_msn", "vit_mae")


@dataclass
class ModelArguments:
    """What to start from, and what is trained of it."""

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": "a ViViT or an image ViT, Hub id or folder, or a preset such as vivit-tiny"},
    )
    attention_type: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT: {', '.join(ATTENTION_TYPES)} (default: factorised_encoder)"},
    )
    embedding_type: str | None = field(
        default=None, metadata={"help": f"from an image ViT: {', '.join(EMBEDDING_TYPES)}"}
    )
    tubelet_size: str | None = field(default=None, metadata={"help": "from an image ViT: time,height,width"})
    num_sampled_frames: int | None = field(default=None, metadata={"help": "with uniform_frame_sampling"})
    num_temporal_layers: int | None = field(default=None, metadata={"help": "Model 2; 0 is the average-pool baseline"})
    tubelet_init: str = field(default="central_frame", metadata={"help": f"{', '.join(TUBELET_INITS)}, or random"})
    temporal_attention_init: str = field(
        default="zero_output", metadata={"help": f"Model 3: {', '.join(TEMPORAL_ATTENTION_INITS)}"}
    )
    temporal_encoder_init: str = field(
        default="random", metadata={"help": f"Model 2: {', '.join(TEMPORAL_ENCODER_INITS)}"}
    )
    num_frames: int | None = field(default=None, metadata={"help": "in a clip; position embeddings are resized"})
    image_size: int | None = field(default=None, metadata={"help": "side of a frame; position embeddings are resized"})
    drop_path_rate: float | None = field(default=None, metadata={"help": "stochastic depth"})
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"of the weights that are trained, whatever they are stored in: {', '.join(DTYPES)}; --bf16 "
            "computes in bfloat16 with float32 weights"
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    freeze: str = field(default="none", metadata={"help": ", ".join(FREEZINGS)})
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "train low-rank updates of queries and values instead, and what is new over time in full; "
            "needs peft"
        },
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "their scale"})


@dataclass
class Start:
    """What training starts from: the model, the processor that feeds it, and where the weights come from."""

    model: Any
    processor: ViViTVideoProcessor
    source: str
    report: InitialisationReport | None = None

    @property
    def is_pretrained(self) -> bool:
        return self.source not in ViViTConfig.presets


def build_model(
    arguments: ModelArguments, data: DataArguments, label_map: LabelMap, say: Callable[[str], None]
) -> Start:
    """Loads or makes the model. Raises ValueError for a source or a setting that does not go with it."""
    source = arguments.model_name_or_path
    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype}: expected one of {', '.join(DTYPES)}.")
    sizes = {
        name: value
        for name in ("num_frames", "image_size", "drop_path_rate")
        if (value := getattr(arguments, name)) is not None
    }
    structure = {
        name: value
        for name in ("attention_type", "embedding_type", "num_sampled_frames", "num_temporal_layers")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.tubelet_size is not None:
        structure["tubelet_size"] = tuple(int(side) for side in arguments.tubelet_size.split(","))
    settings: dict[str, Any] = {}
    report = None
    if source in ViViTConfig.presets:
        config = ViViTConfig.from_preset(source, **{**structure, **sizes, **label_map.config_fields()})
        model = ViViTForVideoClassification(config)
        say(f"{source}: new weights")
    else:
        stored = AutoConfig.from_pretrained(source)
        if stored.model_type in ("vivit_hf", "vivit"):
            model = _from_vivit(source, structure, {**sizes, "dtype": DTYPES[arguments.dtype]}, label_map, say)
            settings = _processor_settings(source)
        elif stored.model_type in _IMAGE_TYPES:
            model, report = _from_image(source, arguments, structure, sizes, label_map, say)
            kept = ("image_mean", "image_std", "rescale_factor", "do_normalize", "do_rescale")
            settings = {name: value for name, value in _processor_settings(source).items() if name in kept}
        else:
            raise ValueError(
                f"{source} is a {stored.model_type}; expected a ViViT or an image ViT of transformers. Weights of timm "
                "and of the JAX ViTs become a ViViT with conversion/convert_vit_checkpoint.py."
            )
        stored_dtype = str(stored.dtype or "float32").removeprefix("torch.")
        if stored_dtype != arguments.dtype:
            say(f"{source}: stored in {stored_dtype}, trained and saved in {arguments.dtype} (--dtype)")
    model.to(DTYPES[arguments.dtype])
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    _check_freezing(model, arguments, report)
    if arguments.lora_rank:
        model = _with_lora(model, arguments, report, say)
    return Start(model, _processor(model.config, settings, data), source, report)


def _from_vivit(
    source: str, structure: dict, settings: dict, label_map: LabelMap, say: Callable[[str], None]
) -> ViViTForVideoClassification:
    old = ViViTForVideoClassification.config_class.from_pretrained(source)
    for name, value in structure.items():
        there = getattr(old, name)
        if (list(value) if isinstance(value, tuple) else value) != there:
            raise ValueError(f"{source} has {name}={there!r}, which is in its weights: leave --{name} {value} out.")
    fields = label_map.config_fields()
    has_same = sorted(LabelMap.from_config(old).names) == sorted(label_map.names) if old.num_labels else False
    if has_same:  # its classifier goes on, in its order
        say(f"{source}: the same {old.num_labels} classes, and so the same classifier")
        fields = {"problem_type": fields["problem_type"]}
    with _without_load_report():
        model = ViViTForVideoClassification.from_pretrained(source, **settings, **fields)
    if not has_same:
        with torch.no_grad():
            torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(model.classifier.bias)
        say(f"{source}: a new classifier for {len(label_map.names)} classes")
    return model


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Leave out transformers' report on keys: the classifier is new on purpose, and anything else is an error."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _from_image(
    source: str,
    arguments: ModelArguments,
    structure: dict,
    sizes: dict,
    label_map: LabelMap,
    say: Callable[[str], None],
) -> ViViTForVideoClassification:
    with _without_load_report():
        vit, keys = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in keys["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"{source} lacks {len(missing)} weights of its model: {', '.join(missing[:5])}.")
    structure = {"attention_type": "factorised_encoder", **structure}
    config = config_from_vit(vit.config, **{**structure, **sizes, **label_map.config_fields()})
    model = ViViTForVideoClassification(config)
    inits = {
        "temporal_attention_init": arguments.temporal_attention_init,
        "temporal_encoder_init": arguments.temporal_encoder_init,
    }
    is_random = arguments.tubelet_init == "random"
    kernel = model.vivit.embeddings.patch_embeddings.projection.weight.detach().clone()
    report = initialise_from_vit(
        model, vit, tubelet_init="central_frame" if is_random else arguments.tubelet_init, **inits
    )
    if is_random:
        model.vivit.embeddings.patch_embeddings.projection.weight.data.copy_(kernel)
        report.parameters["vivit.embeddings.patch_embeddings.projection.weight"] = "newly initialised"
    say(f"{source}: {report} parameters")
    return model, report


def _check_freezing(
    model: ViViTForVideoClassification, arguments: ModelArguments, report: InitialisationReport | None
) -> None:
    """Raise ValueError if weights that nobody has trained would be frozen."""
    if arguments.freeze == "none" and not arguments.lora_rank:
        return
    given = f"--freeze {arguments.freeze}" if arguments.freeze != "none" else f"--lora_rank {arguments.lora_rank}"
    if arguments.lora_rank and arguments.freeze != "none":
        raise ValueError("--lora_rank freezes all but its updates and the classifier: leave --freeze out.")
    if arguments.model_name_or_path in ViViTConfig.presets:
        raise ValueError(f"{given} would freeze the random weights of the preset: leave it out, or start from a model.")
    if arguments.lora_rank:
        return  # what is untrained is trained in full
    if _has_random_tubelets(report):
        raise ValueError(f"{given} would freeze the random kernel of --tubelet_init random: leave one of them out.")
    is_new = "temporal_encoder" in untrained_modules(model)
    # An output projection of zero has no effect yet: the encoder is then an average over time.
    is_random = is_new and model.vivit.temporal_encoder.layer[0].attention.o_proj.weight.any()
    if arguments.freeze == "all_but_head" and is_random:
        raise ValueError(
            "--freeze all_but_head would freeze the temporal encoder, which is newly initialised. Use --freeze "
            "spatial, or --num_temporal_layers 0 for the average over time."
        )


def _has_random_tubelets(report: InitialisationReport | None) -> bool:
    kernel = "vivit.embeddings.patch_embeddings.projection.weight"
    return report is not None and report.parameters[kernel] == "newly initialised"


def _with_lora(
    model: ViViTForVideoClassification,
    arguments: ModelArguments,
    report: InitialisationReport | None,
    say: Callable[[str], None],
) -> Any:
    from peft import LoraConfig, get_peft_model

    whole = untrained_modules(model)
    if _has_random_tubelets(report) and "vivit.embeddings" not in whole:
        whole.append("vivit.embeddings")
    if whole:
        say(f"LoRA: trained in full, since they know nothing of time yet: {', '.join(whole)}")
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        target_modules=LORA_TARGETS,
        exclude_modules=rf".*\.({'|'.join(whole)})\..*" if whole else None,
        modules_to_save=["classifier", *whole],
    )
    return get_peft_model(model, settings)


def _processor_settings(source: str) -> dict[str, Any]:
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:  # there is none
        return {}
    return settings


def _processor(config: Any, settings: dict[str, Any], data: DataArguments) -> ViViTVideoProcessor:
    height, width = config.frame_size
    processor = ViViTVideoProcessor.from_dict({**settings, "num_frames": config.num_frames})
    changes: dict[str, Any] = {"crop_size": {"height": height, "width": width}}
    old_crop = min(processor.crop_size.values())
    if data.resize is not None:
        changes["size"] = {"shortest_edge": data.resize}
    elif changes["crop_size"] != processor.crop_size:
        old_side = min(processor.size.values())
        changes["size"] = {"shortest_edge": round(min(height, width) * old_side / old_crop)}
    for name in ("frame_stride", "frames_per_second"):
        if getattr(data, name) is not None:
            changes[name] = getattr(data, name)
    if data.frame_stride is not None:
        changes["frames_per_second"] = None
    limits = {"allow_private_addresses": data.allow_private_addresses}
    return ViViTVideoProcessor.from_dict({**processor.to_dict(), **changes}, video_limits=limits)
