"""`vivit-hf demo`: try everything offline."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .classify import classify
from .output import echo


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the sample videos.")] = Path("vivit_demo"),
) -> None:
    """
    Try everything offline: write sample videos, classify them with the demo model, and show what to do next.
    """
    from ..inference.demo_model import copy_samples

    try:
        files = copy_samples(output)
    except OSError as error:
        what = error.filename2 or error.filename or output
        raise typer.BadParameter(f"cannot write {str(what)!r}: {error.strerror}", param_hint="--output") from error
    echo(f"{output}: {len(files)} videos. In each a shape moves along a diagonal; in all.mp4 one after another.")
    try:
        classify([str(file) for file in files if file.name != "all.mp4"], top_k=2, num_clips=2, num_crops=1)
    except typer.Exit as ending:
        if ending.exit_code:
            raise
    folder = shlex.quote(f"./{output}" if str(output).startswith("-") else str(output))
    echo("")
    echo(f"vivit-hf timeline {folder}/all.mp4")
    echo(f"vivit-hf explain {folder}/up_left.mp4 --output what_it_saw.png")
