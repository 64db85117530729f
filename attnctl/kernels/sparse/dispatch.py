"""Block-sparse attention: one function for all of its kernels.

Every kernel gets the image tokens of each head in that head's own order; the text is dense in both directions, but for
padding that a mask leaves out. The softmax runs over the kept keys alone, so it sums to one. "PAROAttention", arXiv
2506.16054.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import BackendError, PlanError, nearest
from attnctl.kernels import sdpa
from attnctl.kernels.checks import repeat_heads
from attnctl.kernels.sparse import flex, gather, triton, xformers_blocks
from attnctl.kernels.sparse.lists import LaidOut, lay_out, put_back
from attnctl.kernels.sparse.simulated import simulated
from attnctl.kernels.sparse.written_out import masked, reference
from attnctl.kernels.timing import fastest, size_class
from attnctl.plans.blocks import BlockPlan, Blocks

__all__ = [
    "SPARSE",
    "Sparse",
    "block_sparse",
    "check_fit",
    "check_sparse",
    "choose_sparse",
    "probe_sparse",
    "reference",
    "refusal",
    "shown_keys",
    "sparse_backends",
    "tokens_behind",
]

Call = tuple[Tensor, Tensor, Tensor, Blocks, int, slice, float | None, Tensor | None]
Run = Callable[[Tensor, Tensor, Tensor, Blocks, int, slice, float | None, Tensor | None], Tensor]
"""q [B, H, N, D], k [B, Hk, N, D], v [B, Hk, N, Dv], plan, step group, image tokens, scale, text keys to attend to
(bool [B or 1, T], None for all) -> image rows [B, H, n, Dv], all in the model's own order."""


class Sparse(NamedTuple):
    """A block-sparse kernel: how it is called, and when it cannot be."""

    run: Run
    missing: Callable[[str], str]
    declines: Callable[[Tensor, Tensor, Tensor, Blocks], str]


def _laid_out(kernel: Callable[[LaidOut], Tensor]) -> Run:
    """Wrap a kernel that wants every head's image tokens in that head's order, and the text beside them."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Blocks,
        group: int,
        image: slice,
        scale: float | None,
        words: Tensor | None = None,
    ) -> Tensor:
        text = slice(0, image.start) if image.start else slice(image.stop, q.shape[2])
        parts = [x[:, :, image] for x in (q, k, v)]
        if plan.grid is not None and any(plan.order):
            # Grouped heads share keys, but not orders.
            parts = [lay_out(repeat_heads(x, plan.heads), plan, group) for x in parts]
        texts = [repeat_heads(x[:, :, text], parts[1].shape[1]) for x in (k, v)]
        call = LaidOut(parts[0], parts[1], parts[2], texts[0], texts[1], plan, group, scale, words)
        return put_back(kernel(call), plan, group)

    return run


def _without_padding(kernel: Run) -> Run:
    """Wrap a kernel that knows no words: each sample is computed alone, without the text keys that are left out."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Blocks,
        group: int,
        image: slice,
        scale: float | None,
        words: Tensor | None = None,
    ) -> Tensor:
        if words is None:
            return kernel(q, k, v, plan, group, image, scale, None)
        n, rows = image.stop - image.start, []
        for b, shown in enumerate(words.expand(len(q), -1)):
            at = shown.nonzero()[:, 0]
            at = at if image.start else at + n
            here = slice(len(at), len(at) + n) if image.start else slice(0, n)
            order = torch.arange(image.start, image.stop, device=q.device)
            tokens = torch.cat([at, order] if image.start else [order, at])
            sq, sk, sv = (x[b : b + 1].index_select(2, tokens) for x in (q, k, v))
            rows.append(kernel(sq, sk, sv, plan, group, here, scale, None))
        return torch.cat(rows)

    return run


def _anywhere(device_type: str) -> str:
    return ""


def _any_call(q: Tensor, k: Tensor, v: Tensor, plan: Blocks) -> str:
    return ""


SPARSE: dict[str, Sparse] = {
    "gather": Sparse(gather.run, _anywhere, _any_call),
    "flex": Sparse(_laid_out(flex.run), flex.missing, flex.declines),
    "triton": Sparse(triton.run, triton.missing, triton.declines),
    "triton_int8": Sparse(triton.run_int8, triton.missing, triton.declines),
    "xformers": Sparse(
        _without_padding(_laid_out(xformers_blocks.run)), xformers_blocks.missing, xformers_blocks.declines
    ),
    "simulated_int8": Sparse(_laid_out(simulated), _anywhere, _any_call),
    "simulated_int4": Sparse(_laid_out(partial(simulated, weights=4)), _anywhere, _any_call),
    "masked": Sparse(_laid_out(masked), _anywhere, _any_call),
    "reference": Sparse(_laid_out(reference), _anywhere, _any_call),
}
"""Kernels by name. `auto` takes none that rounds to 8 bits; `simulated_...` show what rounding costs, and are slow."""

_ON_CUDA = ("flex", "triton")
_FAILED: dict[Hashable, str] = {}  # kernels that raised in a real call, and why: they are not tried there again
_WARNED: set[str] = set()


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    *,
    group: int = 0,
    image: slice | None = None,
    scale: float | None = None,
    words: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention over the blocks that a plan keeps, renormalised; text rows and columns are dense.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D]; Hk divides H.
        v: Values [B, Hk, N, Dv].
        plan: What to compute; with B H heads, each sample has blocks of its own.
        group: Part of the run.
        image: Where the image tokens lie; None for where the plan says. All others count as text.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Text keys to attend to, bool [B or 1, T]; None for all.
        backend: A name of `SPARSE`, or "auto" for `choose_sparse`'s choice.

    Returns:
        [B, H, N, Dv] in the order of the input.

    Raises:
        PlanError: Heads or tokens are not the plan's.
        BackendError: An unknown kernel, or one that cannot run here.
    """
    if len(q) > 1 and plan.heads == len(q) * q.shape[1]:
        return _each_sample(q, k, v, plan, group, image, scale, words, backend)
    check_fit(q, k, plan, group)
    if image is not None and (behind := tokens_behind(image, q.shape[2])):
        a, b, c = (x.roll(behind, 2) for x in (q, k, v))
        place, shown = slice(image.start + behind, q.shape[2]), None if words is None else words.roll(behind, 1)
        out = block_sparse(a, b, c, plan, group=group, image=place, scale=scale, words=shown, backend=backend)
        return out.roll(-behind, 2)
    n = q.shape[2]
    image = plan.span(n) if image is None else image
    text = slice(0, image.start) if image.start else slice(image.stop, n)
    plan = plan.sized(image.stop - image.start)
    rows = _image_rows((q, k, v, plan, group, image, scale, words), backend)
    mask = shown_keys(words, n, image)
    if rows is None:
        return sdpa.run(q, k, v, mask, scale)
    if text.stop == text.start:
        return rows
    texts = sdpa.run(q[:, :, text], k, v, mask, scale)
    return torch.cat([texts, rows] if image.start else [rows, texts], 2)


def check_fit(q: Tensor, k: Tensor, plan: Blocks, group: int) -> None:
    """Raise PlanError unless a plan is for these heads, for self-attention, and has this part of the run."""
    if q.shape[1] != plan.heads:
        raise PlanError(f"The plan is for {plan.heads} heads; this attention has {q.shape[1]}.")
    if q.shape[2] != k.shape[2]:
        raise PlanError(f"A plan is for self-attention; {q.shape[2]} queries and {k.shape[2]} keys were given.")
    if not 0 <= group < plan.groups:
        raise PlanError(f"Step group {group} was asked for; the plan has {plan.groups}.")


def tokens_behind(image: slice, tokens: int) -> int:
    """Count the tokens behind an image that others stand in front of: kernels want all of these on one side."""
    return tokens - image.stop if image.start else 0


def shown_keys(words: Tensor | None, n: int, image: slice) -> Tensor | None:
    """Return which of a sequence's n keys are attended to, bool [B or 1, 1, 1, n]; None for all."""
    if words is None:
        return None
    return F.pad(words, (0, n - words.shape[1]) if image.start else (image.stop, 0), value=True)[:, None, None]


def _each_sample(
    q: Tensor, k: Tensor, v: Tensor, plan: Blocks, group: int, image: slice | None, scale: float | None,
    words: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Compute samples that have blocks of their own: as heads of one sample, or one by one where their words differ."""
    heads = q.shape[1]
    if words is None or len(words) == 1:
        a, b, c = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        out = block_sparse(a, b, c, plan, group=group, image=image, scale=scale, words=words, backend=backend)
        return out.view(*q.shape[:3], v.shape[-1])
    rows = []
    for i in range(len(q)):
        one, span = slice(i, i + 1), slice(i * heads, (i + 1) * heads)
        if ("sample", i) not in plan.cache:
            plan.cache["sample", i] = replace(plan, keep=plan.keep[:, span], order=plan.order[span])
        some = plan.cache["sample", i]
        rows.append(
            block_sparse(
                q[one], k[one], v[one], some, group=group, image=image, scale=scale, words=words[one], backend=backend
            )
        )
    return torch.cat(rows)


def _image_rows(call: Call, backend: str) -> Tensor | None:
    """Compute the image rows by the chosen kernel, or return None where all of the attention is to be dense."""
    q, k, v, plan, group, image = call[:6]
    while True:
        name = choose_sparse(q, k, v, plan, backend, group=group, image=image)
        if name == "dense":
            return None
        try:
            return SPARSE[name].run(*call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels raise whatever they like: too many shapes, too little shared memory
            if backend != "auto" or name == "gather":
                raise
            why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            _FAILED[name, *_kind(q, k)] = why
            _warn_once(name, f"the block-sparse kernel {name!r} failed on {q.device} ({why}): the next one is taken")


def choose_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    backend: str = "auto",
    *,
    group: int = 0,
    image: slice | None = None,
) -> str:
    """Return the name of the kernel that `block_sparse` takes for this call, or "dense".

    On CUDA `auto` is the faster of flex and Triton, timed on the first call of its kind, among those that a probe shows
    to run and to be right. Where neither runs, and while torch.compile traces, it is "dense", which is far faster there
    than gather and which one warning reports. Elsewhere it is gather.

    Raises:
        BackendError: An unknown name, or a kernel that cannot run this call.
    """
    check_sparse(backend)
    tracing = torch.compiler.is_compiling()
    if backend == "auto":
        if not _on_cuda(q):
            return "gather"
        if tracing:
            return _dense("torch.compile is tracing, and a kernel cannot be tried meanwhile")
        able = [name for name in _ON_CUDA if not refusal(name, q, k, v, plan) and (name, *_kind(q, k)) not in _FAILED]
        if not able:
            failed = {n: _FAILED.get((n, *_kind(q, k))) for n in _ON_CUDA}
            reasons = (f"{n}: {why or refusal(n, q, k, v, plan)}" for n, why in failed.items())
            return _dense("; ".join(reasons))
        image = plan.span(q.shape[2]) if image is None else image
        sized = plan.sized(image.stop - image.start)
        calls = {n: partial(SPARSE[n].run, q, k, v, sized, group, image, None, None) for n in able}
        b, heads, tokens, width = q.shape
        kind = "sparse", q.device, q.dtype, b, heads, width, size_class(tokens), plan.block_q, plan.block_k, *able
        return fastest(kind, calls, q.device)
    reason = SPARSE[backend].declines(q, k, v, plan) if tracing else refusal(backend, q, k, v, plan)
    if reason:
        others = [name for name in SPARSE if not tracing and not refusal(name, q, k, v, plan)]
        raise BackendError(
            f"backend={backend!r} was given with a plan, but it cannot run this call: {reason}. Kernels that can: "
            f"{', '.join(map(repr, others)) or repr('gather')}. Or leave the choice to 'auto'."
        )
    return backend


def _on_cuda(q: Tensor) -> bool:
    return q.device.type == "cuda"


@torch.compiler.assume_constant_result
def _dense(reason: str) -> str:
    _warn_once("dense", f"no block-sparse kernel runs here, so attention under a plan is dense ({reason})")
    return "dense"


def _warn_once(subject: str, message: str) -> None:
    if subject not in _WARNED:
        _WARNED.add(subject)
        warnings.warn(f"attnctl: {message}.", stacklevel=4)


def _kind(q: Tensor, k: Tensor) -> tuple[Hashable, ...]:
    """Return what a failure of a kernel holds for: a device, a dtype and shapes."""
    return q.device, q.dtype, q.shape, k.shape[1]


def refusal(name: str, q: Tensor, k: Tensor, v: Tensor, plan: Blocks) -> str:
    """Return why a kernel does not run a call, or ""."""
    kernel = SPARSE[name]
    reason = kernel.missing(q.device.type) or kernel.declines(q, k, v, plan)
    if reason or kernel.missing is _anywhere:  # what runs anywhere is torch itself, and needs no trial
        return reason
    return probe_sparse(name, str(q.device), q.dtype, q.shape[-1], plan.block_q, plan.block_k)


def sparse_backends(device_type: str, dtype: torch.dtype, head_dim: int = 64) -> dict[str, str]:
    """Return for every block-sparse kernel why it cannot run on a device; "" where it runs.

    On CUDA each is tried on a small call; elsewhere nothing is, since flex takes seconds to start and Triton cannot.
    """
    kind = torch.device(device_type).type
    if kind != "cuda":
        return {name: kernel.missing(kind) for name, kernel in SPARSE.items()}
    return {name: probe_sparse(name, device_type, dtype, head_dim) for name in SPARSE}


@cache
def probe_sparse(
    name: str, device_type: str, dtype: torch.dtype, head_dim: int, block_q: int = 64, block_k: int = 64
) -> str:
    """Run a kernel once on a small plan of real blocks, compare it with the reference, and remember the verdict.

    There are more than 128 queries: for fewer, flex compiles another kernel.

    Args:
        name: A name of `SPARSE`.
        device_type: A device, with its number where there are several.
        dtype: Of queries, keys and values.
        head_dim: Channels of a head.
        block_q: Tokens in a block of queries.
        block_k: Tokens in a block of keys.

    Returns:
        "" if it works, else the reason. A kernel that runs and returns wrong numbers does not work.
    """
    kernel = SPARSE[name]
    reason = kernel.missing(torch.device(device_type).type)
    if reason:
        return reason
    try:
        with torch.inference_mode():
            width = -(-max(block_q, block_k, 64) // 2) + 1  # over two and a half blocks: the last ones are partial
            n = 5 * width
            rows, columns = torch.arange(-(-n // block_q))[:, None], torch.arange(-(-n // block_k))
            keep = ((rows + columns) % 2 == 0).expand(2, -1, -1).contiguous()
            plan = BlockPlan.from_mask(keep, block_k, ["FHW", "WHF"], 3, block_q=block_q, grid=(1, 5, width))
            # sin(0, 1, 2, ...) rather than random numbers: the caller's generators stay untouched.
            x = torch.arange(3 * 2 * (n + 3) * head_dim, device=device_type, dtype=torch.float32).sin().to(dtype)
            q, k, v = x.reshape(3, 1, 2, n + 3, head_dim).unbind(0)
            call: Call = (q, k, v, plan, 0, slice(3, n + 3), None, None)
            reason = kernel.declines(q, k, v, plan)
            if not reason:
                error = (kernel.run(*call).double() - SPARSE["reference"].run(*call).double()).abs().max()
                if not error <= 5e-2:
                    reason = f"its result on a small call is {float(error):.1e} away from the reference"
    except Exception as error:  # kernels raise whatever they like: missing compilers, unsupported chips
        lines = str(error).strip().splitlines() or [""]
        return f"a small call failed with {type(error).__name__}: {lines[0]}"
    return reason


def check_sparse(backend: str) -> None:
    """Raise BackendError unless a block-sparse kernel has this name."""
    if backend != "auto" and backend not in SPARSE:
        raise BackendError(
            f"backend={backend!r} was given with a plan; expected 'auto' or one of {', '.join(map(repr, SPARSE))}."
            + nearest(backend, SPARSE)
        )
