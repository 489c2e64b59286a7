"""Command-line parts that the conversion commands share: options, the run itself, warnings and a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from transformers.utils import logging

from ..data import escaping
from .results import HTTPError, push
from .weight_files import ConversionError


# Raised for wrong files, wrong options and an unreachable Hub. Any other error is a bug and shows its traceback.
_EXPECTED_ERRORS = (
    *(OSError, ValueError, RuntimeError, EOFError, MemoryError, HTTPError),
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)
_MAX_ERROR_LENGTH = 1500


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append an option's default to its help, except where there is none to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description: str, prog: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every conversion has; `prog` defaults to the name of the script."""
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=_DefaultsFormatter)
    output = parser.add_argument_group("output")
    add_output_argument(output)
    output.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this Hub repository")
    output.add_argument("--private", action="store_true", help="make the repository private if it is created")
    output.add_argument("--skip-parity", action="store_true", help="do not compare the outputs of source and result")
    return parser


def add_output_argument(parser: Any) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must be new or empty")


def add_size_argument(parser: Any, name: str, help: str) -> None:
    parser.add_argument(name, type=int, nargs="+", action=_OneOrTwo, metavar="PIXELS", help=help)


class _OneOrTwo(argparse.Action):
    """Store one number as it is and two as a pair (height, width)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two (height width), not {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


class Printed(Protocol):
    """The result of a command, which can print itself."""

    def print(self) -> None: ...


def run(
    convert: Callable[[argparse.Namespace], Printed], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parse the arguments, convert, and print the result; return 0, or 1 after one line on standard error."""
    args = parser.parse_args(argv)
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the result lists unused and new weights itself
    logging.disable_progress_bar()
    try:
        result = convert(args)
        result.print()
        if repository := vars(args).get("push_to_hub"):
            push(args.output, repository, args.private)
    except _EXPECTED_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
    return 0


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, without control characters, shortened if it is very long."""
    text = escaping.one_line(" ".join((str(error) or type(error).__name__).split()))
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]} ..."


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing package into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConversionError(f"{error.name} is not installed; run `pip install 'vivit-hf[{extra}]'`.") from error


def warn(message: str) -> None:
    print(f"warning: {escaping.one_line(message)}", file=sys.stderr)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar if standard error is a terminal; call the yielded function as each step begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda description: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        started = 0

        def begin(description: str) -> None:
            nonlocal started
            bar.update(task, description=escaping.one_line(description), completed=started)
            started += 1

        yield begin
