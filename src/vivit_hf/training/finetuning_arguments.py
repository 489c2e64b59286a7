"""The arguments of `vivit-hf finetune`: defaults, recipes, settings files and the command line."""

# ruff: noqa: RUF009 (`_argument` makes a dataclass field)

import argparse
import copy
import difflib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser, TrainingArguments

from ..configuration_vivit import ATTENTION_TYPES, EMBEDDING_TYPES, TEMPORAL_POOLINGS
from ..data.annotations import FORMATS, AnnotationError
from ..inference.views import AVERAGINGS
from ..initialisation.from_image import TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS, TUBELET_INITS
from .parameters import FREEZINGS
from .recipes import RECIPES, REFERENCE_BATCH_SIZE


Say = Callable[[str], None]

DTYPES = ("float32", "bfloat16")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
_FLIPS = {"yes": 0.5, "true": 0.5, "auto": 0.5, "no": 0.0, "false": 0.0}  # YAML reads yes and no as true and false


def _argument(default: Any, text: str) -> Any:
    """Return the field of an argument with its help text."""
    return field(default=default, metadata={"help": text})


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}.")


@dataclass
class ModelArguments:
    """The model to start from, and which of its weights are trained."""

    model_name_or_path: str = _argument(
        "google/vit-base-patch16-224-in21k",
        "Hub id or folder of a ViViT or an image ViT; timm (.safetensors) or JAX (.npz) weights; or a preset such as "
        "vivit-tiny",
    )
    attention_type: str | None = _argument(
        None, f"from an image ViT: {', '.join(ATTENTION_TYPES)} (default: factorised_encoder)"
    )
    embedding_type: str | None = _argument(None, f"from an image ViT: {', '.join(EMBEDDING_TYPES)}")
    tubelet_size: str | None = _argument(None, "from an image ViT: time,height,width")
    num_sampled_frames: int | None = _argument(None, "frames that uniform_frame_sampling takes from a clip")
    num_temporal_layers: int | None = _argument(
        None, "layers of Model 2's temporal encoder; 0 is the average-pool baseline"
    )
    temporal_pooling: str | None = _argument(
        None,
        f"from an image ViT, Model 2: pooling over time, {', '.join(TEMPORAL_POOLINGS)} (default: as over space); with "
        "another one than cls, the temporal encoder starts without effect, as a mean with mean",
    )
    tubelet_init: str | None = _argument(
        None, f"from an image ViT: {', '.join(TUBELET_INITS)}, or random (default: central_frame)"
    )
    temporal_attention_init: str | None = _argument(
        None, f"from an image ViT, Model 3: {', '.join(TEMPORAL_ATTENTION_INITS)} (default: zero_output)"
    )
    temporal_encoder_init: str | None = _argument(
        None,
        f"from an image ViT, Model 2: {', '.join(TEMPORAL_ENCODER_INITS)} (default: zero_output with a "
        "temporal_pooling other than cls, else random)",
    )
    num_frames: int | None = _argument(None, "frames of a clip (default: those of a ViViT, the recipe's, or 32)")
    image_size: int | None = _argument(
        None, "height and width of a frame (default: that of a ViViT, the recipe's, or an image ViT's up to 224)"
    )
    drop_path_rate: float | None = _argument(None, "stochastic depth")
    dtype: str = _argument(
        "float32",
        f"dtype of the weights in training, however they are stored: {', '.join(DTYPES)}; --bf16 computes in bfloat16 "
        "with float32 weights",
    )
    attn_implementation: str | None = _argument(None, "eager, sdpa, flash_attention_2, ...")
    freeze: str = _argument("none", ", ".join(FREEZINGS))
    lora_rank: int = _argument(
        0,
        "train low-rank updates of the query and value projections, and new temporal modules in full; requires peft",
    )
    lora_alpha: float = _argument(16.0, "scale of the low-rank updates")

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("freeze", self.freeze, FREEZINGS)
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: expected a positive rank, or 0 to train without LoRA.")
        if self.lora_rank and self.freeze != "none":
            raise ValueError("--lora_rank freezes all weights but its updates and the classifier: leave --freeze out.")
        if self.lora_rank and not importlib.util.find_spec("peft"):
            raise ValueError("--lora_rank requires peft: run `pip install peft`.")


@dataclass
class DataArguments:
    """The videos, their labels, and how clips are taken from them."""

    train_dir: str | None = _argument(None, "folder with one folder of videos per class")
    validation_dir: str | None = _argument(None, "the same for the validation videos")
    train_file: str | None = _argument(None, "CSV, JSON or JSON lines of paths and labels")
    validation_file: str | None = _argument(None, "the same for the validation videos")
    video_root: str | None = _argument(None, "folder that the paths in files are relative to")
    annotation_format: str = _argument("auto", f"format of the files: {', '.join(FORMATS)}")
    missing_videos: str = _argument("error", "error, or skip to leave missing files out")
    allow_private_addresses: bool = _argument(False, "allow downloads from this machine and the local network")
    dataset_name: str | None = _argument(None, "Hub id or folder of a data set")
    dataset_config_name: str | None = _argument(None, "configuration of the data set")
    train_split_name: str = _argument("train", "split of the data set for training")
    validation_split_name: str | None = _argument(
        None, "split of the data set for validation (default: validation or test, if there is one)"
    )
    streaming: bool = _argument(
        False, "do not download the data set first; requires --max_steps; every process reads the whole stream"
    )
    shuffle_buffer_size: int = _argument(100, "number of videos that a stream is shuffled among")
    video_column_name: str | None = _argument(None, "default: path, video, file, ...")
    label_column_name: str | None = _argument(
        None, "default: label, class, ...; several, as noun,verb, are groups of labels"
    )
    label_separator: str | None = _argument(None, "separator between several labels of a video")
    split_column: str = _argument(
        "auto",
        "column that says train, validation or test (default: split, subset or partition, if there is one; none: use "
        "all rows). Test rows serve as validation if there are no others; otherwise they are left out",
    )
    group_column: str | None = _argument(
        None, "column whose values the split keeps together, such as patient, tape or speaker"
    )
    labels_file: str | None = _argument(None, "all labels in the order of the model's output")
    problem_type: str = _argument(PROBLEM_TYPES[0], " or ".join(PROBLEM_TYPES))
    allow_missing_labels: bool = _argument(False, "allow classes without a validation video")
    train_val_split: float | None = _argument(
        0.15,
        "share of the training data to validate on if there are no validation data; 0: none. Parts of one file, and "
        "videos of one --group_column value, stay together",
    )
    max_train_samples: int | None = _argument(None, "use at most this many videos")
    max_eval_samples: int | None = _argument(None, "use at most this many videos")
    frame_stride: int | None = _argument(
        None, "distance between the frames of a clip (default: a ViViT's, the recipe's, or 2)"
    )
    frames_per_second: float | None = _argument(None, "frame rate of a clip, in place of a stride")
    resize: int | None = _argument(None, "short side before the crop, in pixels")
    resize_ratio: float | None = _argument(
        None, "the same as a multiple of the crop (default: the start's or the recipe's, or 256 / 224)"
    )
    num_clips: int = _argument(1, "clips per video in the final evaluation (paper: 4)")
    num_crops: int = _argument(1, "crops per clip in the final evaluation, 1 or 3 (paper: 3)")

    def __post_init__(self) -> None:
        _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1.")


@dataclass
class AugmentationArguments:
    """Regularisation. All of it is off unless it is given here or in the recipe; random crops are always on."""

    horizontal_flip: str = _argument("no", "yes, no, or auto: yes unless class names mention a side or a turn")
    scale_jitter: str | None = _argument(None, "smallest and largest factor, such as 0.9,1.33")
    colour_jitter: float = _argument(0.0, "probability")
    colour_drop: float = _argument(0.0, "probability of a grey clip")
    rand_augment_layers: int = _argument(0, "operations per clip")
    rand_augment_magnitude: float = _argument(10.0, "10 is the full scale")
    mixup_alpha: float = _argument(0.0, "alpha of the Beta distribution")
    cutmix_alpha: float = _argument(0.0, "alpha of the Beta distribution")

    def __post_init__(self) -> None:
        if str(self.horizontal_flip).lower() not in _FLIPS:
            raise ValueError(f"--horizontal_flip {self.horizontal_flip}: expected yes, no or auto.")
        self.scale_factors()

    def flip_probability(self, names_with_sides: Sequence[str]) -> float:
        """Return the probability of a flip; with "auto" it is 0 if class names mention a side."""
        choice = str(self.horizontal_flip).lower()
        return 0.0 if choice == "auto" and names_with_sides else _FLIPS[choice]

    def scale_factors(self) -> tuple[float, float] | None:
        """Return the smallest and the largest factor of the scale jitter, or None without one."""
        if not self.scale_jitter:
            return None
        try:
            smallest, largest = (float(factor) for factor in self.scale_jitter.split(","))
        except ValueError:
            raise ValueError(f"--scale_jitter {self.scale_jitter}: expected two factors such as 0.9,1.33.") from None
        return smallest, largest


@dataclass
class FineTuningArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults for videos, and a few more."""

    recipe: str | None = _argument(None, f"arguments to start from: {', '.join(RECIPES)}")
    layer_decay: float = _argument(1.0, "factor of the learning rate from layer to layer")
    ema_decay: float = _argument(0.0, "decay of a moving average of the weights, which is evaluated and saved; 0: none")
    early_stopping_patience: int = _argument(
        0,
        "stop after this many evaluations without a lower loss, or a better --metric_for_best_model; 0: never",
    )
    class_weights: bool = _argument(False, "give the loss of rare classes more weight")
    balanced_sampling: bool = _argument(False, "draw all classes equally often")
    ddp_find_unused_parameters: bool | None = _argument(False, "search for parameters without a gradient in each step")
    averaging: str = _argument("probabilities", f"what is averaged over views: {' or '.join(AVERAGINGS)}")
    overfit_one_batch: bool = _argument(False, "only test whether the model can learn one batch by heart")
    overfit_steps: int = _argument(200, "maximum number of steps of that test")
    save_batch_picture: str | None = _argument(None, "save a picture of the first training batch to FILE")
    eval_strategy: str = _argument("epoch", "no, steps or epoch")
    save_strategy: str = _argument("epoch", "no, steps, epoch or best")
    logging_steps: float = _argument(10, "optimiser steps; below 1, a share of all steps")
    remove_unused_columns: bool = _argument(False, "has no effect on videos")
    dataloader_num_workers: int = _argument(min(8, os.cpu_count() or 1), "processes that decode videos, per device")
    report_to: None | str | list[str] = _argument(  # noqa: RUF036 (the order that HfArgumentParser reads)
        "tensorboard" if importlib.util.find_spec("tensorboard") else "none", "tensorboard, wandb, all, none, ..."
    )

    def __post_init__(self) -> None:
        _check_choice("averaging", self.averaging, AVERAGINGS)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay}: expected a factor above 0 and at most 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: expected 0 for no average, or a decay below 1, as 0.999.")
        if self.early_stopping_patience < 0:
            raise ValueError(
                f"--early_stopping_patience {self.early_stopping_patience}: expected a number of evaluations, or 0."
            )
        if self.early_stopping_patience:
            self.metric_for_best_model: str | None = self.metric_for_best_model or "loss"
            self.load_best_model_at_end |= self.eval_strategy == self.save_strategy == "epoch"
        super().__post_init__()


class Arguments(NamedTuple):
    """All arguments of a run, by subject."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: FineTuningArguments


_CLASSES = (ModelArguments, DataArguments, AugmentationArguments, FineTuningArguments)
_USAGE = "vivit-hf finetune [settings.yaml] --output_dir DIR [arguments]"
_DESCRIPTION = """
Fine-tune a ViViT on your videos with transformers' Trainer.

    vivit-hf finetune --train_dir videos/train --validation_dir videos/test \\
        --model_name_or_path google/vit-base-patch16-224-in21k --recipe small-data --output_dir my_vivit
    vivit-hf finetune settings.yaml --learning_rate 1e-4           arguments from a file; the command line overrides it
    vivit-hf finetune --do_eval --model_name_or_path my_vivit --validation_dir videos/test --output_dir scores
    vivit-hf finetune --help-all                                   all arguments, including all of the Trainer's
    torchrun --nproc_per_node 8 -m vivit_hf finetune ...           several GPUs; on CPUs add --use_cpu

The data are a folder of class folders (--train_dir), a CSV or JSON of paths and labels or the annotations of Kinetics,
Something-Something v2 or EPIC-Kitchens (--train_file), or a data set of the Hub (--dataset_name). They are checked
before a model is loaded. After an interruption, run the same command again to continue from the last whole checkpoint.
"""
# Those of the Trainer's arguments that --help shows.
_COMMON = (
    "output_dir do_eval num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate weight_decay warmup_steps lr_scheduler_type max_grad_norm optim "
    "label_smoothing_factor seed bf16 gradient_checkpointing torch_compile use_cpu ddp_backend save_total_limit "
    "load_best_model_at_end metric_for_best_model resume_from_checkpoint push_to_hub hub_model_id hub_private_repo"
).split()


def speaker(training: TrainingArguments, echo: Say) -> Say:
    """Return a function that prints with `echo` in the first process, and does nothing in the others."""
    return echo if training.process_index == 0 else lambda text: None


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Silence newer transformers on `gradient_checkpointing`, the only name that older ones and peft know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


def parse_arguments(argv: Sequence[str], echo: Say = print) -> Arguments:
    """Parse the arguments of a run; print the help and exit if they ask for it.

    The command line overrides the settings file, which overrides the recipe, which overrides the defaults.

    Args:
        argv: the command line without the name of the program.
        echo: prints one text.

    Raises:
        AnnotationError: for a settings file that cannot be read.
        ValueError: for a value out of range.
        SystemExit: after the help, and with code 2 for unknown arguments.
    """
    parser = HfArgumentParser(_CLASSES, usage=_USAGE, prog="vivit-hf finetune")
    # The first action of a name: a second one is its negation, such as --no_average_tokens_across_devices.
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if {"-h", "--help", "--help-all"} & set(argv):
        echo(_help_text(actions, is_all="--help-all" in argv))
        sys.exit()
    given: dict[str, Any] = {}
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        given, argv = _read_settings(Path(argv[0]), actions), argv[1:]
    for action in parser._actions:  # what is not on the command line is left out
        action.default, action.required = argparse.SUPPRESS, False
    given |= vars(parser.parse_args(argv))
    name = given.get("recipe")
    if name is not None and name not in RECIPES:
        parser.error(f"--recipe {name}: expected one of {', '.join(RECIPES)}")
    settings = {**(RECIPES[name].arguments if name else {}), **given}
    if "output_dir" not in settings:
        parser.error("--output_dir is required: the folder for checkpoints and results")
    with without_renaming_warnings():
        arguments = Arguments(*parser.parse_dict(settings))
    training = arguments.training
    training.do_train = bool(given.get("do_train", not given.get("do_eval")))  # --do_eval alone only evaluates
    if name and "learning_rate" not in given:
        batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        training.learning_rate = RECIPES[name].learning_rate(batch)
        speaker(training, echo)(
            f"Recipe {name}: learning rate {RECIPES[name].arguments['learning_rate']:g} for {REFERENCE_BATCH_SIZE} "
            f"clips per step, so {training.learning_rate:g} for {batch}."
        )
    return arguments


def _help_text(actions: dict[str, argparse.Action], is_all: bool) -> str:
    """Return our arguments in groups and the Trainer's most common ones; with `is_all`, all of the Trainer's."""
    titles = ("model", "data", "augmentation", "training and evaluation")
    sections = {title: list(one.__annotations__) for title, one in zip(titles, _CLASSES, strict=True)}
    sections["the most common arguments of transformers' Trainer"] = _COMMON
    if is_all:
        shown = {name for names in sections.values() for name in names}
        sections["the other arguments of transformers' Trainer"] = [name for name in actions if name not in shown][::-1]
    formatter = argparse.RawDescriptionHelpFormatter("vivit-hf finetune", max_help_position=36, width=120)
    formatter.add_text(f"usage: {_USAGE}\n{_DESCRIPTION}")
    for title, names in sections.items():
        formatter.start_section(title)
        for name in names:
            action = copy.copy(actions[name])
            action.option_strings = action.option_strings[:1]  # without the spelling with hyphens
            action.metavar = "VALUE"
            formatter.add_argument(action)
        formatter.end_section()
    return formatter.format_help()


# Settings files


def _read_settings(path: Path, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """Return the arguments in a YAML or JSON file, each of the type that it has on the command line.

    Raises AnnotationError, naming file and key, for an unknown argument or a value of another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except Exception as error:
        raise AnnotationError(f"{path}: the settings cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AnnotationError(f"{path}: expected names of arguments with their values.")
    kinds = {name: kind for one in _CLASSES for name, kind in get_type_hints(one).items()}
    typed = {}
    for name, value in settings.items():
        if name not in actions:
            near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(str(name), actions, n=1))
            raise AnnotationError(f"{path}: there is no argument {name!r}{near}")
        try:
            typed[name] = _typed_value(value, actions[name], kinds[name])
        except ValueError as error:
            raise AnnotationError(f"{path}: {name}: {error}") from error
    return typed


def _typed_value(value: Any, action: argparse.Action, kind: Any) -> Any:
    """Convert a value of a settings file to the type of its argument; `kind` is the annotation of its field."""
    kinds = {get_origin(one) or one for one in get_args(kind) or (kind,)}
    is_list = action.nargs in ("+", "*")
    if value is None:
        if type(None) in kinds:
            return None
        raise ValueError("null is not allowed here; leave the key out for the default")
    if isinstance(value, dict) and dict in kinds:
        return value
    if isinstance(value, dict) or (isinstance(value, list) and not (is_list or list in kinds)):
        raise ValueError(f"expected one value, got {'the list ' * isinstance(value, list)}{value!r}")
    convert: Any = action.type or str
    try:
        # as on the command line
        values = [convert(str(one)) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        expected = "true or false" if bool in kinds else getattr(convert, "__name__", str(convert))
        raise ValueError(f"expected {expected}, got {value!r}") from None
    if action.choices is not None and not set(values) <= set(action.choices):
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return values if is_list or isinstance(value, list) else values[0]
