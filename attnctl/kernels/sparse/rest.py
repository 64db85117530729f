"""Blocks that are left out, each as its mean key and value, joined to a kernel's result by the sums of both softmaxes.

Two parts of one softmax over keys are joined exactly by the logs of their sums of exponentials: the second has the
share sigmoid(l2 - l1) of the whole. So a kernel that returns its sums needs to know nothing of the means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.kernels.checks import chunk_rows, repeat_heads, wide_dtype
from attnctl.kernels.sparse.lists import block_means, block_sizes, lay_out, put_back
from attnctl.plans.blocks import Blocks

__all__ = ["with_means"]


def with_means(
    out: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Blocks, group: int, image: slice,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Add the blocks that a plan leaves out to the attention over those that it keeps.

    Args:
        out: Image rows over the blocks that are kept, [B, H, n, Dv].
        sums: Log of every query's sum of exponentials over these, [B, H, n].
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D].
        v: Values [B, Hk, N, Dv].
        plan: Blocks of the image.
        group: Part of the run.
        image: Where the image tokens lie.
        scale: Factor on q k^T, 1 / sqrt(D) if None.

    Returns:
        [B, H, n, Dv].
    """
    heads, n, wide = q.shape[1], image.stop - image.start, wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = lay_out(q[:, :, image], plan, group)
    keys, values = (
        block_means(lay_out(repeat_heads(x[:, :, image], heads), plan, group), plan.block_k).to(wide) for x in (k, v)
    )
    mask, sizes = plan.keep[group].to(q.device), block_sizes(n, plan.block_k, keys).log()
    near, logs = lay_out(out, plan, group), lay_out(sums[..., None], plan, group)
    parts = []
    step = chunk_rows(q.shape[0], heads, keys.shape[2], q.device)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        blocks = torch.arange(rows.start, rows.stop, device=q.device) // plan.block_q
        logits = (queries[:, :, rows].to(wide) * scale) @ keys.transpose(-2, -1) + sizes
        logits = logits.masked_fill(mask[:, blocks], -torch.inf)
        far = logits.logsumexp(-1, keepdim=True)
        share = (far - logs[:, :, rows]).sigmoid()  # 0 where a row keeps all blocks: its far sum is -inf
        means = (logits - far.masked_fill(far.isneginf(), 0)).exp() @ values
        parts.append((near[:, :, rows].to(wide) * (1 - share) + means * share).to(out.dtype))
    return put_back(torch.cat(parts, 2), plan, group)
