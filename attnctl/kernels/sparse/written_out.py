"""Block-sparse attention with its mask written out by tokens: what kernels are held against, and for few tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels import sdpa
from attnctl.kernels.checks import as_bias, chunk_rows, repeat_heads, wide_dtype
from attnctl.kernels.sparse.lists import LaidOut, block_means, block_sizes, derived
from attnctl.plans.blocks import Blocks

__all__ = ["all_keys", "bias_of", "masked", "reference"]


def reference(call: LaidOut) -> Tensor:
    """Compute the image rows with an explicit masked softmax, in float32 or wider: what the kernels are held against.

    Returns:
        [B, H, N, Dv].
    """
    q, k, v, k_text, v_text, plan, group, scale, words = call
    n, wide = q.shape[2], wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (x.to(wide) for x in all_keys(k, v, k_text, v_text, plan))
    keys, parts = keys.transpose(-2, -1), []
    step = chunk_rows(q.shape[0], q.shape[1], keys.shape[-1], q.device)
    for first in range(0, n, step):
        rows = torch.arange(first, min(first + step, n), device=q.device)
        logits = (q[..., rows, :].to(wide) * scale) @ keys
        parts.append((logits + bias_of(plan, group, rows, k_text.shape[2], words, logits)).softmax(-1) @ values)
    return torch.cat(parts, 2).to(v.dtype)


def masked(call: LaidOut) -> Tensor:
    """Compute the image rows by torch's dense kernel under a mask of tokens: for so few tokens that lists do not pay.

    The mask is as large as the map.

    Returns:
        [B, H, N, Dv].
    """
    q, k, v, k_text, v_text, plan, group, scale, words = call
    keys, values = all_keys(k, v, k_text, v_text, plan)
    rows = torch.arange(q.shape[2], device=q.device)
    if words is not None:
        return sdpa.run(q, keys, values, bias_of(plan, group, rows, k_text.shape[2], words, q), scale)
    bias = derived(
        plan, group, ("masked", k_text.shape[2], q.dtype, q.device),
        lambda: bias_of(plan, group, rows, k_text.shape[2], None, q.detach()),
    )  # fmt: skip
    return sdpa.run(q, keys, values, bias, scale)


def all_keys(k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor, plan: Blocks) -> tuple[Tensor, Tensor]:
    """Return the keys and values of text, of the image and, where they count, of its blocks' means, [B, H, all, D]."""
    means = [block_means(x, plan.block_k) for x in (k, v)] if plan.rest else [k[:, :, :0], v[:, :, :0]]
    tensors = [torch.cat(parts, 2) for parts in ((k_text, k, means[0]), (v_text, v, means[1]))]
    return repeat_heads(tensors[0], plan.heads), repeat_heads(tensors[1], plan.heads)


def bias_of(plan: Blocks, group: int, rows: Tensor, text: int, words: Tensor | None, like: Tensor) -> Tensor:
    """Return what is added to the logits of some image rows, [B or 1, H, rows, all keys]."""
    n = plan.n_image or rows.numel()
    blocks = plan.keep[group].to(like.device)[:, rows // plan.block_q]
    keep = F.pad(blocks.repeat_interleave(plan.block_k, -1)[..., :n], (text, 0), value=True)
    shown = like.new_ones((1, text), dtype=torch.bool) if words is None else words
    bias = as_bias(keep & F.pad(shown, (0, n), value=True)[:, None, None], like.dtype)
    if not plan.rest:
        return bias
    means = block_sizes(n, plan.block_k, bias).log().masked_fill(blocks, -torch.inf)
    return torch.cat([bias, means.expand(len(bias), -1, -1, -1)], -1)
