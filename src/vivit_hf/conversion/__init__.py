"""Convert image models, google-research/scenic and transformers' Vivit to ViViTs, and export ViViTs to ONNX."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .scenic_checkpoint import read_scenic_checkpoint as read_scenic_checkpoint
    from .scenic_weights import (
        config_from_scenic as config_from_scenic,
        state_dict_from_scenic as state_dict_from_scenic,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__)
