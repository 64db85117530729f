"""The six orders in which the tokens of a video can be laid out in a row ("PAROAttention", arXiv 2506.16054).

An order names the axes of the [frames, height, width] grid from the slowest to the fastest. Which one puts the tokens
that a head looks at side by side depends on the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnctl.errors import PlanError, nearest

__all__ = ["ORDERS", "order_ids", "order_name", "permutation", "permute_heads", "restore_heads"]

ORDERS: dict[str, tuple[int, int, int]] = {
    "FHW": (0, 1, 2),
    "FWH": (0, 2, 1),
    "HWF": (1, 2, 0),
    "HFW": (1, 0, 2),
    "WHF": (2, 1, 0),
    "WFH": (2, 0, 1),
}
"""Axes of the grid in the new order, the last one fastest; the place in this table is the order's number."""

_NAMES = tuple(ORDERS)


def order_name(number: int) -> str:
    """Return the name of an order by its number."""
    return _NAMES[number]


def order_ids(orders: Sequence[int | str], heads: int) -> tuple[int, ...]:
    """Read one order a head, by number or name, as numbers.

    Raises:
        PlanError: An order is unknown, or their number is not that of the heads.
    """
    if isinstance(orders, str) or not isinstance(orders, Sequence) or len(orders) != heads:
        raise PlanError(f"order={orders!r:.80} was given; expected one order for each of {heads} heads.")
    found = []
    for order in orders:
        if isinstance(order, str) and order.upper() in ORDERS:
            found.append(_NAMES.index(order.upper()))
        elif type(order) in (int, float) and order in range(len(_NAMES)):
            found.append(int(order))
        else:
            hint = nearest(order, _NAMES) if isinstance(order, str) else ""
            raise PlanError(f"Order {order!r:.40} is unknown; expected 0 to 5 or one of {', '.join(_NAMES)}.{hint}")
    return tuple(found)


@lru_cache(maxsize=64)
def permutation(grid: tuple[int, int, int], order: int) -> Tensor:
    """Return the tokens of a grid in an order, int64 [F H W] on the CPU: new token i is old token permutation[i]."""
    n = grid[0] * grid[1] * grid[2]
    with torch.inference_mode(False):  # it is kept: a later call may differentiate
        return torch.arange(n).reshape(grid).permute(ORDERS[_NAMES[order]]).reshape(-1)


def permute_heads(x: Tensor, grid: tuple[int, int, int], orders: tuple[int, ...]) -> Tensor:
    """Lay the tokens of every head out in its own order; x itself where all keep theirs.

    Shapes: x [B, H, F H W, D] -> the same.
    """
    return _reorder(x, [permutation(grid, o) for o in orders]) if any(orders) else x


def restore_heads(x: Tensor, grid: tuple[int, int, int], orders: tuple[int, ...]) -> Tensor:
    """Undo `permute_heads`, bit for bit.

    Shapes: x [B, H, F H W, D] -> the same.
    """
    return _reorder(x, [permutation(grid, o).argsort() for o in orders]) if any(orders) else x


def _reorder(x: Tensor, rows: list[Tensor]) -> Tensor:
    n = x.shape[2]
    index = torch.cat([r + h * n for h, r in enumerate(rows)]).to(x.device)
    return x.flatten(1, 2).index_select(1, index).view(x.shape)
