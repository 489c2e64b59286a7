"""Write, upload and describe the result of a conversion."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

import vivit_hf

from ..configuration_vivit import ViViTConfig
from ..data.escaping import one_line
from ..hub.model_card import write_model_card
from ..video_processing_vivit import ViViTVideoProcessor
from .weight_files import ConversionError, read_json


MAX_SHARD_SIZE = "5GB"

# Base class of the HTTP client's errors: requests' or httpx', depending on the version of huggingface_hub.
HTTPError: Any = HfHubHTTPError.__bases__[0]


@contextlib.contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """
    Yield a temporary folder beside `output`; rename it to `output` on success, and remove it on any error.

    Raises:
        ConversionError: if `output` is a file or a folder that is not empty.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; choose another --output or remove it.")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def save(
    model: PreTrainedModel,
    processor: ViViTVideoProcessor,
    folder: Path,
    name: str,
    *,
    base_model: str | None = None,
    report: Any = None,
    datasets: list[str] | None = None,
) -> None:
    """Save model, processor and a model card for `name` that states the origin of the weights."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(folder)
    write_model_card(folder, model, repo_id=name, base_model=base_model, report=report, datasets=datasets)


def push(folder: str, repository: str, private: bool) -> None:
    """Upload the model and processor in a finished folder with their own `push_to_hub`."""
    config = read_json(Path(folder) / "config.json")
    package = vivit_hf if config["model_type"] == ViViTConfig.model_type else transformers
    model = getattr(package, config["architectures"][0]).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    try:
        model.push_to_hub(repository, private=private)
        processor.push_to_hub(repository, private=private)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise ConversionError(f"{folder} is complete, but was not uploaded to {repository}: {error}") from error
    print_line(f"uploaded to {repository}")


@dataclass
class Result:
    """Summary of a conversion."""

    output: str
    model: str
    mapped: int
    unused: Mapping[str, str] = field(default_factory=dict)  # name of a source array -> reason
    newly_initialised: list[str] = field(default_factory=list)
    changes: str = ""
    parity: str = "not checked (--skip-parity)"
    num_parameters: int = 0
    processor: str = ""
    notes: list[str] = field(default_factory=list)

    def print(self) -> None:
        total = self.mapped + len(self.unused)
        size = sum(path.stat().st_size for path in Path(self.output).rglob("*") if path.is_file())
        print_table(
            ("arrays mapped", f"{self.mapped} of {total}" + (f" ({self.changes})" if self.changes else "")),
            ("newly initialised", shortened(self.newly_initialised) or "none"),
            ("unused", shortened(f"{name} ({reason})" for name, reason in self.unused.items()) or "none"),
            ("parity", self.parity),
            ("size", f"{self.num_parameters / 1e6:,.1f} M parameters, {size / 1e6:,.0f} MB"),
            ("model", self.model),
            ("processor", self.processor),
            *(("note", note) for note in self.notes),
            ("written to", self.output),
        )


def print_table(*rows: tuple[str, str]) -> None:
    """Print rows of a heading and a text; names from files cannot add markup or control characters."""
    table = Table("", "", show_header=False)
    for heading, text in rows:
        table.add_row(heading, Text(one_line(text)))
    Console().print(table)


def print_line(text: str) -> None:
    Console().print(Text(one_line(text)))


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """List names with layer numbers replaced by N, each once; merge whole layers if there are more than `limit`."""
    names = list(names)
    kinds = list(dict.fromkeys(re.sub(r"(?<=[._/])\d+(?=[./])", "N", name) for name in names))
    if len(kinds) > limit:
        kinds = list(dict.fromkeys(re.sub(r"(?<=[._/]N[./]).*", "*", kind) for kind in kinds))
    listing = ", ".join(kinds[:limit]) + (f", and {len(kinds) - limit} more kinds" if len(kinds) > limit else "")
    return f"{len(names)}: {listing}" if names else ""


def count_parameters(model: torch.nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
