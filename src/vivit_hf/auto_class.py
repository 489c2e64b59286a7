"""Which classes take the code that defines them along to where they are saved."""

from typing import Any


class AutoClassMixin:
    """
    `_auto_class`, which `register_for_auto_class` sets, for one class at a time.

    A class that has one copies its file beside what it saves. In transformers the subclasses inherit that: one that is
    derived in a training script would publish the script, and the one that FSDP makes from ours, a file of PyTorch.
    """

    _auto_class: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._auto_class = vars(cls).get("_auto_class")
