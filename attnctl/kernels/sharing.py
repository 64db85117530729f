"""Features of several rows brought together: statistics of one row given to another, masks over appended keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from attnctl.kernels.checks import as_bias, check_mask, wide_dtype

__all__ = ["Keys", "joined_keys", "match_statistics", "widened_mask"]

Keys: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Keys [b, H, K, D], values [b, H, K, D], and what is added to their logits [b, 1 or H, 1 or n, K], or None."""

_EPS = 1e-5


def joined_keys(parts: Sequence[Keys], q: Tensor) -> Keys:
    """Put keys that lie in several parts one behind the other, for queries q [b, H, n, D]."""
    k, v = (torch.cat([p[i] for p in parts], 2) for i in (0, 1))  # type: ignore[misc]
    if all(p[2] is None for p in parts):
        return k, v, None
    sized = [p[2] if p[2] is not None else q.new_zeros(1, 1, 1, p[0].shape[2]) for p in parts]
    lead = torch.broadcast_shapes(*(m.shape[:-1] for m in sized))
    return k, v, torch.cat([m.expand(*lead, m.shape[-1]) for m in sized], -1)


def match_statistics(x: Tensor, reference: Tensor) -> Tensor:
    """Give features the mean and the deviation of others (AdaIN, arXiv 1703.06868, eq. 8).

    Args:
        x: Features [B, H, N, D].
        reference: Features [B, H, M, D].

    Returns:
        [B, H, N, D] in the type of x. The variance is unbiased, over tokens, per head and channel, plus 1e-5; that of a
        single token is 0.
    """
    a, b = x.to(wide_dtype(x.dtype)), reference.to(wide_dtype(x.dtype))
    deviation = [(y.var(2, correction=min(1, y.shape[2] - 1), keepdim=True) + _EPS).sqrt() for y in (a, b)]
    return ((a - a.mean(2, keepdim=True)) / deviation[0] * deviation[1] + b.mean(2, keepdim=True)).to(x.dtype)


def widened_mask(
    mask: Tensor | None, call: tuple[int, int, int, int], source: Tensor, tokens: Tensor, bias: float, like: Tensor
) -> Tensor | None:
    """Widen an attention mask by the columns of keys that other rows of the call lend.

    Args:
        mask: None, bool (True = attend) or additive, broadcastable to [B, H, Nq, Nk].
        call: (B, H, Nq, Nk).
        source: Rows that each row takes keys from [B, S].
        tokens: Keys that are taken from each of them [M].
        bias: What is added to the logits of the appended keys.
        like: A tensor of the type and device of the queries.

    Returns:
        A mask with Nk + S * M columns, or None where nothing is masked and the bias is 0.
    """
    keys = call[3]
    lent = source.shape[1] * len(tokens)
    if mask is None:
        if bias == 0:
            return None
        wide = like.new_zeros(1, 1, 1, keys + lent)
        wide[..., keys:] = bias
        return wide
    mask = check_mask(mask, call)
    mask = mask.expand(*mask.shape[:-1], keys)
    if bias != 0:
        mask = as_bias(mask, like.dtype)
    columns = mask[..., tokens]
    if mask.shape[0] == 1:
        columns = columns.repeat(1, 1, 1, source.shape[1])
    else:
        columns = columns[source].permute(0, 2, 3, 1, 4).flatten(3)  # [B, S, H, Nq, M] -> [B, H, Nq, S * M]
    return torch.cat([mask, columns + bias if bias else columns], -1)
