"""Parts of an attention map, exactly and with gradients, without the map of queries by keys.

    columns      softmax(q k^T scale + mask) @ weights
    key_columns  the same for a few keys, where the kernel's log-sum-exp is at hand: exp(q k^T scale - lse) @ weights
    query_rows   softmax(q_p k^T scale + mask)          for the queries p that are asked for
    softmax_map  softmax(q k^T scale + mask)            the whole map, for the small ones of cross-attention

Columns are attention itself with the weights in place of the values: one-hot columns give single keys, means of one-hot
columns give words of several tokens. A fused kernel computes them, heads apart, and holds no map; where there are few
keys, as in cross-attention, the map is small and written out. Rows hold a map of P queries by N keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import sdpa
from attnctl.kernels.checks import (
    as_bias,
    check_call,
    masked_softmax,
    part_of,
    pick,
    repeat_heads,
    rows_of,
    token_slice,
    wide_dtype,
)

__all__ = [
    "SelfMap",
    "columns",
    "key_columns",
    "linear_rows",
    "otsu_split",
    "query_rows",
    "softmax_map",
    "stretched",
    "text_columns",
]

# Up to this many keys a map has no more elements than queries of a usual head dimension.
FEW_KEYS = 128
# Fused kernels take channels in eights; on CPU they want as many in the values as in queries and keys.
_CHANNELS = 8


def columns(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Compute softmax(q k^T scale + mask) @ weights, exactly and differentiably in q and k.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D], Hk divides H; weights [Nk, C] or [B, Nk, C] -> [B, H, rows, C].
    mask: boolean (True = attend) or additive float, broadcastable to [B, H, Nq, Nk]. scale: 1 / sqrt(D) if None.
    rows: the query rows that are wanted, all if None. The softmax runs in float32, or in float64 where q has it, and
        so is the result; a row that may attend to nothing is zero.
    Raises: ConfigError for shapes that do not fit together, or rows beyond the queries.
    """
    mask = check_call(q, k, k, mask)
    batch, heads, n_query, width = q.shape
    if not isinstance(weights, Tensor):
        raise ConfigError(f"weights {type(weights).__name__} were given; expected a tensor, one row per key.")
    if weights.dim() not in (2, 3) or weights.shape[-2] != k.shape[2] or weights.shape[-1] == 0:
        raise ConfigError(
            f"weights {tuple(weights.shape)} were given for {k.shape[2]} keys; expected one row a key and one column a "
            f"concept: [{k.shape[2]}, C] or [{batch}, {k.shape[2]}, C]."
        )
    if weights.dim() == 3 and weights.shape[0] not in (1, batch):
        raise ConfigError(f"weights for {weights.shape[0]} samples were given, but q has {batch}.")
    if rows is not None:
        rows = token_slice(rows, n_query, "rows")
        q, mask = q[..., rows, :], rows_of(mask, rows)
    scale = width**-0.5 if scale is None else scale
    wide = wide_dtype(q.dtype)
    q, k = q.to(wide), repeat_heads(k, heads).to(wide)
    w = weights.to(device=q.device, dtype=wide)
    w = w.expand(batch, -1, -1) if w.dim() == 3 else w.expand(batch, *w.shape)
    bias = None if mask is None else as_bias(mask, wide)
    if k.shape[2] <= FEW_KEYS:
        return _written_out(q, k, w, bias, scale)
    return _fused(q, k, w, bias, scale)


def _written_out(q: Tensor, k: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)
    probs = logits.softmax(dim=-1) if bias is None else masked_softmax(logits + bias)
    return probs @ w.unsqueeze(1)


def _fused(q: Tensor, k: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    width = -(-q.shape[-1] // _CHANNELS) * _CHANNELS
    q, k = (_padded(x, width) for x in (q, k))  # zero channels add nothing to q k^T
    parts = []
    for part in w.split(width, dim=-1):
        values = _padded(part, width).unsqueeze(1).expand(-1, q.shape[1], -1, -1)
        parts.append(sdpa.run(q, k, values, bias, scale)[..., : part.shape[-1]])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def key_columns(
    q: Tensor, k: Tensor, weights: Tensor, lse: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute weighted columns of some keys from the log-sum-exp over all: exp(q k^T scale + mask - lse) @ weights.

    The logits are computed anew in float32, as in `columns`: with queries and keys of half precision both agree to the
    rounding of the kernel that summed.

    Shapes: q [B, H, N, D]; k [B, Hk, K, D], the K keys that have weights; weights [K, C] or [B, K, C]; lse [B, H, N];
    mask four-dimensional, broadcastable to [B, H, N, K] -> [B, H, N, C].
    """
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.to(wide) * scale) @ repeat_heads(k, q.shape[1]).to(wide).transpose(-2, -1)
    logits = logits if mask is None else logits + as_bias(mask, wide)
    # A query that may attend to nothing has no sum: all of its logits are -inf, and so its shares are 0.
    shares = (logits - lse.to(wide).unsqueeze(-1).clamp_min(torch.finfo(wide).min)).exp()
    w = weights.to(device=q.device, dtype=wide)
    return shares @ (w if w.dim() == 2 else w.unsqueeze(1))


def text_columns(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    rows: slice,
    keys: slice | Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Compute weighted columns of some keys, by their sums where the kernel has given them.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D]; weights [K, C] or [B, K, C] of the K keys; sums [B, H, Nq], the
    log-sum-exp over all keys -> [B, H, rows, C].
    """
    if sums is None:
        whole = weights.new_zeros(*weights.shape[:-2], k.shape[-2], weights.shape[-1])
        whole[..., keys, :] = weights
        return columns(q, k, whole, mask=mask, scale=scale, rows=rows)
    # The kernel has summed over all keys already: the columns of some need no second pass over the others.
    part = part_of(mask, q, k, rows, keys)
    return key_columns(q[:, :, rows], k[:, :, keys], weights, sums[:, :, rows], mask=part, scale=scale)


def query_rows(
    q: Tensor, k: Tensor, places: Sequence[int], *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute the rows `places` of softmax(q k^T scale + mask), exactly and differentiably.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D], Hk divides H -> [B, H, P, Nk], in float32, or float64 where q has it.
    mask: boolean (True = attend) or additive float, broadcastable to [B, H, Nq, Nk]. scale: 1 / sqrt(D) if None.
    Raises: ConfigError for shapes that do not fit together, or a place beyond the queries.
    """
    mask = check_call(q, k, k, mask)
    _check_places(q, places)
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (pick(q, places, 2).to(wide) * scale) @ repeat_heads(k, q.shape[1]).to(wide).transpose(-2, -1)
    if mask is None:
        return logits.softmax(dim=-1)
    mask_rows = mask if mask.shape[-2] == 1 else pick(mask, places, 2)
    return masked_softmax(logits + as_bias(mask_rows, wide))


def linear_rows(q: Tensor, k: Tensor, places: Sequence[int]) -> Tensor:
    """Compute rows of the map behind ReLU linear attention, relu(q) relu(k)^T with rows that sum to one.

    Shapes: q, k [B, H, N, D] -> [B, H, P, N]; a query without a positive product looks nowhere.
    """
    check_call(q, k, k)
    _check_places(q, places)
    products = pick(q, places, 2).relu().float() @ k.relu().float().transpose(-2, -1)
    return products / (products.sum(-1, keepdim=True) + 1e-15)


@dataclass(frozen=True)
class SelfMap:
    """How image tokens attend to each other in one call, each row scaled to a sum of 1; held as queries and keys.

    Attributes:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D].
        mask: None, or broadcastable to [B, H, N, N].
        scale: Logit scale, or None for 1 / sqrt(D).
        linear: Whether the map is that of ReLU linear attention.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    linear: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Attend once: [B, N, C] to [B, N, C], the mean over the heads, in float32."""
        if not self.linear:
            return columns(self.q, self.k, values, mask=self.mask, scale=self.scale).mean(1)
        q, k = self.q.relu().float(), self.k.relu().float()
        out = q @ (k.transpose(-2, -1) @ values.unsqueeze(1).to(q.dtype))
        return (out / (q @ k.sum(2).unsqueeze(-1) + 1e-15)).mean(1)

    def rows(self, places: Sequence[int]) -> Tensor:
        """Compute some rows, [B, H, P, N]."""
        if self.linear:
            return linear_rows(self.q, self.k, places)
        return query_rows(self.q, self.k, places, mask=self.mask, scale=self.scale)


def _check_places(q: Tensor, places: Sequence[int]) -> None:
    n = q.shape[2]
    if not places or not all(0 <= p < n for p in places):
        raise ConfigError(f"places={tuple(places)}: give one query or more, each from 0 to {n - 1}.")


def softmax_map(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Compute the explicit map softmax(q k^T scale + mask) in float32, [B, H, Nq, Nk], in the dtype of q."""
    wide = wide_dtype(q.dtype)
    logits = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(wide).transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).to(q.dtype)


def stretched(maps: Tensor, dims: tuple[int, ...], *, from_zero: bool) -> Tensor:
    """Divide maps by their largest value, or bring them to [0, 1] where `from_zero` is False; differentiably.

    Shapes: maps [...], reduced over `dims` -> the same. A map that is constant (at 0, with `from_zero`) becomes 0.
    """
    if not from_zero:
        maps = maps - maps.amin(dims, keepdim=True)
    high = maps.amax(dims, keepdim=True)
    return maps / torch.where(high > 0, high, torch.ones_like(high))


def otsu_split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split values where the variance between the two classes is greatest (Otsu, 1979), exactly.

    Shapes: values [..., n] -> the largest value of the lower class and the smallest of the upper one, both [..., 1];
    the value itself twice where there is but one.
    """
    values = values.sort(dim=-1).values
    n = values.shape[-1]
    if n == 1:
        return values, values
    count = torch.arange(1, n, device=values.device, dtype=values.dtype)
    below = values.cumsum(-1)[..., :-1]
    total = values.sum(-1, keepdim=True)
    gap = (total - below) / (n - count) - below / count
    split = (count * (n - count) * gap**2).argmax(-1, keepdim=True)
    return values.gather(-1, split), values.gather(-1, split + 1)
