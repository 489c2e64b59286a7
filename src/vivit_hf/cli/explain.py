"""`vivit-hf explain`: a picture of where the model looked."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.escaping import one_line
from . import options
from .output import echo, fail, video_errors


def explain(
    video: options.Video,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture or video to write: .png, .mp4 or .gif.")],
    model: options.Model = None,
    method: Annotated[
        Literal["rollout", "gradient"],
        typer.Option(help="rollout: where attention leads; gradient: what speaks for a label."),
    ] = "rollout",
    label: Annotated[
        str | None, typer.Option(help="The label to explain, for gradient.", show_default="the most likely")
    ] = None,
    start: Annotated[float | None, typer.Option(min=0, help="Start of the part to explain, in seconds.")] = None,
    end: Annotated[float | None, typer.Option(min=0, help="End of that part, in seconds.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 5,
    on_error: options.OnError = "warn",
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
) -> None:
    """
    Draw what the model saw: a heat map over the frames of one clip, its labels, and the weight of each time step.

    Example: vivit-hf explain holiday.mp4 --output holiday.png --method gradient
    """
    from ..explain.explanation import explain_clip
    from ..explain.pictures import save_explanation
    from ..inference.clips import shown_masks

    _check_output(output, video)
    by_gradient = method == "gradient"
    if label is not None and not by_gradient:
        raise typer.BadParameter("rollout does not depend on a label; add --method gradient", param_hint="--label")
    exact_for = "the picture shows what the exact model sees"
    classifier, processor = options.load(
        model, device, dtype, by_gradient, allow_private_addresses, by_gradient, exact_for=exact_for
    )
    index = None if label is None else _find_label(label, classifier.config)
    part: dict[str, Any] = {"start": start, "end": end}
    part |= {"bytes": options.standard_input(), "path": "-"} if video == "-" else {"path": video}
    on_lost = "repeat_last" if on_error == "warn" else "raise"
    with video_errors(video):
        features = processor(part, num_clips=1, num_crops=1, on_error=on_lost)
        mask = features.get("frame_mask")
        mask = None if mask is None else shown_masks(mask, classifier.config)
        explanation = explain_clip(classifier, processor, features["pixel_values"], method, index, top_k, mask)
    try:
        save_explanation(output, explanation)
    except OSError as error:
        fail(f"Cannot write {output}: {error.strerror or error}.")
    for name, score in explanation.labels:
        echo(f"{score:.3f}  {name}")
    echo(f"Written: {output}")


def _check_output(output: Path, video: str) -> None:
    from ..explain.pictures import SUFFIXES

    problem = None
    if output.suffix.lower() not in SUFFIXES:
        problem = f"expected {', '.join(SUFFIXES)}, got {output.name!r}"
    elif output.is_dir():
        problem = f"{str(output)!r} is a folder"
    elif os.path.exists(video) and output.exists() and os.path.samefile(video, output):
        problem = f"{str(output)!r} is the video itself"
    elif not output.absolute().parent.is_dir():
        problem = f"there is no folder {str(output.parent)!r}"
    if problem is not None:
        raise typer.BadParameter(problem, param_hint="--output")


def _find_label(label: str, config: Any) -> int:
    from ..data.labels import LabelMap

    names = LabelMap.from_config(config).names
    if label not in names:
        known = one_line(", ".join(names[:8])) + " ..." * (len(names) > 8)
        raise typer.BadParameter(f"the model does not know {label!r}; it knows {known}", param_hint="--label")
    return names.index(label)
