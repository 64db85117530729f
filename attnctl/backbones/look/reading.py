"""What tells how one attention module is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Reading"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one attention module is read.

    Attributes:
        heads: Heads H: contiguous channels of what `out` is given.
        width: Channels of the values.
        out: The first layer behind attention.
        enter: Runs the attention on the (normed) tokens that its module was called with.
        values: The layer whose output ends with the values; None where they are read at torch's fused kernel.
        by_head: Whether queries, keys and values of one head lie together in that output.
        norm: A norm between the module's input and attention, or None.
        windowed: Whether the tokens are cut, shifted or padded before they reach `values`.
        channels_first: Whether the module is given maps [B, C, H, W].
        order: Numbers the tokens of a map of (height, width) as attention gets them: row by row from 0, -1 for
            padding; None where they come row by row, or as `windowed` blocks are found to have them.
        sized: Whether the second argument is the grid of the tokens.
        prefix: Class and register tokens ahead of the grid, None for as many as the model has.
        settings: Attributes that the module `core` needs while it is read.
        core: The module that holds the projections.
        pool: Names of the queries where these are single tokens and no places, as in attention pools.
        rounds: How often weights meet values in one call, each time for as many of the heads.
        spread: Keys are means of so many tokens each, in a row.
        mixer: The mixer that has taken the kernel's place, which is then where attention is read.
        summed: Whether values meet their keys before a query does, in a product at which they are read.
        heads_first: Whether heads come ahead of the windows of an image where both are apart.
    """

    heads: int
    width: int
    out: nn.Module
    enter: Callable[..., Any]
    values: nn.Module | None = None
    by_head: bool = False
    norm: nn.Module | None = None
    windowed: bool = False
    channels_first: bool = False
    order: Callable[[int, int], Tensor] | None = None
    sized: bool = False
    prefix: int | None = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    core: nn.Module | None = None
    pool: tuple[str, ...] | None = None
    rounds: int = 1
    spread: int = 1
    heads_first: bool = False
    mixer: nn.Module | None = None
    summed: bool = False
