"""Block-sparse attention by gathering: any device, any size, differentiable, and the fastest on a CPU.

The key blocks that a query block needs are copied side by side, and torch's dense kernel runs on the copy. Copies are
kept about as large as a core's cache: larger ones are slower, since they are written to memory and read back. Nothing
is padded and nothing is masked: query blocks with equally many key blocks run together, and what is left of the last
block, like the text, stands at the end of the copy.

One head is laid out at a time, in memory that the next one takes over: for all heads together it would be new memory,
and a CPU spends longer on getting its pages than on filling them. Queries are laid out in the order in which they are
computed, so that one reordering brings them there and one brings the results back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.kernels import sdpa
from attnctl.kernels.lists import Bundle, bundles, ratio
from attnctl.plans.blocks import BlockPlan
from attnctl.plans.orders import permutation

__all__ = ["run"]

_CACHE_BYTES = 1 << 20
_MOST_ROWS = 4


def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, group: int, image: slice, scale: float | None) -> Tensor:
    """Compute the image rows of block-sparse attention.

    Shapes: q [B, H, N, D]; k [B, Hk, N, D]; v [B, Hk, N, Dv], in the model's order; image: the n tokens of the grid,
    the others are text -> [B, H, n, Dv].
    """
    batch, heads = q.shape[:2]
    shared = heads // k.shape[1]
    text = slice(0, image.start) if image.start else slice(image.stop, q.shape[2])
    n, times = image.stop - image.start, ratio(plan, group)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    memory = None if differentiable else _Memory()
    out = None if differentiable else v.new_empty((batch, heads, n, v.shape[-1]))
    found = []
    for h in range(heads):
        work = bundles(plan, group, h, times, q.device)
        order = permutation(plan.grid, plan.order[h], q.device) if plan.grid and any(plan.order) else None
        there, back = _ways(work, times * plan.block_q, n, order)
        for b in range(batch):
            kv = b, h // shared
            head = _Head(
                _laid_out("keys", k[kv][image], order, memory),
                _laid_out("values", v[kv][image], order, memory),
                (k[kv][text], v[kv][text]),
                plan.block_k,
            )
            queries = _laid_out("queries", q[b, h, image], there, memory)
            results = _compute(queries, head, work, times * plan.block_q, scale, memory)
            if out is None:
                found.append(results.index_select(0, back))
            else:
                torch.index_select(results, 0, back, out=out[b, h])
    return torch.stack(found).unflatten(0, (heads, batch)).transpose(0, 1) if out is None else out


class _Memory:
    """Memory for what is laid out, used again and again."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory of a shape, with whatever stands in it."""
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = like.new_empty(size)
        return self.kept[name][:size].view(shape)


class _Head(NamedTuple):
    """Keys and values of one head: image tokens in the head's order, text tokens, tokens in a block."""

    keys: Tensor
    values: Tensor
    text: tuple[Tensor, Tensor]
    block: int

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return whole blocks of keys and of values, each as one row."""
        whole = self.keys.shape[0] // self.block
        keys, values = (x[: whole * self.block].reshape(whole, self.block * x.shape[1]) for x in self[:2])
        return keys, values

    def ends(self, tail: bool) -> tuple[Tensor, Tensor]:
        """Return what follows the blocks: the text, and before it the last, partial block where `tail`."""
        if not tail:
            return self.text
        first = self.keys.shape[0] // self.block * self.block
        return torch.cat([self.keys[first:], self.text[0]]), torch.cat([self.values[first:], self.text[1]])


def _ways(work: tuple[Bundle, ...], height: int, n: int, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens in the order in which they are computed, and where each token's result then stands: [n] both.

    `order`: Tokens in the order that the blocks are cut from; None for the model's.
    """
    rows = torch.cat([bundle.rows for bundle in work])
    there = (rows[:, None] * height + torch.arange(height, device=rows.device)).flatten()
    if n % height:  # rows of the last block that do not exist
        there = there[there < n]
    if order is not None:
        there = order[there]
    return there, torch.empty_like(there).scatter_(0, there, torch.arange(n, device=rows.device))


def _laid_out(name: str, x: Tensor, order: Tensor | None, memory: _Memory | None) -> Tensor:
    """Return tokens [n, D] in an order, each after the other in memory."""
    if order is None:
        return x.contiguous()
    if memory is None:
        return x.index_select(0, order)
    return torch.index_select(x, 0, order, out=memory.take(name, x.shape, x))


def _compute(
    queries: Tensor, head: _Head, work: tuple[Bundle, ...], height: int, scale: float | None, memory: _Memory | None
) -> Tensor:
    """Compute one head's attention, in the order of its queries, [n, Dv]."""
    n = queries.shape[0]
    out = None if memory is None else memory.take("results", (n, head.values.shape[-1]), head.values)
    found, at = [], 0
    blocks = head.blocks()
    for bundle in work:
        ends = head.ends(bundle.tail)
        count = bundle.blocks.shape[1]
        size = (count * head.block + ends[0].shape[0]) * queries.shape[-1] * queries.element_size()
        # Behind whole blocks something must be appended row by row: the copy is in one piece only for a single row.
        together = 1 if ends[0].shape[0] else min(_MOST_ROWS, max(1, _CACHE_BYTES // max(1, size)))
        for columns in bundle.blocks.split(together):
            keys = _copied("key blocks", blocks[0], columns, ends[0], memory)
            values = _copied("value blocks", blocks[1], columns, ends[1], memory)
            stop = min(n, at + len(columns) * height)  # a partial query block is alone in its bundle
            some = queries[at:stop].unflatten(0, (len(columns), -1))
            done = sdpa.run(some[None], keys[None], values[None], None, scale)[0].flatten(0, 1)
            if out is None:
                found.append(done)
            else:
                out[at:stop] = done
            at = stop
    return torch.cat(found) if out is None else out


def _copied(name: str, blocks: Tensor, columns: Tensor, end: Tensor, memory: _Memory | None) -> Tensor:
    """Copy key (or value) blocks side by side and `end` behind them, [R, tokens, D]."""
    (rows, count), width = columns.shape, end.shape[-1]
    inside = count * blocks.shape[1] // width
    if memory is None:
        taken = blocks.index_select(0, columns.flatten()).view(rows, inside, width)
        return torch.cat([taken, end.expand(rows, *end.shape)], 1) if end.shape[0] else taken
    buffer = memory.take(name, (rows, inside + end.shape[0], width), blocks)
    if count:
        # In one piece: there is one row, or nothing behind the blocks.
        place = buffer.view(-1)[: rows * inside * width].view(rows * count, blocks.shape[1])
        torch.index_select(blocks, 0, columns.flatten(), out=place)
    if end.shape[0]:
        buffer[:, inside:] = end
    return buffer
