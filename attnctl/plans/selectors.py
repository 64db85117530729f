"""Ways to say which part of an attention map to compute, for `attnctl.processors.SparseAttention`.

`Online` judges by the queries and keys of the run. `Neighborhood`, `SlidingTile` and `Radial` go by the places of
tokens alone. A `BlockPlan` or `ModelPlan` of a calibration says it once for a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from attnctl.errors import ConfigError, choice, nearest, number, unboxed, whole

__all__ = ["Neighborhood", "Online", "Radial", "SlidingTile"]

By = Literal["map", "pooled", "antidiagonal"]
Budget = Literal["row", "head", "model"]
Rest = Literal["drop", "mean"]
_LARGEST = 1 << 16  # tokens of a block or a tile: the last one is filled up to as many
_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH", "TILE", "SQUARE")


@dataclass(frozen=True, kw_only=True)
class Online:
    """Choose blocks while the model runs, and keep them for some steps.

    Attributes:
        density: Share of the image's blocks to compute, above 0, up to 1; 0.5 if `mass` is not given either.
        mass: Share of every row's scores that its blocks reach, above 0, up to 1, in place of `density`.
        by: "map": the map's own mass, and dense attention on the steps that choose; "pooled": mean queries and keys of
            blocks (arXiv 2502.18137); "antidiagonal": XAttention's sums (arXiv 2503.16428). With the last two no step
            is dense on its account.
        every: Steps from one choice to the next.
        dense_steps: Steps at the beginning of the run that stay dense; None for those of the control.
        schedule: Densities (or masses) of equal parts of the run, in place of one for all of it.
        budget: Who has the density: "row", each row of blocks; "head", each head; "model", all attentions share it.
        block: Tokens in a block of keys, and of queries unless `block_q` says otherwise.
        block_q: Tokens in a block of queries.
        order: Order of the tokens that blocks are cut from: a name of `attnctl.plans.orders.LAYOUTS`.
        rows: Queries of every block that "map" looks at; None for all of them.
        share: Sites in a row that use the choice of the first of them.
        rest: What becomes of blocks that are left out: "drop", nothing; "mean", each counts as its mean key and value.
        carry: Whether what the blocks that are left out changed at the last choice is added until the next one; for
            "map" alone. It takes as much memory as the output of every attention, and the steps that choose compute
            both.
    """

    density: float | None = None
    mass: float | None = None
    by: By = "map"
    every: int = 4
    dense_steps: int | None = None
    schedule: tuple[float, ...] = ()
    budget: Budget = "row"
    block: int = 64
    block_q: int | None = None
    order: str = "FHW"
    rows: int | None = None
    share: int = 1
    rest: Rest = "mean"
    carry: bool = False

    def __post_init__(self) -> None:
        if self.density is not None and self.mass is not None:
            raise ConfigError(f"Online: density={self.density} and mass={self.mass} were given; give one of them.")
        if self.density is None and self.mass is None:
            object.__setattr__(self, "density", 0.5)
        for name in ("density", "mass"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(getattr(self, name), f"Online: {name}", high=1.0, above=0.0))
        if isinstance(self.schedule, (str, int, float)) or not isinstance(self.schedule, Sequence):
            raise ConfigError(f"Online: schedule={self.schedule!r:.80} was given; expected shares such as (0.8, 0.5).")
        parts = tuple(number(x, "Online: schedule", high=1.0, above=0.0) for x in self.schedule)
        object.__setattr__(self, "schedule", parts)
        for name, options in (("by", By), ("budget", Budget), ("rest", Rest)):
            choice(getattr(self, name), f"Online: {name}", get_args(options))
        for name, least in (("every", 1), ("block", 1), ("share", 1), ("block_q", 1), ("rows", 1), ("dense_steps", 0)):
            value = getattr(self, name)
            if value is not None or name in ("every", "block", "share"):
                most = _LARGEST if name in ("block", "block_q") else None
                object.__setattr__(self, name, whole(value, f"Online: {name}", least, most))
        if not isinstance(self.order, str) or self.order not in _ORDERS:
            raise ConfigError(
                f"Online: order={self.order!r:.40} was given; expected one of {', '.join(_ORDERS)}."
                f"{nearest(str(self.order), _ORDERS)}"
            )
        if not isinstance(self.carry, bool) or (self.carry and self.by != "map"):
            raise ConfigError(
                f"Online: carry={self.carry!r:.40} was given with by={self.by!r}; what is carried on is the difference "
                'to dense attention, which only by="map" computes.'
            )
        if self.mass is not None and self.budget != "row":
            raise ConfigError(
                f"Online: budget={self.budget!r} was given with mass={self.mass}, which is each row's own."
            )

    def share_at(self, step: int, steps: int) -> float:
        """Return the density, or the mass, at a step of the run."""
        if self.schedule:
            return self.schedule[min(step * len(self.schedule) // max(steps, 1), len(self.schedule) - 1)]
        share = self.density if self.mass is None else self.mass
        assert share is not None
        return share


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """Let every image token see a window around it, with the semantics of NATTEN (arXiv 2204.07143, 2504.16922).

    A number stands for all axes of the grid; several are for its last axes (rows and columns, or frames, rows and
    columns). With one or two, frames see themselves alone, or all of each other.

    Attributes:
        window: Tokens that a query sees along each axis.
        stride: Queries that share one window along each axis; multiples of 8 or so are the fastest.
        dilation: Step between the tokens that a query sees.
        frames: What a window of two numbers means for a video: "own", each frame alone; "all".
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    frames: Literal["own", "all"] = "all"

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            object.__setattr__(self, name, _sizes(getattr(self, name), f"Neighborhood: {name}"))
        choice(self.frames, "Neighborhood: frames", ("own", "all"))


@dataclass(frozen=True, kw_only=True)
class SlidingTile:
    """Let every tile of image tokens see a window of tiles around it (arXiv 2502.04507).

    Attributes:
        tile: Tokens of a tile along the last axes of the grid.
        window: Tiles that a tile sees along each axis, odd numbers; more than there are stands for all.
    """

    tile: tuple[int, ...] = (6, 8, 8)
    window: int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            object.__setattr__(self, name, _sizes(getattr(self, name), f"SlidingTile: {name}"))
        if math.prod(self.tile if isinstance(self.tile, tuple) else (self.tile,)) > _LARGEST:
            raise ConfigError(f"SlidingTile: tile={self.tile!r:.80} was given; expected at most {_LARGEST} tokens.")
        tiles = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(n % 2 == 0 for n in tiles):
            raise ConfigError(
                f"SlidingTile: window={self.window!r} was given; expected odd numbers of tiles, so that a tile stands "
                "in the middle of its window. Neighborhood takes even windows."
            )


@dataclass(frozen=True, kw_only=True)
class Radial:
    """Let tokens see ever less of a frame, the farther that frame is away in time (arXiv 2506.19852).

    Attributes:
        decay: Factor on the width of what is seen in frames that are not next to one's own.
        sink: Whether everything sees the first frame, as in the published setting for Wan.
        block: Tokens in a block.
    """

    decay: float = 1.0
    sink: bool = True
    block: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", number(self.decay, "Radial: decay", above=0.0))
        object.__setattr__(self, "block", whole(self.block, "Radial: block", 1, _LARGEST))
        if not isinstance(self.sink, bool):
            raise ConfigError(f"Radial: sink={self.sink!r:.40} was given; expected True or False.")


def _sizes(value: object, what: str) -> int | tuple[int, ...]:
    """Return a whole number, or one to three of them."""
    value = unboxed(value)
    if isinstance(value, (list, tuple)):
        if not 1 <= len(value) <= 3:
            raise ConfigError(f"{what}={value!r:.80} was given; expected one to three whole numbers.")
        return tuple(whole(v, what, 1) for v in value)
    return whole(value, what, 1)
