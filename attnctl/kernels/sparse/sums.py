"""Block-sparse attention with the log of every query's sum of exponentials.

Two parts of one softmax over keys are joined exactly by these: with outputs a, b and logs l, m the whole is
a + sigmoid(m - l) (b - a). So keys that are somewhere else (another card, a cache, a summary) can be added afterwards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnctl.errors import BackendError
from attnctl.kernels.checks import as_bias, repeat_heads
from attnctl.kernels.sparse import gather, triton
from attnctl.kernels.sparse.dispatch import check_fit, refusal, shown_keys, tokens_behind
from attnctl.plans.blocks import Blocks

__all__ = ["block_sparse_with_sums"]

_WITH_SUMS = {"gather": gather.run_with_sums, "triton": triton.run_with_sums}


def block_sparse_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    *,
    group: int = 0,
    image: slice | None = None,
    scale: float | None = None,
    words: Tensor | None = None,
    backend: Literal["gather", "triton"] = "gather",
) -> tuple[Tensor, Tensor]:
    """Compute `block_sparse`, and the log of every query's sum of exponentials, by which further keys are joined to it.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D]; Hk divides H.
        v: Values [B, Hk, N, Dv].
        plan: What to compute, the same for all samples.
        group: Part of the run.
        image: Where the image tokens lie; None for where the plan says.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Text keys to attend to, bool [B or 1, T]; None for all.
        backend: The kernel: both read the same lists.

    Returns:
        [B, H, N, Dv] and [B, H, N], the latter in float32 (float64 for float64) and without gradients.

    Raises:
        PlanError: Heads or tokens are not the plan's.
        BackendError: Another kernel, or one that cannot run here; means of blocks that are left out with Triton, which
            joins them later.
    """
    if backend not in _WITH_SUMS:
        raise BackendError(f"backend={backend!r} was given; kernels that return sums: {', '.join(_WITH_SUMS)}.")
    check_fit(q, k, plan, group)
    if image is not None and (behind := tokens_behind(image, q.shape[2])):
        a, b, c = (x.roll(behind, 2) for x in (q, k, v))
        place, shown = slice(image.start + behind, q.shape[2]), None if words is None else words.roll(behind, 1)
        out, logs = block_sparse_with_sums(
            a, b, c, plan, group=group, image=place, scale=scale, words=shown, backend=backend
        )
        return out.roll(-behind, 2), logs.roll(-behind, 2)
    n = q.shape[2]
    image = plan.span(n) if image is None else image
    text = slice(0, image.start) if image.start else slice(image.stop, n)
    plan = plan.sized(image.stop - image.start)
    reason = "its sums leave out the means of blocks (rest)" if backend == "triton" and plan.rest else ""
    reason = reason or refusal(backend, q, k, v, plan)
    if reason:
        raise BackendError(f"backend={backend!r} cannot run this call: {reason}. Take 'gather'.")
    rows, sums = _WITH_SUMS[backend](q, k, v, plan, group, image, scale, words)
    assert sums is not None
    if text.stop == text.start:
        return rows, sums
    mask = shown_keys(words, n, image)
    keys, values = (repeat_heads(x, q.shape[1]) for x in (k, v))
    texts, logs = gather.attend_with_sums(
        q[:, :, text], keys, values, None if mask is None else as_bias(mask, q.dtype), scale
    )
    ordered = ((texts, rows), (logs, sums)) if image.start else ((rows, texts), (sums, logs))
    return torch.cat(ordered[0], 2), torch.cat(ordered[1], 2)
