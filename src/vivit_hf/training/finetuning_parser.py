"""Parsing of the arguments of `vivit-hf finetune`: defaults, a recipe, a settings file and the command line."""

import argparse
import copy
import difflib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from ..data.annotations import AnnotationError
from .finetuning_arguments import (
    Arguments,
    AugmentationArguments,
    DataArguments,
    FineTuningArguments,
    ModelArguments,
)
from .recipes import RECIPES, REFERENCE_BATCH_SIZE


Say = Callable[[str], None]

USAGE = "vivit-hf finetune [settings.yaml] --output_dir DIR [arguments]"
DESCRIPTION = """
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
_CLASSES = (ModelArguments, DataArguments, AugmentationArguments, FineTuningArguments)
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
    """
    Parse the arguments of a run; print the help and exit if they ask for it.

    The command line overrides the settings file, which overrides the recipe, which overrides the defaults.

    Args:
        argv: the command line without the name of the program.
        echo: prints one text.

    Raises:
        AnnotationError: for a settings file that cannot be read.
        ValueError: for a value out of range.
        SystemExit: after the help, and with code 2 for unknown arguments.
    """
    parser = HfArgumentParser(_CLASSES, usage=USAGE, prog="vivit-hf finetune")
    if {"-h", "--help", "--help-all"} & set(argv):
        echo(help_text(parser, is_all="--help-all" in argv))
        sys.exit()
    given = _given_arguments(list(argv))
    recipe = given.get("recipe")
    if recipe is not None and recipe not in RECIPES:
        parser.error(f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    settings = {**(RECIPES[recipe].arguments if recipe else {}), **given}
    if "output_dir" not in settings:
        parser.error("--output_dir is required: the folder for checkpoints and results")
    with without_renaming_warnings():
        arguments = Arguments(*parser.parse_dict(settings))
    training = arguments.training
    training.do_train = bool(given.get("do_train", not given.get("do_eval")))  # --do_eval alone only evaluates
    if recipe and "learning_rate" not in given:
        _scale_learning_rate(training, speaker(training, echo))
    return arguments


def _given_arguments(argv: list[str]) -> dict[str, Any]:
    """Return what the settings file and the command line say, without defaults."""
    given: dict[str, Any] = {}
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        given = read_settings(Path(argv[0]))
        argv = argv[1:]
    parser = HfArgumentParser(_CLASSES, usage=USAGE, prog="vivit-hf finetune")
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return given | vars(parser.parse_args(argv))


def _scale_learning_rate(training: FineTuningArguments, say: Say) -> None:
    """Scale the learning rate of the recipe to the batch size."""
    assert training.recipe is not None
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    recipe = RECIPES[training.recipe]
    training.learning_rate = recipe.learning_rate(batch)
    say(
        f"Recipe {recipe.name}: learning rate {recipe.arguments['learning_rate']:g} for {REFERENCE_BATCH_SIZE} clips "
        f"per step, so {training.learning_rate:g} for {batch}."
    )


def help_text(parser: HfArgumentParser, is_all: bool) -> str:
    """Return our arguments in groups and the Trainer's most common ones; with `is_all`, all of the Trainer's."""
    sections = {
        "model": list(ModelArguments.__annotations__),
        "data": list(DataArguments.__annotations__),
        "augmentation": list(AugmentationArguments.__annotations__),
        "training and evaluation": list(FineTuningArguments.__annotations__),
        "the most common arguments of transformers' Trainer": [*_COMMON],
    }
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if is_all:
        shown = {name for names in sections.values() for name in names}
        sections["the other arguments of transformers' Trainer"] = [name for name in actions if name not in shown][::-1]
    formatter = argparse.RawDescriptionHelpFormatter("vivit-hf finetune", max_help_position=36, width=120)
    formatter.add_text(f"usage: {USAGE}\n{DESCRIPTION}")
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


def read_settings(path: Path) -> dict[str, Any]:
    """
    Return the arguments in a YAML or JSON file, each of the type that it has on the command line.

    Raises AnnotationError, naming file and key, for an unknown argument or a value of another type.
    """
    settings = _load_settings(path)
    # The first action of a name: a second one is its negation, such as --no_average_tokens_across_devices.
    actions = {action.dest: action for action in reversed(HfArgumentParser(_CLASSES)._actions) if action.dest != "help"}
    kinds = {name: kind for one in _CLASSES for name, kind in get_type_hints(one).items()}
    typed = {}
    for name, value in settings.items():
        if name not in actions:
            near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(str(name), actions, n=1))
            raise AnnotationError(f"{path}: there is no argument {name!r}{near}")
        try:
            typed[name] = _typed_value(value, actions[name], kinds[name])
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise AnnotationError(f"{path}: {name}: {error}") from error
    return typed


def _load_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AnnotationError(f"{path}: there is no such settings file.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            settings = yaml.safe_load(text)
    except Exception as error:
        raise AnnotationError(f"{path}: the settings cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AnnotationError(f"{path}: expected names of arguments with their values.")
    return settings


def _typed_value(value: Any, action: argparse.Action, kind: Any) -> Any:
    """Convert a value of a settings file to the type of its argument; `kind` is the annotation of its field."""
    parts = set(get_args(kind)) or {kind}
    is_list = action.nargs in ("+", "*")
    if value is None:
        if type(None) in parts:
            return None
        raise ValueError("null is not allowed here; leave the key out for the default")
    if isinstance(value, dict):
        if any(part is dict or get_origin(part) is dict for part in parts):
            return value
        raise ValueError(f"expected one value, got {value!r}")
    convert: Any = action.type or str
    if isinstance(value, list):
        if not (is_list or any(part is list or get_origin(part) is list for part in parts)):
            raise ValueError(f"expected one value, got the list {value!r}")
        return [_typed_value(one, argparse.Action([], "", type=convert), str) for one in value]
    try:
        converted = convert(str(value))  # as on the command line
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        expected = "true or false" if bool in parts else getattr(convert, "__name__", str(convert))
        raise ValueError(f"expected {expected}, got {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return [converted] if is_list else converted
