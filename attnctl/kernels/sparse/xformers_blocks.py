"""Block-sparse attention by xformers: gathered keys, and a block-diagonal bias that keeps query blocks apart.

xformers has no block-sparse bias. Every query block becomes a sequence of its own whose keys are copied side by side,
as many as it needs and no padding, and `BlockDiagonalMask` runs them all in one call of memory-efficient attention
("Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682). Copies are made a bounded amount at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl.kernels import xformers
from attnctl.kernels.checks import repeat_heads
from attnctl.kernels.sparse.lists import LaidOut, derived
from attnctl.plans.blocks import Blocks

__all__ = ["declines", "missing", "run", "sequences"]

_COPY_BYTES = 256 << 20
"""Keys that are copied at a time; values take as much again."""


class Sequences(NamedTuple):
    """Query blocks, over all heads, that are computed in one call.

    Attributes:
        queries: Their rows among the queries of all heads, [H N].
        starts: First key of every run of keys, among those of all heads, [H (N + T)]; int64.
        lengths: Length of every run; int64.
        keys: Number of keys of all of them.
        bias: xformers' block-diagonal bias.
    """

    queries: slice
    starts: Tensor
    lengths: Tensor
    keys: int
    bias: Any

    def rows(self) -> Tensor:
        """Return the rows of the keys, int64 [keys]; nothing is read back from the device."""
        ends = self.lengths.cumsum(0)
        shift = (self.starts - (ends - self.lengths)).repeat_interleave(self.lengths, output_size=self.keys)
        return torch.arange(self.keys, device=shift.device) + shift


def missing(device_type: str) -> str:
    """Say why xformers cannot run on a device type, or return ""."""
    return xformers.missing(device_type)


def declines(q: Tensor, k: Tensor, v: Tensor, plan: Blocks) -> str:
    """Say why xformers does not take a call, or return ""."""
    if plan.rest:
        return "it knows no means of blocks that are left out"
    return xformers.declines(q, k, v, None)


def run(call: LaidOut) -> Tensor:
    """Compute the image rows of block-sparse attention where all of the text counts, [B, H, N, Dv]."""
    q, k, v, k_text, v_text, plan, group, scale, _ = call
    batch, heads, n, width = q.shape
    keys, values = (
        torch.cat([repeat_heads(x, heads), repeat_heads(text, heads)], 2).flatten(1, 2)
        for x, text in ((k, k_text), (v, v_text))
    )
    most = max(1, _COPY_BYTES // (max(width, v.shape[-1]) * q.element_size()))
    parts = sequences(plan, group, k_text.shape[2], most, q.device)
    rows = q.reshape(batch, heads * n, width)
    out = []
    for b in range(batch):
        done = []
        for part in parts:
            taken = part.rows()
            one = (rows[b, part.queries], keys[b].index_select(0, taken), values[b].index_select(0, taken))
            packed = (x[None, :, None] for x in one)
            done.append(xformers.memory_efficient(*packed, bias=part.bias, scale=scale)[0, :, 0])
        out.append(torch.cat(done).unflatten(0, (heads, n)))
    return torch.stack(out)


def sequences(plan: Blocks, group: int, text: int, most: int, device: torch.device) -> tuple[Sequences, ...]:
    """Cut a plan's query blocks into calls of at most `most` keys (or one query block), kept with the plan.

    Args:
        plan: Blocks of the image.
        group: Part of the run.
        text: Number of text keys, which stand behind the image's; every query attends to them.
        most: Keys in one call.
        device: Where the lists lie.
    """
    key = ("xformers", text, most, device)
    return derived(plan, group, key, lambda: tuple(_sequences(plan, group, text, most, device)))


def _sequences(plan: Blocks, group: int, text: int, most: int, device: torch.device) -> list[Sequences]:
    n, keep = plan.n_image, plan.keep[group]
    assert n is not None
    heads, nq, nk = keep.shape
    sizes = torch.full((nk + 1,), plan.block_k)
    sizes[nk - 1] = n - (nk - 1) * plan.block_k
    sizes[nk] = text
    # The text is one more block that every row keeps.
    keep = torch.cat([keep, torch.full((heads, nq, 1), text > 0)], -1)
    runs = keep.flatten(0, 1).nonzero()
    lengths = sizes[runs[:, 1]]
    firsts = torch.where(runs[:, 1] < nk, runs[:, 1] * plan.block_k, n) + runs[:, 0] // nq * (n + text)
    key_counts = (keep.flatten(0, 1) * sizes).sum(-1)
    row_ends = keep.flatten(0, 1).sum(-1).cumsum(0).tolist()
    query_counts = [plan.block_q] * (nq - 1) + [n - (nq - 1) * plan.block_q]
    batches, row = [], 0
    counts = key_counts.tolist()
    while row < heads * nq:
        stop, taken = row + 1, counts[row]
        while stop < heads * nq and taken + counts[stop] <= most:
            taken += counts[stop]
            stop += 1
        span = slice(row_ends[row - 1] if row else 0, row_ends[stop - 1])
        queries = [query_counts[r % nq] for r in range(row, stop)]
        begin = row // nq * n + row % nq * plan.block_q
        batches.append(
            Sequences(
                slice(begin, begin + sum(queries)), firsts[span].to(device), lengths[span].to(device), taken,
                xformers.block_diagonal(queries, counts[row:stop], device),
            )
        )  # fmt: skip
        row = stop
    return batches
