"""What a repository needs besides, so that Hugging Face's Inference Endpoints serve its model."""

import shutil
from importlib.metadata import requires
from pathlib import Path
from typing import Any


# What the model and its processor import. The image of an endpoint brings torch, which pip should not replace.
_NEEDED = ("transformers", "huggingface_hub", "av", "numpy", "pillow")


def check_endpoint(model: Any) -> None:
    """Raise ValueError for a model without a classifier."""
    if not hasattr(model, "classifier") or not model.config.num_labels:
        raise ValueError(
            f"`endpoint=True` needs a model with a classifier, got a {type(model).__name__} with num_labels="
            f"{model.config.num_labels}: push a ViViTForVideoClassification, or leave `endpoint` out."
        )


def write_endpoint(folder: Path) -> None:
    """Write `handler.py`, and `requirements.txt` with the versions that this package needs."""
    shutil.copyfile(Path(__file__).with_name("endpoint_handler.py"), folder / "handler.py")
    ours = [one for one in requires("vivit-hf") or [] if "extra ==" not in one]
    lines = [one for one in ours if one.replace("-", "_").startswith(_NEEDED)]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
