"""Parse the arguments of `vivit-hf pretrain`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import HfArgumentParser

from .clip_lengths import GROUP_BY_LENGTH
from .finetuning_arguments import Say
from .finetuning_parser import VideoTrainingArguments, actions_of, print_help
from .pretraining_arguments import (
    USAGE,
    PretrainingDataArguments,
    PretrainingDefaults,
    PretrainingModelArguments,
    help_text,
)


@dataclass
class PretrainingArguments(PretrainingDefaults, VideoTrainingArguments):
    """`VideoTrainingArguments` of a pretraining run."""

    def __post_init__(self) -> None:
        if self.picture_steps < 0:
            raise ValueError(f"--picture_steps {self.picture_steps}: expected a number of steps, or 0 for no pictures.")
        if self.eval_strategy != "no" or self.do_eval:
            raise ValueError("Pretraining has no evaluation: leave --eval_strategy and --do_eval out.")
        if self.train_sampling_strategy == GROUP_BY_LENGTH:
            raise ValueError(
                f"--train_sampling_strategy {GROUP_BY_LENGTH}: clips of pretraining have one length, so leave it out."
            )
        self.do_train = True
        super().__post_init__()


class PretrainingRun(NamedTuple):
    """All arguments of a run, by subject."""

    model: PretrainingModelArguments
    data: PretrainingDataArguments
    training: PretrainingArguments


def parse_arguments(argv: Sequence[str], echo: Say = print) -> PretrainingRun:
    """Parse the arguments of a run; print the help and exit if they ask for it.

    Args:
        argv: the command line without the name of the program.
        echo: prints one text.

    Raises:
        ValueError: for a value out of range.
        SystemExit: after the help, and with code 2 for unknown or missing arguments.
    """
    classes = (PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments)
    parser = HfArgumentParser(classes, usage=USAGE, prog="vivit-hf pretrain")
    print_help(actions_of(parser), argv, help_text, echo)
    if argv and not argv[0].startswith("-"):
        argv = ["--videos", *argv]
    for action in parser._actions:
        action.required |= action.dest == "output_dir"
    return PretrainingRun(*parser.parse_dict(vars(parser.parse_args(argv))))
