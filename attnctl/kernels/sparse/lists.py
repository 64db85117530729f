"""Block masks as lists: for every query block its key blocks, grouped so that equal work runs together.

Derived once from a plan and kept with it; a mask of 64 x 64 blocks and 40 heads takes a few milliseconds. What is kept
is made outside inference mode, whoever asks first: otherwise a later call could not differentiate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.plans.blocks import BlockPlan

__all__ = ["Bundle", "bundles", "coarser", "csr", "ratio"]

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
    key = ("ratio", group)
    if key not in plan.cache:
        costs = {}
        for times in (1, 2, 4):
            height = times * plan.block_q
            if times > 1 and height > _TALLEST:
                break
            share = float(coarser(plan.keep[group], times).double().mean())
            costs[times] = share / next(e for least, e in _EFFICIENCY if height >= least)
        plan.cache[key] = min(costs, key=lambda times: costs[times])
    return int(plan.cache[key])


def bundles(plan: BlockPlan, group: int, head: int, times: int, device: torch.device) -> tuple[Bundle, ...]:
    """Return the work of one head, grouped by the number of key blocks.

    The last query block stands alone where it is partial, so that the others can be stacked.
    """
    key = ("bundles", group, head, times, device)
    assert plan.n_image is not None
    if key not in plan.cache:
        with torch.inference_mode(False):
            keep = coarser(plan.keep[group, head], times)
            plan.cache[key] = tuple(
                Bundle(b.rows.to(device), b.blocks.to(device), b.tail)
                for b in _bundles(keep, plan.n_image, times * plan.block_q, plan.block_k)
            )
    found: tuple[Bundle, ...] = plan.cache[key]
    return found


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
    """Return the number of key blocks of every row and their numbers, padded with zeros.

    Shapes: int32 [H, nq] and int32 [H, nq, nk].
    """
    key = ("csr", group, device)
    if key not in plan.cache:
        with torch.inference_mode(False):
            keep = plan.keep[group]
            counts = keep.sum(-1, dtype=torch.int32)
            # A stable sort puts the kept blocks first, in their order.
            indices = keep.int().argsort(dim=-1, descending=True, stable=True)
            inside = torch.arange(keep.shape[-1]) < counts[..., None]
            plan.cache[key] = counts.to(device), (indices * inside).int().contiguous().to(device)
    found: tuple[Tensor, Tensor] = plan.cache[key]
    return found
