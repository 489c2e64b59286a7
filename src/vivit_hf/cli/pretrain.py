"""`vivit-hf pretrain`: masked pretraining on videos without labels."""

from collections.abc import Sequence

import typer

from .finetune import run_training


def pretrain(context: typer.Context) -> None:
    """
    Pretrain a ViViT on videos without labels; --help lists the arguments.

    Example: vivit-hf pretrain videos --model_name_or_path vivit-tiny --output_dir pretrained
    """
    main(context.args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    run_training("pretrain", "pretraining", argv)
