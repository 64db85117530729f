"""xformers' memory-efficient attention ("Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682).

The wheel may import and still be unable to run, so it is never trusted unprobed; without CUDA it is never
imported at all. It wants [B, N, H, D] and, for a mask, an additive bias in the queries' dtype whose rows
start at multiples of 8 elements.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnctl.kernels.checks import as_bias, current, repeat_heads

__all__ = ["block_diagonal", "declines", "memory_efficient", "mismatch", "missing", "run"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing(device_type: str) -> str:
    """Say why xformers cannot run on a device type, or return "" where its import succeeds."""
    if device_type != "cuda":
        return f"xformers has kernels for CUDA only, and the tensors are on {device_type!r}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _ops()
    except Exception as error:  # a broken wheel raises anything from OSError to AttributeError
        return f"importing xformers failed with {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def mismatch() -> str:
    """Say which releases of torch and xformers do not fit together here, and which do, or return ""."""
    built = _built_for()
    if built is None or _release(built) == _release(torch.__version__):
        return ""
    return (
        f"the kernels of the installed xformers are built for torch {built}, and cannot load beside torch "
        f"{torch.__version__}. A pair that fits: pip install 'attnctl[xformers]'. Without xformers "
        "(pip uninstall xformers) torch's own attention runs"
    )


def _built_for() -> str | None:
    """Read the release of torch that a wheel was built for from its notes, without importing it; None for none."""
    spec = importlib.util.find_spec("xformers")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        notes = Path(folder) / "cpp_lib.json"
        if notes.is_file():
            built = json.loads(notes.read_text(encoding="utf-8")).get("version", {}).get("torch")
            return str(built) if built else None
    return None


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def declines(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Say why xformers does not take this call, or return ""."""
    if q.device.type != "cuda":
        return f"xformers has kernels for CUDA only, and the tensors are on {q.device.type!r}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"xformers needs q, k, v of one dtype out of float16, bfloat16, float32, not {q.dtype}"
    if mask is not None and mask.requires_grad:
        return "xformers gives no gradient for a mask that is broadcast or padded"
    return ""


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute attention with xformers; grouped heads are repeated, masks become aligned biases.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D]; mask four-dimensional -> [B, H, Nq, Dv].
    """
    heads = q.shape[1]
    bias = None if mask is None else _aligned_bias(mask, q, k.shape[2])
    q, k, v = (
        (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
        for x in (q, repeat_heads(k, heads), repeat_heads(v, heads))
    )
    out = memory_efficient(q, k, v, bias=bias, scale=scale).transpose(1, 2)
    if mask is not None and mask.dtype == torch.bool:
        # SDPA gives zero where a row may attend to nothing; the finite bias would give the mean.
        out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return out


def memory_efficient(q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, scale: float | None = None) -> Tensor:
    """Call xformers' memory-efficient attention.

    Shapes: q [B, Nq, H, D]; k, v [B, Nk, H, D] -> [B, Nq, H, Dv]. bias: a tensor or one of xformers' own.
    """
    with current(q.device):
        out: Tensor = _ops().memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    return out


def block_diagonal(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Any:
    """Return xformers' bias for sequences that stand one behind the other and do not see each other.

    Args:
        queries: Number of queries of every sequence.
        keys: Number of keys of every sequence.
        device: Where the call runs.
    """
    bias = _ops().fmha.attn_bias.BlockDiagonalMask
    return bias.from_seqlens(list(queries), list(keys), device=device)


def _aligned_bias(mask: Tensor, q: Tensor, n_key: int) -> Tensor:
    """Lay a mask out as an expanded view of a buffer whose rows are padded to multiples of 8."""
    # Finite instead of -inf: a fully masked row must not turn into NaN inside the kernel.
    bias = as_bias(mask, q.dtype, blocked=torch.finfo(q.dtype).min / 2)
    padded = -(-n_key // 8) * 8
    buffer = bias.new_zeros((*bias.shape[:-1], padded))
    buffer[..., :n_key] = bias
    return buffer[..., :n_key].expand(q.shape[0], q.shape[1], q.shape[2], n_key)


@lru_cache(maxsize=1)
def _ops() -> Any:
    with _quiet():
        return importlib.import_module("xformers.ops")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what xformers says on import about extensions that were built for another torch."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
