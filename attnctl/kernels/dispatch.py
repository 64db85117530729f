"""One attention function, several backends, one visible choice.

`auto` means torch's SDPA, unless a timing on the spot shows xformers to be faster: on CUDA, where a probe shows that
it runs and the call is one it takes. On a tie, and where a call fails after all, it is SDPA. Nothing is probed or timed
while torch.compile traces: there `auto` is SDPA, which the compiler knows, and a forced backend is taken at its word
(call `choose` once beforehand to have it checked).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.errors import BackendError, ConfigError, nearest, shown
from attnctl.kernels import math, sdpa, xformers
from attnctl.kernels.checks import check_call
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.timing import fastest, size_class
from attnctl.plans.blocks import BlockPlan

__all__ = ["Backend", "Plain", "attention", "attention_and_sums", "backends", "choose", "plain", "probe"]

Plain = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


class Backend(NamedTuple):
    """Whether a backend runs on this machine, and why not."""

    name: str
    available: bool
    reason: str


class _Kernel(NamedTuple):
    run: Plain
    missing: Callable[[str], str]
    declines: Callable[[Tensor, Tensor, Tensor, Tensor | None], str]


_REFUSED: set[Hashable] = set()  # kinds of calls that xformers has refused
# In the order of preference; the reference comes last and only when it is asked for.
_KERNELS: dict[str, _Kernel] = {
    "xformers": _Kernel(xformers.run, xformers.missing, xformers.declines),
    "sdpa": _Kernel(sdpa.run, sdpa.missing, sdpa.declines),
    "math": _Kernel(math.run, math.missing, math.declines),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    plan: BlockPlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(q k^T scale + mask) v with the chosen backend.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D]; v [B, Hk, Nk, Dv], Hk divides H -> [B, H, Nq, Dv].
    mask: boolean (True = attend) or additive float of any dtype, broadcastable to [B, H, Nq, Nk].
    scale: factor on q k^T, 1 / sqrt(D) if None.
    plan: blocks to compute instead of the whole map (`attnctl.plans.BlockPlan`, its first step group); the backends
        are then those of `attnctl.kernels.sparse.dispatch`, and there can be no mask.
    Raises: ConfigError for shapes that do not fit; PlanError for a plan of other heads or tokens; BackendError for an
        unknown backend, a forced backend that cannot run this call, or a plan together with a mask.
    """
    mask = check_call(q, k, v, mask)
    if isinstance(scale, (str, list, tuple)):
        raise ConfigError(f"scale={shown(scale)} was given; expected a number, or None for 1 / sqrt(D).")
    if plan is not None:
        if not isinstance(plan, BlockPlan):
            raise ConfigError(f"plan={type(plan).__name__} was given; expected an attnctl.plans.BlockPlan.")
        if mask is not None:
            raise BackendError("A plan and a mask were given together; block-sparse kernels take no mask. Pass one.")
        return block_sparse(q, k, v, plan, scale=scale, backend=backend)
    name = choose(q, k, v, mask, backend)
    if backend != "auto" or name == "sdpa":
        return _KERNELS[name].run(q, k, v, mask, scale)
    try:
        return _KERNELS[name].run(q, k, v, mask, scale)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel may refuse shapes that its own checks let pass
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        warnings.warn(f"attnctl: {name} refused a call ({why}); torch's own attention runs instead.", stacklevel=2)
        _REFUSED.add(_kind(q, k, v, mask))
        return sdpa.run(q, k, v, mask, scale)


def attention_and_sums(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute `attention`, and the log-sum-exp of each query's logits where its kernel gives that away.

    Shapes: as in `attention`; sums [B, H, Nq], or None.
    """
    mask = check_call(q, k, v, mask)
    if q.shape[1] == k.shape[1] and choose(q, k, v, mask) == "sdpa":
        typed = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return sdpa.with_sums(q, k, v, mask=typed, scale=scale)
    return attention(q, k, v, mask=mask, scale=scale), None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute ordinary attention: `attention` in the positional form that kernel wrappers hand on."""
    return attention(q, k, v, mask=mask, scale=scale)


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "auto") -> str:
    """Return the name of the backend that `attention` takes for this call.

    Shapes: as in `attention`. Raises: BackendError for an unknown name or a forced backend that cannot run.
    """
    tracing = torch.compiler.is_compiling()
    if backend == "auto":
        if q.device.type != "cuda" or tracing:
            return "sdpa"
        kind = _kind(q, k, v, mask)
        if kind in _REFUSED or _refusal("xformers", q, k, v, mask):
            return "sdpa"
        calls = {n: partial(_KERNELS[n].run, q, k, v, mask, None) for n in ("sdpa", "xformers")}
        return fastest(kind, calls, q.device)
    if not isinstance(backend, str) or backend not in _KERNELS:
        raise BackendError(
            f"backend={shown(backend)} was given; expected 'auto' or one of {', '.join(map(repr, _KERNELS))}."
            + nearest(backend, _KERNELS)
        )
    reason = _KERNELS[backend].declines(q, k, v, mask)
    if not reason and not tracing:
        reason = probe(backend, str(q.device), q.dtype, q.shape[-1], mask is not None)
    if reason:
        able = [] if tracing else [repr(name) for name in _KERNELS if not _refusal(name, q, k, v, mask)]
        raise BackendError(
            f"backend={backend!r} was given, but it cannot run this call: {reason}. "
            f"Backends that can: {', '.join(able) or 'sdpa'}. Or leave the choice to backend='auto'."
        )
    return backend


def backends(
    device_type: str | None = None, dtype: torch.dtype | None = None, head_dim: int = 64
) -> dict[str, Backend]:
    """Try every backend on a tiny call and tell which ones run here, and why the others do not.

    device_type: "cuda" where torch sees one, else "cpu". dtype: float16 on CUDA, else float32.
    """
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = dtype or (torch.float16 if kind == "cuda" else torch.float32)
    results = {}
    for name in _KERNELS:
        reason = probe(name, kind, precision, head_dim)
        results[name] = Backend(name, not reason, reason)
    return results


def check_backend(backend: str, weight: Tensor) -> None:
    """Raise BackendError if a kernel given by name is unknown or cannot run where a model's weight is."""
    if backend == "auto":
        return
    stored = weight.is_meta or weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    # Weights that are offloaded, in 8 bits or packed tell nothing of q: the first call does, in the kernel itself.
    available = backends() if stored else backends(weight.device.type, weight.dtype)
    if not isinstance(backend, str) or backend not in available:
        raise BackendError(f"backend={shown(backend)} is unknown. Choose auto or one of {', '.join(available)}.")
    if not stored and not available[backend].available:
        runs = ", ".join(name for name, b in available.items() if b.available)
        raise BackendError(f"backend={backend!r} cannot run here: {available[backend].reason}. These can: {runs}.")


@cache
def probe(name: str, device_type: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """Run a backend once on a tiny call, compare it with the reference, and keep the verdict.

    Returns "" if it works, else the reason. A kernel that runs and returns wrong numbers does not work.
    """
    reason = _KERNELS[name].missing(torch.device(device_type).type)
    if reason:
        return reason
    try:
        with torch.inference_mode():
            # sin(0, 1, 2, ...) rather than random numbers: the caller's generators stay untouched.
            x = torch.arange(3 * 2 * 16 * head_dim, device=device_type, dtype=torch.float32).sin().to(dtype)
            q, k, v = x.reshape(3, 1, 2, 16, head_dim).unbind(0)
            mask = (torch.arange(16, device=device_type) < 11).reshape(1, 1, 1, 16) if masked else None
            out, want = _KERNELS[name].run(q, k, v, mask, None), math.run(q, k, v, mask, None)
            if not torch.allclose(out.float(), want.float(), atol=3e-2):
                return "its result on a tiny call differs from the reference"
    except Exception as error:  # kernels raise whatever they like: missing symbols, unsupported chips
        lines = str(error).strip().splitlines() or [""]
        return f"a tiny call failed with {type(error).__name__}: {lines[0]}"
    return ""


def _refusal(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    declined = _KERNELS[name].declines(q, k, v, mask)
    return declined or probe(name, str(q.device), q.dtype, q.shape[-1], mask is not None)


def _kind(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Hashable:
    """Return what a timing, or a refusal, holds for: calls on one device whose sizes are alike."""
    sizes = size_class(q.shape[2]), size_class(k.shape[2])
    masked = None if mask is None else (mask.dtype, *(n > 1 for n in mask.shape))
    return "dense", q.device, q.dtype, q.shape[:2], k.shape[1], q.shape[-1], v.shape[-1], sizes, masked
