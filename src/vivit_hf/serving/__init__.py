"""Answer HTTP requests with the labels of videos: `vivit-hf serve`."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .app import create_app as create_app
    from .predictor import Predictor as Predictor
    from .server import run_server as run_server
    from .serving_limits import ServingLimits as ServingLimits

__getattr__, __dir__, __all__ = lazy_exports(__name__)
