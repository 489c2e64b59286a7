"""
Write the reference of the commands and of the Python names, from the parsers and docstrings of the package.

A page says where: `<!-- commands -->` becomes the help of every command, and `<!-- names of: vivit_hf.inference -->`
the docstrings of all that this package exports.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "src"))
os.environ["COLUMNS"] = "100"  # argparse breaks lines there
COMMANDS = "<!-- commands -->"
NAMES = re.compile(r"<!-- names of: (?P<package>[\w.]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places of a page that ask for a reference."""
    markdown = NAMES.sub(lambda match: names_of(match["package"]), markdown)
    return markdown.replace(COMMANDS, "\n".join(commands())) if COMMANDS in markdown else markdown


def names_of(package: str) -> str:
    """Return the blocks of mkdocstrings for the names that a package exports."""
    return "\n\n".join(f"::: {package}.{name}" for name in importlib.import_module(package).__all__)


def commands() -> Iterator[str]:
    """Yield a section for every command, with the text that `--help` prints."""
    from typer.main import get_command

    from vivit_hf.cli.app import app

    program = get_command(app)
    for path in paths_of(program):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            program.main([*path, "--help"], prog_name="vivit-hf")
        if not output.getvalue().strip():
            raise RuntimeError(f"vivit-hf {' '.join(path)} --help prints nothing")
        yield f"## {' '.join(('vivit-hf', *path))}\n\n```text\n{output.getvalue().strip()}\n```\n"


def paths_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words that call each command, and let the commands print plain help, without boxes."""
    command.rich_markup_mode = None
    if not hasattr(command, "commands"):
        yield path
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from paths_of(child, (*path, name))
