"""What the builders of the zoo are made of: random inputs, and one row per class of diffusers.

A builder gives a `Tiny`: the constructor arguments of a host class, the keyword arguments of one call, and what the
call means (token grid, text tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

TEXT = 7  # text tokens: no other axis of any model has this length

Inputs = dict[str, Any]


class Draw:
    """Draw random inputs from an own generator."""

    def __init__(self, batch: int, seed: int, frames: int = 3) -> None:
        self.batch = batch
        self.frames = frames
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw a standard normal tensor."""
        return torch.randn(shape, generator=self.generator)

    def rows(self, *shape: int) -> Tensor:
        """Draw a batched standard normal tensor."""
        return self.normal(self.batch, *shape)

    def whole(self, high: int, *shape: int) -> Tensor:
        """Draw batched whole numbers below a limit."""
        return torch.randint(high, (self.batch, *shape), generator=self.generator)

    def times(self, base: float, step: float) -> Tensor:
        """Give every row its own time."""
        return base + step * torch.arange(self.batch, dtype=torch.float32)

    def mask(self, length: int = TEXT) -> Tensor:
        """Mask the end of the text: every row has its own number of valid tokens, the last row all."""
        valid = length - torch.arange(self.batch).flip(0) % (length - 1)
        return torch.arange(length)[None] < valid[:, None]


@dataclass(frozen=True)
class Tiny:
    """One tiny model and one call of it.

    Attributes:
        config: Constructor arguments of the host class.
        inputs: Keyword arguments of the call.
        grid: Frames, rows and columns of the token grid that the call means.
        text: Text (or other condition) tokens; 0 where the host has none.
    """

    config: dict[str, Any]
    inputs: Inputs
    grid: tuple[int, int, int]
    text: int = TEXT


@dataclass(frozen=True)
class Host:
    """A class of diffusers with its builder.

    Attributes:
        name: Name of the class.
        make: Draws a tiny model's arguments.
        rows: The most rows that one call takes; None for any number.
        shared: Inputs that all rows of a call share.
    """

    name: str
    make: Callable[[Draw], Tiny] = field(repr=False)
    rows: int | None = None
    shared: frozenset[str] = frozenset()

    def draw(self, draw: Draw) -> Tiny:
        """Draw a tiny model's arguments, for no more rows than the host takes."""
        draw.batch = draw.batch if self.rows is None else min(draw.batch, self.rows)
        return self.make(draw)


HOSTS: dict[str, Host] = {}


def host(
    name: str, *shared: str, rows: int | None = None
) -> Callable[[Callable[[Draw], Tiny]], Callable[[Draw], Tiny]]:
    """Register a builder under its function's name if the installed diffusers has the class."""

    def register(make: Callable[[Draw], Tiny]) -> Callable[[Draw], Tiny]:
        if name in dir(diffusers):
            HOSTS[make.__name__] = Host(name, make, rows, frozenset(shared))
        return make

    return register


def grid_ids(height: int, width: int, axes: int = 3, time: float = 0) -> Tensor:
    """Number image tokens by time, row and column [HW, axes], as FLUX pipelines do."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height, width, axes)
    ids[..., 0], ids[..., 1], ids[..., 2] = time, rows, columns
    return ids.reshape(-1, axes)
