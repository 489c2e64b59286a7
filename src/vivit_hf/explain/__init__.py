"""Where a model looked: attention rollout, gradient relevance, and pictures of both."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .batch_picture import draw_batch as draw_batch
    from .explanation import Explanation as Explanation, explain_clip as explain_clip
    from .heat import draw_overlay as draw_overlay
    from .pictures import draw_explanation as draw_explanation, save_explanation as save_explanation
    from .relevance import (
        Relevance as Relevance,
        attention_rollout as attention_rollout,
        gradient_relevance as gradient_relevance,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__)
