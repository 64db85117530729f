"""ReLU linear attention (Sana), which no kernel interception can see.

Sana's self-attention is two matrix products, not scaled_dot_product_attention, so its processor is written out here
with the link's wrappers around the kernel. The plain path repeats diffusers' operations in their order and is
bit-identical to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attnctl.core.hosts.tokens import PLAIN

__all__ = ["is_linear", "linear_attention", "run_linear"]

_LINEAR = ("SanaLinearAttnProcessor2_0",)


def is_linear(cls: type) -> bool:
    """Tell whether a processor class computes ReLU linear attention."""
    return cls.__name__ in _LINEAR


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute relu(q) (relu(k)^T v) with row sums normalised to one, [B, H, N, D], in float32.

    The arguments `mask` and `scale` exist for the kernel signature; linear attention has neither.
    """
    query, key, value = q.transpose(2, 3), k, v.transpose(2, 3)
    query, key = F.relu(query), F.relu(key)
    query, key, value = query.float(), key.float(), value.float()
    value = F.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)  # the row of ones sums the weights
    out = torch.matmul(torch.matmul(value, key), query)
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.transpose(2, 3).to(q.dtype)


def run_linear(link: Any, attn: Any, hidden: torch.Tensor, encoder: torch.Tensor | None, call: Any) -> torch.Tensor:
    """Run a linear attention module with a link's wrappers around its kernel, [B, N, C] in and out."""
    source = hidden if encoder is None else encoder
    q, k, v = attn.to_q(hidden), attn.to_k(source), attn.to_v(source)
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    # [B, N, H D] -> [B, H, D, N] as the host lays it out, then viewed as [B, H, N, D].
    q, k, v = (x.transpose(1, 2).unflatten(1, (attn.heads, -1)).transpose(2, 3) for x in (q, k, v))
    out = link.run(call(q, k, v, None, None, link, 0, PLAIN, linear_attention))
    out = out.transpose(2, 3).flatten(1, 2).transpose(1, 2).to(hidden.dtype)
    out = attn.to_out[1](attn.to_out[0](out))
    return out.clip(-65504, 65504) if hidden.dtype == torch.float16 else out
