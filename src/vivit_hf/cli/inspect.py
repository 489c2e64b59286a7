"""`vivit-hf inspect`: describe a model from its configuration, without its weights."""

import os
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..data.escaping import one_line
from . import options
from .output import as_cell, echo_json, fail, output_console, quiet_libraries


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Folder or Hub id, or the name of a preset.", show_default=False)
    ] = "",
    all_labels: Annotated[bool, typer.Option("--labels", help="List every label.")] = False,
    as_json: options.Json = False,
) -> None:
    """
    Show a model's variant, sizes, parameters and multiply-adds, tokens, expected input, labels and processor.

    Only the configuration is read, so the weights need not be there. Without MODEL, describe the demo model in the
    package. Exit code 0, or 1 if the configuration cannot be read.

    Example: vivit-hf inspect vivit-b-16x2-fe
    """
    from ..inference.demo_model import demo_model_path
    from ..inference.stored_settings import describe_stored
    from ..initialisation.inspection import describe_model
    from ..initialisation.model_processor import describe_frames

    quiet_libraries()
    name = model or str(demo_model_path())
    config, processor = _read(name)
    found = {"model": name, **describe_model(config, processor)}
    if as_json:
        echo_json(found)
        return
    console = output_console()
    described = "none beside the model" if processor is None else describe_frames(processor)
    tuned = describe_stored(config)
    lines = {**_lines(found, all_labels), "processor": described, **({} if tuned is None else {"tuned": tuned})}
    for key, value in lines.items():
        console.print(f"[bold]{key:<10}[/]", end="")
        console.print(one_line(value), highlight=False, markup=False, soft_wrap=True)
    table = Table("part", Column("parameters (M)", justify="right"), Column("multiply-adds (G)", justify="right"))
    for part, counts in found["parts"].items():
        table.add_row(as_cell(part), f"{counts['parameters'] / 1e6:.2f}", f"{counts['multiply_adds'] / 1e9:.2f}")
    table.add_section()
    table.add_row("all", f"{found['parameters'] / 1e6:.2f}", f"{found['multiply_adds'] / 1e9:.2f}")
    console.print(table)


def _read(name: str) -> tuple[Any, Any]:
    """Read the configuration and the processor, None if there is none; exits with 1 if that fails."""
    from ..configuration_vivit import ViViTConfig
    from ..video_processing_vivit import ViViTVideoProcessor

    if name in ViViTConfig.presets:
        return ViViTConfig.from_preset(name), None
    try:
        where = options.find_model(name)
        config = ViViTConfig.from_pretrained(name, **where)
    except Exception as error:  # a damaged or hostile file can make the libraries raise anything
        fail(f"Cannot read the configuration of {name}: {_first_line(error)}")
    try:
        return config, ViViTVideoProcessor.from_pretrained(name, **where)
    except Exception as error:
        if not isinstance(error, OSError) or os.path.exists(os.path.join(name, "preprocessor_config.json")):
            fail(f"Cannot read the processor of {name}: {_first_line(error)}")
        return config, None


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, (OSError, ValueError)) and first else f"{type(error).__name__}: {first}"


def _lines(found: dict[str, Any], all_labels: bool) -> dict[str, str]:
    """Return the lines above the table, by their headings."""
    variant, tokens = found["variant"], found["tokens"]
    frames, channels, height, width = found["input"]["shape"]
    low, high = found["input"]["range"]
    grid = " x ".join(map(str, tokens["grid"]))
    registers = f" and {tokens['register_tokens']} registers" if tokens["register_tokens"] else ""
    patches = "2D patches" if tokens["embedding"] != "tubelet" else "tubelets"
    size = " x ".join(map(str, tokens["tubelet"]))
    labels = found["labels"]
    shown = labels if all_labels else labels[:6]
    more = f" and {len(labels) - len(shown)} more (--labels)" if len(labels) > len(shown) else ""
    lines = {
        "model": found["model"],
        "variant": f"{variant['attention_type']} ({variant['paper']} of the paper)",
        "input": f"{frames} frames of {height} x {width} pixels, {channels} channels, values in [{low:g}, {high:g}]",
        "tokens": f"{grid} = {tokens['total']:,} (time x height x width){registers}, {patches} of {size}",
        "sizes": ", ".join(f"{key} {value}" for key, value in found["sizes"].items()),
        "labels": f"{len(labels)}: {', '.join(shown)}{more}" if labels else "none: the model returns features",
    }
    if found["label_groups"]:
        lines["groups"] = ", ".join(f"{group} ({size})" for group, size in found["label_groups"].items())
    if pretraining := found["pretraining"]:
        width, layers, heads = (
            pretraining[f"decoder_{key}"] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        lines["decoder"] = (
            f"{layers} layers, width {width}, {heads} heads, for masked pretraining with "
            f"{pretraining['mask_ratio']:.0%} of the places masked; not counted below"
        )
    return lines
