"""What the commands share: options, loading the model, and finding the videos."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import typer

from ..data.escaping import counted
from .output import fail, quiet_libraries, say, video_errors


def _one_or_three(num_crops: int | None) -> int | None:
    if num_crops not in (None, 1, 3):
        raise typer.BadParameter(f"expected 1 or 3, got {num_crops}")
    return num_crops


Videos = Annotated[
    list[str],
    typer.Argument(metavar="VIDEO...", help="Files, folders, patterns, http(s) addresses, or - for standard input."),
]
Video = Annotated[str, typer.Argument(metavar="VIDEO", help="A file, an http(s) address, or - for standard input.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id of a ViViT.", show_default="the demo model in the package"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...", show_default="a GPU if there is one")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the model.")]
AnswersDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Number format of the model; leaves out the setting that `vivit-hf tune` stored.",
        show_default="float32, or the stored setting",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines, for other programs.")]
PrivateAddresses = Annotated[
    bool,
    typer.Option("--allow-private-addresses", help="Also download from this machine and the local network."),
]
OnError = Annotated[
    Literal["warn", "skip", "raise"],
    typer.Option(
        help="For a damaged video: warn and repeat the frame before each lost one, skip the video, or end the command."
    ),
]
Clips = Annotated[
    int | None,
    typer.Option(min=1, help="Clips per video, spread over it.", show_default="4, or 1 with frame_sampling 'uniform'"),
]
Crops = Annotated[
    int | None,
    typer.Option(
        callback=_one_or_three,
        help="Crops per clip: 1 or 3.",
        show_default="3, or 1 if the processor does not crop",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Clips that the model sees at a time.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode.", show_default="one per core, at most 8")
]
FeaturesModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Where the model is now.", show_default="the model that the features name"),
]
Hop = Annotated[
    int | None,
    typer.Option(min=1, help="Sampled frames between windows.", show_default="a tubelet, or half a window"),
]
UnchangedThreshold = Annotated[
    float,
    typer.Option(
        min=0,
        max=255,
        help="Grey levels of 255 that a patch of a time step may differ on average from the last encoded step, whose "
        "token it then takes. 0: equal pixels only. Above 0, the error is printed. Factorised encoders only.",
    ),
]
MinScore = Annotated[float, typer.Option(min=0, max=1, help="Leave out segments with a lower score.")]
MinDuration = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Seconds; shorter segments go to their neighbours.",
        show_default="three quarters of a window, a whole one across a cut",
    ),
]
Windows = Annotated[bool, typer.Option("--windows", help="Print every window instead of segments.")]

EXACT_FEATURES = "features are those of the exact model"


def workers_of(num_workers: int | None) -> int:
    """Return the number of processes that decode; None stands for one per core, at most 8."""
    return min(8, os.cpu_count() or 1) if num_workers is None else num_workers


def views_of(processor: Any, num_clips: int | None, num_crops: int | None) -> dict[str, int]:
    """Return the views per video; for a number that is None, as many as the paper takes and the processor can make."""
    if num_clips is None:
        num_clips = 1 if processor.frame_sampling == "uniform" else 4  # uniform frames cover the whole video
    if num_crops is None:
        num_crops = 3 if processor.do_center_crop else 1
    return {"num_clips": num_clips, "num_crops": num_crops}


def averaging_of(config: Any, views: dict[str, int]) -> str:
    """Return how to average these views: as when the model was calibrated; print if it was on other views."""
    from ..calibration_vivit import AVERAGINGS, Calibration

    stored = Calibration.of(config)
    if stored is None:
        return AVERAGINGS[0]
    if views != {"num_clips": stored.num_clips, "num_crops": stored.num_crops}:
        clips, crops = counted(stored.num_clips, "clip"), counted(stored.num_crops, "crop")
        say(f"The model was calibrated on {clips} x {crops}: with other views, probabilities fit less well.")
    return stored.averaging


def find_model(name: str) -> dict[str, Any]:
    """
    Return the arguments with which `from_pretrained` loads a folder or Hub id: none, or those for the cached copy.

    Raises OSError at once if there is neither such a folder nor such a model on the Hub.
    """
    from huggingface_hub import try_to_load_from_cache

    from ..initialisation.weight_files import why_hub_is_silent

    if (reason := why_hub_is_silent(name)) is None:
        return {}
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise OSError(f"there is no folder {name!r}, and the Hub cannot be reached ({reason})")
    say(f"The Hub cannot be reached ({reason}): using the cached copy of {name}.")
    return {"local_files_only": True}


def find_device(device: str | None) -> Any:
    """Return the `torch.device` to run on; exits with 2 if it cannot be used."""
    import torch

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
    return place


def load(
    model: str | None,
    device: str | None,
    dtype: str | None,
    needs_labels: bool = True,
    allow_private_addresses: bool = False,
    needs_gradients: bool = False,
    image_frames: int | None = None,
    exact_for: str | None = None,
) -> tuple[Any, Any]:
    """
    Load a model, in eval mode and optimised unless gradients are needed, and its processor.

    Without a dtype, the setting that `vivit-hf tune` stored is taken up. With `exact_for`, what the model is loaded
    for, it is not, and a message says so.

    With `image_frames`, an image model is taken as well, for clips of that many frames (see `vivit_from_image`).

    Exits with 2 and the reason if that fails or they do not fit together.
    """
    from ..configuration_vivit import ViViTConfig
    from ..inference.demo_model import demo_model_path
    from ..inference.stored_settings import describe_stored

    quiet_libraries()
    if model is None:
        model = str(demo_model_path())
        say("No --model given: using the demo model, which only recognises along which diagonal a shape moves.")
    place = find_device(device)
    if model in ViViTConfig.presets:
        raise typer.BadParameter(f"{model!r} is a preset without weights; `inspect` describes it", param_hint="--model")
    limits = {"allow_private_addresses": allow_private_addresses}
    loaded, processor = _from_pretrained(model, dtype or "float32", limits, image_frames)
    if needs_labels and not loaded.config.num_labels:
        fail(f"The model {model} has no classifier (num_labels is 0): choose one that was trained on labels.", code=2)
    clip = (loaded.config.num_frames, *loaded.config.frame_size)
    sizes = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else {}
    given = (processor.num_frames, sizes.get("height"), sizes.get("width"))  # None: depends on the video
    if any(wanted != got for wanted, got in zip(clip, given, strict=True) if got is not None):
        fail(
            f"The processor of {model} makes clips of {given} (frames, height, width), but the model expects {clip}: "
            "set `num_frames` and `crop_size` in its preprocessor_config.json.",
            code=2,
        )
    loaded.to(place).eval()
    stored = describe_stored(loaded.config)
    if exact_for is not None and stored is not None:
        say(f"The setting {stored.split()[0]} that `vivit-hf tune` stored is left out: {exact_for}.")
    if not needs_gradients:
        speed_up(loaded, is_exact=dtype is not None or exact_for is not None)
    return loaded, processor


def speed_up(model: Any, is_exact: bool) -> str | None:
    """Optimise a model, unless `is_exact` with its stored setting; return the name of that setting if it is used."""
    from ..inference import optimize
    from ..inference.stored_settings import describe_stored

    try:
        setting = optimize(model, stored=not is_exact).setting
    except ValueError as error:
        fail(f"The setting that `vivit-hf tune` stored cannot be used: {error} --dtype float32 leaves it out.", code=2)
    if setting is not None:
        say(f"Using {describe_stored(model.config)}, as `vivit-hf tune` chose; --dtype float32 runs the exact model.")
    return setting


def _from_pretrained(model: str, dtype: str, video_limits: dict[str, Any], image_frames: int | None) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError

    from ..initialisation.image_features import is_image_model, vivit_from_image
    from ..modeling_vivit import ViViTForVideoClassification
    from ..video_processing_vivit import ViViTVideoProcessor

    try:
        where = find_model(model)
        if image_frames is not None and is_image_model(model):
            loaded, processor = vivit_from_image(model, image_frames)
            processor.video_limits = {**(processor.video_limits or {}), **video_limits}
            return loaded.to(getattr(torch, dtype)), processor
        loaded = ViViTForVideoClassification.from_pretrained(model, dtype=getattr(torch, dtype), **where)
        processor = ViViTVideoProcessor.from_pretrained(model, video_limits=video_limits, **where)
    except SafetensorError as error:
        reason = f"its weights are damaged or incomplete ({error})."
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # a damaged or hostile folder can make the libraries raise anything
        reason = f"{type(error).__name__}: {error}"
    else:
        return loaded, processor
    return fail(f"Cannot load the model {model}: {reason}", code=2)


def load_encoder(
    settings: dict[str, Any],
    model: str | None,
    device: str | None,
    *,
    allow_private_addresses: bool = False,
    needs_gradients: bool = False,
) -> tuple[Any, Any]:
    """
    Load the model that features come from, and the processor with their sampling; exits with 2 if it has changed.

    Args:
        settings: see `Features`.
        model: where the model is now; None for the place in the settings.
        device, allow_private_addresses, needs_gradients: see `load`.
    """
    from ..inference.fingerprints import hub_commit, model_fingerprint

    name, views = model or settings["model"], settings["views"]
    encoder, processor = load(
        name,
        device,
        settings["dtype"],
        needs_labels=False,
        allow_private_addresses=allow_private_addresses,
        needs_gradients=needs_gradients,
        image_frames=views["num_frames"],
        exact_for=EXACT_FEATURES,
    )
    processor.frame_sampling = views["frame_sampling"]
    found = model_fingerprint(name, encoder.config, processor, hub_commit(name))
    if changed := [part for part, digest in settings["fingerprint"].items() if found[part] != digest]:
        fail(
            f"The model {name} is not the one that the features come from: its {' and '.join(changed)} changed. Give "
            "the right one with --model, or embed the videos again.",
            code=2,
        )
    return encoder, processor


def expand(videos: Sequence[str]) -> list[str]:
    """Return the videos in order: files, those in folders, matches of patterns, addresses, and - for standard input."""
    from ..data.scan import find_videos

    found: list[str] = []
    for video in videos:
        if video == "-" or "://" in video or os.path.isfile(video):
            found.append(video)
        elif os.path.isdir(video):
            inside = [str(path) for path in find_videos(video)]
            if not inside:
                raise typer.BadParameter(f"the folder {video!r} contains no video", param_hint="VIDEO")
            found += inside
        elif glob.has_magic(video) and (matches := sorted(glob.glob(video, recursive=True))):
            parts = [map(str, find_videos(path)) if os.path.isdir(path) else [path] for path in matches]
            found += dict.fromkeys(chain.from_iterable(parts))  # `**` matches folders as well as their contents
        else:
            found.append(video)  # a missing file is reported when it is read, and the others go on
    return found


def standard_input() -> bytearray:
    """Read all of standard input; exits with 1 if it exceeds the limits of a video."""
    from ..video_sources import VideoDecodingError, read_stream

    try:
        return read_stream(standard_input_file())
    except VideoDecodingError as error:
        fail(str(error))


def standard_input_file() -> Any:
    """Return standard input as a binary file; exits with 2 if it is closed or a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        what = "closed" if sys.stdin is None else "a terminal"
        raise typer.BadParameter(f"- reads a video from standard input, and that is {what}", param_hint="VIDEO")
    return sys.stdin.buffer


def check_windows(windows: bool, min_score: float, min_duration: float | None) -> None:
    if windows and (min_score or min_duration is not None):
        raise typer.BadParameter(
            "every window is printed; leave out --min-score and --min-duration", param_hint="--windows"
        )


def stream_of(video: str, model: Any, processor: Any, hop: int | None, unchanged_threshold: float) -> Any:
    """Return a `StreamingClassifier`; exits with 2 if the options do not fit the model or the processor."""
    from ..inference import StreamingClassifier

    with video_errors(video):
        return StreamingClassifier(model, processor, hop=hop, unchanged_threshold=unchanged_threshold)


def say_reuse(reuse: Any) -> None:
    """Print how many time steps took the token of another one, if there are any or if that changes the answers."""
    if reuse.num_reused or reuse.threshold:
        say(str(reuse))


def segments_of(
    found: Iterator[Any], config: Any, windows: bool, min_score: float, min_duration: float | None
) -> Iterator[Any]:
    """Return the windows as segments, or merged into segments."""
    from ..inference.segments import merge_windows, window_segments

    if config.label_groups:
        first, *others = config.label_groups
        say(f"Labels of the group {first!r} alone; `vivit-hf classify` gives those of {', '.join(others)} as well.")
    if windows:
        return window_segments(found, config)
    return merge_windows(found, config, min_score=min_score, min_duration=min_duration)


def as_row(segment: Any) -> dict[str, Any]:
    """Return a segment for JSON."""
    times = {"start": round(segment.start, 3), "end": round(segment.end, 3)}
    return {**times, "label": segment.label, "score": round(segment.score, 4)}
