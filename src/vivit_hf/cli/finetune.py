"""`vivit-hf finetune`: train a ViViT on your own videos."""

import importlib
import sys
from collections.abc import Sequence

import typer

from ..data.escaping import printable
from .output import escape_logs, quiet_libraries, say


def finetune(context: typer.Context) -> None:
    """
    Fine-tune a ViViT on your own videos; --help lists the arguments.

    Example: vivit-hf finetune --train_dir videos/train --recipe small-data --output_dir my_vivit
    """
    main(context.args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process."""
    run_training("finetune", "finetuning", argv)


def run_training(command: str, module: str, argv: Sequence[str] | None) -> None:
    """
    Run a training command: print its help, or parse and check its arguments and train.

    Args:
        command: its name, for messages.
        module: the module of `vivit_hf.training` that has `prepare`. The modules of its arguments have the suffixes
            `_arguments` (which does not import torch) and `_parser`.
        argv: the arguments, by default those of the process.
    """
    if argv is None:
        escape_logs()  # a script runs the command alone
        argv = sys.argv[1:]
    module, run = f"vivit_hf.training.{module}", None
    if {"-h", "--help"} & set(argv):
        _echo(importlib.import_module(f"{module}_arguments").help_text())
        raise SystemExit
    parse_arguments = importlib.import_module(f"{module}_parser").parse_arguments
    from ..inference.finite_outputs import NonFiniteError
    from ..video_sources import VideoDecodingError

    try:
        try:
            arguments = parse_arguments(argv, _echo)
            quiet_libraries()  # the Trainer's own progress bars stay
            run = importlib.import_module(module).prepare(arguments, _echo)
        except (ValueError, OSError) as error:
            raise SystemExit(printable(f"{command}: {error}")) from error
        run.run()
    except VideoDecodingError as error:
        reason = str(error).rpartition("VideoDecodingError: ")[2].strip()  # without the traceback of a worker
        raise SystemExit(printable(f"{command}: {reason}")) from error
    except NonFiniteError as error:
        raise SystemExit(printable(f"{command}: {error}")) from error
    except KeyboardInterrupt:
        checkpoint = None if run is None else run.last_checkpoint()
        then = "there is no checkpoint yet" if checkpoint is None else f"run again to continue from {checkpoint}"
        say(f"Interrupted: {then}.")
        raise SystemExit(130) from None


def _echo(text: str) -> None:
    typer.echo(printable(text))
