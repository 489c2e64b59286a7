"""Read config.json of a model folder, and change a field of it."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..data.whole_files import written_whole
from ..model_files import named_json_errors


def read_fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of a folder's config.json; ValueError if it is missing or damaged."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME} to write to; merge an adapter into its model first.")
    with named_json_errors(folder, CONFIG_NAME):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def write_field(folder: str | os.PathLike[str], name: str, value: Any) -> None:
    """Write a field into a folder's config.json, where all else stays."""
    stored = {**read_fields(folder), name: value}
    with written_whole(Path(folder, CONFIG_NAME)) as unfinished:
        unfinished.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
