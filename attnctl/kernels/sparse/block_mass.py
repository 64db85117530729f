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
from attnctl.plans.orders import LAYOUTS, first_alike, permutation

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
        orders: For each head the orders to try; None for all of `LAYOUTS`.
        eps: Entries below it count as empty, in the paper's marks; None leaves these out.
        sigma: Share of empty entries from which a block counts as empty.

    Returns:
        Float32 (float64 stays) on the device of q, the orders as the second dimension.
    """
    image = slice(0, q.shape[2]) if image is None else image
    heads, n, wide = q.shape[1], image.stop - image.start, wide_dtype(q.dtype)
    # On an image, or any grid with an axis of one, several orders are the same layout: measured once.
    same = [first_alike(grid, o, block_k) for o in range(len(LAYOUTS))]
    distinct = sorted(set(same))
    tried = [distinct] * heads if orders is None else orders
    tallies = _tallies(grid, tried, block_q, block_k, eps, q)
    shape = heads, len(tried[0]), -(-n // block_q), -(-n // block_k)
    queries = q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys = repeat_heads(k, heads).to(wide).transpose(-2, -1)
    step = chunk_rows(1, heads, keys.shape[-1], q.device)
    mass = queries.new_zeros(shape)
    marks: list[tuple[Tensor, Tensor]] = []
    for b in range(q.shape[0]):
        for first in range(0, n, step):
            rows = slice(image.start + first, image.start + min(first + step, n))
            p = (queries[b, :, rows] @ keys[b]).softmax(-1)[..., image]
            for tally in tallies:
                tally.add(p, first)
        part = _assembled(shape, tallies, "sums")  # of this sample alone: the marks are of one map each
        mass += part
        if eps is not None:
            low, top = (_assembled(shape, tallies, name) for name in ("low", "top"))
            marks.append(_marks(part, low, top, n, block_q, block_k, sigma))
        for tally in tallies:
            tally.clear()
    sparse, uneven = (torch.stack(m).mean(0) for m in zip(*marks, strict=True)) if marks else (None, None)
    mass = mass / _sizes(n, block_q, mass)[:, None] / q.shape[0]
    if orders is not None:
        return BlockMass(mass, sparse, uneven)
    back = torch.tensor([distinct.index(o) for o in same], device=q.device)
    return BlockMass(*(None if x is None else x.index_select(1, back) for x in (mass, sparse, uneven)))  # type: ignore[arg-type]


class _Tally:
    """The sums of blocks in one order, of the heads that try it.

    Args:
        heads: These heads; indices where they do not lie side by side.
        slot: Place of the order among those that a head tries.
        order: Tokens in the order, int64 [n].
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.
        eps: Entries below it count as empty; None counts none.
        like: A tensor of the device.
    """

    def __init__(
        self,
        heads: slice | Tensor,
        slot: int,
        order: Tensor,
        block_q: int,
        block_k: int,
        eps: float | None,
        like: Tensor,
    ) -> None:
        self.heads, self.slot, self.eps, self.n = heads, slot, eps, len(order)
        self.block_q, self.block_k, self.blocks = block_q, block_k, -(-len(order) // block_k)
        # What fills the last block is the first token, and set to zero once it is there.
        self.columns = F.pad(order, (0, self.blocks * block_k - self.n)).to(like.device)
        self.row_blocks = (order.argsort() // block_q).to(like.device)
        count = heads.stop - heads.start if isinstance(heads, slice) else len(heads)
        self.sums = like.new_zeros(count, -(-self.n // block_q), self.blocks, dtype=wide_dtype(like.dtype))
        self.low = None if eps is None else torch.zeros_like(self.sums)
        self.top = None if eps is None else torch.zeros_like(self.sums)

    def add(self, p: Tensor, first: int) -> None:
        """Add rows of the map, [H, rows, n], the first of which is the image's token `first`."""
        p = p[self.heads] if isinstance(self.heads, slice) else p.index_select(0, self.heads)
        laid = p.index_select(-1, self.columns)
        if laid.shape[-1] > self.n:
            laid[..., self.n :].zero_()
        laid = laid.unflatten(-1, (self.blocks, self.block_k))
        row_blocks = self.row_blocks[first : first + p.shape[1]]
        self.sums.index_add_(1, row_blocks, laid.sum(-1))
        if self.low is not None and self.top is not None:
            self.low.index_add_(1, row_blocks, (laid < self.eps).sum(-1, dtype=laid.dtype))
            index = row_blocks[None, :, None].expand(len(p), -1, self.blocks)
            self.top.scatter_reduce_(1, index, laid.amax(-1), "amax")

    def clear(self) -> None:
        """Begin another map."""
        for x in (self.sums, self.low, self.top):
            if x is not None:
                x.zero_()


def _tallies(
    grid: tuple[int, int, int], tried: Sequence[Sequence[int]], block_q: int, block_k: int, eps: float | None, q: Tensor
) -> list[_Tally]:
    """Return a tally for every order, of all heads that try it in the same slot.

    A CPU takes one head at a time, whose part of the map stays in its cache; a GPU takes all of them in one launch.
    """
    found = []
    for slot in range(len(tried[0])):
        for order in dict.fromkeys(head[slot] for head in tried):
            heads = [h for h, head in enumerate(tried) if head[slot] == order]
            parts: list[slice | Tensor] = [slice(h, h + 1) for h in heads]
            if q.device.type != "cpu":
                parts = [slice(0, len(tried)) if len(heads) == len(tried) else torch.tensor(heads).to(q.device)]
            tokens = permutation(grid, order, block_k)
            found += [_Tally(part, slot, tokens, block_q, block_k, eps, q) for part in parts]
    return found


def _assembled(shape: tuple[int, int, int, int], tallies: list[_Tally], name: str) -> Tensor:
    """Put one kind of sums together, [H, orders, nq, nk]."""
    whole = tallies[0].sums.new_zeros(shape)
    for tally in tallies:
        whole[tally.heads, tally.slot] = getattr(tally, name)
    return whole


def _marks(
    sums: Tensor, low: Tensor, top: Tensor, n: int, block_q: int, block_k: int, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return M_sparse and M_quant; what pads the last blocks does not count."""
    entries = _sizes(n, block_q, sums)[:, None] * _sizes(n, block_k, sums)
    # The zeros that fill the last block were counted as empty in every row.
    low = low - (block_k - _sizes(n, block_k, sums)) * _sizes(n, block_q, sums)[:, None]
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
        found: What `block_mass` says, for all orders.
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
