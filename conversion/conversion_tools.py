"""What the conversion scripts share: options, labels, whole output or none, the table at the end, one-line errors."""

import argparse
import contextlib
import math
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

import vivit_hf
from vivit_hf import ViViTConfig, ViViTVideoProcessor
from vivit_hf.conversion.weight_files import ConversionError, read_json
from vivit_hf.hub.model_card import write_model_card


LABEL_FILES_REPOSITORY = "huggingface/label-files"
MAX_SHARD_SIZE = "5GB"

# A connection that fails is an error of the HTTP client, which is another one from version to version.
HTTPError = HfHubHTTPError.__bases__[0]
# What a wrong file, a wrong option or an unreachable Hub raises. Anything else is a defect, and shows its traceback.
_EXPECTED_ERRORS = (
    *(OSError, ValueError, RuntimeError, EOFError, MemoryError, HTTPError),
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)
_MAX_ERROR_LENGTH = 1500


# The command line


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """With the default behind an option, where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has; `description` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=description.strip().split("\n\n")[0], formatter_class=_DefaultsFormatter
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    output.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this repository of the Hub")
    output.add_argument("--private", action="store_true", help="make that repository private, if it has to be created")
    output.add_argument("--skip-parity", action="store_true", help="do not run source and result against each other")
    return parser


def add_size_argument(parser: Any, name: str, help: str, default: list[int] | None = None) -> None:
    parser.add_argument(name, type=int, nargs="+", action=_OneOrTwo, metavar="PIXELS", help=help, default=default)


class _OneOrTwo(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two (height width), not {len(values)}")
        setattr(namespace, self.dest, values)


def one_or_pair(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else tuple(values)


def run(convert: Callable[[argparse.Namespace], "Result"], parser: argparse.ArgumentParser, argv: Any) -> int:
    """Parses, converts, prints the table: 0, or 1 and one line on standard error."""
    args = parser.parse_args(argv)
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # these scripts say themselves what is unused and what is new
    logging.disable_progress_bar()
    try:
        result = convert(args)
        result.print()
        if args.push_to_hub:
            push(args.output, args.push_to_hub, args.private)
    except _EXPECTED_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
    return 0


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, cut where it turns into a listing without end."""
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]} ..."


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal; calling what it yields names the step that begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda description: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        started = 0

        def begin(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, completed=started)
            started += 1

        yield begin


# Labels


def read_labels(path: str | Path) -> dict[int, str]:
    """
    Label names from a JSON list, a JSON map of index to name, or a text file with one name per line.

    Raises:
        ValueError: if the indices are not 0, 1, 2, ...
    """
    if str(path).endswith(".json"):
        labels = read_json(path)
        labels = dict(enumerate(labels)) if isinstance(labels, list) else _indexed(labels, path)
    else:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        labels = dict(enumerate(line.strip() for line in lines if line.strip()))
    if sorted(labels) != list(range(len(labels))):
        raise ConversionError(f"{path}: the label indices must be 0 to {len(labels) - 1} without a gap.")
    return {index: str(labels[index]) for index in sorted(labels)}


def _indexed(labels: Any, path: str | Path) -> dict[int, Any]:
    try:
        return {int(index): label for index, label in labels.items()}
    except (AttributeError, ValueError) as error:
        raise ConversionError(f"{path} is neither a list of labels nor a map from index to label.") from error


def labels_from_hub(file_name: str) -> dict[int, str] | None:
    """Labels from the Hub's data set of label files; None, with a warning, if they cannot be had."""
    try:
        path = hf_hub_download(LABEL_FILES_REPOSITORY, file_name, repo_type="dataset")
    except (OSError, ValueError) as error:
        warn(f"no {file_name} from {LABEL_FILES_REPOSITORY} ({one_line(error)[:200]})")
        return None
    return read_labels(path)


def set_labels(config: PretrainedConfig, labels: Mapping[int, str]) -> None:
    config.id2label = dict(labels)
    config.label2id = {label: index for index, label in labels.items()}


# Writing


@contextlib.contextmanager
def beside_and_renamed(output: str | Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it gets that name when all is well, and is removed when not."""
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
    """Model, processor, and a model card for `name` that says where the weights come from, see `write_model_card`."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(folder)
    write_model_card(folder, model, repo_id=name, base_model=base_model, report=report, datasets=datasets)


def push(folder: str, repository: str, private: bool) -> None:
    """Uploads a finished folder's model and processor, each by its own `push_to_hub`."""
    config = read_json(Path(folder) / "config.json")
    package = vivit_hf if config["model_type"] == ViViTConfig.model_type else transformers
    model = getattr(package, config["architectures"][0]).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    try:
        model.push_to_hub(repository, private=private)
        processor.push_to_hub(repository, private=private)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise ConversionError(f"{folder} is whole, but was not uploaded to {repository}: {error}") from error
    Console().print(f"uploaded to {repository}")


# What frames look like to the model


def value_range(processor: ViViTVideoProcessor) -> tuple[float, float]:
    """What black and white become, over all channels."""
    channels = max(3, len(processor.image_mean))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, channels, 1, 1)
    values = processor.rescale_and_normalize(extremes)
    return values.min().item(), values.max().item()


def describe_processor(processor: ViViTVideoProcessor) -> str:
    """How frames become pixel values, in words."""
    low, high = value_range(processor)
    size = processor.size
    resized = (
        f"short side {size['shortest_edge']}" if "shortest_edge" in size else f"{size['height']} x {size['width']}"
    )
    crop = processor.crop_size
    crop = f", central crop {crop['height']} x {crop['width']}" if processor.do_center_crop else ""
    frames = f"{processor.num_frames} frames, stride {processor.frame_stride}"
    return f"{frames}, {resized}{crop}, values in [{low:.3g}, {high:.3g}]"


# The table at the end


@dataclass
class Result:
    """What a conversion did; `print` shows it."""

    output: str
    model: str
    mapped: int
    unused: Mapping[str, str] = field(default_factory=dict)  # name of a source array -> why
    newly_initialised: list[str] = field(default_factory=list)
    changes: str = ""
    parity: str = "not checked (--skip-parity)"
    num_parameters: int = 0
    processor: str = ""
    notes: list[str] = field(default_factory=list)

    def print(self, console: Console | None = None) -> None:
        table = Table("", "", show_header=False)
        total = self.mapped + len(self.unused)
        table.add_row("arrays mapped", f"{self.mapped} of {total}" + (f" ({self.changes})" if self.changes else ""))
        table.add_row("newly initialised", shortened(self.newly_initialised) or "none")
        reasons = [f"{name} ({why})" for name, why in self.unused.items()]
        table.add_row("unused", shortened(reasons) or "none")
        table.add_row("parity", self.parity)
        size = sum(path.stat().st_size for path in Path(self.output).rglob("*") if path.is_file())
        table.add_row("size", f"{self.num_parameters / 1e6:,.1f} M parameters, {size / 1e6:,.0f} MB")
        table.add_row("model", self.model)
        table.add_row("processor", self.processor)
        for note in self.notes:
            table.add_row("note", note)
        table.add_row("written to", self.output)
        (console or Console()).print(table)


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """Names with the numbers of layers as N, each once; beyond `limit` of them, layers as a whole."""
    names = list(names)
    kinds = list(dict.fromkeys(re.sub(r"(?<=[._/])\d+(?=[./])", "N", name) for name in names))
    if len(kinds) > limit:
        kinds = list(dict.fromkeys(re.sub(r"(?<=[._/]N[./]).*", "*", kind) for kind in kinds))
    listing = ", ".join(kinds[:limit]) + (f", and {len(kinds) - limit} more kinds" if len(kinds) > limit else "")
    return f"{len(names)}: {listing}" if names else ""


def count_parameters(model: torch.nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
