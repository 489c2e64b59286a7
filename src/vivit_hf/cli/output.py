"""Printing: text is escaped, JSON has no NaN, results go to standard output and messages to standard error."""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..data.escaping import one_line, printable


_ClickException: Any = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")


def as_cell(text: str, style: str = "") -> Text:
    """Return the text for a cell of a table: on one line, with brackets and colons taken literally."""
    return Text(one_line(text), style=style, overflow="fold")


def output_console() -> Console:
    """Return a console on standard output. Without a terminal it never wraps, so that no name is cut."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console() if is_terminal else Console(width=10_000)


def echo(text: str) -> None:
    """Print a line of results on standard output."""
    typer.echo(one_line(text))


def echo_json(row: dict[str, Any]) -> None:
    """Print a line of JSON on standard output; exits with 1 if it contains NaN or infinity, which JSON cannot hold."""
    try:
        line = json.dumps(row, allow_nan=False)
    except ValueError:
        fail(f"JSON cannot hold NaN or infinity: {row}")
    typer.echo(line)


def can_draw() -> bool:
    """Return whether matplotlib is installed; say what is missing if it is not."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    say("matplotlib is not installed, so there is no picture: pip install 'vivit-hf[training]'.")
    return False


def track(
    items: Iterable[Any],
    total: int,
    what: str,
    is_shown: bool = True,
    is_unusable: Callable[[Any], bool] = lambda item: False,
) -> Iterator[Any]:
    """Yield the items with a progress bar on standard error, if that is a terminal, and count unusable ones there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.description}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    console = Console(stderr=True)
    is_hidden = not (is_shown and console.is_terminal and total > 1)
    num_unusable = 0
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as progress:
        task = progress.add_task("", total=total)
        for item in items:
            yield item
            num_unusable += is_unusable(item)
            progress.update(task, advance=1, description=f"{num_unusable} unusable" if num_unusable else "")


def say(text: str) -> None:
    """Print a message on standard error."""
    typer.echo(printable(text), err=True)


def fail(text: str, code: int = 1) -> NoReturn:
    """Print a message on standard error and end the command with this exit code."""
    say(text)
    raise typer.Exit(code)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def escape_logs() -> None:
    """Print warnings and logs on standard error, escaped. Only for processes that run a command."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """Hide the progress bars of loading weights, and escape what transformers logs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for handler in transformers_logging.get_logger("transformers").handlers:
        handler.setFormatter(_PrintableFormatter("%(message)s"))


@contextmanager
def video_errors(video: str) -> Iterator[None]:
    """Turn what goes wrong while a video is read and classified into a message and an exit code."""
    from ..inference.finite_outputs import NonFiniteError
    from ..video_sources import VideoDecodingError, source_name

    try:
        yield
    except VideoDecodingError as error:
        fail(str(error))
    except NonFiniteError as error:
        fail(f"{source_name(video)}: {error}")
    except OSError as error:
        fail(f"Cannot read {source_name(video)}: {error.strerror or error}.")
    except ValueError as error:  # options that do not fit the model or the processor
        raise typer.BadParameter(str(error)) from error


def read_from(video: str, results: Iterator[Any]) -> Iterator[Any]:
    """Yield results that are computed while a video is read. Only errors of reading it are attributed to the video."""
    with video_errors(video):
        yield from results


@contextmanager
def _reported_errors() -> Iterator[None]:
    try:
        yield
    except _ClickException as error:
        error.message = printable(error.message)
        raise
    except KeyboardInterrupt:
        fail("Interrupted.", code=130)


class EscapingGroup(TyperGroup):
    """The commands. Errors about their arguments, such as file names, are escaped; an interrupt exits with 130."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _reported_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _reported_errors():
            return super().invoke(ctx)
