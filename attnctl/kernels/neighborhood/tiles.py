"""A neighbourhood cut into tiles of queries, each with the keys that it reads; tiles of one kind run together."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.kernels.neighborhood.axes import Axis, window_places

__all__ = ["Work", "best_tile", "tiles"]

_LARGEST_TILE = 256
# Measured on one CPU core (benchmarks/sparse.py): what a tile costs beside its rows, in rows, and what a mask adds.
_OVERHEAD = 14
_MASKED = 1.1
_SPREAD = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # groups of queries that a tile may hold along an axis


class _Span(NamedTuple):
    """A tile along one axis.

    Attributes:
        queries: Tokens of the axis that are computed.
        keys: Tokens of the axis that at least one of them sees.
        kind: For each query the first and the last + 1 of `keys` that it sees, and how far the first key lies from the
            first query, in places.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    kind: tuple[tuple[tuple[int, int], ...], int, int]


def _spans(axis: Axis, tile: int) -> list[_Span]:
    """Cut an axis into tiles of at most `tile` queries of one group."""
    spans = []
    places = window_places(axis)
    for group in range(min(axis.dilation, axis.length)):
        seen = places[group :: axis.dilation]
        for a in range(0, len(seen), tile):
            part = seen[a : a + tile]
            first, last = min(p[2] for p in part), max(p[3] for p in part)
            queries, keys = (
                tuple(group + p * axis.dilation for p in range(*ends)) for ends in ((a, a + len(part)), (first, last))
            )
            kind = tuple((p[2] - first, p[3] - first) for p in part), len(keys), first - a
            spans.append(_Span(queries, keys, kind))
    return spans


def best_tile(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Choose the tile that takes the least time, by a model of it: keys to read, rows, and whether there is a mask."""
    options = []
    for axis in axes:
        sizes = {min(n * axis.stride, axis.length) for n in _SPREAD} | ({axis.length} if axis.full else set())
        sums = []
        for size in sorted(sizes):
            spans = _spans(axis, size)
            shared = all(set(s.kind[0]) == {(0, len(s.keys))} for s in spans)
            sums.append((size, len(spans), sum(len(s.keys) for s in spans), shared))
        options.append(sums)
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for choice in itertools.product(*options):
        rows = math.prod(size for size, *_ in choice)
        if rows > _LARGEST_TILE and best[1]:
            continue
        cost: float = math.prod(keys for *_, keys, _ in choice) * (rows + _OVERHEAD)
        cost *= 1.0 if all(shared for *_, shared in choice) else _MASKED
        best = min(best, (cost, tuple(size for size, *_ in choice)))
    return best[1]


class Work(NamedTuple):
    """Tiles of one kind.

    Attributes:
        queries: Tokens that they compute, int64 [T, Nq].
        keys: Tokens that they read, int64 [T, Nk].
        seen: Which of these each query sees, bool [Nq, Nk]; None for all.
        apart: Places from a query to a key along each axis, int64 [axes, Nq, Nk]; None where nobody asked for them.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    apart: Tensor | None


def _make(axes: tuple[Axis, ...], apart: bool) -> tuple[tuple[Work, ...], Tensor]:
    """Return all tiles by their kinds, and where each token's result stands among theirs."""
    lengths, tile = [a.length for a in axes], best_tile(axes)
    by_axis: list[dict[object, list[_Span]]] = []
    for axis, size in zip(axes, tile, strict=True):
        kinds: dict[object, list[_Span]] = {}
        for span in _spans(axis, size):
            kinds.setdefault((span.kind[:2], span.kind[2] if apart else 0), []).append(span)
        by_axis.append(kinds)
    works = []
    for parts in itertools.product(*(kinds.values() for kinds in by_axis)):
        queries, keys = (
            _product([[getattr(s, name) for s in spans] for spans in parts], lengths) for name in ("queries", "keys")
        )
        alike = [spans[0].kind for spans in parts]
        seen, steps = _seen(alike)
        shared = all(set(ends) == {(0, count)} for ends, count, _ in alike)
        works.append(Work(queries, keys, None if shared else seen, steps if apart else None))
    order = torch.cat([work.queries.flatten() for work in works])
    return tuple(works), order.argsort()


def _product(parts: list[list[tuple[int, ...]]], lengths: list[int]) -> Tensor:
    """Return the tokens of all products of spans, int64 [tiles, tokens]."""
    whole_grid = torch.zeros(1, 1, dtype=torch.long)
    for spans, length in zip(parts, lengths, strict=True):
        along = torch.tensor(spans)
        tokens = whole_grid[:, None, :, None] * length + along[None, :, None, :]
        whole_grid = tokens.reshape(tokens.shape[0] * tokens.shape[1], -1)
    return whole_grid


def _seen(kinds: list[tuple[tuple[tuple[int, int], ...], int, int]]) -> tuple[Tensor, Tensor]:
    """Return which keys of a tile its queries see, [Nq, Nk], and how far they lie apart, [axes, Nq, Nk]."""
    masks, steps = [], []
    for ends, count, begin in kinds:
        first, last = torch.tensor(ends)[:, :, None].unbind(1)
        key = torch.arange(count)
        masks.append((key >= first) & (key < last))
        steps.append(key + begin - torch.arange(len(ends))[:, None])
    seen, shape = torch.ones(1, 1, dtype=torch.bool), [m.shape for m in masks]
    for m in masks:
        seen = (seen[:, None, :, None] & m[None, :, None, :]).reshape(len(seen) * len(m), -1)
    spread = []
    for i, step in enumerate(steps):
        before, after = (
            (math.prod(s[0] for s in some), math.prod(s[1] for s in some)) for some in (shape[:i], shape[i + 1 :])
        )
        spread.append(step.repeat_interleave(after[0], 0).repeat_interleave(after[1], 1).repeat(before))
    return seen, torch.stack(spread)


def tiles(axes: tuple[Axis, ...], device: torch.device, *, apart: bool = False) -> tuple[tuple[Work, ...], Tensor]:
    """Return all tiles by their kinds, and where each token's result stands among theirs, int64 [N]; kept.

    Args:
        axes: The neighbourhood.
        device: Where the lists lie.
        apart: Whether to tell how far queries and keys lie apart.
    """
    # What is made while a graph is traced belongs to it, and must not stay.
    return (_tiles if torch.compiler.is_compiling() else _kept)(axes, device, apart)


def _tiles(axes: tuple[Axis, ...], device: torch.device, apart: bool) -> tuple[tuple[Work, ...], Tensor]:
    with torch.inference_mode(False):  # a later call may differentiate
        work, back = _make(axes, apart)
        moved = (Work(*(None if x is None else x.to(device) for x in w)) for w in work)  # type: ignore[arg-type]
        return tuple(moved), back.to(device)


_kept = lru_cache(maxsize=64)(_tiles)
