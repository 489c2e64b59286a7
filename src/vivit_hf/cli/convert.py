"""`vivit-hf convert` and `vivit-hf export`: convert the weights of other models, and export to ONNX."""

import typer


# `vivit_hf.conversion.command` defines the options; the scripts in conversion/ use the same ones.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

convert = typer.Typer(help="Convert the weights of other models.", no_args_is_help=True)


def _run(command: str, context: typer.Context) -> None:
    from ..conversion.command import main

    raise typer.Exit(main(command, context.args, context.command_path))


@convert.command(context_settings=PASS_ON)
def vit(context: typer.Context) -> None:
    """Make a ViViT of any variant from an image ViT of transformers, timm or JAX."""
    _run("vit", context)


@convert.command(context_settings=PASS_ON)
def scenic(context: typer.Context) -> None:
    """Convert an official flax checkpoint of google-research/scenic."""
    _run("scenic", context)


@convert.command(context_settings=PASS_ON)
def transformers(context: typer.Context) -> None:
    """Convert transformers' own Vivit to ours, or ours to transformers'."""
    _run("transformers", context)


def export(context: typer.Context) -> None:
    """Export a classifier to ONNX, in float32 and int8, and compare the result with PyTorch."""
    _run("export", context)
