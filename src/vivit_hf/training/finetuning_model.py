"""The model of a fine-tuning run: a ViViT, a preset, or an image ViT that becomes a ViViT; with its processor."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..configuration_vivit import ViViTConfig
from ..data.labels import LabelMap
from ..inference.clips import check_takes_masks
from ..inference.finite_outputs import NonFiniteError, broken_weights
from ..initialisation.from_image import InitialisationReport, config_from_vit, initialise_from_vit, list_unused
from ..initialisation.image_arrays import ImageSource
from ..initialisation.image_features import default_image_size
from ..initialisation.image_models import image_structure
from ..initialisation.image_sources import read_image_source
from ..initialisation.model_processor import processor_for, resize_ratio_of
from ..initialisation.weight_files import find_file, has_processor, read_json
from ..modeling_vivit import ViViTForPreTraining, ViViTForVideoClassification, ViViTPreTrainedModel
from ..video_processing_vivit import ViViTVideoProcessor
from .finetuning_arguments import PROBLEM_TYPES, DataArguments, ModelArguments, Say
from .finetuning_parser import Arguments
from .parameters import untrained_modules
from .recipes import RECIPES


# Settings of the model and of its clips; those of one group exclude each other.
STRUCTURE = (
    *("attention_type", "embedding_type", "tubelet_size", "num_sampled_frames"),
    *("num_temporal_layers", "temporal_pooling"),
)
SIZES = ("num_frames", "image_size")
_SAMPLING = (("frame_stride", "frames_per_second", "frame_sampling"), ("resize", "resize_ratio"))
_POLICY = "short_video_policy"
_SETTINGS = (*((name,) for name in (*STRUCTURE, *SIZES)), *_SAMPLING, (_POLICY,))
_INITS = {"tubelet_init": "central_frame", "temporal_attention_init": "zero_output", "temporal_encoder_init": None}
GIVEN, DEFAULT = "given", "default"
_TUBELETS = "vivit.embeddings.patch_embeddings.projection.weight"
_LORA_TARGETS = r".*\.(q_proj|v_proj)"


@dataclass
class Start:
    """The model that training starts from, its processor, and where the weights come from."""

    model: Any
    processor: ViViTVideoProcessor
    source: str
    report: InitialisationReport | None = None


@dataclass
class Settings:
    """Settings of the model and of its clips by name, and the origin of each."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def of(self, *names: str) -> dict[str, Any]:
        return {name: self.values[name] for name in names if name in self.values}


def choose_settings(sources: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Take each setting from the first source that has it, and leave it out if none has."""
    chosen = Settings()
    for group in _SETTINGS:
        for origin, values in sources.items():
            found = {name: values[name] for name in group if values.get(name) is not None}
            if found:
                chosen.values |= found
                chosen.origins |= dict.fromkeys(found, origin)
                break
    return chosen


@dataclass(frozen=True)
class _Request:
    """A model to build: the source, the arguments, the settings that they and the recipe give, and the labels."""

    source: str
    arguments: ModelArguments
    given: Mapping[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]  # by the name to print; empty without a recipe
    label_map: LabelMap | None  # None for masked pretraining
    pretraining: Mapping[str, Any]  # fields of the configuration
    say: Say

    @property
    def model_class(self) -> Any:
        return ViViTForPreTraining if self.label_map is None else ViViTForVideoClassification

    def config_fields(self, settings: Settings, *names: str) -> dict[str, Any]:
        """Return the settings with these names, and the fields that depend on labels and arguments."""
        labels = {"num_labels": 0} if self.label_map is None else self.label_map.config_fields()
        fields = {**settings.of(*names), **labels, **self.pretraining}
        if self.arguments.drop_path_rate is not None:
            fields["drop_path_rate"] = self.arguments.drop_path_rate
        if self.arguments.merge_tokens is not None:
            fields["merge_tokens"] = _merge_tokens(self.arguments.merge_tokens)
            settings.origins["merge_tokens"] = GIVEN
        return fields


def _merge_tokens(text: str) -> int | list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--merge_tokens is one number, or one per layer such as 8,8,4,0, got {text!r}.") from None
    return counts[0] if len(counts) == 1 else counts


def build_model(
    wanted: ModelArguments,
    data: DataArguments,
    label_map: LabelMap | None,
    say: Say,
    *,
    recipe: str | None = None,
    pretraining: Mapping[str, Any] = MappingProxyType({}),
) -> Start:
    """Load or make the model and its processor.

    A setting comes from the arguments, else from a ViViT, else from the recipe, else it is the default. Without a label
    map, the model is a `ViViTForPreTraining`, and `pretraining` has fields of its configuration. Raises ValueError for
    a source that cannot be used, or a setting that contradicts it.
    """
    source = wanted.model_name_or_path
    recipes = {f"recipe {recipe}": RECIPES[recipe].model} if recipe else {}
    request = _Request(source, wanted, _given_settings(data, wanted), recipes, label_map, pretraining, say)
    stored = stored_config(source)
    start = _from_vivit(request) if is_vivit(source, stored) else _from_image(request)
    stored_dtype = str(stored.get("dtype") or stored.get("torch_dtype") or "float32").removeprefix("torch.")
    if stored_dtype != wanted.dtype:
        say(f"{source}: stored in {stored_dtype}, trained and saved in {wanted.dtype} (--dtype)")
    model = start.model.to(getattr(torch, wanted.dtype))
    if broken := broken_weights(model):
        raise NonFiniteError(
            f"The weights of {source} contain NaN or infinite numbers in {wanted.dtype} ({broken}): the checkpoint is "
            "damaged or its training diverged."
        )
    if wanted.attn_implementation is not None:
        model.set_attn_implementation(wanted.attn_implementation)
    check_takes_masks(model, start.processor)
    limits = start.processor.video_limits or {}
    start.processor.video_limits = {**limits, "allow_private_addresses": data.allow_private_addresses}
    has_random_tubelets = start.report is not None and start.report.parameters[_TUBELETS] == "newly initialised"
    _check_freezing(model, wanted, has_random_tubelets)
    if wanted.lora_rank:
        start.model = add_lora(model, wanted, has_random_tubelets, say)
    return start


def is_vivit(source: str, stored: Mapping[str, Any]) -> bool:
    """Return whether a source is a ViViT or a preset, by its stored configuration; otherwise it is an image ViT."""
    return source in ViViTConfig.presets or stored.get("model_type") in ("vivit_hf", "vivit")


def labels_to_score(source: str) -> LabelMap:
    """Return the labels of a fine-tuned ViViT. Raises ValueError for a model that has no trained classifier."""
    stored = stored_config(source)
    config = ViViTConfig.from_pretrained(source) if stored and is_vivit(source, stored) else None
    label_map = LabelMap.from_config(config) if config is not None and config.num_labels else None
    if label_map is None or label_map.is_regression:
        raise ValueError(f"--do_eval scores a fine-tuned ViViT, and {source} has no classifier: train it first.")
    return label_map


def _given_settings(data: DataArguments, model: ModelArguments) -> dict[str, Any]:
    """Return the settings on the command line or in the settings file."""
    named = {**vars(data), **vars(model)}
    given = {name: named[name] for group in _SETTINGS for name in group if named[name] is not None}
    if "tubelet_size" in given:
        try:
            given["tubelet_size"] = [int(side) for side in given["tubelet_size"].split(",")]
        except ValueError:
            raise ValueError(f"--tubelet_size is time,height,width, got {given['tubelet_size']!r}.") from None
    for group in _SAMPLING:
        # Frames of a clip have a distance, those spread over a video have none.
        if len(both := [name for name in group if given.get(name, "clip") != "clip"]) > 1:
            raise ValueError(f"--{both[0]} and --{both[1]} set the same: leave one of them out.")
    return given


def stored_config(source: str) -> dict[str, Any]:
    """Return the contents of config.json; empty for a preset or a single file of weights."""
    if source in ViViTConfig.presets or Path(source).is_file() or Path(source).suffix in (".npz", ".safetensors"):
        return {}
    file = find_file(source, "config.json")
    if file is None:
        raise ValueError(f"{source} has no config.json, so its kind of model is unknown.")
    return read_json(file)


def _from_vivit(request: _Request) -> Start:
    """Start from a ViViT with its weights, or from a preset with new ones."""
    source, arguments, say = request.source, request.arguments, request.say
    for name in _INITS:
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"{source} is not an image ViT to start from: leave --{name} {value} out.")
    is_preset, processor = source in ViViTConfig.presets, None
    stored = ViViTConfig.from_preset(source) if is_preset else ViViTConfig.from_pretrained(source)
    if not is_preset and has_processor(source):
        processor = ViViTVideoProcessor.from_pretrained(source)
    own = _settings_of(stored, processor)
    settings = choose_settings({GIVEN: request.given, source: own, **request.recipes})
    if is_preset:
        fields = request.config_fields(settings, *STRUCTURE, *SIZES)
        model = request.model_class(ViViTConfig.from_preset(source, **fields))
        say(f"{source}: new weights")
    else:
        _check_structure(source, stored, request.given)
        model = _load_vivit(request, stored, settings)
    start = Start(model, _processor(model.config, processor, settings, source), source)
    _say_settings(start, settings, processor is not None, say)
    for recipe, values in request.recipes.items():
        overridden = [
            f"{name} {round(values[name], 3) if isinstance(values[name], float) else values[name]}"
            for name, origin in settings.origins.items()
            if origin == source and values.get(name) not in (None, settings.values[name])
        ]
        if overridden:
            say(f"  {source} overrides these settings of {recipe}: {', '.join(overridden)}")
    return start


def _settings_of(config: ViViTConfig, processor: ViViTVideoProcessor | None) -> dict[str, Any]:
    """Return the settings of a ViViT and its processor."""
    settings = {name: getattr(config, name) for name in (*STRUCTURE, *SIZES)}
    if config.attention_type != "factorised_encoder":
        del settings["num_temporal_layers"]
    if processor is not None:
        rate = _rate_of(processor)
        settings |= {rate: getattr(processor, rate), "resize_ratio": resize_ratio_of(processor.to_dict())}
        settings[_POLICY] = processor.short_video_policy
    return settings


def _rate_of(processor: ViViTVideoProcessor) -> str:
    """Return the name of the setting that says how far the frames of a clip are apart."""
    if processor.frame_sampling == "uniform":
        return "frame_sampling"
    return "frame_stride" if processor.frames_per_second is None else "frames_per_second"


def _check_structure(source: str, stored: ViViTConfig, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a given setting that contradicts the weights."""
    for name in STRUCTURE:
        if name not in given:
            continue
        is_kind = name in ("attention_type", "embedding_type")  # these words have two spellings each
        wanted = getattr(ViViTConfig(**{name: given[name]}), name) if is_kind else given[name]
        if wanted != getattr(stored, name):
            raise ValueError(
                f"{source} has {name}={getattr(stored, name)!r}, which its weights fix: leave --{name} {given[name]} "
                "out."
            )


def _load_vivit(request: _Request, stored: ViViTConfig, settings: Settings) -> Any:
    """Load a ViViT with its classifier if the classes are the same, in its order; otherwise with a new classifier."""
    source, label_map = request.source, request.label_map
    fields = {**request.config_fields(settings, *SIZES), "dtype": getattr(torch, request.arguments.dtype)}
    fields |= {"calibration": None, "optimization": None}
    for name, made in (("calibration", "calibration"), ("optimization", "setting of `vivit-hf tune`")):
        if getattr(stored, name) is not None:
            request.say(f"{source}: its {made} is left out, which does not hold for other weights")
    if label_map is None:
        with without_load_report():
            model, info = ViViTForPreTraining.from_pretrained(source, output_loading_info=True, **fields)
        is_new = any(name.startswith("decoder.") for name in info["missing_keys"])
        request.say(f"{source}: {'a new decoder' if is_new else 'its decoder is kept'}")
        return model
    has_same = bool(stored.num_labels) and sorted(LabelMap.from_config(stored).names) == sorted(label_map.names)
    if has_same:
        request.say(f"{source}: it has the same {stored.num_labels} classes, so its classifier is kept")
        del fields["id2label"], fields["label_groups"]
    with without_load_report():
        model = ViViTForVideoClassification.from_pretrained(source, **fields)
    if not has_same:
        with torch.no_grad():
            torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(model.classifier.bias)
        request.say(f"{source}: a new classifier for {len(label_map.names)} classes")
    return model


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers on missing keys, which are intended or else an error, and on tensor parallelism."""
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _from_image(request: _Request) -> Start:
    """Start from an image ViT, which fixes the width, the layers, the patches and the normalisation of pixels."""
    source, say = request.source, request.say
    with without_load_report():
        image = read_image_source(source)
    defaults = {"attention_type": "factorised_encoder", "image_size": default_image_size(image.vit.config)}
    settings = choose_settings({GIVEN: request.given, **request.recipes, DEFAULT: defaults})
    fields = request.config_fields(settings, *STRUCTURE, *SIZES)
    if len(size := fields.get("tubelet_size", ())) == 1:  # of time alone
        fields["tubelet_size"] = [*size, *image_structure(image.vit.config).patch_size]
    model = request.model_class(config_from_vit(image.vit.config, **fields))
    report = _initialise(model, image, request.arguments)
    say(f"{source}: {report} parameters")
    if unused := report.unused():
        say(f"{source}: left out {', '.join(list_unused(unused))}")
    for note in image.notes:
        say(f"{source}: {note}")
    settings.origins.setdefault("tubelet_size", source)
    if resize_ratio_of(image.processor_settings or {}):
        settings.origins.setdefault("resize", source)
    start = Start(model, _processor(model.config, image.processor_settings, settings, source), source, report)
    _say_settings(start, settings, image.processor_settings is not None, say)
    return start


def _initialise(model: ViViTPreTrainedModel, image: ImageSource, arguments: ModelArguments) -> InitialisationReport:
    """Initialise a model from an image ViT; "random" keeps the tubelet kernel that the model was made with."""
    inits: dict[str, Any] = {name: getattr(arguments, name) or default for name, default in _INITS.items()}
    if inits["tubelet_init"] != "random":
        return initialise_from_vit(model, image, **inits)
    kernel = model.get_parameter(_TUBELETS).detach().clone()
    report = initialise_from_vit(model, image, **{**inits, "tubelet_init": _INITS["tubelet_init"]})
    model.get_parameter(_TUBELETS).data.copy_(kernel)
    report.parameters[_TUBELETS] = "newly initialised"
    return report


def _processor(config: ViViTConfig, stored: Any, settings: Settings, source: str) -> ViViTVideoProcessor:
    """Return the processor for clips of the model; `stored` has the settings that come from `source`."""
    groups = (*_SAMPLING, (_POLICY,))
    names = [name for group in groups for name in group if settings.origins.get(name, source) != source]
    return processor_for(config, stored, **settings.of(*names))


def _say_settings(start: Start, settings: Settings, has_processor: bool, say: Say) -> None:
    """Print a line for each origin of settings; with `has_processor`, the normalisation of pixels is the start's."""
    config, processor = start.model.config, start.processor
    rate = _rate_of(processor)
    names = ["attention_type", "embedding_type", "tubelet_size", *SIZES]
    if config.attention_type == "factorised_encoder":
        names[1:1] = ["num_temporal_layers", *(["temporal_pooling"] if config.temporal_pooling else [])]
    origins = settings.origins
    shown = [(origins.get(name, DEFAULT), f"{name} {getattr(config, name)}") for name in names]
    if config.merge_tokens is not None:
        shown.append((origins.get("merge_tokens", start.source), f"merge_tokens {config.merge_tokens}"))
    shown += [(origins.get(name, DEFAULT), f"{name} {getattr(processor, name)}") for name in (rate, _POLICY)]
    resize = origins.get("resize") or origins.get("resize_ratio", DEFAULT)
    shown.append((resize, f"short side resized to {processor.size['shortest_edge']}"))
    mean, std = ([round(value, 3) for value in values] for values in (processor.image_mean, processor.image_std))
    shown.append((start.source if has_processor else DEFAULT, f"image_mean {mean}, image_std {std}"))
    say("The model and its clips:")
    for origin in (GIVEN, *dict.fromkeys(one for one, _ in shown if one not in (GIVEN, DEFAULT)), DEFAULT):
        if texts := [text for one, text in shown if one == origin]:
            say(f"  {origin}: {', '.join(texts)}")


# Training a part of the weights


def _check_freezing(model: ViViTForVideoClassification, arguments: ModelArguments, has_random_tubelets: bool) -> None:
    """Raise ValueError if `--freeze` or `--lora_rank` would freeze weights that have never been trained."""
    if arguments.freeze == "none" and not arguments.lora_rank:
        return
    given = f"--freeze {arguments.freeze}" if arguments.freeze != "none" else f"--lora_rank {arguments.lora_rank}"
    if arguments.model_name_or_path in ViViTConfig.presets:
        raise ValueError(f"{given} would freeze the random weights of the preset: leave it out, or start from a model.")
    if arguments.lora_rank:
        return  # it trains untrained modules in full
    if has_random_tubelets:
        raise ValueError(f"{given} would freeze the random kernel of --tubelet_init random: leave one of them out.")
    is_new = "temporal_encoder" in untrained_modules(model)
    # While its output projections are zero, the encoder is an average over time.
    is_random = is_new and model.vivit.temporal_encoder.layer[0].attention.o_proj.weight.any()
    if arguments.freeze == "all_but_head" and is_random:
        raise ValueError(
            "--freeze all_but_head would freeze the temporal encoder, which is newly initialised. Use --freeze "
            "spatial, or --num_temporal_layers 0 for the average over time."
        )


def check_cache(arguments: Arguments, config: ViViTConfig) -> None:
    """Raise ValueError for arguments that --cache_features does not go with."""
    training = arguments.training
    if not arguments.model.cache_features:
        return
    ending = "Leave one of them out."
    if training.recipe and "cache_features" in RECIPES[training.recipe].arguments:
        ending = f"It comes from the recipe {training.recipe}: use another one."
    if config.attention_type != "factorised_encoder":
        raise ValueError(
            "--cache_features needs Model 2, whose spatial encoder does not depend on time; this model has "
            f"attention_type={config.attention_type!r}. {ending}"
        )
    if arguments.model.classifier_init == "probe" and (config.label_groups or config.problem_type != PROBLEM_TYPES[0]):
        raise ValueError(
            "--classifier_init probe fits a classifier of one label per video: give --classifier_init random for "
            "several labels."
        )
    for name, is_given, reason in (
        ("streaming", arguments.data.streaming, "the videos of a stream cannot be told apart"),
        ("do_eval", not training.do_train, "without training, each clip is encoded once anyway"),
        ("cutmix_alpha", bool(arguments.augmentation.cutmix_alpha), "it mixes pixels (--mixup_alpha mixes tokens)"),
        ("save_batch_picture", bool(training.save_batch_picture), "stored tokens have no pixels"),
        ("teacher", training.teacher is not None, "a teacher sees pixels, which stored tokens do not have"),
    ):
        if is_given:
            raise ValueError(f"--{name} does not go with --cache_features: {reason}. {ending}")


def add_lora(model: ViViTForVideoClassification, arguments: ModelArguments, has_random_tubelets: bool, say: Say) -> Any:
    """Return a peft model that trains low-rank updates, and in full the classifier and modules that are still new."""
    from peft import LoraConfig, get_peft_model

    whole = untrained_modules(model)
    if has_random_tubelets and "vivit.embeddings" not in whole:
        whole.append("vivit.embeddings")
    if whole:
        say(f"LoRA: trained in full, because they ignore the order of frames so far: {', '.join(whole)}")
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # floats work, too
        target_modules=_LORA_TARGETS,
        exclude_modules=rf".*\.({'|'.join(whole)})\..*" if whole else None,
        modules_to_save=["classifier", *whole],
    )
    with warnings.catch_warnings():  # peft reads a property that newer transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = arguments.model_name_or_path
    return adapted
