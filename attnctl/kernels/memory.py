"""Memory for what a kernel lays out on its way, used again and again within one call.

A CPU spends longer on getting new pages from the system, and on giving them back, than on filling them.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Hold one piece of memory under each name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory of a shape, in the dtype and on the device of `like`, with whatever stands in it."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = like.new_empty(size)
        return self._kept[name][:size].view(shape)
