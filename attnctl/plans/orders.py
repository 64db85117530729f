"""The orders in which the tokens of a video can be laid out in a row, so that those a head looks at lie side by side.

Six orders name the axes of the [frames, height, width] grid from the slowest to the fastest ("PAROAttention", arXiv
2506.16054). Two more cut the grid into tiles of a block's size and lay out one tile after the other: boxes over several
frames ("TILE"; "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507), and squares of one frame
("SQUARE"). Which order is best depends on the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnctl.errors import PlanError, nearest

__all__ = [
    "LAYOUTS",
    "ORDERS",
    "first_alike",
    "order_ids",
    "order_name",
    "permutation",
    "permute_heads",
    "restore_heads",
    "tile_shape",
]

ORDERS: dict[str, tuple[int, int, int]] = {
    "FHW": (0, 1, 2),
    "FWH": (0, 2, 1),
    "HWF": (1, 2, 0),
    "HFW": (1, 0, 2),
    "WHF": (2, 1, 0),
    "WFH": (2, 0, 1),
}
"""Axes of the grid in the new order, the last one fastest; the place in this table is the order's number."""

LAYOUTS = (*ORDERS, "TILE", "SQUARE")
"""All orders by their numbers: those of axes, then boxes and squares."""

_SQUARE = LAYOUTS.index("SQUARE")
_RAGGED = 0.15  # an axis that tiles do not divide counts as so much more surface
_BLOCK = 64

Grid = tuple[int, int, int]


def order_name(number: int) -> str:
    """Return the name of an order by its number."""
    return LAYOUTS[number]


def order_ids(orders: Sequence[int | str], heads: int) -> tuple[int, ...]:
    """Read one order a head, by number or name, as numbers.

    Raises:
        PlanError: An order is unknown, or their number is not that of the heads.
    """
    if isinstance(orders, str) or not isinstance(orders, Sequence) or len(orders) != heads:
        raise PlanError(f"order={orders!r:.80} was given; expected one order for each of {heads} heads.")
    ids = []
    for order in orders:
        if isinstance(order, str) and order.upper() in LAYOUTS:
            ids.append(LAYOUTS.index(order.upper()))
        elif type(order) in (int, float) and order in range(len(LAYOUTS)):
            ids.append(int(order))
        else:
            hint = nearest(order, LAYOUTS) if isinstance(order, str) else ""
            raise PlanError(
                f"Order {order!r:.40} is unknown; expected 0 to {len(LAYOUTS) - 1} or one of "
                f"{', '.join(LAYOUTS)}.{hint}"
            )
    return tuple(ids)


def permutation(grid: Grid, order: int, block: int = _BLOCK) -> Tensor:
    """Return the tokens of a grid in an order, int64 [F H W] on the CPU: new token i is old token permutation[i].

    Args:
        grid: Frames, rows and columns.
        order: Number of the order.
        block: Tokens in a tile; the orders of axes do not depend on it.
    """
    return _permutation(grid, order, block if order >= len(ORDERS) else 0)


@lru_cache(maxsize=64)
def _permutation(grid: Grid, order: int, block: int) -> Tensor:
    with torch.inference_mode(False):  # it is kept: a later call may differentiate
        tokens = torch.arange(math.prod(grid)).reshape(grid)
        if not block:
            return tokens.permute(ORDERS[LAYOUTS[order]]).reshape(-1)
        return _tiled(tokens, tile_shape(grid, block, flat=order == _SQUARE))


def _tiled(tokens: Tensor, tile: Grid) -> Tensor:
    """Lay tiles one after the other; those at the end of an axis may be smaller."""
    at = torch.meshgrid(*(torch.arange(n) for n in tokens.shape), indexing="ij")
    place = torch.zeros_like(tokens)
    for parts in ([a // t for a, t in zip(at, tile, strict=True)], [a % t for a, t in zip(at, tile, strict=True)]):
        for part in parts:
            place = place * (int(part.max()) + 1) + part
    return tokens.reshape(-1)[place.reshape(-1).argsort()]


@lru_cache(maxsize=256)
def tile_shape(grid: Grid, block: int, *, flat: bool = False) -> Grid:
    """Return the tile of at most `block` tokens that is most nearly a cube, and divides the grid where one does.

    Args:
        grid: Frames, rows and columns.
        block: Tokens in a tile.
        flat: Whether a tile lies in one frame.
    """
    best = (0, -math.inf), (1, 1, 1)
    for a in range(1, min(1 if flat else grid[0], block) + 1):
        for b in range(1, min(grid[1], block // a) + 1):
            c = min(grid[2], block // (a * b))
            ragged = sum(n % t > 0 for n, t in zip(grid, (a, b, c), strict=True))
            score = a * b * c, -(a + b + c) * (1 + _RAGGED * ragged)
            best = max(best, (score, (a, b, c)))
    return best[1]


def first_alike(grid: Grid, order: int, block: int) -> int:
    """Return the first order that lays a grid out as this one does: on an image, several do."""
    laid = permutation(grid, order, block)
    return next(o for o in range(order + 1) if torch.equal(permutation(grid, o, block), laid))


def permute_heads(x: Tensor, grid: Grid, orders: tuple[int, ...], block: int = _BLOCK) -> Tensor:
    """Lay the tokens of every head out in its own order; x itself where all keep theirs.

    Shapes: x [B, H, F H W, D] -> the same.
    """
    return _reorder(x, [permutation(grid, o, block) for o in orders]) if any(orders) else x


def restore_heads(x: Tensor, grid: Grid, orders: tuple[int, ...], block: int = _BLOCK) -> Tensor:
    """Undo `permute_heads`, bit for bit.

    Shapes: x [B, H, F H W, D] -> the same.
    """
    return _reorder(x, [permutation(grid, o, block).argsort() for o in orders]) if any(orders) else x


def _reorder(x: Tensor, rows: list[Tensor]) -> Tensor:
    n = x.shape[2]
    index = torch.cat([r + h * n for h, r in enumerate(rows)]).to(x.device)
    return x.flatten(1, 2).index_select(1, index).view(x.shape)
