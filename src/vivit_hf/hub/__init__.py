"""Push models and model cards to the Hub, and register ViViT with the Auto classes of transformers."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .model_card import read_initialisation as read_initialisation, write_model_card as write_model_card
    from .push import push_to_hub as push_to_hub

__getattr__, __dir__, __all__ = lazy_exports(__name__)
