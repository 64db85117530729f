"""Where the mass of an attention map lies, block by block, in every order of the tokens; without the map.

What a calibration needs to know of one attention ("PAROAttention", arXiv 2506.16054, section 4): for each order the sum
of every block, and the paper's two marks of how sparse and how even the blocks are. Rows are taken a few at a time, so
memory is O(rows x keys).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import chunk_rows, repeat_heads, wide_dtype
from attnctl.plans.orders import ORDERS, permutation

__all__ = ["BlockMass", "block_mass", "choose_masks", "choose_masks_together", "choose_orders"]

_TIE = 1e-6


class BlockMass(NamedTuple):
    """Say where the mass of the map lies, averaged over the batch.

    Attributes:
        mass: Sum of every block divided by its number of rows [H, orders, nq, nk]; rows of it add up to at most 1, the
            rest goes to the text.
        sparse: Share of blocks that are almost empty [H, orders] (M_sparse), or None.
        uneven: Mean ratio of the largest to the mean entry of a block [H, orders] (M_quant), or None.
    """

    mass: Tensor
    sparse: Tensor | None
    uneven: Tensor | None


def block_mass(
    q: Tensor,
    k: Tensor,
    grid: tuple[int, int, int],
    block_q: int,
    block_k: int,
    *,
    image: slice | None = None,
    scale: float | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    eps: float | None = None,
    sigma: float = 0.9,
) -> BlockMass:
    """Add up softmax(q k^T scale) in blocks of the image's own tokens, for several orders of these.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D]; Hk divides H.
        grid: Frames, rows and columns of the image tokens.
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.
        image: Where the image tokens lie; None for all.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        orders: For each head the orders to try; None for all six.
        eps: Entries below it count as empty, in the paper's marks; None leaves these out.
        sigma: Share of empty entries from which a block counts as empty.

    Returns:
        Float32 (float64 stays) on the device of q, the orders as the second dimension.
    """
    image = slice(0, q.shape[2]) if image is None else image
    heads, n = q.shape[1], image.stop - image.start
    tried = [range(len(ORDERS))] * heads if orders is None else orders
    # On an image, or any grid with an axis of one, several orders are the same layout: measured once.
    same = [_first_alike(grid, o) for o in range(len(ORDERS))]
    kept = sorted({same[o] for o in tried[0]}) if orders is None else None
    back = None if kept is None else torch.tensor([kept.index(same[o]) for o in tried[0]], device=q.device)
    tried = tried if kept is None else [kept] * heads
    layouts = torch.stack([torch.stack([permutation(grid, o) for o in head]) for head in tried]).to(q.device)
    places = layouts.argsort(-1)
    nq, nk = -(-n // block_q), -(-n // block_k)
    wide = wide_dtype(q.dtype)
    pads = torch.zeros(nk, dtype=wide, device=q.device)
    pads[-1] = nk * block_k - n
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = repeat_heads(k, heads).to(wide).transpose(-2, -1)
    sums = torch.zeros(heads, places.shape[1], nq, nk, dtype=wide, device=q.device)
    step = chunk_rows(1, heads, keys.shape[-1])
    sparse = uneven = None
    marks: list[tuple[Tensor, Tensor]] = []
    for b in range(q.shape[0]):
        part = torch.zeros_like(sums)  # of this sample alone: the marks are of one map each
        low, top = (torch.zeros_like(sums), torch.zeros_like(sums)) if eps is not None else (None, None)
        for first in range(0, n, step):
            rows = slice(image.start + first, image.start + min(first + step, n))
            p = ((q[b, :, rows].to(wide) * scale) @ keys[b]).softmax(-1)[..., image]
            for h in range(heads):
                for o in range(places.shape[1]):
                    laid = F.pad(p[h].index_select(1, layouts[h, o]), (0, nk * block_k - n)).unflatten(1, (nk, block_k))
                    row_block = places[h, o, first : first + p.shape[1]] // block_q
                    part[h, o].index_add_(0, row_block, laid.sum(-1))
                    if low is not None and top is not None and eps is not None:
                        # Padding is not empty: it is 0, and counted off again.
                        small = (laid < eps).sum(-1, dtype=wide) - pads
                        low[h, o].index_add_(0, row_block, small)
                        index = row_block[:, None].expand(-1, nk)
                        top[h, o].scatter_reduce_(0, index, laid.amax(-1), "amax")
        sums += part
        if low is not None and top is not None:
            marks.append(_marks(part, low, top, n, block_q, block_k, sigma))
    if marks:
        sparse = torch.stack([m[0] for m in marks]).mean(0)
        uneven = torch.stack([m[1] for m in marks]).mean(0)
    mass = sums / _sizes(n, block_q, sums)[:, None] / q.shape[0]
    if back is None:
        return BlockMass(mass, sparse, uneven)
    marked = [None if m is None else m.index_select(1, back) for m in (sparse, uneven)]
    return BlockMass(mass.index_select(1, back), *marked)


def _first_alike(grid: tuple[int, int, int], order: int) -> int:
    """Return the first order that lays a grid out as this one does."""
    long = [[axis for axis in axes if grid[axis] > 1] for axes in ORDERS.values()]
    return long.index(long[order])


def _marks(
    sums: Tensor, low: Tensor, top: Tensor, n: int, block_q: int, block_k: int, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return M_sparse and M_quant; what pads the last blocks does not count."""
    entries = _sizes(n, block_q, sums)[:, None] * _sizes(n, block_k, sums)
    sparse = (low / entries >= sigma).to(sums.dtype).mean((-2, -1))
    mean = sums / entries
    uneven = torch.where(mean > 0, top / mean, torch.ones_like(mean)).mean((-2, -1))
    return sparse, uneven


def _sizes(n: int, block: int, like: Tensor) -> Tensor:
    count = -(-n // block)
    sizes = like.new_full((count,), float(block))
    sizes[-1] = n - (count - 1) * block
    return sizes


def choose_orders(found: BlockMass, density: float, metric: str = "mass", alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Choose the order of every head.

    Args:
        found: What `block_mass` says, for all six orders.
        density: Share of blocks that will be kept.
        metric: "mass": the most mass in that share of the blocks; "paro": the paper's formula with the sign of its
            first term corrected; "paro_literal": as printed, for study.
        alpha: Weight of the sparseness in the paper's formula.

    Returns:
        Numbers of the orders, int64 [H], and the cost of every order [H, orders], smaller is better. Among equals the
        first wins, so that a head keeps its order unless another one helps.
    """
    if metric == "mass":
        flat = found.mass.flatten(-2)
        kept = flat.topk(max(1, round(density * flat.shape[-1])), dim=-1).values.sum(-1)
        cost = 1 - kept / flat.sum(-1).clamp_min(1e-30)
    else:
        assert found.sparse is not None
        assert found.uneven is not None
        first = found.sparse if metric == "paro_literal" else 1 - found.sparse
        cost = alpha * _share(first) + (1 - alpha) * _share(found.uneven)
    best = cost.amin(-1, keepdim=True)
    close = cost <= best + _TIE * best.abs().clamp_min(1e-12)
    return close.int().argmax(-1), cost


def _share(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total.clamp_min(1e-30), torch.zeros_like(x))


def choose_masks(mass: Tensor, density: float, *, together: bool = False) -> Tensor:
    """Keep the blocks with the most mass, and the best block of every row.

    Args:
        mass: Of every block [..., H, nq, nk].
        density: Share of blocks to keep, in (0, 1].
        together: Let the heads compete for one budget instead of a budget each.

    Returns:
        Bool, in the shape of `mass`.
    """
    flat = mass.flatten(-3) if together else mass.flatten(-2)
    kept = max(1, math.floor(density * flat.shape[-1] + 0.5))
    least = flat.topk(kept, dim=-1).values[..., -1]
    return _above(mass, least[(..., None, None, None) if together else (..., None, None)])


def choose_masks_together(masses: Sequence[Tensor], density: float) -> list[Tensor]:
    """Keep the blocks with the most mass of several attentions, which compete for one budget of work.

    Args:
        masses: Of every block of every attention, each [..., H, nq, nk].
        density: Share of all their blocks to keep, in (0, 1]. Every row's best block is kept beside.

    Returns:
        Bool, in the shape of each of `masses`.
    """
    flat = torch.cat([m.flatten() for m in masses])
    kept = max(1, math.floor(density * flat.numel() + 0.5))
    # kthvalue rather than topk: it has no limit on how many, and needs no copy of the largest.
    least = flat.kthvalue(flat.numel() - kept + 1).values
    return [_above(m, least) for m in masses]


def _above(mass: Tensor, least: Tensor) -> Tensor:
    keep = mass >= least
    best = mass == mass.amax(-1, keepdim=True)
    # One block a row, the first among equals.
    return keep | (best & (best.cumsum(-1) == 1))
