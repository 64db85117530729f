"""Block-sparse attention: one function for all of its kernels.

Every kernel gets the image tokens of each head in that head's own order; the text is dense in both directions. The
softmax runs over the kept keys alone, so it sums to one. "PAROAttention", arXiv 2506.16054.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnctl.errors import BackendError, PlanError, nearest
from attnctl.kernels import gather, sdpa
from attnctl.kernels.layout import chunk_rows, repeat_heads, wide_dtype
from attnctl.plans.blocks import BlockPlan
from attnctl.plans.orders import permute_heads, restore_heads

__all__ = ["SPARSE", "block_sparse", "check_sparse", "reference"]

Sparse = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, BlockPlan, int, float | None], Tensor]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    plan: BlockPlan,
    group: int,
    scale: float | None,
) -> Tensor:
    """Compute the image rows with an explicit masked softmax, in float32 or wider: what the kernels are held against.

    Shapes: q [B, H, N, D]; k, v [B, Hk, N, D], in each head's own order; k_text, v_text [B, Hk, T, D] -> [B, H, N, Dv].
    """
    heads, n, wide = q.shape[1], q.shape[2], wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = repeat_heads(torch.cat([k_text, k], 2), heads).to(wide).transpose(-2, -1)
    values = repeat_heads(torch.cat([v_text, v], 2), heads).to(wide)
    keep = plan.keep[group].to(q.device).repeat_interleave(plan.block_k, -1)[..., :n]
    keep = torch.nn.functional.pad(keep, (k_text.shape[2], 0), value=True)
    parts = []
    step = chunk_rows(q.shape[0], heads, keys.shape[-1])
    for first in range(0, n, step):
        rows = torch.arange(first, min(first + step, n), device=q.device)
        logits = (q[..., rows, :].to(wide) * scale) @ keys
        parts.append(logits.masked_fill(~keep[:, rows // plan.block_q], -torch.inf).softmax(-1) @ values)
    return torch.cat(parts, 2).to(v.dtype)


SPARSE: dict[str, Sparse] = {"gather": gather.run, "reference": reference}


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    group: int = 0,
    image: slice | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention over the blocks that a plan keeps, renormalised; text rows and columns are dense.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D]; Hk divides H.
        v: Values [B, Hk, N, Dv].
        plan: What to compute.
        group: Part of the run.
        image: Where the image tokens lie; None for where the plan says.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        backend: "gather", "reference", or "auto" for the fastest that runs.

    Returns:
        [B, H, N, Dv] in the order of the input.

    Raises:
        PlanError: Heads or tokens are not the plan's.
        BackendError: An unknown kernel, or one that cannot run here.
    """
    if q.shape[1] != plan.heads:
        raise PlanError(f"The plan is for {plan.heads} heads; this attention has {q.shape[1]}.")
    if q.shape[2] != k.shape[2]:
        raise PlanError(f"A plan is for self-attention; {q.shape[2]} queries and {k.shape[2]} keys were given.")
    if not 0 <= group < plan.groups:
        raise PlanError(f"Step group {group} was asked for; the plan has {plan.groups}.")
    n = q.shape[2]
    image = plan.span(n) if image is None else image
    plan = plan.sized(image.stop - image.start)
    check_sparse(backend)
    kernel = SPARSE["gather" if backend == "auto" else backend]
    text = slice(0, image.start) if image.start else slice(image.stop, n)
    parts = [x[:, :, image] for x in (q, k, v)]
    if plan.grid is not None and any(plan.order):
        # Grouped heads share keys, but not orders.
        parts = [permute_heads(repeat_heads(x, plan.heads), plan.grid, plan.order) for x in parts]
    rows = kernel(parts[0], parts[1], parts[2], *_text(parts[1], k, v, text), plan, group, scale)
    if plan.grid is not None:
        rows = restore_heads(rows, plan.grid, plan.order)
    if text.stop == text.start:
        return rows
    words = sdpa.run(q[:, :, text], k, v, None, scale)
    return torch.cat([words, rows] if image.start else [rows, words], 2)


def _text(image_keys: Tensor, k: Tensor, v: Tensor, text: slice) -> tuple[Tensor, Tensor]:
    """Return the text's keys and values, with as many heads as the image's."""
    heads = image_keys.shape[1]
    return repeat_heads(k[:, :, text], heads), repeat_heads(v[:, :, text], heads)


def check_sparse(backend: str) -> None:
    """Raise BackendError unless a block-sparse kernel has this name."""
    if backend != "auto" and backend not in SPARSE:
        raise BackendError(
            f"backend={backend!r} was given with a plan; expected 'auto' or one of {', '.join(map(repr, SPARSE))}."
            + nearest(backend, SPARSE)
        )
