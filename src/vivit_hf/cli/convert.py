"""`vivit-hf convert`: convert the weights of other models."""

from __future__ import annotations

import typer


# The parsers in `vivit_hf.conversion` define the options; scripts use the same ones.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

convert = typer.Typer(help="Convert the weights of other models.", no_args_is_help=True)


@convert.command(context_settings=PASS_ON)
def vit(context: typer.Context) -> None:
    """Make a ViViT of any variant from an image ViT of transformers, timm or JAX."""
    from ..conversion.convert_vit import main

    raise typer.Exit(main(context.args, context.command_path))


@convert.command(context_settings=PASS_ON)
def scenic(context: typer.Context) -> None:
    """Convert an official flax checkpoint of google-research/scenic."""
    from ..conversion.convert_scenic import main

    raise typer.Exit(main(context.args, context.command_path))


@convert.command(context_settings=PASS_ON)
def transformers(context: typer.Context) -> None:
    """Convert transformers' own Vivit to ours, or ours to transformers'."""
    from ..conversion.convert_transformers import main

    raise typer.Exit(main(context.args, context.command_path))
