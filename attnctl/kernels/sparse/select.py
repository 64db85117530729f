"""Which blocks of an attention to compute, judged from its queries and keys when it runs: scores, then a choice.

Scores of blocks, [B, H, nq, nk], rows of which add up to 1 or less:

    map           the map's own mass, of some or all rows of every block of queries
    pooled        softmax of the blocks' mean queries times mean keys ("SpargeAttention: Accurate and Training-free
                  Sparse Attention Accelerating Any Model Inference", arXiv 2502.18137, without its test of likeness)
    antidiagonal  every S-th diagonal of each block of S x S ("XAttention: Block Sparse Attention with Antidiagonal
                  Scoring", arXiv 2503.16428)

Nothing here waits for the device, and no tensor is as large as the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import chunk_rows, repeat_heads, wide_dtype
from attnctl.kernels.sparse.lists import block_means

__all__ = [
    "antidiagonal_scores",
    "keep_above",
    "keep_density",
    "keep_mass",
    "least_kept",
    "map_scores",
    "pooled_scores",
]


def map_scores(
    q: Tensor, k: Tensor, text: Tensor | None, block_q: int, block_k: int, scale: float, rows: int | None = None
) -> Tensor:
    """Add up the map in blocks.

    Args:
        q: Image queries [B, H, N, D], in the order that blocks are cut from.
        k: Image keys [B, Hk, N, D], likewise.
        text: Text keys [B, Hk, T, D], which take their share of the softmax, or None.
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.
        scale: Factor on q k^T.
        rows: Queries of every block that are looked at, evenly spread; None for all.

    Returns:
        [B, H, nq, nk] in float32 (float64 stays).
    """
    wide, n, heads = wide_dtype(q.dtype), q.shape[2], q.shape[1]
    nq, nk, taken = -(-n // block_q), -(-n // block_k), min(rows or block_q, block_q)
    # Evenly spread over a block; where the last one has fewer tokens, its last one stands in.
    spread = (torch.arange(taken, device=q.device) * 2 + 1) * block_q // (2 * taken)
    at = (torch.arange(nq, device=q.device)[:, None] * block_q + spread).clamp(max=n - 1).flatten()
    keys = repeat_heads(k if text is None else torch.cat([k, text], 2), heads).to(wide).transpose(-2, -1)
    step = max(1, chunk_rows(q.shape[0], heads, keys.shape[-1], q.device) // taken) * taken
    sums = []
    for part in at.split(step):
        p = ((q.index_select(2, part).to(wide) * scale) @ keys).softmax(-1)[..., :n]
        p = p.unflatten(2, (-1, taken)).mean(3)
        sums.append(F.pad(p, (0, nk * block_k - n)).unflatten(-1, (nk, block_k)).sum(-1))
    return torch.cat(sums, 2)


def pooled_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """Attend with the mean query of every block to the mean keys.

    Shapes: q [B, H, N, D]; k [B, Hk, N, D], in the order that blocks are cut from -> [B, H, nq, nk].
    """
    wide = wide_dtype(q.dtype)
    keys = repeat_heads(block_means(k, block_k), q.shape[1]).to(wide)
    logits = block_means(q, block_q).to(wide) @ keys.transpose(-2, -1) * scale
    if k.shape[2] % block_k:  # fewer keys have less of the softmax
        logits[..., -1] += math.log(k.shape[2] % block_k / block_k)
    return logits.softmax(-1)


def antidiagonal_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float, stride: int = 8) -> Tensor:
    """Add up every S-th antidiagonal of the map in blocks (arXiv 2503.16428, section 2.1).

    Groups of S queries, taken backwards, and of S keys are joined along their channels; their products are the sums
    over antidiagonals, and the softmax runs over those. The last token fills up what is no whole block.

    Shapes: q [B, H, N, D]; k [B, Hk, N, D], in the order that blocks are cut from -> [B, H, nq, nk].
    """
    n, wide = q.shape[2], wide_dtype(q.dtype)
    stride = math.gcd(math.gcd(block_q, block_k), stride)
    nq, nk = -(-n // block_q), -(-n // block_k)
    size = max(nq * block_q, nk * block_k)
    groups = [torch.cat([x, x[:, :, -1:].expand(-1, -1, size - n, -1)], 2) if size > n else x for x in (q, k)]
    queries, keys = (x.unflatten(2, (-1, stride)) for x in groups)
    queries = queries.flip(3).flatten(3)[:, :, : nq * block_q // stride].to(wide) * (scale / stride)
    keys = repeat_heads(keys.flatten(3)[:, :, : nk * block_k // stride].to(wide), q.shape[1]).transpose(-2, -1)
    high, wide_block = block_q // stride, block_k // stride
    step = max(1, chunk_rows(q.shape[0], q.shape[1], keys.shape[-1], q.device) // high) * high
    sums = []
    for part in queries.split(step, 2):
        p = (part @ keys).softmax(-1)
        sums.append(p.unflatten(-1, (nk, wide_block)).sum(-1).unflatten(2, (-1, high)).mean(3))
    return torch.cat(sums, 2)


def keep_density(scores: Tensor, density: float, *, by_row: bool) -> Tensor:
    """Keep the blocks with the largest scores of every row, or of every head and the best of every row.

    Args:
        scores: [..., nq, nk].
        density: Share of blocks to keep, in (0, 1]; a row keeps at least one.
        by_row: Whether each row has that share, or the rows of a head share it.

    Returns:
        Bool, in the shape of `scores`.
    """
    flat = scores if by_row else scores.flatten(-2)
    count = max(1, math.floor(density * flat.shape[-1] + 0.5))
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count, dim=-1).indices, True)
    return mask if by_row else mask.view_as(scores) | _best(scores)


def keep_mass(scores: Tensor, mass: float) -> Tensor:
    """Keep the fewest blocks of every row whose scores reach a share of its sum, the one that crosses it included.

    Shapes: scores [..., nq, nk] -> bool, the same.
    """
    ordered, places = scores.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    taken = before < mass * ordered.sum(-1, keepdim=True)
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, places, taken)


def least_kept(scores: Sequence[Tensor], density: float) -> Tensor:
    """Return the least score that several attentions keep which compete for one budget of blocks, a tensor [].

    Args:
        scores: Of blocks of every attention, all or a fair sample, in any shape.
        density: Share of all their blocks to keep.
    """
    flat = torch.cat([s.flatten() for s in scores])
    count = max(1, math.floor(density * flat.numel() + 0.5))
    return flat.kthvalue(flat.numel() - count + 1).values


def keep_above(scores: Tensor, least: Tensor) -> Tensor:
    """Keep the blocks whose score is large enough, and the best of every row: [..., nq, nk] -> bool, the same."""
    return (scores >= least) | _best(scores)


def _best(scores: Tensor) -> Tensor:
    """Return the best block of every row alone."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
