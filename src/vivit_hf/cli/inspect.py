"""`vivit-hf inspect`: what a model is, before its weights are there."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .options import JsonOption, find_model
from .output import as_cell, echo_json, fail, one_line, output_console, quiet_libraries


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, (OSError, ValueError)) and first else f"{type(error).__name__}: {first}"


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Folder or Hub id, or the name of a preset.", show_default=False)
    ] = "",
    all_labels: Annotated[bool, typer.Option("--labels", help="List every label.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Show a model's variant, sizes, parameters and multiply-adds, tokens, expected input, labels and processor.

    Reads its configuration alone: the weights need not be there. Without MODEL it is the demo model in the package.
    Exit code 0, or 1 if the configuration cannot be had.

    Example: vivit-hf inspect vivit-b-16x2-fe
    """
    from ..configuration_vivit import ViViTConfig
    from ..inference.demo_model import demo_model_path
    from ..initialisation.inspection import describe_model
    from ..video_processing_vivit import ViViTVideoProcessor

    quiet_libraries()
    name = model or str(demo_model_path())
    processor: dict[str, Any] | None = None
    if name in ViViTConfig.presets:
        config = ViViTConfig.from_preset(name)
    else:
        try:
            where = find_model(name)
            config = ViViTConfig.from_pretrained(name, **where)
        except Exception as error:  # a damaged or hostile file can make the libraries trip over anything
            fail(f"Cannot read the configuration of {name}: {_first_line(error)}")
        try:
            processor = ViViTVideoProcessor.from_pretrained(name, **where).to_dict()
        except Exception as error:
            if not isinstance(error, OSError) or os.path.exists(os.path.join(name, "preprocessor_config.json")):
                fail(f"Cannot read the processor of {name}: {_first_line(error)}")
            processor = None
    found = {"model": name, **describe_model(config), "processor": processor}
    if as_json:
        echo_json(found)
        return

    console = output_console()
    variant, tokens, sizes = found["variant"], found["tokens"], found["sizes"]
    frames, channels, height, width = found["input"]["shape"]
    grid = " x ".join(map(str, tokens["grid"]))
    lines = {
        "model": name,
        "variant": f"{variant['attention_type']} ({variant['paper']} of the paper)",
        "input": f"{frames} frames of {height} x {width} pixels, {channels} channels, values in [-1, 1]",
        "tokens": f"{grid} = {tokens['total']:,} (time x height x width), "
        + ("2D patches" if tokens["embedding"] != "tubelet" else "tubelets")
        + f" of {' x '.join(map(str, tokens['tubelet']))}",
        "sizes": ", ".join(f"{key} {value}" for key, value in sizes.items()),
    }
    labels = found["labels"]
    shown = labels if all_labels else labels[:6]
    more = f" and {len(labels) - len(shown)} more (--labels)" if len(labels) > len(shown) else ""
    lines["labels"] = f"{len(labels)}: {', '.join(shown)}{more}" if labels else "none: it gives features"
    if found["label_groups"]:
        lines["groups"] = ", ".join(f"{group} ({size})" for group, size in found["label_groups"].items())
    if processor is None:
        lines["processor"] = "none beside the model"
    else:
        rate = f"stride {processor['frame_stride']}"
        if processor.get("frames_per_second"):
            rate = f"{processor['frames_per_second']:g} frames per second"
        lines["processor"] = f"{processor['num_frames']} frames, {rate}, {processor['frame_sampling']} sampling"
    for key, value in lines.items():
        console.print(f"[bold]{key:<10}[/]", end="")
        console.print(one_line(value), highlight=False, markup=False, soft_wrap=True)
    table = Table("part", Column("parameters (M)", justify="right"), Column("multiply-adds (G)", justify="right"))
    for part, counts in found["parts"].items():
        table.add_row(as_cell(part), f"{counts['parameters'] / 1e6:.2f}", f"{counts['multiply_adds'] / 1e9:.2f}")
    table.add_section()
    table.add_row("all", f"{found['parameters'] / 1e6:.2f}", f"{found['multiply_adds'] / 1e9:.2f}")
    console.print(table)
