"""Parse the arguments of `vivit-hf finetune`: defaults, recipes, settings files and the command line."""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..data.annotations import AnnotationError
from ..inference.views import AVERAGINGS
from .clip_lengths import GROUP_BY_LENGTH
from .finetuning_arguments import (
    DISTILLATION_TEMPERATURE,
    DISTILLATION_WEIGHT,
    USAGE,
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    OurTrainingArguments,
    Say,
    VideoDefaults,
    check_choice,
    help_text,
)
from .recipes import RECIPES


@dataclass
class VideoTrainingArguments(VideoDefaults, TrainingArguments):
    """transformers' `TrainingArguments` with defaults for videos."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: expected 0 for no average, or a decay below 1, as 0.999.")
        for suffix in ("", "_kwargs"):
            # Newer transformers has another name for this, and warns of the one that all versions know.
            if getattr(self, f"activation_checkpointing{suffix}", "older") is None:
                setattr(self, f"activation_checkpointing{suffix}", getattr(self, f"gradient_checkpointing{suffix}"))
        check_choice("train_sampling_strategy", self.train_sampling_strategy, ("random", GROUP_BY_LENGTH))
        super().__post_init__()
        for name in self.report_to or ():
            # transformers knows flyte, and leaves it out of its list.
            if name not in ("none", "flyte", *get_available_reporting_integrations()):
                extra = "'vivit-hf[training]'" if name == "tensorboard" else name
                raise ValueError(f"--report_to {name}: it is not known or not installed; run `pip install {extra}`.")


@dataclass
class FineTuningArguments(OurTrainingArguments, VideoTrainingArguments):
    """`VideoTrainingArguments` of a fine-tuning run.

    With `scales_learning_rate`, the learning rate is a recipe's, which is scaled once the model is known.
    """

    scales_learning_rate: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_choice("averaging", self.averaging, AVERAGINGS)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay}: expected a factor above 0 and at most 1.")
        if self.early_stopping_patience < 0:
            raise ValueError(
                f"--early_stopping_patience {self.early_stopping_patience}: expected a number of evaluations, or 0."
            )
        if not (self.distillation_temperature > 0 and math.isfinite(self.distillation_temperature)):
            raise ValueError(
                f"--distillation_temperature {self.distillation_temperature}: expected a positive number, such as 3."
            )
        if not 0 < self.distillation_weight <= 1:
            raise ValueError(
                f"--distillation_weight {self.distillation_weight}: expected a share above 0 and at most 1."
            )
        chosen = (self.distillation_temperature, self.distillation_weight)
        if self.teacher is None and chosen != (DISTILLATION_TEMPERATURE, DISTILLATION_WEIGHT):
            raise ValueError("--distillation_temperature and --distillation_weight need a --teacher.")
        if self.early_stopping_patience:
            self.metric_for_best_model: str | None = self.metric_for_best_model or "loss"
            self.load_best_model_at_end |= self.eval_strategy == self.save_strategy == "epoch"
        super().__post_init__()


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the arguments by name, without negations such as --no_average_tokens_across_devices."""
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    return dict(reversed(actions.items()))


def print_help(
    actions: dict[str, argparse.Action], argv: Sequence[str], help_text: Callable[..., str], echo: Say
) -> None:
    """Print the help of a training command and exit, if `argv` asks for it."""
    if {"-h", "--help", "--help-all"} & set(argv):
        brief = help_text()
        others = [action for name, action in actions.items() if f"--{name} " not in brief]
        echo(help_text(others) if "--help-all" in argv else brief)
        sys.exit()


class Arguments(NamedTuple):
    """All arguments of a run, by subject."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: FineTuningArguments


_CLASSES = (ModelArguments, DataArguments, AugmentationArguments, FineTuningArguments)


def speaker(training: TrainingArguments, echo: Say) -> Say:
    """Return a function that prints with `echo` in the first process, and does nothing in the others."""
    return echo if training.process_index == 0 else lambda text: None


def check_step_counts(given: dict[str, Any], training: TrainingArguments) -> None:
    """Raise ValueError for a number of steps without effect: unlike in transformers, the default is once an epoch."""
    for name in ("save", "eval"):
        strategy = getattr(training, f"{name}_strategy").value
        if given.get(f"{name}_steps") is not None and strategy != "steps":
            raise ValueError(
                f"--{name}_steps {given[f'{name}_steps']:g} has no effect with --{name}_strategy {strategy}: add "
                f"--{name}_strategy steps."
            )


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
    parser = HfArgumentParser(_CLASSES, usage=USAGE, prog="vivit-hf finetune")
    actions = actions_of(parser)
    print_help(actions, argv, help_text, echo)
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
    arguments = Arguments(*parser.parse_dict(settings))
    training = arguments.training
    check_step_counts(given, training)
    training.do_train = bool(given.get("do_train", not given.get("do_eval")))  # --do_eval alone only evaluates
    training.scales_learning_rate = name is not None and "learning_rate" not in given
    return arguments


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
