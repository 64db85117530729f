"""Block-sparse attention by gathering: any device, any size, differentiable, and the fastest on a CPU.

The key blocks that a query block needs are copied side by side, and torch's dense kernel runs on the copy. Copies are
kept about as large as a core's cache: larger ones are slower, since they are written to memory and read back. Nothing
is padded and nothing is masked: query blocks with equally many key blocks run together, and what is left of the last
block, like the text, stands at the end of the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.kernels import sdpa
from attnctl.kernels.lists import Bundle, bundles, ratio
from attnctl.plans.blocks import BlockPlan

__all__ = ["run"]

_CACHE_BYTES = 1 << 20
_MOST_ROWS = 4


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    plan: BlockPlan,
    group: int,
    scale: float | None,
) -> Tensor:
    """Compute the image rows of block-sparse attention.

    Shapes: q [B, H, N, D]; k, v [B, Hk, N, D], in each head's own order; k_text, v_text [B, Hk, T, D] -> [B, H, N, Dv].
    """
    batch, heads, n = q.shape[:3]
    shared = heads // k.shape[1]
    out = q.new_empty((batch, heads, n, v.shape[-1]), dtype=v.dtype)
    times = ratio(plan, group)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scratch = None if differentiable else _Scratch(q, v)
    for b in range(batch):
        for h in range(heads):
            head = _Head(k[b, h // shared], v[b, h // shared], k_text[b, h // shared], v_text[b, h // shared], plan)
            for bundle in bundles(plan, group, h, times, q.device):
                _bundle(q[b, h], head, bundle, out[b, h], times * plan.block_q, scale, scratch)
    return out


class _Head:
    """Keys and values of one head, as whole blocks and what stands behind them."""

    def __init__(self, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor, plan: BlockPlan) -> None:
        self.block = plan.block_k
        whole = k.shape[0] // self.block
        self.blocks = [x[: whole * self.block].reshape(whole, self.block * x.shape[-1]) for x in (k, v)]
        rest = [x[whole * self.block :] for x in (k, v)]
        self.ends = {
            False: (k_text, v_text),
            True: (torch.cat([rest[0], k_text]), torch.cat([rest[1], v_text])) if rest[0].shape[0] else None,
        }


class _Scratch:
    """Memory for the copies, used again and again."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.widths = (q.shape[-1], v.shape[-1])
        self.memory: list[Tensor] = [q.new_empty(0), v.new_empty(0)]

    def take(self, which: int, rows: int, tokens: int) -> Tensor:
        size = rows * tokens * self.widths[which]
        if self.memory[which].numel() < size:
            self.memory[which] = self.memory[which].new_empty(size)
        return self.memory[which][:size].view(rows, tokens, self.widths[which])


def _bundle(
    q: Tensor, head: _Head, bundle: Bundle, out: Tensor, height: int, scale: float | None, scratch: _Scratch | None
) -> None:
    """Compute the query blocks of one bundle and write them to `out` [N, Dv]."""
    n = q.shape[0]
    total, count = bundle.blocks.shape
    end = head.ends[bundle.tail]
    assert end is not None
    tokens = count * head.block + end[0].shape[0]
    bytes_each = max(1, tokens * q.shape[-1] * q.element_size())
    # Behind whole blocks something must be appended row by row: the copy is in one piece only for a single row.
    together = 1 if end[0].shape[0] else min(_MOST_ROWS, max(1, _CACHE_BYTES // bytes_each))
    whole = n // height
    q_blocks, out_blocks = (x[: whole * height].view(whole, height, x.shape[-1]) for x in (q, out))
    for first in range(0, total, together):
        rows, blocks = bundle.rows[first : first + together], bundle.blocks[first : first + together]
        pair = [_copy(head.blocks[i], blocks, end[i], head.block, i, scratch) for i in (0, 1)]
        if whole * height < n and int(bundle.rows[-1]) == whole:  # the partial query block, alone in its bundle
            last = sdpa.run(q[None, None, whole * height :], pair[0][None], pair[1][None], None, scale)
            out[whole * height :] = last[0, 0]
            continue
        done = sdpa.run(q_blocks.index_select(0, rows)[None], pair[0][None], pair[1][None], None, scale)
        out_blocks.index_copy_(0, rows, done[0])


def _copy(source: Tensor, blocks: Tensor, end: Tensor, block: int, which: int, scratch: _Scratch | None) -> Tensor:
    """Copy key (or value) blocks side by side, [R, tokens, D]."""
    rows, count = blocks.shape
    inside = count * block
    width = end.shape[-1]
    if scratch is None:
        taken = source.index_select(0, blocks.reshape(-1)).reshape(rows, inside, width)
        return torch.cat([taken, end.expand(rows, *end.shape)], 1) if end.shape[0] else taken
    buffer = scratch.take(which, rows, inside + end.shape[0])
    if count:
        flat = buffer.view(-1)[: rows * inside * width] if end.shape[0] == 0 or rows == 1 else None
        assert flat is not None
        torch.index_select(source, 0, blocks.reshape(-1), out=flat.view(rows * count, block * width))
    buffer[:, inside:] = end
    return buffer
