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

from attnctl.plans.blocks import BlockPlan
from attnctl.plans.orders import ORDERS, permutation

__all__ = ["Bundle", "Layout", "bundles", "coarser", "csr", "derived", "lay_out", "layout", "put_back", "ratio"]

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
    """

    rows: Tensor
    blocks: Tensor
    tail: bool


class Layout(NamedTuple):
    """The orders of a plan's heads on a device.

    Attributes:
        ids: Number of every head's order, int64 [H].
        there: For each of the six orders, which token stands at each place, int64 [6, n].
        back: For each of the six orders, where each token stands, int64 [6, n].
    """

    ids: Tensor
    there: Tensor
    back: Tensor

    def rows(self, *, inverse: bool) -> Tensor:
        """Return row numbers in a [H n, D] view that reorder every head, int64 [H n]."""
        table = self.back if inverse else self.there
        heads, n = len(self.ids), table.shape[1]
        return (table.index_select(0, self.ids) + n * torch.arange(heads, device=table.device)[:, None]).flatten()


def derived(plan: BlockPlan, group: int, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what `make` derives from a plan for a part of the run; that of another part is dropped first."""
    part, found = plan.cache.get("lists", (None, {}))
    if part != group:
        found = {}
        plan.cache["lists"] = group, found
    if key not in found:
        with torch.inference_mode(False):
            found[key] = make()
    value: T = found[key]
    return value


def layout(plan: BlockPlan, group: int, device: torch.device) -> Layout | None:
    """Return the orders of a plan's heads, or None where every head keeps the model's."""
    grid = plan.grid
    if grid is None or not any(plan.order):
        return None

    def make() -> Layout:
        there = torch.stack([permutation(grid, o) for o in range(len(ORDERS))])
        return Layout(*(x.to(device) for x in (torch.tensor(plan.order), there, there.argsort(-1))))

    return derived(plan, group, ("layout", device), make)


def lay_out(x: Tensor, plan: BlockPlan, group: int) -> Tensor:
    """Lay the image tokens of every head out in its own order.

    Shapes: x [B, H, n, D] -> the same.
    """
    return _reorder(x, layout(plan, group, x.device), inverse=False)


def put_back(x: Tensor, plan: BlockPlan, group: int) -> Tensor:
    """Undo `lay_out`, bit for bit.

    Shapes: x [B, H, n, D] -> the same.
    """
    return _reorder(x, layout(plan, group, x.device), inverse=True)


def _reorder(x: Tensor, found: Layout | None, *, inverse: bool) -> Tensor:
    if found is None:
        return x
    b, h, n, d = x.shape
    return x.reshape(b, h * n, d).index_select(1, found.rows(inverse=inverse)).view(b, h, n, d)


def coarser(keep: Tensor, times: int) -> Tensor:
    """Join `times` query blocks into one that computes what any of them needs.

    Shapes: keep [..., nq, nk] -> [..., ceil(nq / times), nk].
    """
    if times == 1:
        return keep
    missing = -keep.shape[-2] % times
    padded = F.pad(keep, (0, 0, 0, missing))
    return padded.unflatten(-2, (-1, times)).any(-2)


def ratio(plan: BlockPlan, group: int) -> int:
    """Return how many query blocks to join, by predicted time: work divided by the kernel's efficiency at it."""

    def make() -> int:
        costs = {}
        for times in (1, 2, 4):
            height = times * plan.block_q
            if times > 1 and height > _TALLEST:
                break
            share = float(coarser(plan.keep[group], times).double().mean())
            costs[times] = share / next(e for least, e in _EFFICIENCY if height >= least)
        return min(costs, key=lambda times: costs[times])

    return derived(plan, group, ("ratio",), make)


def bundles(plan: BlockPlan, group: int, head: int, times: int, device: torch.device) -> tuple[Bundle, ...]:
    """Return the work of one head, grouped by the number of key blocks.

    The last query block stands alone where it is partial, so that the others can be stacked.
    """
    n = plan.n_image
    assert n is not None

    def make() -> tuple[Bundle, ...]:
        keep = coarser(plan.keep[group, head], times)
        made = _bundles(keep, n, times * plan.block_q, plan.block_k)
        return tuple(Bundle(b.rows.to(device), b.blocks.to(device), b.tail) for b in made)

    return derived(plan, group, ("bundles", head, times, device), make)


def _bundles(keep: Tensor, n: int, block_q: int, block_k: int) -> list[Bundle]:
    whole = keep[:, :-1] if n % block_k else keep
    tail = keep[:, -1] if n % block_k else torch.zeros(len(keep), dtype=torch.bool)
    counts = whole.sum(-1)
    # Sorted by row, then by column: the columns of a row lie together.
    columns = whole.nonzero()[:, 1].split(counts.tolist())
    alone = torch.zeros(len(keep), dtype=torch.bool)
    alone[-1] = bool(n % block_q)
    kinds: dict[tuple[int, bool, bool], list[int]] = {}
    for row, kind in enumerate(zip(counts.tolist(), tail.tolist(), alone.tolist(), strict=True)):
        kinds.setdefault(kind, []).append(row)
    return [
        Bundle(torch.tensor(rows), torch.stack([columns[r] for r in rows]), has_tail)
        for (_, has_tail, _), rows in kinds.items()
    ]


def csr(plan: BlockPlan, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
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
