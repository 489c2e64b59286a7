"""What linear layers that multiply in int8 share, on every device: the plain weight stays beside the quantised one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class Int8Linear(nn.Linear):
    """
    A plain layer that was turned into a quantised one in place.

    Copies, pickles, casts, moves to another device and loaded weights make it plain again.
    """

    added: ClassVar[tuple[str, ...]]  # attributes that a plain layer does not have

    def unpack(self) -> None:
        """Turn this layer back into the plain one, in place."""
        for name in self.added:
            del vars(self)[name]
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Linear:
        applied = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if (applied.dtype, applied.device) != (self.weight.dtype, self.weight.device):
            self.unpack()
            return self._apply(fn, recurse)  # that of nn.Linear
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*args, **kwargs)  # that of nn.Linear

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain layers."""
        state = {name: value for name, value in vars(self).items() if name not in self.added}
        return object.__new__, (nn.Linear,), state
