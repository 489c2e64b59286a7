"""The command line, `vivit-hf`; each command is a function in a `cli_` file."""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from .convert import PASS_ON, convert
from .export import export
from .finetune import finetune
from .inspect import inspect
from .output import EscapingGroup, escape_logs, say
from .scan import scan
from .videos import classify, demo, explain, timeline


app = typer.Typer(
    name="vivit-hf",
    cls=EscapingGroup,
    help="Video transformers (ViViT) for Hugging Face, on your own videos.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (classify, timeline, explain, inspect, scan, demo):
    app.command()(command)
app.command(context_settings=PASS_ON)(export)
app.command(context_settings=PASS_ON)(finetune)
app.add_typer(convert, name="convert")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from .. import __version__

        typer.echo(f"vivit-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    return


def main() -> None:
    # Importing torch and transformers makes a million objects that stay; looking for garbage among them again and again
    # would take a sixth of the time to the first answer.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file can have a name that the terminal cannot show
    escape_logs()
    try:
        app()
    except OSError as error:  # those of videos and models are caught where they are read
        what = "Cannot write standard output" if error.filename is None else error.filename
        say(f"{what}: {error.strerror or error}.")
        sys.exit(1)
