"""Errors, warnings, progress and results of conversions in the terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..data import escaping


_MAX_ERROR_LENGTH = 1500


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, without control characters, shortened if it is very long."""
    text = escaping.one_line(" ".join((str(error) or type(error).__name__).split()))
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]} ..."


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing package into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; run `pip install 'vivit-hf[{extra}]'`.") from error


def warn(message: str) -> None:
    print(f"warning: {escaping.one_line(message)}", file=sys.stderr)


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar if standard error is a terminal; call the yielded function as each step begins."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=-1)  # the first step begins with none done
        yield lambda step: bar.update(task, description=escaping.one_line(step), advance=1)


def print_table(*rows: tuple[str, str]) -> None:
    """Print rows of a heading and a text; names from files cannot add markup or control characters."""
    table = Table("", "", show_header=False)
    for heading, text in rows:
        table.add_row(heading, Text(escaping.one_line(text)))
    Console().print(table)
