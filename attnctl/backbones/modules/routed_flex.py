"""Routed attention without copies: torch's flex_attention reads the keys of the chosen windows where they lie.

"BiFormer" (arXiv 2303.08810), equation 6, on the lists of "Flex Attention" (arXiv 2412.05496): a window is a block, and
the routing is the list of blocks that each block of queries reads. Compiled on CUDA; on a CPU it runs uncompiled, which
builds the whole map and is there to check the lists alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import BackendError
from attnctl.kernels.sparse import flex

__all__ = ["routed_flex"]

_LEAST = 16  # tokens of a window and channels of a head that a kernel on CUDA takes


def routed_flex(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, real: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend to the tokens of each window's chosen windows.

    Shapes: q, k, v [B, H, windows * tokens, D], window by window; index [B, windows, k], no window twice; real
    [windows * tokens], False for keys to leave out, None for none -> [B, H, windows * tokens, D].

    Raises: BackendError for tensors and windows that flex_attention does not take.
    """
    windows, length = index.shape[1], q.shape[2]
    tokens = length // windows
    reason = _refusal(q, k, v, tokens)
    if reason:
        raise BackendError(f"backend='flex' was given, but it cannot run this call: {reason}. Leave it to 'auto'.")
    mask = _block_mask(index, tokens, real)
    if q.device.type == "cpu":
        return flex.eager()(q, k, v, block_mask=mask, scale=scale)
    tile = flex.tile(tokens)
    options = {"BLOCK_M": tile, "BLOCK_N": tile}
    return flex.compiled()(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def _refusal(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> str:
    kind, width = q.device.type, min(q.shape[-1], v.shape[-1])
    if kind == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "flex_attention has no backward pass on CPU"
    if kind == "cuda" and (tokens % _LEAST or width < _LEAST):
        return (
            f"on CUDA it needs windows in multiples of {_LEAST} tokens and heads at least {_LEAST} wide, not {tokens} "
            f"and {width}"
        )
    return flex.missing(kind)


def _block_mask(index: Tensor, tokens: int, real: Tensor | None) -> object:
    """Turn the routing into torch's BlockMask: whole blocks, or partial ones where keys are left out."""
    from torch.nn.attention.flex_attention import BlockMask

    b, n, topk = index.shape
    # Torch wants as many columns as there are blocks; what stands behind the count is not read.
    numbers = F.pad(index.sort(dim=-1).values, (0, n - topk)).int()[:, None].contiguous()
    counts = torch.full((b, 1, n), topk, dtype=torch.int32, device=index.device)
    empty = torch.zeros_like(counts), torch.zeros_like(numbers)  # kernels want tensors of their own for each list
    partial, whole = (empty, (counts, numbers)) if real is None else ((counts, numbers), empty)
    keep = torch.zeros((b, n, n), dtype=torch.bool, device=index.device).scatter_(2, index, True)
    length = n * tokens
    return BlockMask.from_kv_blocks(
        *partial, *whole, BLOCK_SIZE=(tokens, tokens), seq_lengths=(length, length),
        mask_mod=_allowed(keep, tokens, keep.new_ones(length) if real is None else real),
    )  # fmt: skip


def _allowed(keep: Tensor, tokens: int, real: Tensor) -> Callable[..., Tensor]:
    """Return the mask of single tokens, which a compiled kernel asks in partial blocks and an uncompiled one always."""

    def allowed(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return keep[b, row // tokens, column // tokens] & real[column]

    return allowed
