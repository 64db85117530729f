"""Block-sparse attention: one function for all of its kernels.

Every kernel gets the image tokens of each head in that head's own order; the text is dense in both directions. The
softmax runs over the kept keys alone, so it sums to one. "PAROAttention", arXiv 2506.16054.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.errors import BackendError, PlanError, nearest
from attnctl.kernels import sdpa
from attnctl.kernels.checks import chunk_rows, repeat_heads, wide_dtype
from attnctl.kernels.sparse import flex, gather, triton, xformers_blocks
from attnctl.plans.blocks import BlockPlan
from attnctl.plans.orders import permute_heads, restore_heads

__all__ = [
    "SPARSE",
    "Sparse",
    "block_sparse",
    "check_sparse",
    "choose_sparse",
    "probe_sparse",
    "reference",
    "sparse_backends",
]

Run = Callable[[Tensor, Tensor, Tensor, BlockPlan, int, slice, float | None], Tensor]
"""q [B, H, N, D], k [B, Hk, N, D], v [B, Hk, N, Dv], plan, step group, image tokens, scale -> image rows [B, H, n, Dv],
all in the model's own order."""


class Sparse(NamedTuple):
    """A block-sparse kernel: how it is called, and when it cannot be."""

    run: Run
    missing: Callable[[str], str]
    declines: Callable[[Tensor, Tensor, Tensor, BlockPlan], str]


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


def _laid_out(kernel: Callable[..., Tensor]) -> Run:
    """Wrap a kernel that wants every head's image tokens in that head's order, and the text beside them."""

    def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, group: int, image: slice, scale: float | None) -> Tensor:
        text = slice(0, image.start) if image.start else slice(image.stop, q.shape[2])
        parts = [x[:, :, image] for x in (q, k, v)]
        if plan.grid is not None and any(plan.order):
            # Grouped heads share keys, but not orders.
            parts = [permute_heads(repeat_heads(x, plan.heads), plan.grid, plan.order) for x in parts]
        words = [repeat_heads(x[:, :, text], parts[1].shape[1]) for x in (k, v)]
        rows = kernel(*parts, *words, plan, group, scale)
        return rows if plan.grid is None else restore_heads(rows, plan.grid, plan.order)

    return run


def _anywhere(device_type: str) -> str:
    return ""


def _any_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str:
    return ""


SPARSE: dict[str, Sparse] = {
    "gather": Sparse(gather.run, _anywhere, _any_call),
    "flex": Sparse(_laid_out(flex.run), flex.missing, flex.declines),
    "triton": Sparse(triton.run, triton.missing, triton.declines),
    "triton_int8": Sparse(triton.run_int8, triton.missing, triton.declines),
    "xformers": Sparse(_laid_out(xformers_blocks.run), xformers_blocks.missing, xformers_blocks.declines),
    "reference": Sparse(_laid_out(reference), _anywhere, _any_call),
}
"""Kernels by name; `auto` never takes one that rounds to 8 bits."""

_FIRST_ON_CUDA = ("flex", "triton")


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
        backend: A name of `SPARSE`, or "auto" for `choose_sparse`'s choice.

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
    rows = SPARSE[choose_sparse(q, k, v, plan, backend)].run(q, k, v, plan, group, image, scale)
    text = slice(0, image.start) if image.start else slice(image.stop, n)
    if text.stop == text.start:
        return rows
    words = sdpa.run(q[:, :, text], k, v, None, scale)
    return torch.cat([words, rows] if image.start else [rows, words], 2)


def choose_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, backend: str = "auto") -> str:
    """Return the name of the kernel that `block_sparse` takes for this call.

    On CUDA `auto` is the first of flex and Triton that a probe shows to run and to be right, elsewhere gather; nothing
    is probed while torch.compile traces.

    Raises:
        BackendError: An unknown name, or a kernel that cannot run this call.
    """
    check_sparse(backend)
    tracing = torch.compiler.is_compiling()
    if backend == "auto":
        able = () if tracing or q.device.type != "cuda" else _FIRST_ON_CUDA
        return next((name for name in able if not _refusal(name, q, k, v, plan)), "gather")
    reason = SPARSE[backend].declines(q, k, v, plan) if tracing else _refusal(backend, q, k, v, plan)
    if reason:
        others = [name for name in SPARSE if not tracing and not _refusal(name, q, k, v, plan)]
        raise BackendError(
            f"backend={backend!r} was given with a plan, but it cannot run this call: {reason}. Kernels that can: "
            f"{', '.join(map(repr, others)) or repr('gather')}. Or leave the choice to 'auto'."
        )
    return backend


def _refusal(name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str:
    kernel = SPARSE[name]
    reason = kernel.missing(q.device.type) or kernel.declines(q, k, v, plan)
    # What runs anywhere is torch itself, and needs no trial.
    return reason or ("" if kernel.missing is _anywhere else probe_sparse(name, q.device.type, q.dtype, q.shape[-1]))


def sparse_backends(device_type: str, dtype: torch.dtype, head_dim: int = 64) -> dict[str, str]:
    """Say for every block-sparse kernel why it cannot run on a device type; "" where it runs.

    On CUDA each is tried on a tiny call; elsewhere nothing is, since flex takes seconds to start and Triton cannot.
    """
    if device_type != "cuda":
        return {name: kernel.missing(device_type) for name, kernel in SPARSE.items()}
    return {name: probe_sparse(name, device_type, dtype, head_dim) for name in SPARSE}


@cache
def probe_sparse(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Run a kernel once on a tiny plan, compare it with the reference, and keep the verdict.

    Returns "" if it works, else the reason. A kernel that runs and returns wrong numbers does not work.
    """
    kernel = SPARSE[name]
    reason = kernel.missing(device_type)
    if reason:
        return reason
    try:
        with torch.inference_mode():
            keep = torch.tensor([[[True, False, True], [False, True, False], [True, True, False]]])
            plan = BlockPlan.from_mask(keep.expand(2, 3, 3).contiguous(), 16, ["FHW", "WHF"], 3, grid=(2, 4, 5))
            # sin(0, 1, 2, ...) rather than random numbers: the caller's generators stay untouched.
            x = torch.arange(3 * 2 * 43 * head_dim, device=device_type, dtype=torch.float32).sin().to(dtype)
            q, k, v = x.reshape(3, 1, 2, 43, head_dim).unbind(0)
            call = (q, k, v, plan, 0, slice(3, 43), None)
            reason = kernel.declines(q, k, v, plan)
            if not reason:
                error = (kernel.run(*call).double() - SPARSE["reference"].run(*call).double()).abs().max()
                if not error <= 5e-2:
                    reason = f"its result on a tiny call is {float(error):.1e} away from the reference"
    except Exception as error:  # kernels raise whatever they like: missing compilers, unsupported chips
        lines = str(error).strip().splitlines() or [""]
        return f"a tiny call failed with {type(error).__name__}: {lines[0]}"
    return reason


def check_sparse(backend: str) -> None:
    """Raise BackendError unless a block-sparse kernel has this name."""
    if backend != "auto" and backend not in SPARSE:
        raise BackendError(
            f"backend={backend!r} was given with a plan; expected 'auto' or one of {', '.join(map(repr, SPARSE))}."
            + nearest(backend, SPARSE)
        )
