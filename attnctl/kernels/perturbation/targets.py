"""What attention becomes when it is perturbed: target maps T, each computed as T v without building T.

    identity     T = I                     "Self-Rectifying Diffusion Sampling with Perturbed-Attention
                                           Guidance" (PAG), arXiv 2403.17377
    query_mean   T = softmax(mean(q) k^T)  "Smoothed Energy Guidance", arXiv 2408.00760, sigma -> inf
    uniform      T = 1/L
    argmax       T = one-hot of each row's best key, the limit of temperature -> 0
    temperature  T = softmax(x logits), x = 1/tau
The last three, and all five with a strength u, as in "Fine-Grained Perturbation Guidance via Attention Head
Selection" (HeadHunter, SoftPAG), arXiv 2506.10978. Softmax and means run in float32 and are cast back. A
result may be v itself or a broadcast view: do not write into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import math
from attnctl.kernels.checks import (
    as_bias,
    check_call,
    check_mask,
    chunk_rows,
    masked_softmax,
    repeat_heads,
    rows_of,
    token_slice,
    wide_dtype,
)
from attnctl.kernels.dispatch import Plain, plain

__all__ = ["argmax", "identity", "query_mean", "temperature", "uniform"]


def identity(v: Tensor, n_query: int) -> Tensor:
    """Return v: every token attends to itself alone (PAG, T = I, arXiv 2403.17377). Masks do not matter.

    Shapes: v [B, Hk, N, D] -> the same tensor. Raises: ConfigError unless n_query is N.
    """
    if n_query != v.shape[2]:
        raise ConfigError(
            f"target='identity' was given for {n_query} queries and {v.shape[2]} keys; the identity map "
            "exists only where queries and keys are the same tokens. Select self- or joint-attention sites."
        )
    return v


def uniform(v: Tensor, n_query: int, mask: Tensor | None = None) -> Tensor:
    """Return the mean of v over the keys that a mask allows, for every query: T = 1/L (arXiv 2506.10978).

    A float mask weighs the keys by its softmax: the logits are zero before the mask is added.
    Shapes: v [B, H, Nk, D]; mask broadcastable to [B, H, n_query, Nk] -> [B, H, n_query, D].
    """
    wide = wide_dtype(v.dtype)
    if mask is None:
        return v.mean(dim=2, keepdim=True, dtype=wide).to(v.dtype).expand(-1, -1, n_query, -1)
    mask = check_mask(mask, (v.shape[0], v.shape[1], n_query, v.shape[2])).expand(-1, -1, -1, v.shape[2])
    step, vw = chunk_rows(v.shape[0], v.shape[1], v.shape[2], v.device), v.to(wide)
    parts = [masked_softmax(as_bias(rows, wide)) @ vw for rows in mask.split(step, dim=2)]
    return torch.cat(parts, dim=2).to(v.dtype).expand(-1, -1, n_query, -1)


def query_mean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    rows: slice | None = None,
) -> Tensor:
    """Let every token attend with the mean query of the chosen rows (arXiv 2408.00760, sigma -> inf).

    One softmax row per head, broadcast; with a mask that differs between queries, one row per query.
    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D] -> [B, H, Nq, D]. rows: the queries that are averaged.
    """
    mask = check_call(q, k, v, mask)
    chosen = q if rows is None else q[..., token_slice(rows, q.shape[2], "rows"), :]
    mean = chosen.mean(dim=2, keepdim=True, dtype=wide_dtype(q.dtype))
    if mask is not None and mask.shape[2] > 1:
        mean = mean.expand(-1, -1, q.shape[2], -1)
    return math.run(mean, k, v, mask, scale).expand(-1, -1, q.shape[2], -1)


def argmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Give every query the value of its best key (arXiv 2506.10978, temperature -> 0); no gradient for q, k.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D] -> [B, H, Nq, D]. A row with no allowed key becomes zero.
    """
    mask = check_call(q, k, v, mask)
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kt = repeat_heads(k, q.shape[1]).detach().to(wide).transpose(-2, -1)
    queries = q.detach().to(wide) * scale
    masked = None if mask is None else mask.detach()
    best = []
    step = chunk_rows(q.shape[0], q.shape[1], k.shape[2], q.device, alive=1 if mask is None else 3)
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        best.append(_best(queries[..., rows, :], kt, rows_of(masked, rows)))
    index = torch.cat([b.indices for b in best], 2).expand(-1, -1, -1, v.shape[-1])
    picked = repeat_heads(v, q.shape[1]).gather(2, index)
    return picked if mask is None else picked.masked_fill(torch.cat([b.values for b in best], 2).isneginf(), 0.0)


def _best(queries: Tensor, kt: Tensor, mask: Tensor | None) -> torch.return_types.max:
    """Return the largest logit of every query and its key; the logits are given up before the next ones are made."""
    logits = queries @ kt
    return (logits if mask is None else logits + as_bias(mask, logits.dtype)).max(dim=-1, keepdim=True)


def temperature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    x: float,
    plain: Plain = plain,
) -> Tensor:
    """Multiply the logits by x = 1/tau before the softmax (arXiv 2506.10978); x < 1 flattens, x > 1 sharpens.

    A mask is added after the multiplication. Shapes: as in `attention`.
    """
    return plain(q, k, v, mask, x * (q.shape[-1] ** -0.5 if scale is None else scale))
