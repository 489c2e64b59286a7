"""`vivit-hf finetune`: train a ViViT on your own videos."""

import sys
from collections.abc import Sequence

import typer

from ..data.escaping import printable
from .output import quiet_libraries, say


def finetune(context: typer.Context) -> None:
    """
    Fine-tune a ViViT on your own videos; --help lists the arguments.

    Example: vivit-hf finetune --train_dir videos/train --recipe small-data --output_dir my_vivit
    """
    main(context.args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        from ..training.finetuning_arguments import help_text

        _echo(help_text())
        raise SystemExit

    from ..training.finetuning_parser import parse_arguments

    run = None
    try:
        try:
            arguments = parse_arguments(argv, _echo)
            quiet_libraries()  # the Trainer's own progress bars stay
            from ..training.finetuning import prepare

            run = prepare(arguments, _echo)
        except (ValueError, OSError) as error:
            raise SystemExit(printable(f"finetune: {error}")) from error
        run.run()
    except KeyboardInterrupt:
        checkpoint = None if run is None else run.last_checkpoint()
        then = "there is no checkpoint yet" if checkpoint is None else f"run again to continue from {checkpoint}"
        say(f"Interrupted: {then}.")
        raise SystemExit(130) from None


def _echo(text: str) -> None:
    typer.echo(printable(text))
