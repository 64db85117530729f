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
    shape = heads, len(tried[0]), -(-n // block_q), -(-n // block_k)
    queries = q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys = repeat_heads(k, heads).to(wide)
    kind = _HeadByHead if q.device.type == "cpu" else _Together
    tally = kind(grid, tried, block_q, block_k, image, keys, eps)
    mass = queries.new_zeros(shape)
    marks: list[tuple[Tensor, Tensor]] = []
    for b in range(q.shape[0]):
        for first in range(0, n, tally.step):
            rows = slice(image.start + first, image.start + min(first + tally.step, n))
            tally.add(queries[b, :, rows], keys[b], first)
        part = tally.sums()  # of this sample alone: the marks are of one map each
        mass += part
        if eps is not None:
            marks.append(_marks(part, tally.low(), tally.top(), n, block_q, block_k, sigma))
        tally.clear()
    sparse, uneven = (torch.stack(m).mean(0) for m in zip(*marks, strict=True)) if marks else (None, None)
    mass = mass / _sizes(n, block_q, mass)[:, None] / q.shape[0]
    if orders is not None:
        return BlockMass(mass, sparse, uneven)
    back = torch.tensor([distinct.index(o) for o in same], device=q.device)
    return BlockMass(*(None if x is None else x.index_select(1, back) for x in (mass, sparse, uneven)))  # type: ignore[arg-type]


class _Together:
    """Sums of blocks of all heads in all orders that they try: every chunk of rows takes a few launches.

    The map is laid out keys first, [H, keys, rows]. The keys of a block are then rows of one table, and `embedding_bag`
    adds them up, or takes the largest, where they stand: a copy in every order would be as many maps.

    Args:
        grid: Frames, rows and columns of the image tokens.
        tried: For each head its orders, equally many.
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.
        image: Where the image tokens lie.
        keys: All keys [B, H, N, D].
        eps: Entries below it count as empty; None counts none.
    """

    def __init__(
        self, grid: tuple[int, int, int], tried: Sequence[Sequence[int]], block_q: int, block_k: int, image: slice,
        keys: Tensor, eps: float | None,
    ) -> None:  # fmt: skip
        heads, slots, n, device = len(tried), len(tried[0]), math.prod(grid), keys.device
        # Of the map's size there is the map alone; beside it the largest of every block, and, in 64 bits, their places.
        rows = chunk_rows(1, heads, keys.shape[2], device, alive=1 + 3 * slots / block_k)
        # The softmax over other dimensions than the last counts in 32 bits up to some releases of torch.
        self.eps, self.step = eps, max(1, min(rows, (2**32 - 1) // (heads * keys.shape[2])))
        used = sorted({o for head in tried for o in head})
        there = torch.stack([permutation(grid, o, block_k) for o in used])
        of_head = torch.tensor([[used.index(o) for o in head] for head in tried])
        there, places, of_head = (x.to(device) for x in (there, there.argsort(-1) // block_q, of_head))
        above = image.start + keys.shape[2] * torch.arange(heads, device=device)[:, None, None]
        self._entries = (there[of_head] + above).flatten()
        starts = torch.arange(0, n, block_k, device=device)
        self._starts = (torch.arange(0, heads * slots * n, n, device=device)[:, None] + starts).flatten()
        self._row_blocks = places[of_head][:, :, None]
        shape = heads, slots, len(starts), -(-n // block_q)
        self._kept = [keys.new_zeros(shape) for _ in range(1 if eps is None else 3)]

    @torch.no_grad()
    def add(self, queries: Tensor, keys: Tensor, first: int) -> None:
        """Add rows of the map, queries [H, rows, D] times keys [H, N, D], the first of them the image's `first`."""
        table = keys @ queries.transpose(-2, -1)
        # In place where a thread writes no number that another one reads; graphs of whole operations promise no such.
        table = torch.softmax(table, -2, out=None if table.device.type == "mps" else table).flatten(0, 1)
        mass = self._kept[0]
        index = self._row_blocks[..., first : first + queries.shape[1]].expand(*mass.shape[:3], -1)
        mass.scatter_add_(-1, index, self._bags(table, "sum"))
        if self.eps is not None:
            self._kept[2].scatter_reduce_(-1, index, self._bags(table, "max"), "amax")
            self._kept[1].scatter_add_(-1, index, self._bags(table.lt_(self.eps), "sum"))  # in place: read no more

    def _bags(self, table: Tensor, mode: str) -> Tensor:
        """Reduce the keys of every block, [H N, rows] -> [H, orders, nk, rows]."""
        return F.embedding_bag(self._entries, table, self._starts, mode=mode).view(*self._kept[0].shape[:3], -1)

    def sums(self) -> Tensor:
        """Return the sum of every block, [H, orders, nq, nk]."""
        return self._kept[0].transpose(-2, -1)

    def low(self) -> Tensor:
        """Return how many entries of every block are empty."""
        return self._kept[1].transpose(-2, -1)

    def top(self) -> Tensor:
        """Return the largest entry of every block."""
        return self._kept[2].transpose(-2, -1)

    def clear(self) -> None:
        """Begin another map."""
        for x in self._kept:
            x.zero_()


class _HeadByHead:
    """Sums of blocks as `_Together` has them, one head and order at a time: its part of the map stays in a CPU's cache.

    Its arguments are those of `_Together`.
    """

    def __init__(
        self, grid: tuple[int, int, int], tried: Sequence[Sequence[int]], block_q: int, block_k: int, image: slice,
        keys: Tensor, eps: float | None,
    ) -> None:  # fmt: skip
        self.image, self.step = image, chunk_rows(1, len(tried), keys.shape[2], keys.device)
        self._tallies = [
            [_Tally(permutation(grid, order, block_k), block_q, block_k, eps, keys) for order in head] for head in tried
        ]

    def add(self, queries: Tensor, keys: Tensor, first: int) -> None:
        """Add rows of the map, as `_Together.add`."""
        p = (queries @ keys.transpose(-2, -1)).softmax(-1)[..., self.image]
        for part, tallies in zip(p, self._tallies, strict=True):
            for tally in tallies:
                tally.add(part, first)

    def sums(self) -> Tensor:
        """Return the sum of every block, [H, orders, nq, nk]."""
        return self._all("sums")

    def low(self) -> Tensor:
        """Return how many entries of every block are empty."""
        return self._all("low")

    def top(self) -> Tensor:
        """Return the largest entry of every block."""
        return self._all("top")

    def _all(self, name: str) -> Tensor:
        return torch.stack([torch.stack([getattr(tally, name) for tally in tallies]) for tallies in self._tallies])

    def clear(self) -> None:
        """Begin another map."""
        for tallies in self._tallies:
            for tally in tallies:
                tally.clear()


class _Tally:
    """The sums of blocks of one head in one order.

    Args:
        order: Tokens in the order, int64 [n].
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.
        eps: Entries below it count as empty; None counts none.
        like: A tensor of the device and dtype.
    """

    def __init__(self, order: Tensor, block_q: int, block_k: int, eps: float | None, like: Tensor) -> None:
        self.eps, self.n = eps, len(order)
        self.block_q, self.block_k, self.blocks = block_q, block_k, -(-len(order) // block_k)
        # What fills the last block is the first token, and set to zero once it is there.
        self.columns = F.pad(order, (0, self.blocks * block_k - self.n))
        self.row_blocks = order.argsort() // block_q
        self.sums = like.new_zeros(-(-self.n // block_q), self.blocks)
        self.low = None if eps is None else torch.zeros_like(self.sums)
        self.top = None if eps is None else torch.zeros_like(self.sums)

    def add(self, p: Tensor, first: int) -> None:
        """Add rows of the map, [rows, n], the first of which is the image's token `first`."""
        laid = p.index_select(-1, self.columns)
        if laid.shape[-1] > self.n:
            laid[..., self.n :].zero_()
        laid = laid.unflatten(-1, (self.blocks, self.block_k))
        row_blocks = self.row_blocks[first : first + len(p)]
        self.sums.index_add_(0, row_blocks, laid.sum(-1))
        if self.eps is not None and self.low is not None and self.top is not None:
            # The zeros that fill the last block are no entries.
            missing = self.blocks * self.block_k - self.n
            low = (laid < self.eps).sum(-1, dtype=laid.dtype)
            low[..., -1] -= missing if self.eps > 0 else 0
            self.low.index_add_(0, row_blocks, low)
            self.top.scatter_reduce_(0, row_blocks[:, None].expand(-1, self.blocks), laid.amax(-1), "amax")

    def clear(self) -> None:
        """Begin another map."""
        for x in (self.sums, self.low, self.top):
            if x is not None:
                x.zero_()


def _marks(
    sums: Tensor, low: Tensor, top: Tensor, n: int, block_q: int, block_k: int, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return M_sparse and M_quant."""
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


def choose_orders(masses: BlockMass, density: float, metric: str = "mass", alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Choose the order of every head.

    Args:
        masses: What `block_mass` says, for all orders.
        density: Share of blocks that will be kept.
        metric: "mass": the most mass in that share of the blocks; "paro": the paper's formula with the sign of its
            first term corrected; "paro_literal": as printed, for study.
        alpha: Weight of the sparseness in the paper's formula.

    Returns:
        Numbers of the orders, int64 [H], and the cost of every order [H, orders], smaller is better. Among equals the
        first wins, so that a head keeps its order unless another one helps.
    """
    if metric == "mass":
        flat = masses.mass.flatten(-2)
        mass = flat.topk(max(1, round(density * flat.shape[-1])), dim=-1).values.sum(-1)
        cost = 1 - mass / flat.sum(-1).clamp_min(1e-30)
    else:
        assert masses.sparse is not None
        assert masses.uneven is not None
        first = masses.sparse if metric == "paro_literal" else 1 - masses.sparse
        cost = alpha * _share(first) + (1 - alpha) * _share(masses.uneven)
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
    count = max(1, math.floor(density * flat.shape[-1] + 0.5))
    least = flat.topk(count, dim=-1).values[..., -1]
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
    count = max(1, math.floor(density * flat.numel() + 0.5))
    # kthvalue rather than topk: it has no limit on how many, and needs no copy of the largest.
    least = flat.kthvalue(flat.numel() - count + 1).values
    return [_above(m, least) for m in masses]


def _above(mass: Tensor, least: Tensor) -> Tensor:
    keep = mass >= least
    best = mass == mass.amax(-1, keepdim=True)
    # One block a row, the first among equals.
    return keep | (best & (best.cumsum(-1) == 1))
