"""How the commands print: texts are escaped, JSON has no NaN, and remarks are kept apart from results."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup


_ClickException: Any = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")


def printable(text: str) -> str:
    """
    The text with whatever a terminal could take for a command as an escape sequence such as `\\x1b`.

    Line feeds stay; they come from messages of several lines.
    """
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in str(text)
    )


def one_line(text: str) -> str:
    """As `printable`, with line feeds escaped, too: a label must not look like another line of the output."""
    return printable(text).replace("\n", r"\n")


def as_cell(text: str, style: str = "") -> Text:
    """For a table: as `one_line`, and brackets and colons mean nothing."""
    return Text(one_line(text), style=style, overflow="fold")


def output_console() -> Console:
    """Standard output; without a terminal lines are as long as they have to be, so that no name is cut."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console() if is_terminal else Console(width=10_000)


def echo(text: str) -> None:
    """A line of results on standard output."""
    typer.echo(one_line(text))


def echo_json(row: dict[str, Any]) -> None:
    """A line of JSON on standard output; ends the command if there is NaN or infinity, which JSON does not have."""
    try:
        line = json.dumps(row, allow_nan=False)
    except ValueError:
        fail(f"This cannot be written as JSON, because it holds NaN or infinity: {row}")
    typer.echo(line)


def say(text: str) -> None:
    """A remark to whoever looks on; standard output stays for results."""
    typer.echo(printable(text), err=True)


def fail(text: str, code: int = 1) -> NoReturn:
    say(text)
    raise typer.Exit(code)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def escape_logs() -> None:
    """Print warnings and logs as remarks, escaped. For a process that is a command."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """No progress bars of loading weights between the lines of a command; what transformers logs is escaped."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for handler in transformers_logging.get_logger("transformers").handlers:
        handler.setFormatter(_PrintableFormatter("%(message)s"))


@contextmanager
def _escaped_errors() -> Iterator[None]:
    try:
        yield
    except _ClickException as error:
        error.message = printable(error.message)
        raise


class EscapingGroup(TyperGroup):
    """The commands; errors about their arguments, such as names of files, are escaped."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _escaped_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _escaped_errors():
            return super().invoke(ctx)
