"""Columns of an attention map: how much of each query's attention a weighted set of keys receives.

    softmax(q k^T scale + mask) @ weights

is attention itself with the weights in place of the values: one-hot columns give single keys, means of one-hot
columns give words of several tokens. A fused kernel computes it exactly, heads apart and with gradients, and no map of
queries by keys is ever held. Where there are few keys, as in cross-attention, the map is small and written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import sdpa
from attnctl.kernels.checks import as_bias, check_call, masked_softmax, repeat_heads, rows_of, token_slice, wide_dtype

__all__ = ["columns"]

# Up to this many keys a map has no more elements than queries of a usual head dimension.
_FEW_KEYS = 128
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
    if k.shape[2] <= _FEW_KEYS:
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
