"""torch's own scaled_dot_product_attention: every device, every mask, compiles and differentiates.

This is the only file of the package that calls F.scaled_dot_product_attention, so code that intercepts that
function knows where the plain path ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import as_bias, repeat_heads

__all__ = ["as_called", "declines", "missing", "run", "with_sums"]


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


def with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `as_called`, bit for bit, and what its kernel knows besides: the log of each query's sum of exponentials.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D] -> output [B, H, Nq, D], and log-sum-exp [B, H, Nq] in float32 or
    float64; None where torch chooses a kernel that keeps it to itself.
    """
    mask = None if is_causal else mask
    call: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    plain = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] and not torch.compiler.is_compiling()
    kernel = torch._fused_sdp_choice(q, k, v, mask, 0.0, **call) if plain else 0
    aten, output, sums = torch.ops.aten, None, None
    # Numbers of torch's SDPBackend: 1 is flash, 2 memory-efficient attention. On CUDA both take other paths with masks
    # and with odd widths, which are not repeated here.
    if kernel == 1 and q.device.type == "cpu":
        bias = mask if mask is None or mask.dtype != torch.bool else as_bias(mask, q.dtype)
        output, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    elif q.is_cuda and mask is None and q.shape[-1] % 8 == 0 and k.shape[1] == q.shape[1]:
        if kernel == 1:
            output, sums = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
        elif kernel == 2:
            output, sums = aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, is_causal, scale=scale
            )[:2]
            sums = sums[..., : q.shape[2]]
    if output is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **call), None
    return output, None if sums is None else sums.detach()
