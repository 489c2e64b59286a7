"""Run a conversion: read its processor, write its result whole, upload it, and describe it."""

import argparse
import importlib
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError  # the former of whichever client it uses
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

import vivit_hf

from ..configuration_vivit import ViViTConfig
from ..hub.model_card import write_model_card
from ..initialisation.from_image import list_unused, merge_layers
from ..initialisation.weight_files import ConversionError, has_processor, read_json
from ..video_processing_vivit import ViViTVideoProcessor
from .terminal import one_line, print_table, warn


# Raised for wrong files, wrong options and an unreachable Hub. Any other error is a bug and shows its traceback.
_EXPECTED_ERRORS = (
    *(OSError, ValueError, RuntimeError, EOFError, MemoryError, ModuleNotFoundError, HTTPError),
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)


def run(module: str, args: argparse.Namespace) -> int:
    """
    Call the `convert` of a module and print what it returns; return 0, or 1 after one line on standard error.

    With `push_to_hub`, the result is then uploaded.
    """
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the result lists unused and new weights itself
    logging.disable_progress_bar()
    try:
        result = importlib.import_module(f".{module}", __package__).convert(args)
        result.print()
        if repository := vars(args).get("push_to_hub"):
            _push(args.output, repository, args.private, args.endpoint, result.card)
    except _EXPECTED_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
    return 0


@contextmanager
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
    args: argparse.Namespace, folder: Path, model: PreTrainedModel, processor: ViViTVideoProcessor, **card: Any
) -> None:
    """Save model and processor, and a model card with the given arguments of `write_model_card`."""
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    write_model_card(folder, model, repo_id=args.push_to_hub or Path(args.output).name, **card)


def read_processor(source: str) -> ViViTVideoProcessor | None:
    """Read the processor beside the weights of a folder or Hub id; return None after a warning if there is none."""
    if has_processor(source):
        return ViViTVideoProcessor.from_pretrained(source)
    warn(f"{source} has no preprocessor_config.json; using values in [-1, 1], as the official models do")
    return None


def _push(folder: str, repository: str, is_private: bool, endpoint: bool, card: Mapping[str, Any]) -> None:
    """Upload the model and processor in a finished folder with their own `push_to_hub`."""
    config = read_json(Path(folder) / "config.json")
    package = vivit_hf if config["model_type"] == ViViTConfig.model_type else transformers
    model = getattr(package, config["architectures"][0]).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    private = is_private or None  # None leaves a new repository to the Hub's default, which may be private
    card = {**card, "endpoint": True} if endpoint else card
    try:
        model.push_to_hub(repository, private=private, **card)
        processor.push_to_hub(repository, private=private)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise ConversionError(f"{folder} is complete, but was not uploaded to {repository}: {error}") from error
    print_table(("uploaded to", repository))


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
    card: Mapping[str, Any] = field(default_factory=dict)  # metadata for `push_to_hub` that the model does not know

    def print(self) -> None:
        total = self.mapped + len(self.unused)
        size = sum(path.stat().st_size for path in Path(self.output).rglob("*") if path.is_file())
        print_table(
            ("arrays mapped", f"{self.mapped} of {total}" + (f" ({self.changes})" if self.changes else "")),
            ("newly initialised", shortened(self.newly_initialised) or "none"),
            ("unused", shortened(list_unused(self.unused)) or "none"),
            ("parity", self.parity),
            ("size", f"{self.num_parameters / 1e6:,.1f} M parameters, {size / 1e6:,.0f} MB"),
            ("model", self.model),
            ("processor", self.processor),
            *(("note", note) for note in self.notes),
            ("written to", self.output),
        )


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """List names with layer numbers replaced by N, each once; merge whole layers if there are more than `limit`."""
    kinds = merge_layers(names)
    if len(kinds) > limit:
        kinds = list(dict.fromkeys(re.sub(r"(?<=[._/]N[./]).*", "*", kind) for kind in kinds))
    listing = ", ".join(kinds[:limit]) + (f", and {len(kinds) - limit} more kinds" if len(kinds) > limit else "")
    return f"{len(names)}: {listing}" if names else ""
