"""`vivit-hf export`: export a classifier to ONNX."""

from __future__ import annotations

import typer


def export(context: typer.Context) -> None:
    """Export a classifier to ONNX, in float32 and int8, and compare the result with PyTorch."""
    from ..conversion.export_onnx import main

    raise typer.Exit(main(context.args, context.command_path))
