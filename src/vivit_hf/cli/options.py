"""What the commands share: their options, the model that they run, and the videos that they are given."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any

import typer

from .output import fail, quiet_libraries, say


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
HUB_TIMEOUT = 5.0  # seconds in which the Hub must answer whether it has a model

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id of a ViViT.", show_default="the demo model in the package"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...", show_default="a GPU if there is one")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, for other programs.")]
PrivateAddressesOption = Annotated[
    bool,
    typer.Option("--allow-private-addresses", help="Also download from this machine and the local network."),
]


OnErrorOption = Annotated[
    str,
    typer.Option(
        help="Of a damaged video: warn and put the frame before in the place of a lost one, skip the video, or raise, "
        "which ends the command."
    ),
]


def check_on_error(on_error: str) -> None:
    if on_error not in ("warn", "skip", "raise"):
        raise typer.BadParameter(f"expected warn, skip or raise, got {on_error!r}", param_hint="--on-error")


def find_model(name: str) -> dict[str, Any]:
    """
    What `from_pretrained` is to be told about a folder or Hub id: nothing, or to take the copy in the cache.

    Raises OSError at once, with the reason, if there is no such folder and no such model on the Hub; transformers alone
    would try every file several times.
    """
    if os.path.isdir(name):
        return {}
    nowhere = f"there is no folder {name!r}"
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        raise OSError(f"{nowhere}, and models of the Hub are named like 'owner/name'")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise OSError(f"{nowhere}, and the Hub has no public model of that name") from error
    except Exception as error:  # of the HTTP client, which is another one in other versions of huggingface_hub
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise OSError(f"{nowhere}, and the Hub cannot be asked for a model of that name ({reason[0]})") from error
        say(f"The Hub cannot be asked for {name} ({reason[0]}): this is the copy in the cache.")
        return {"local_files_only": True}
    return {}


def load(
    model: str | None,
    device: str | None,
    dtype: str,
    needs_labels: bool = True,
    allow_private_addresses: bool = False,
) -> tuple[Any, Any]:
    """The model in eval mode, and its processor; exits with 2 and the reason if they cannot be had or do not fit."""
    import torch
    from safetensors import SafetensorError

    from ..configuration_vivit import ViViTConfig
    from ..inference.demo_model import demo_model_path
    from ..modeling_vivit import ViViTForVideoClassification
    from ..video_processing_vivit import ViViTVideoProcessor

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
        if place.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise typer.BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from error
    if model in ViViTConfig.presets:
        raise typer.BadParameter(f"{model!r} is a preset without weights; `inspect` describes it", param_hint="--model")
    try:
        where = find_model(model)
        loaded = ViViTForVideoClassification.from_pretrained(model, dtype=getattr(torch, dtype), **where)
        limits = {"allow_private_addresses": allow_private_addresses}
        processor = ViViTVideoProcessor.from_pretrained(model, video_limits=limits, **where)
    except SafetensorError as error:
        fail(f"Cannot load the model {model}: its weights are damaged or not all there ({error}).", code=2)
    except OSError as error:
        fail(f"Cannot load the model {model}: {str(error).strip().splitlines()[0]}", code=2)
    except ValueError as error:
        fail(f"Cannot load the model {model}: {error}", code=2)
    except Exception as error:  # whatever a damaged or hostile folder makes the libraries trip over
        fail(f"Cannot load the model {model}: {type(error).__name__}: {error}", code=2)
    if needs_labels and not loaded.config.num_labels:
        fail(f"The model {model} has no classifier (num_labels is 0): choose one that was trained on labels.", code=2)
    clip, given = (loaded.config.num_frames, *loaded.config.frame_size), _clip_of(processor)
    if any(wanted != got for wanted, got in zip(clip, given, strict=True) if got is not None):
        fail(
            f"The processor of {model} gives clips of {given} (frames, height, width), and the model takes {clip}: set "
            "`num_frames` and `crop_size` in its preprocessor_config.json.",
            code=2,
        )
    return loaded.to(place).eval(), processor


def _clip_of(processor: Any) -> tuple[int | None, int | None, int | None]:
    """Frames, height and width of its clips; None for what depends on the video."""
    sizes = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else {}
    return processor.num_frames, sizes.get("height"), sizes.get("width")


def expand(videos: Sequence[str]) -> list[str]:
    """Files, the videos of folders, what patterns match, addresses and - for standard input, in their order."""
    from ..data.scan import find_videos

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
            parts = [map(str, find_videos(path)) if os.path.isdir(path) else [path] for path in matches]
            found += dict.fromkeys(chain.from_iterable(parts))  # `**` also finds what is in the folders it finds
        else:
            found.append(video)  # not there: an error in its own line, and the others go on
    return found


def standard_input() -> bytearray:
    """All of standard input, within the limits of a video; exits with 1 and the reason if there is more."""
    from ..video_sources import VideoDecodingError, read_stream

    try:
        return read_stream(standard_input_file())
    except VideoDecodingError as error:
        fail(str(error))


def standard_input_file() -> Any:
    if sys.stdin is None or sys.stdin.isatty():
        what = "closed" if sys.stdin is None else "a terminal"
        raise typer.BadParameter(f"- reads a video from standard input, and that is {what}", param_hint="VIDEO")
    return sys.stdin.buffer
