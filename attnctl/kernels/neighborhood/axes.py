"""Neighbourhood attention over a grid of one to three axes, with the semantics of NATTEN, at the cost of its window.

"Neighborhood Attention Transformer", arXiv 2204.07143; "Dilated Neighborhood Attention Transformer", arXiv 2209.15001;
strides after "Generalized Neighborhood Attention", arXiv 2504.16922. Along an axis of n tokens, query i sees the w keys
that begin at

    clamp(leader - w div 2, 0, n - w),   leader = min((i div t) t + t div 2, n - 1),

t the stride: the queries of a group of t share the window of their leader. A dilation e cuts an axis into e axes, of
the tokens with equal i mod e. A window is shifted inwards at a border and keeps its size; an even one reaches one token
further to the left. Along several axes a query sees the product of what it sees along each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.errors import ConfigError, unboxed, whole

__all__ = ["Axis", "axes_of", "neighborhood_density", "neighborhood_mask", "window_places"]


class Axis(NamedTuple):
    """One axis of a neighbourhood.

    Attributes:
        length: Tokens along the axis.
        window: Tokens that a query sees.
        stride: Queries that share one window.
        dilation: Step between the tokens that a query sees.
        causal: Whether a query sees no token behind itself.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    @property
    def full(self) -> bool:
        """Tell whether every query sees the whole axis."""
        return self.window >= self.length and self.dilation == 1 and not self.causal


def axes_of(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    shrink: bool = False,
) -> tuple[Axis, ...]:
    """Bring the arguments of a neighbourhood into one form, an `Axis` for each axis of the grid.

    Args:
        grid: Tokens along each axis, one to three.
        window: Tokens that a query sees along each axis, or along all of them.
        stride: Queries that share one window, up to the window.
        dilation: Step between the tokens that a query sees; window times dilation is at most the axis.
        causal: Whether a query sees no token behind itself.
        shrink: Let a window that does not fit see what there is, instead of refusing it.

    Raises:
        ConfigError: An argument is no whole number, a window does not fit, or a stride is larger than its window.
    """
    lengths = [whole(n, "grid", 1) for n in grid]
    if not 1 <= len(lengths) <= 3:
        raise ConfigError(f"grid={tuple(grid)!r:.80} was given; expected one to three axes.")
    windows, strides, dilations = (
        _each(value, name, len(lengths))
        for value, name in ((window, "window"), (stride, "stride"), (dilation, "dilation"))
    )
    flags = [causal] * len(lengths) if isinstance(causal, bool) else list(causal)
    if len(flags) != len(lengths) or not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError(f"causal={causal!r:.80} was given; expected True or False, or one for each axis of the grid.")
    for n, w, t, e in zip(lengths, windows, strides, dilations, strict=True):
        if not shrink and w * e > n:
            raise ConfigError(
                f"window={window!r} with dilation={dilation!r} was given for the grid {tuple(lengths)}: {w} tokens, "
                f"{e} apart, do not fit into an axis of {n}. Take a window of at most {n // e} there, or less dilation."
            )
        if t > w:
            raise ConfigError(
                f"stride={stride!r} was given with window={window!r}: {t} queries cannot share a window of {w} tokens, "
                "since some of them would not see themselves. Take a stride up to the window."
            )
    return tuple(map(Axis, lengths, windows, strides, dilations, flags))


def _each(value: int | Sequence[int], name: str, count: int) -> list[int]:
    value = unboxed(value)
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{name}={value!r:.80} was given; expected one number, or one for each of {count} axes.")
    return [whole(v, name, 1) for v in values]


def window_places(axis: Axis) -> list[tuple[int, int, int, int]]:
    """Return for every token of an axis its group, its place there, and the first and last place + 1 that it sees.

    Places are counted within the group: token i of an axis with dilation e is place i div e of group i mod e.
    """
    places = []
    for i in range(axis.length):
        group, place = i % axis.dilation, i // axis.dilation
        n = -(-(axis.length - group) // axis.dilation)
        size, first = min(axis.window, n), place // axis.stride * axis.stride
        if axis.causal:
            leader = min(first + axis.stride - 1, n - 1)
            places.append((group, place, max(leader - size + 1, 0), place + 1))
        else:
            leader = min(first + axis.stride // 2, n - 1)
            start = min(max(leader - size // 2, 0), n - size)
            places.append((group, place, start, start + size))
    return places


def neighborhood_mask(axes: Sequence[Axis], device: torch.device | None = None) -> Tensor:
    """Compute which tokens each token sees, bool [N, N]: the definition, written out, for tests and small grids."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in axes:
        places = torch.tensor(window_places(axis), device=device)
        group, place, start, stop = (x[:, None] for x in places.unbind(1))
        seen = (group == group.T) & (start <= place.T) & (stop > place.T)
        n, m = len(mask), axis.length
        mask = (mask[:, None, :, None] & seen[None, :, None, :]).reshape(n * m, n * m)
    return mask


def neighborhood_density(axes: Sequence[Axis]) -> float:
    """Return the share of the whole map that a neighbourhood computes."""
    shares = (sum(last - first for _, _, first, last in window_places(a)) / a.length**2 for a in axes)
    return math.prod(shares)
