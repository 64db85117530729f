"""Block-sparse attention by torch's flex_attention ("Flex Attention", arXiv 2412.05496), on CUDA and on CPU.

Whole blocks go into the list that no mask function runs on; only a partial block before the text is masked element by
element. On CUDA the kernel is compiled, once for every shape. On a CPU it runs uncompiled, which builds the whole map
and is there to check the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import repeat_heads
from attnctl.plans.blocks import BlockPlan

__all__ = ["block_mask", "compiled", "declines", "eager", "missing", "run", "tile"]

_LEAST = 16
_TALLEST = 128


class _Mask(NamedTuple):
    """A torch BlockMask and the tokens that stand between the image's keys and the text's, to fill the last block."""

    mask: Any
    gap: int


def missing(device_type: str) -> str:
    """Say why flex_attention cannot run on a device type, or return ""."""
    if device_type not in ("cuda", "cpu"):
        return f"flex_attention is used on CUDA (and, uncompiled, on CPU), and the tensors are on {device_type!r}"
    return ""


def declines(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str:
    """Say why flex_attention does not take a call, or return ""."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "flex_attention has no backward pass on CPU"
    if q.device.type == "cuda":
        if plan.block_q % _LEAST or plan.block_k % _LEAST:
            return f"flex needs blocks in multiples of {_LEAST} tokens on CUDA, not {plan.block_q} x {plan.block_k}"
        if min(q.shape[-1], v.shape[-1]) < _LEAST:
            return f"flex needs heads at least {_LEAST} wide on CUDA, not {q.shape[-1]} and {v.shape[-1]}"
        if q.dtype == torch.float64:
            return "flex has no float64 kernel on CUDA"
    return ""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    plan: BlockPlan,
    group: int,
    scale: float | None,
) -> Tensor:
    """Compute the image rows of block-sparse attention.

    Shapes: q [B, H, N, D]; k, v [B, Hk, N, D], in each head's own order; k_text, v_text [B, Hk, T, D] -> [B, H, N, Dv].
    """
    heads = q.shape[1]
    mask, gap = block_mask(plan, group, k_text.shape[2], q.device)
    keys, values = (
        torch.cat([F.pad(repeat_heads(x, heads), (0, 0, 0, gap)), repeat_heads(text, heads)], 2)
        for x, text in ((k, k_text), (v, v_text))
    )
    if q.device.type == "cpu":
        return eager()(q, keys, values, block_mask=mask, scale=scale)
    # Tiles must divide the plan's blocks; torch's own choice of them does not look at these.
    tiles = {"BLOCK_M": tile(plan.block_q), "BLOCK_N": tile(plan.block_k)}
    return compiled()(q, keys, values, block_mask=mask, scale=scale, kernel_options=tiles)


def block_mask(plan: BlockPlan, group: int, text: int, device: torch.device) -> _Mask:
    """Return a plan's lists as torch's BlockMask, kept with the plan: image keys, a gap, then text keys.

    Args:
        plan: Blocks of the image.
        group: Part of the run.
        text: Number of text keys; every query attends to them.
        device: Where the lists lie.
    """
    key = ("flex", group, text, device)
    if key not in plan.cache:
        # Outside inference mode, whoever asks first: otherwise a later call would compile again, or not differentiate.
        with torch.inference_mode(False):
            plan.cache[key] = _block_mask(plan, group, text, device)
    found: _Mask = plan.cache[key]
    return found


def _block_mask(plan: BlockPlan, group: int, text: int, device: torch.device) -> _Mask:
    from torch.nn.attention.flex_attention import BlockMask

    n, bq, bk = plan.n_image, plan.block_q, plan.block_k
    assert n is not None
    gap = -n % bk if text else 0
    length = n + gap + text
    keep = F.pad(plan.keep[group], (0, -(-length // bk) - plan.keep.shape[-1]), value=True)
    partial = torch.zeros_like(keep)
    if gap:
        partial[..., n // bk] = keep[..., n // bk]
    keep = keep.to(device)
    partial = partial.to(device)
    counts, numbers = _listed(partial)
    whole_counts, whole_numbers = _listed(keep & ~partial)
    mask = BlockMask.from_kv_blocks(
        counts, numbers, whole_counts, whole_numbers, BLOCK_SIZE=(bq, bk),
        mask_mod=_allowed(keep, n, n + gap, bq, bk), seq_lengths=(n, length),
    )  # fmt: skip
    return _Mask(mask, gap)


def _allowed(keep: Tensor, n: int, text: int, block_q: int, block_k: int) -> Callable[..., Tensor]:
    """Return the mask of single tokens, which a compiled kernel asks in partial blocks and an uncompiled one always."""

    def allowed(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        real = (column < n) | (column >= text)
        return keep[h, row // block_q, column // block_k] & real

    return allowed


def _listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and numbers of the blocks of every row, int32 [1, H, nq] and [1, H, nq, nk]."""
    # A stable sort puts the kept blocks first, in their order.
    numbers = keep.int().argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1, dtype=torch.int32)[None], numbers.int()[None].contiguous()


def tile(block: int) -> int:
    """Return the largest power of two, up to 128, that divides a block."""
    return min(block & -block, _TALLEST)


def eager() -> Callable[..., Tensor]:
    """Return flex_attention uncompiled, which builds whole maps."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Tensor] = flex_attention
    return run


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    """Return flex_attention compiled, once for the process."""
    # fullgraph: too many shapes are an error; without it they would fall back to whole maps, silently.
    return torch.compile(eager(), dynamic=False, fullgraph=True)
