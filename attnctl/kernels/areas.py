"""Areas of a picture on a grid of tokens: how much of each token lies in a box or under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError, number, unboxed

__all__ = ["box_on_grid", "checked_box", "mask_on_grid", "patterns"]


def checked_box(box: Sequence[Any], what: str) -> tuple[float, float, float, float]:
    """Check a box (left, top, right, bottom) in fractions of the picture.

    Raises:
        ConfigError: A side is no number from 0 to 1, or the box is empty.
    """
    left, top, right, bottom = (float(number(unboxed(x), what, 0.0, 1.0)) for x in box)
    if left >= right or top >= bottom:
        raise ConfigError(
            f"{what}={tuple(box)} is empty: give (left, top, right, bottom) in fractions of the picture, left before "
            "right and top before bottom."
        )
    return left, top, right, bottom


def box_on_grid(box: tuple[float, float, float, float], rows: int, columns: int) -> Tensor:
    """Compute how much of each cell of a grid a box covers.

    Args:
        box: Left, top, right, bottom as fractions of the picture, 0 to 1.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Returns:
        Shares [rows, columns], 0 to 1, in float32.
    """

    def cover(low: float, high: float, n: int) -> Tensor:
        edges = torch.arange(n + 1, dtype=torch.float64) / n
        shared = edges[1:].clamp_max(high) - edges[:-1].clamp_min(low)
        return (shared.clamp_min(0) * n).float()

    left, top, right, bottom = box
    return cover(top, bottom, rows)[:, None] * cover(left, right, columns)


def mask_on_grid(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Average a mask [h, w] over the cells of a grid: [rows, columns] in float32."""
    return F.interpolate(mask[None, None].float(), (rows, columns), mode="area")[0, 0]


def patterns(inside: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Group tokens by the regions that they lie in.

    Args:
        inside: Whether each region holds each token, bool [R, N].

    Returns:
        Pairs of regions and the places of their tokens [n]; tokens in no region come under ().
    """
    sets, group = inside.T.unique(dim=0, return_inverse=True)
    return [
        (tuple(int(r) for r in row.nonzero().flatten()), (group == i).nonzero().flatten()) for i, row in enumerate(sets)
    ]
