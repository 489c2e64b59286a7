"""The model of `finetune.py`: a ViViT, a preset, or an image ViT that becomes a ViViT; with its processor."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from finetuning_data import DataArguments

from vivit_hf import (
    InitialisationReport,
    ViViTConfig,
    ViViTForVideoClassification,
    ViViTVideoProcessor,
    config_from_vit,
    initialise_from_vit,
)
from vivit_hf.configuration_vivit import ATTENTION_TYPES, EMBEDDING_TYPES
from vivit_hf.conversion.image_sources import read_image_source
from vivit_hf.conversion.weight_files import find_file, has_processor, read_json
from vivit_hf.data.labels import LabelMap
from vivit_hf.initialisation.from_image import TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS, TUBELET_INITS
from vivit_hf.initialisation.model_processor import processor_for, resize_ratio_of
from vivit_hf.training.recipes import Recipe
from vivit_hf.training.trainer import FREEZINGS, LORA_TARGETS, untrained_modules


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Settings of the model and of its clips; of a pair, one takes the place of the other.
_STRUCTURE = ("attention_type", "embedding_type", "tubelet_size", "num_sampled_frames", "num_temporal_layers")
_SIZES = ("num_frames", "image_size")
_SAMPLING = (("frame_stride", "frames_per_second"), ("resize", "resize_ratio"))
_SETTINGS = (*((name,) for name in (*_STRUCTURE, *_SIZES)), *_SAMPLING)
_INITS = {"tubelet_init": "central_frame", "temporal_attention_init": "zero_output", "temporal_encoder_init": "random"}
_LARGEST_DEFAULT_SIZE = 224  # image models of 384 and 518 pixels are common, and a clip has 16 times their tokens
GIVEN, DEFAULT = "given", "default"


@dataclass
class ModelArguments:
    """What to start from, and what is trained of it."""

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={
            "help": "a ViViT or an image ViT, Hub id or folder; weights of timm (.safetensors) or of JAX (.npz); or a "
            "preset such as vivit-tiny"
        },
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
    tubelet_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT: {', '.join(TUBELET_INITS)}, or random (default: central_frame)"},
    )
    temporal_attention_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT, Model 3: {', '.join(TEMPORAL_ATTENTION_INITS)} (default: zero_output)"},
    )
    temporal_encoder_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT, Model 2: {', '.join(TEMPORAL_ENCODER_INITS)} (default: random)"},
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "in a clip (default: those of a ViViT, the recipe's, or 32)"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of a frame (default: that of a ViViT, the recipe's, or an image ViT's up to 224)"},
    )
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


@dataclass
class Settings:
    """Settings of the model and of its clips by name, and where each comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def of(self, *names: str) -> dict[str, Any]:
        return {name: self.values[name] for name in names if name in self.values}


def choose_settings(sources: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Each setting from the first of the sources that has it; left out where none does."""
    chosen = Settings()
    for group in _SETTINGS:
        for origin, values in sources.items():
            found = {name: values[name] for name in group if values.get(name) is not None}
            if found:
                chosen.values |= found
                chosen.origins |= dict.fromkeys(found, origin)
                break
    return chosen


def build_model(
    arguments: ModelArguments,
    data: DataArguments,
    label_map: LabelMap,
    say: Callable[[str], None],
    recipe: Recipe | None = None,
) -> Start:
    """
    Loads or makes the model and its processor. A setting is the one that is given, else that of a ViViT, else that of
    the recipe, else the default.

    Raises ValueError for a source or a setting that does not go with it.
    """
    source = arguments.model_name_or_path
    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype}: expected one of {', '.join(DTYPES)}.")
    given = _given_settings(arguments, data)
    recipes = {f"recipe {recipe.name}": recipe.model} if recipe else {}
    is_preset = source in ViViTConfig.presets
    stored = {} if is_preset else _stored_config(source)
    if is_preset or stored.get("model_type") in ("vivit_hf", "vivit"):
        start = _from_vivit(source, arguments, given, recipes, label_map, say)
    else:
        start = _from_image(source, arguments, given, recipes, label_map, say)
    stored_dtype = str(stored.get("dtype") or stored.get("torch_dtype") or "float32").removeprefix("torch.")
    if stored_dtype != arguments.dtype:
        say(f"{source}: stored in {stored_dtype}, trained and saved in {arguments.dtype} (--dtype)")
    model = start.model.to(DTYPES[arguments.dtype])
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    limits = {**(start.processor.video_limits or {}), "allow_private_addresses": data.allow_private_addresses}
    start.processor.video_limits = limits
    _check_freezing(model, arguments, start.report)
    if arguments.lora_rank:
        start.model = _with_lora(model, arguments, start.report, say)
    return start


def _given_settings(arguments: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """What the command line or the file of settings says."""
    given = {
        name: value for group in _SETTINGS for name in group if (value := _value(name, arguments, data)) is not None
    }
    if "tubelet_size" in given:
        try:
            given["tubelet_size"] = [int(side) for side in given["tubelet_size"].split(",")]
        except ValueError:
            raise ValueError(f"--tubelet_size is time,height,width, got {given['tubelet_size']!r}.") from None
    for group in _SAMPLING:
        if len(both := [name for name in group if name in given]) > 1:
            raise ValueError(f"--{both[0]} and --{both[1]} set the same: leave one of them out.")
    return given


def _value(name: str, *arguments: Any) -> Any:
    return next(getattr(one, name) for one in arguments if hasattr(one, name))


def _stored_config(source: str) -> dict[str, Any]:
    """The contents of config.json; empty for a single file of weights."""
    if Path(source).is_file() or Path(source).suffix in (".npz", ".safetensors"):
        return {}
    file = find_file(source, "config.json")
    if file is None:
        raise ValueError(f"{source} has no config.json, which says what kind of model it is.")
    return read_json(file)


def _from_vivit(
    source: str,
    arguments: ModelArguments,
    given: dict[str, Any],
    recipes: dict[str, Mapping[str, Any]],
    label_map: LabelMap,
    say: Callable[[str], None],
) -> Start:
    """A ViViT with its weights, or a preset with new ones."""
    for name in _INITS:
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"{source} is not an image ViT to start from: leave --{name} {value} out.")
    is_preset, processor = source in ViViTConfig.presets, None
    stored = ViViTConfig.from_preset(source) if is_preset else ViViTConfig.from_pretrained(source)
    if not is_preset and has_processor(source):
        processor = ViViTVideoProcessor.from_pretrained(source)
    own = _settings_of(stored, processor)
    settings = choose_settings({GIVEN: given, source: own, **recipes})
    fields = {**settings.of(*_SIZES), **label_map.config_fields()}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    if is_preset:
        model = ViViTForVideoClassification(ViViTConfig.from_preset(source, **{**settings.of(*_STRUCTURE), **fields}))
        say(f"{source}: new weights")
    else:
        _check_structure(source, stored, given)
        model = _load_vivit(source, stored, {**fields, "dtype": DTYPES[arguments.dtype]}, label_map, say)
    start = Start(model, _processor(model.config, processor, settings, source), source)
    _say_settings(start, settings, processor is not None, say)
    for recipe, values in recipes.items():
        passed_over = [
            f"{name} {round(values[name], 3) if isinstance(values[name], float) else values[name]}"
            for name, origin in settings.origins.items()
            if origin == source and values.get(name) not in (None, settings.values[name])
        ]
        if passed_over:
            say(f"  {source} has its own, so these of {recipe} do not count: {', '.join(passed_over)}")
    return start


def _settings_of(config: ViViTConfig, processor: ViViTVideoProcessor | None) -> dict[str, Any]:
    """What a ViViT and its processor have of the settings."""
    settings = {name: getattr(config, name) for name in (*_STRUCTURE, *_SIZES)}
    if config.attention_type != "factorised_encoder":
        del settings["num_temporal_layers"]
    if processor is not None:
        rate = "frame_stride" if processor.frames_per_second is None else "frames_per_second"
        settings |= {rate: getattr(processor, rate), "resize_ratio": resize_ratio_of(processor.to_dict())}
    return settings


def _check_structure(source: str, stored: ViViTConfig, given: dict[str, Any]) -> None:
    """Raises ValueError for a given setting that the weights contradict."""
    for name in _STRUCTURE:
        if name not in given:
            continue
        is_kind = name in ("attention_type", "embedding_type")  # of which there are two spellings
        wanted = getattr(ViViTConfig(**{name: given[name]}), name) if is_kind else given[name]
        if wanted != getattr(stored, name):
            raise ValueError(
                f"{source} has {name}={getattr(stored, name)!r}, which is in its weights: leave --{name} "
                f"{given[name]} out."
            )


def _load_vivit(
    source: str, stored: ViViTConfig, fields: dict[str, Any], label_map: LabelMap, say: Callable[[str], None]
) -> ViViTForVideoClassification:
    has_same = sorted(LabelMap.from_config(stored).names) == sorted(label_map.names) if stored.num_labels else False
    if has_same:  # its classifier goes on, in its order
        say(f"{source}: the same {stored.num_labels} classes, and so the same classifier")
        fields = {name: value for name, value in fields.items() if name not in label_map.config_fields()}
        fields["problem_type"] = label_map.config_fields()["problem_type"]
    with _without_load_report():
        model = ViViTForVideoClassification.from_pretrained(source, **fields)
    if not has_same:
        with torch.no_grad():
            torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(model.classifier.bias)
        say(f"{source}: a new classifier for {len(label_map.names)} classes")
    return model


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """
    Leave out transformers' reports on keys, where the classifier is new on purpose and anything else is an error, and
    on layers that no tensor parallelism shards.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _from_image(
    source: str,
    arguments: ModelArguments,
    given: dict[str, Any],
    recipes: dict[str, Mapping[str, Any]],
    label_map: LabelMap,
    say: Callable[[str], None],
) -> Start:
    """A ViViT from an image ViT, which decides on its width, its layers, its patches and how pixels are normalised."""
    with _without_load_report():
        image = read_image_source(source)
    sizes = image.vit.config.image_size
    image_size = min(_LARGEST_DEFAULT_SIZE, *([sizes, sizes] if isinstance(sizes, int) else sizes))
    defaults = {"attention_type": "factorised_encoder", "image_size": image_size}
    settings = choose_settings({GIVEN: given, **recipes, DEFAULT: defaults})
    fields = {**settings.of(*_STRUCTURE, *_SIZES), **label_map.config_fields()}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    model = ViViTForVideoClassification(config_from_vit(image.vit.config, **fields))
    inits = {name: getattr(arguments, name) or default for name, default in _INITS.items()}
    is_random = inits["tubelet_init"] == "random"
    kernel = model.vivit.embeddings.patch_embeddings.projection.weight.detach().clone()
    report = initialise_from_vit(model, image.vit, **inits | ({"tubelet_init": "central_frame"} if is_random else {}))
    if is_random:
        model.vivit.embeddings.patch_embeddings.projection.weight.data.copy_(kernel)
        report.parameters["vivit.embeddings.patch_embeddings.projection.weight"] = "newly initialised"
    say(f"{source}: {report} parameters")
    for note in image.notes:
        say(f"{source}: {note}")
    settings.origins.setdefault("tubelet_size", source)
    if resize_ratio_of(image.processor_settings or {}):
        settings.origins.setdefault("resize", source)
    start = Start(model, _processor(model.config, image.processor_settings, settings, source), source, report)
    _say_settings(start, settings, image.processor_settings is not None, say)
    return start


def _processor(config: ViViTConfig, stored: Any, settings: Settings, source: str) -> ViViTVideoProcessor:
    """The processor for clips of the model; what comes from `source` is in `stored`."""
    names = [name for group in _SAMPLING for name in group if settings.origins.get(name, source) != source]
    return processor_for(config, stored, **settings.of(*names))


def _say_settings(start: Start, settings: Settings, has_processor: bool, say: Callable[[str], None]) -> None:
    """A line for each origin of settings; `has_processor` says whether the start has one, whose pixels are taken."""
    config, processor = start.model.config, start.processor
    rate = "frame_stride" if processor.frames_per_second is None else "frames_per_second"
    names = ["attention_type", "embedding_type", "tubelet_size", *_SIZES]
    if config.attention_type == "factorised_encoder":
        names.insert(1, "num_temporal_layers")
    origins = settings.origins
    shown = [(origins.get(name, DEFAULT), f"{name} {getattr(config, name)}") for name in names]
    shown.append((origins.get(rate, DEFAULT), f"{rate} {getattr(processor, rate)}"))
    resize = origins.get("resize") or origins.get("resize_ratio", DEFAULT)
    shown.append((resize, f"short side resized to {processor.size['shortest_edge']}"))
    mean, std = ([round(value, 3) for value in values] for values in (processor.image_mean, processor.image_std))
    shown.append((start.source if has_processor else DEFAULT, f"image_mean {mean}, image_std {std}"))
    say("The model and its clips:")
    for origin in (GIVEN, *dict.fromkeys(one for one, _ in shown if one not in (GIVEN, DEFAULT)), DEFAULT):
        if texts := [text for one, text in shown if one == origin]:
            say(f"  {origin}: {', '.join(texts)}")


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


def check_checkpoint(checkpoint: str, start: Start, lora_rank: int | None) -> None:
    """Raise ValueError for a checkpoint of a run with another model, other classes or another --lora_rank."""
    way_out = "give another --output_dir, or --resume_from_checkpoint no to start anew."
    adapter, whole = Path(checkpoint) / "adapter_config.json", Path(checkpoint) / "config.json"
    rank = read_json(adapter)["r"] if adapter.exists() else None
    if rank != (lora_rank or None) and (adapter.exists() or whole.exists()):
        kind = "without LoRA" if rank is None else f"of --lora_rank {rank}"
        raise ValueError(f"{checkpoint} is {kind}, unlike this run: {way_out}")
    if not whole.exists():
        return
    stored = ViViTConfig.from_pretrained(checkpoint)
    for name in ("id2label", *_STRUCTURE, *_SIZES):
        saved, wanted = getattr(stored, name), getattr(start.model.config, name)
        if saved != wanted:
            raise ValueError(f"{checkpoint} has {name} {saved}, this run {wanted}: {way_out}")
