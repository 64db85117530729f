"""Rows of an attention map: where a few queries look.

    softmax(q_p k^T scale + mask)        for the queries p that are asked for

A map of P queries by N keys is held, never one of N by N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.checks import as_bias, check_call, masked_softmax, repeat_heads, wide_dtype

__all__ = ["linear_rows", "query_rows"]


def query_rows(
    q: Tensor, k: Tensor, places: Sequence[int], *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute the rows `places` of softmax(q k^T scale + mask), exactly and differentiably.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D], Hk divides H -> [B, H, P, Nk], in float32, or float64 where q has it.
    mask: boolean (True = attend) or additive float, broadcastable to [B, H, Nq, Nk]. scale: 1 / sqrt(D) if None.
    Raises: ConfigError for shapes that do not fit together, or a place beyond the queries.
    """
    mask = check_call(q, k, k, mask)
    index = _index(q, places)
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q[:, :, index].to(wide) * scale) @ repeat_heads(k, q.shape[1]).to(wide).transpose(-2, -1)
    if mask is None:
        return logits.softmax(dim=-1)
    own = mask if mask.shape[-2] == 1 else mask[:, :, index]
    return masked_softmax(logits + as_bias(own, wide))


def linear_rows(q: Tensor, k: Tensor, places: Sequence[int]) -> Tensor:
    """Compute rows of the map behind ReLU linear attention, relu(q) relu(k)^T with rows that sum to one.

    Shapes: q, k [B, H, N, D] -> [B, H, P, N]; a query without a positive product looks nowhere.
    """
    check_call(q, k, k)
    products = q[:, :, _index(q, places)].relu().float() @ k.relu().float().transpose(-2, -1)
    return products / (products.sum(-1, keepdim=True) + 1e-15)


def _index(q: Tensor, places: Sequence[int]) -> Tensor:
    n = q.shape[2]
    if not places or not all(0 <= p < n for p in places):
        raise ConfigError(f"places={tuple(places)}: give one query or more, each from 0 to {n - 1}.")
    return torch.tensor(list(places), device=q.device)
