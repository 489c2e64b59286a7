"""The command line, `vivit-hf`: each command is a function in a file of its own."""

import gc
import io
import sys
from typing import Annotated

import typer

from .classify import classify
from .classify_dataset import classify_dataset
from .convert import PASS_ON, convert, export
from .demo import demo
from .embed import embed
from .evaluate import evaluate
from .explain import explain
from .finetune import finetune
from .inspect import inspect
from .output import EscapingGroup, escape_logs, say
from .pretrain import pretrain
from .probe import probe
from .scan import scan
from .search import search
from .serve import serve
from .timeline import timeline
from .tune import tune
from .watch import watch


app = typer.Typer(
    name="vivit-hf",
    cls=EscapingGroup,
    help="Video transformers (ViViT) for Hugging Face, on your own videos.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (classify, timeline, watch, explain, embed, search, probe, tune, inspect, scan, serve, demo):
    app.command()(command)
# The options of evaluate.py are spelled with underscores, like those of the other training scripts.
app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(evaluate)
app.command(context_settings=PASS_ON)(classify_dataset)
app.command(context_settings=PASS_ON)(export)
app.command(context_settings=PASS_ON)(finetune)
app.command(context_settings=PASS_ON)(pretrain)
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


def main(arguments: list[str] | None = None) -> None:
    """Run a command with these arguments, by default those of the process."""
    # Importing torch and transformers creates a million objects that stay. Searching them for garbage again and again
    # would take a sixth of the time to the first answer.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can hold what the terminal cannot show
    escape_logs()
    try:
        app(arguments)
    except OSError as error:  # errors of reading videos and models are caught where they are read
        # A copy names its source first. Without a name, it is the output: a file is named where it is opened.
        name = error.filename2 or error.filename
        what = "" if error.errno is None else "Cannot write the output: " if name is None else f"{name}: "
        say(f"{what}{error.strerror or error}.")
        sys.exit(1)
