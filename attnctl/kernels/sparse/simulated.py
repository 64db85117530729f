"""Block-sparse attention whose numbers are rounded to 8 or 4 bits, written out: what such a kernel costs in quality.

"PAROAttention", arXiv 2506.16054, section 4: queries and keys are rounded a block at a time, the keys less their mean;
the weights exp(l - max) are rounded a tile of one query and one key block at a time, and the values a block of keys at
a time, each by the largest number of its tile. Each head's order makes the numbers of a tile alike, which is what
reordering gains. A query's sum of weights is taken before they are rounded. Sums are exact here, as those of whole
numbers are on a card.

Nothing is faster for it: whole numbers are products of floats here. Tensor cores multiply 8-bit numbers from Turing on,
and 4-bit ones on Turing, Ampere and Ada alone: Hopper has none, Blackwell has 4-bit floats in their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import chunk_rows, wide_dtype
from attnctl.kernels.sparse.lists import LaidOut
from attnctl.kernels.sparse.written_out import all_keys, bias_of

__all__ = ["rounded", "simulated"]


def rounded(x: Tensor, tile: tuple[int, int], bits: int) -> Tensor:
    """Round to whole numbers times a scale of each tile, which is its largest magnitude over 2^(bits - 1) - 1.

    Args:
        x: Numbers [..., rows, columns].
        tile: Rows and columns of a tile; the last ones may be smaller.
        bits: Bits of a whole number with its sign.

    Returns:
        The rounded numbers, in the type of `x`.
    """
    levels = 2 ** (bits - 1) - 1
    rows, columns = x.shape[-2:]
    if x.numel() == 0:
        return x
    padded = F.pad(x, (0, -columns % tile[1], 0, -rows % tile[0]))
    tiles = padded.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0]))  # [..., nr, tile, nc, tile]
    scales = tiles.abs().amax((-3, -1), keepdim=True) / levels
    small = (tiles / scales.clamp_min(torch.finfo(x.dtype).tiny)).round() * scales
    return small.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def simulated(call: LaidOut, *, logits: int = 8, weights: int = 8) -> Tensor:
    """Compute the image rows with rounded numbers.

    Args:
        call: The call.
        logits: Bits of queries and keys.
        weights: Bits of weights and values.

    Returns:
        [B, H, N, Dv].
    """
    q, k, v, k_text, v_text, plan, group, scale, words = call
    n, text, wide = q.shape[2], k_text.shape[2], wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (x.to(wide) for x in all_keys(k, v, k_text, v_text, plan))
    ends = (text, n, keys.shape[2] - text - n)  # text, image, means of blocks that are left out
    keys = keys - keys.mean(2, keepdim=True)
    keys = _parts(keys, ends, (plan.block_k, keys.shape[-1]), logits, 2).transpose(-2, -1)
    values = _parts(values, ends, (plan.block_k, values.shape[-1]), weights, 2)
    queries = rounded(q.to(wide), (plan.block_q, q.shape[-1]), logits) * scale
    step = max(1, chunk_rows(q.shape[0], q.shape[1], keys.shape[-1], q.device) // plan.block_q) * plan.block_q
    parts = []
    for first in range(0, n, step):  # whole blocks of queries
        rows = torch.arange(first, min(first + step, n), device=q.device)
        made = queries[..., rows, :] @ keys
        made = made + bias_of(plan, group, rows, text, words, made)
        made = (made - made.amax(-1, keepdim=True)).exp()
        sums = made.sum(-1, keepdim=True)
        parts.append(_parts(made, ends, (plan.block_q, plan.block_k), weights, 3) @ values / sums)
    return torch.cat(parts, 2).to(v.dtype)


def _parts(x: Tensor, ends: tuple[int, int, int], tile: tuple[int, int], bits: int, axis: int) -> Tensor:
    """Round text, image and means, whose tiles are their own."""
    return torch.cat([rounded(part, tile, bits) for part in x.split(ends, axis)], axis)
