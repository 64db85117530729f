"""Block masks as lists: for every query block its key blocks, grouped so that equal work runs together.

Derived from a plan when a kernel first reads it, and stored with it for one part of the run: the lists of a long video
take 15 MB a site. They are made outside inference mode, whichever call comes first: otherwise a later call could not
differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import wide_dtype
from attnctl.plans.blocks import Blocks
from attnctl.plans.orders import permutation

__all__ = [
    "Bundle",
    "LaidOut",
    "Layout",
    "block_means",
    "block_sizes",
    "bundles",
    "coarser",
    "csr",
    "derived",
    "lay_out",
    "layout",
    "put_back",
    "ratio",
]

T = TypeVar("T")

# Measured on one CPU core, against dense attention at equal work, by height of the query blocks (benchmarks/paro.py).
_EFFICIENCY = ((256, 0.91), (128, 0.84), (64, 0.79), (0, 0.70))
_TALLEST = 256


class Bundle(NamedTuple):
    """Query blocks of one head that compute equally many key blocks.

    Attributes:
        rows: Their numbers, int64 [R].
        blocks: Their whole key blocks, int64 [R, C].
        tail: Whether they also take the last key block, which is a partial one.
        left: The key blocks that they leave out, int64 [R, L]; None where these count for nothing.
    """

    rows: Tensor
    blocks: Tensor
    tail: bool
    left: Tensor | None = None


class LaidOut(NamedTuple):
    """A call whose image tokens stand in each head's own order, beside its text: what most kernels are given.

    Attributes:
        q: Queries of the image [B, H, N, D].
        k: Keys of the image [B, Hk, N, D].
        v: Values of the image [B, Hk, N, Dv].
        k_text: Keys of the text [B, Hk, T, D].
        v_text: Values of the text [B, Hk, T, Dv].
        plan: What to compute.
        group: Part of the run.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Text keys to attend to, bool [B or 1, T]; None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_text: Tensor
    v_text: Tensor
    plan: Blocks
    group: int
    scale: float | None
    words: Tensor | None = None


class Layout(NamedTuple):
    """The orders of a plan's heads on a device.

    Attributes:
        ids: Row of every head's order in the tables, int64 [H].
        rows_of: The same for the host.
        there: For each order that is used, which token stands at each place, int64 [orders, n].
        back: For each order that is used, where each token stands, int64 [orders, n].
    """

    ids: Tensor
    rows_of: tuple[int, ...]
    there: Tensor
    back: Tensor

    def rows(self, *, inverse: bool) -> Tensor:
        """Return row numbers in a [H n, D] view that reorder every head, int64 [H n]."""
        table = self.back if inverse else self.there
        heads, n = len(self.ids), table.shape[1]
        return (table.index_select(0, self.ids) + n * torch.arange(heads, device=table.device)[:, None]).flatten()


def derived(plan: Blocks, group: int, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what `make` derives from a plan for a part of the run; that of another part is dropped first."""
    part, entries = plan.cache.get("lists", (None, {}))
    if part != group:
        entries = {}
        plan.cache["lists"] = group, entries
    if key not in entries:
        with torch.inference_mode(False):
            entries[key] = make()
    value: T = entries[key]
    return value


def layout(plan: Blocks, group: int, device: torch.device) -> Layout | None:
    """Return the orders of a plan's heads, or None where every head keeps the model's."""
    grid = plan.grid
    if grid is None or not any(plan.order):
        return None

    def make() -> Layout:
        used = sorted(set(plan.order))
        rows = tuple(used.index(o) for o in plan.order)
        there = torch.stack([permutation(grid, o, plan.block_k) for o in used])
        ids, there, back = (x.to(device) for x in (torch.tensor(rows), there, there.argsort(-1)))
        return Layout(ids, rows, there, back)

    return derived(plan, group, ("layout", device), make)


def lay_out(x: Tensor, plan: Blocks, group: int) -> Tensor:
    """Lay the image tokens of every head out in its own order.

    Shapes: x [B, H, n, D] -> the same.
    """
    return _reorder(x, layout(plan, group, x.device), inverse=False)


def put_back(x: Tensor, plan: Blocks, group: int) -> Tensor:
    """Undo `lay_out`, bit for bit.

    Shapes: x [B, H, n, D] -> the same.
    """
    return _reorder(x, layout(plan, group, x.device), inverse=True)


def _reorder(x: Tensor, order: Layout | None, *, inverse: bool) -> Tensor:
    if order is None:
        return x
    b, h, n, d = x.shape
    return x.reshape(b, h * n, d).index_select(1, order.rows(inverse=inverse)).view(b, h, n, d)


def coarser(keep: Tensor, times: int) -> Tensor:
    """Join `times` query blocks into one that computes what any of them needs.

    Shapes: keep [..., nq, nk] -> [..., ceil(nq / times), nk].
    """
    if times == 1:
        return keep
    missing = -keep.shape[-2] % times
    padded = F.pad(keep, (0, 0, 0, missing))
    return padded.unflatten(-2, (-1, times)).any(-2)


def ratio(plan: Blocks, group: int) -> int:
    """Return how many query blocks to join, by predicted time: work divided by the kernel's efficiency at it."""

    def make() -> int:
        costs = {}
        for times in (1,) if plan.rest else (1, 2, 4):  # what a row leaves out is its own
            height = times * plan.block_q
            if times > 1 and height > _TALLEST:
                break
            share = float(coarser(plan.keep[group], times).double().mean())
            costs[times] = share / next(e for least, e in _EFFICIENCY if height >= least)
        return min(costs, key=lambda times: costs[times])

    return derived(plan, group, ("ratio",), make)


def bundles(plan: Blocks, group: int, head: int, times: int, device: torch.device) -> tuple[Bundle, ...]:
    """Return the work of one head, grouped by the number of key blocks.

    The last query block stands alone where it is partial, so that the others can be stacked.
    """
    n = plan.n_image
    assert n is not None

    def make() -> tuple[Bundle, ...]:
        keep = coarser(plan.keep[group, head].cpu(), times)
        made = _bundles(keep, n, times * plan.block_q, plan.block_k, rest=plan.rest)
        if device.type == "cpu":
            return tuple(made)
        lefts = [None if b.left is None else b.left.to(device) for b in made]
        return tuple(
            Bundle(b.rows.to(device), b.blocks.to(device), b.tail, x) for b, x in zip(made, lefts, strict=True)
        )

    return derived(plan, group, ("bundles", head, times, device), make)


def _bundles(keep: Tensor, n: int, block_q: int, block_k: int, *, rest: bool) -> list[Bundle]:
    ragged = bool(n % block_k)
    whole = keep[:, :-1] if ragged else keep
    kinds = 4 * whole.sum(-1) + (2 * keep[:, -1] if ragged else 0)
    if n % block_q:
        kinds[-1] += 1  # alone
    parts = []
    for kind in kinds.unique().tolist():
        rows = (kinds == kind).nonzero()[:, 0]
        # Sorted by row, then by column: the columns of a row lie together.
        columns = whole.index_select(0, rows).nonzero()[:, 1].view(len(rows), kind // 4)
        left = _left_out(keep.index_select(0, rows)) if rest else None
        parts.append(Bundle(rows, columns, kind // 2 % 2 == 1, left))
    # The partial query block comes last.
    return sorted(parts, key=lambda b: int(b.rows[-1]) == len(keep) - 1 and bool(n % block_q))


def _left_out(keep: Tensor) -> Tensor | None:
    """Return the blocks that rows leave out, which are equally many, or None where they keep all: [R, nk] -> [R, L]."""
    columns = (~keep).nonzero()[:, 1]
    return columns.view(len(keep), -1) if len(columns) else None


def block_means(x: Tensor, block: int) -> Tensor:
    """Return the mean token of every block; the last one may be smaller: [..., n, D] -> [..., blocks, D]."""
    n, wide = x.shape[-2], wide_dtype(x.dtype)
    whole = n // block
    means = x[..., : whole * block, :].unflatten(-2, (whole, block)).mean(-2, dtype=wide)
    if n % block:
        means = torch.cat([means, x[..., whole * block :, :].mean(-2, keepdim=True, dtype=wide)], -2)
    return means.to(x.dtype)


def block_sizes(n: int, block: int, like: Tensor) -> Tensor:
    """Return the number of tokens of every block as a tensor of the same kind and place as another, [blocks]."""
    sizes = like.new_full((-(-n // block),), float(block))
    if n % block:
        sizes[-1] = n % block
    return sizes


def csr(plan: Blocks, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of every row and their numbers, ascending, padded with zeros.

    Shapes: int32 [H, nq] and int32 [H, nq, nk].
    """

    def make() -> tuple[Tensor, Tensor]:
        keep = plan.keep[group].to(device)
        counts = keep.sum(-1, dtype=torch.int32)
        # A stable sort puts the kept blocks first, in their order.
        numbers = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        inside = torch.arange(keep.shape[-1], device=device) < counts[..., None]
        return counts, (numbers * inside).int()

    return derived(plan, group, ("csr", device), make)
