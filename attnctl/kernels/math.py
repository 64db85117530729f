"""The reference: softmax(q k^T scale + mask) v written out, in float32, a block of query rows at a time.

Slow and exact on every device. It is what the other backends are probed against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.kernels.checks import as_bias, chunk_rows, masked_softmax, repeat_heads, rows_of, wide_dtype

__all__ = ["declines", "missing", "run"]


def missing(device_type: str) -> str:
    """Say why this backend cannot run on a device type; it always can."""
    return ""


def declines(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Say why this backend does not take a call; it takes every one."""
    return ""


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute attention with an explicit float32 softmax; memory is bounded by the block of rows.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D]; mask four-dimensional -> [B, H, Nq, Dv].
    """
    wide = wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kt = repeat_heads(k, q.shape[1]).to(wide).transpose(-2, -1)
    vw = repeat_heads(v, q.shape[1]).to(wide)
    step = chunk_rows(q.shape[0], q.shape[1], k.shape[2], q.device)
    blocks = []
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        logits = (q[..., rows, :].to(wide) * scale) @ kt
        cut = rows_of(mask, rows)
        w = logits.softmax(dim=-1) if cut is None else masked_softmax(logits + as_bias(cut, wide))
        blocks.append(w @ vw)
    return torch.cat(blocks, dim=-2).to(v.dtype)
