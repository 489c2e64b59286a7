"""What the commands share: how they print, which model they run, and which videos they are given."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .dataset_scan import find_videos
from .inference import demo_model_path


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id of a ViViT.", show_default="the demo model in the package"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...", show_default="a GPU if there is one")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, for other programs.")]


def output_console() -> Console:
    """Standard output; without a terminal lines are as long as they have to be, so that no name is cut."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def say(text: str) -> None:
    """A remark to whoever looks on; standard output stays for results."""
    typer.echo(text, err=True)


def fail(text: str, code: int = 1) -> NoReturn:
    say(text)
    raise typer.Exit(code)


def quiet_libraries() -> None:
    """No progress bars of loading weights between the lines of a command."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(model: str | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The model in eval mode, and its processor; exits with 2 and the reason if they cannot be had."""
    import torch

    from .modeling_vivit import ViViTForVideoClassification
    from .video_processing_vivit import ViViTVideoProcessor

    quiet_libraries()
    if model is None:
        model = str(demo_model_path())
        say("No --model given: this is the demo model. It knows along which diagonal a shape moves, and nothing else.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from error
    try:
        loaded = ViViTForVideoClassification.from_pretrained(model, dtype=getattr(torch, dtype))
        processor = ViViTVideoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(f"Cannot load the model {model}: {str(error).strip().splitlines()[0]}", code=2)
    return loaded.to(place).eval(), processor


def expand(videos: Sequence[str]) -> list[str]:
    """Files, the videos of folders, what patterns match, addresses and - for standard input, in their order."""
    found: list[str] = []
    for video in videos:
        if video == "-" or "://" in video or os.path.isfile(video):
            found.append(video)
        elif os.path.isdir(video):
            inside = [str(path) for path in find_videos(video)]
            if not inside:
                raise typer.BadParameter(f"the folder {video!r} holds no video", param_hint="VIDEO")
            found += inside
        elif glob.has_magic(video) and (matches := sorted(glob.glob(video, recursive=True))):
            found += [path for path in matches if os.path.isfile(path)]
        else:
            found.append(video)  # not there: an error in its own line, and the others go on
    return found


def standard_input() -> Any:
    if sys.stdin.isatty():
        raise typer.BadParameter("- reads a video from standard input, and that is a terminal", param_hint="VIDEO")
    return sys.stdin.buffer
