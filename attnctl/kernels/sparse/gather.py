"""Block-sparse attention by gathering: any device, any size, differentiable, and the fastest on a CPU.

The key blocks that a query block needs are copied side by side, and torch's dense kernel runs on the copy. Copies are
kept about as large as a core's cache: larger ones are slower, since they are written to memory and read back. Nothing
is padded and nothing is masked: query blocks with equally many key blocks run together, and what is left of the last
block, like the text, stands at the end of the copy. So do the means of blocks that are left out, where they count: each
has the logarithm of its size added to its logit.

One head is laid out at a time, in memory that the next one takes over: for all heads together it would be new memory,
and a CPU spends longer on getting its pages than on filling them. Queries are laid out in the order in which they are
computed, so that one reordering brings them there and one brings the results back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels import sdpa
from attnctl.kernels.checks import Memory, as_bias, wide_dtype
from attnctl.kernels.sparse.lists import Bundle, block_means, block_sizes, bundles, layout, ratio
from attnctl.plans.blocks import Blocks

__all__ = ["attend_with_sums", "run", "run_with_sums"]

_CACHE_BYTES = 1 << 20
_MOST_ROWS = 4


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    group: int,
    image: slice,
    scale: float | None,
    words: Tensor | None = None,
) -> Tensor:
    """Compute the image rows of block-sparse attention; see `run_with_sums`."""
    return run_with_sums(q, k, v, plan, group, image, scale, words, sums=False)[0]


def run_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    group: int,
    image: slice,
    scale: float | None,
    words: Tensor | None = None,
    *,
    sums: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute the image rows of block-sparse attention, all tensors in the model's own order.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D].
        v: Values [B, Hk, N, Dv].
        plan: What to compute; means of blocks that are left out count where it says so.
        group: Part of the run.
        image: Where the n tokens of the grid lie; the others are text.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Text keys to attend to, bool [B or 1, T]; None for all.
        sums: Whether to return the log of every query's sum of exponentials, over all that counts.

    Returns:
        [B, H, n, Dv], and the sums in float32 (float64 for float64), [B, H, n], without gradients, or None.
    """
    batch, heads = q.shape[:2]
    shared = heads // k.shape[1]
    text = slice(0, image.start) if image.start else slice(image.stop, q.shape[2])
    n, times = image.stop - image.start, ratio(plan, group)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    memory = None if differentiable else Memory()
    out = None if differentiable else v.new_empty((batch, heads, n, v.shape[-1]))
    logs = q.new_empty((batch, heads, n), dtype=wide_dtype(q.dtype)) if sums else None
    outputs = []
    orders = layout(plan, group, q.device)
    for h in range(heads):
        work = bundles(plan, group, h, times, q.device)
        order = None if orders is None else orders.there[orders.rows_of[h]]
        there, back = _ways(work, times * plan.block_q, n, order)
        for b in range(batch):
            kv = b, h // shared
            keys = _laid_out("keys", k[kv][image], order, memory)
            values = _laid_out("values", v[kv][image], order, memory)
            head = _Head(
                keys, values, (k[kv][text], v[kv][text]), plan.block_k,
                None if words is None else words[b if len(words) > 1 else 0],
                (block_means(keys, plan.block_k), block_means(values, plan.block_k)) if plan.rest else None,
            )  # fmt: skip
            queries = _laid_out("queries", q[b, h, image], there, memory)
            head_logs = None if logs is None else logs.new_empty(n)
            results = _compute(queries, head, work, times * plan.block_q, scale, memory, head_logs)
            if logs is not None and head_logs is not None:
                logs[b, h] = head_logs.index_select(0, back)
            if out is None:
                outputs.append(results.index_select(0, back))
            else:
                torch.index_select(results, 0, back, out=out[b, h])
    return torch.stack(outputs).unflatten(0, (heads, batch)).transpose(0, 1) if out is None else out, logs


class _Head(NamedTuple):
    """Keys and values of one head: image in its order, text, tokens in a block, which text tokens are words, means."""

    keys: Tensor
    values: Tensor
    text: tuple[Tensor, Tensor]
    block: int
    words: Tensor | None = None
    means: tuple[Tensor, Tensor] | None = None

    def bias(self, keys: int, left: Tensor | None) -> Tensor | None:
        """Return what is added to the logits of a copy's `keys` and of the means behind them, [1, 1, 1, all].

        None for nothing: all text is words, and no means are there.
        """
        if self.words is None and left is None:
            return None
        bias = self.keys.new_zeros(keys + (0 if left is None else left.shape[1]))
        if self.words is not None:  # the text is the last of the keys
            bias[keys - len(self.words) : keys] = as_bias(self.words, bias.dtype)
        if left is not None:
            bias[keys:] = block_sizes(len(self.keys), self.block, bias).log()[left[0]]
        return bias[None, None, None]

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
    tokens = torch.arange(n, device=rows.device)
    # Whole blocks are picked, then what the last, partial one lacks is cut off: it comes last, a bundle of its own.
    missing = -n % height
    blocks = F.pad(tokens if order is None else order, (0, missing)).view(-1, height)
    there = blocks.index_select(0, rows).flatten()[:n]
    return there, torch.empty_like(there).scatter_(0, there, tokens)


def _laid_out(name: str, x: Tensor, order: Tensor | None, memory: Memory | None) -> Tensor:
    """Return tokens [n, D] in an order, each after the other in memory."""
    if order is None:
        return x.contiguous()
    if memory is None:
        return x.index_select(0, order)
    return torch.index_select(x, 0, order, out=memory.take(name, x.shape, x))


def _compute(
    queries: Tensor,
    head: _Head,
    work: tuple[Bundle, ...],
    height: int,
    scale: float | None,
    memory: Memory | None,
    sums: Tensor | None,
) -> Tensor:
    """Compute one head's attention, in the order of its queries, [n, Dv]; write the sums' logs into `sums` [n]."""
    n = queries.shape[0]
    out = None if memory is None else memory.take("results", (n, head.values.shape[-1]), head.values)
    outputs, at = [], 0
    blocks = head.blocks()
    for bundle in work:
        rows, count = bundle.blocks.shape
        stop = min(n, at + rows * height)  # a partial query block is alone in its bundle
        ends = head.ends(bundle.tail)
        left = bundle.left if head.means is not None else None
        mask = head.bias(count * head.block + ends[0].shape[0], left)
        size = (count * head.block + ends[0].shape[0]) * queries.shape[-1] * queries.element_size()
        # Behind whole blocks something must be appended row by row: the copy is in one piece only for a single row.
        together = 1 if ends[0].shape[0] or left is not None else min(_MOST_ROWS, max(1, _CACHE_BYTES // max(1, size)))
        # Rows lie along the batch axis: a kernel's results are then in the order of the queries.
        some = queries[at:stop].view(rows, 1, -1, queries.shape[-1]).split(together)
        columns = bundle.blocks.view(-1).split(together * count) if count else [bundle.blocks.view(-1)] * len(some)
        done = [] if out is None else out[at:stop].view(rows, 1, -1, out.shape[-1]).split(together)
        means = (None, None) if left is None else head.means or (None, None)
        copies = [
            _Copies("keys", blocks[0], ends[0], means[0], memory),
            _Copies("values", blocks[1], ends[1], means[1], memory),
        ]
        for i, part in enumerate(some):
            keys, values = (copy.of(columns[i], len(part), None if left is None else left[i]) for copy in copies)
            if sums is None:
                result = sdpa.run(part, keys, values, mask, scale)
            else:
                result, logs = attend_with_sums(part, keys, values, mask, scale)
                first = at + i * together * height
                sums[first : first + logs.numel()] = logs.flatten()
            if out is None:
                outputs.append(result.flatten(0, 2))
            else:
                done[i].copy_(result)
        at = stop
    return torch.cat(outputs) if out is None else out


def attend_with_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention and the log of each query's sum of exponentials, written out where the kernel keeps it."""
    result, logs = sdpa.with_sums(q, k, v, mask=mask, scale=scale)
    if logs is None:
        wide = wide_dtype(q.dtype)
        logits = q.detach().to(wide) @ k.detach().to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        logs = (logits if mask is None else logits + mask).logsumexp(-1)
    return result, logs


class _Copies:
    """Key (or value) blocks copied side by side, `end` behind them, and behind that some of the blocks' means."""

    def __init__(self, name: str, blocks: Tensor, end: Tensor, means: Tensor | None, memory: Memory | None) -> None:
        self.name, self.blocks, self.end, self.means, self.memory = name + " copied", blocks, end, means, memory
        self.whole = self.place = end[:0]

    def of(self, columns: Tensor, rows: int, left: Tensor | None) -> Tensor:
        """Copy the blocks of some rows, numbers [rows * C], and return them as [rows, 1, tokens, D].

        `left`: The blocks, of one row, whose means come last.
        """
        count, width, after = columns.shape[0] // rows, self.end.shape[-1], self.end.shape[0]
        inside, means = count * self.blocks.shape[1] // width, 0 if left is None else len(left)
        if self.memory is None:
            taken = self.blocks.index_select(0, columns).view(rows, 1, inside, width)
            parts = [taken, self.end.expand(rows, 1, after, width)] if after else [taken]
            if left is not None and self.means is not None:
                parts.append(self.means.index_select(0, left)[None, None])
            return torch.cat(parts, 2)
        if self.whole.shape != (rows, 1, inside + after + means, width):
            self.whole = self.memory.take(self.name, (rows, 1, inside + after + means, width), self.blocks)
            # In one piece: there is one row, or nothing behind the blocks.
            self.place = self.whole.view(-1)[: rows * inside * width].view(rows * count, self.blocks.shape[1])
            # What stands behind the blocks is the same for every row of a bundle, and stays.
            self.whole[:, :, inside : inside + after] = self.end
        if count:
            torch.index_select(self.blocks, 0, columns, out=self.place)
        if left is not None and self.means is not None:
            torch.index_select(self.means, 0, left, out=self.whole[0, 0, inside + after :])
        return self.whole
