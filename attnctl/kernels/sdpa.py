"""torch's own scaled_dot_product_attention: every device, every mask, compiles and differentiates.

This is the only file of the package that calls F.scaled_dot_product_attention, so code that intercepts that
function knows where the plain path ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import repeat_heads

__all__ = ["as_called", "declines", "missing", "run"]


def missing(device_type: str) -> str:
    """Say why this backend cannot run on a device type; it always can."""
    return ""


def declines(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Say why this backend does not take a call; it takes every one."""
    return ""


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute attention with torch's fastest kernel for this call.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D]; mask four-dimensional -> [B, H, Nq, Dv].
    """
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    # No fused kernel takes a mask and grouped heads together: repeating k and v is far smaller than a map.
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def as_called(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Make the very call that a host made, for controls that only look: bit for bit what it computes by itself."""
    mask = None if is_causal else mask
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
