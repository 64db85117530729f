"""Block-sparse attention by torch's flex_attention ("Flex Attention", arXiv 2412.05496), on CUDA and on CPU.

Whole blocks go into the list that no mask function runs on; the image's last block, where it is partial, and the text
are masked element by element. On CUDA the kernel is compiled, once for every shape: text is filled up to a multiple of
128 keys, and which of them are words is a tensor, so that prompts of any length share a few programs. On a CPU it runs
uncompiled, which builds the whole map and is there to check the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.checks import current, repeat_heads
from attnctl.kernels.sparse.lists import LaidOut, derived
from attnctl.plans.blocks import Blocks

__all__ = ["block_mask", "compiled", "declines", "eager", "missing", "run", "tile"]

_LEAST = 16
_TALLEST = 128
_TEXT_STEP = 128


def missing(device_type: str) -> str:
    """Say why flex_attention cannot run on a device type, or return ""."""
    if device_type not in ("cuda", "cpu"):
        return f"flex_attention is used on CUDA (and, uncompiled, on CPU), and the tensors are on {device_type!r}"
    return ""


def declines(q: Tensor, k: Tensor, v: Tensor, plan: Blocks) -> str:
    """Say why flex_attention does not take a call, or return ""."""
    if plan.rest:
        return "it knows no means of blocks that are left out"
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


def run(call: LaidOut) -> Tensor:
    """Compute the image rows of block-sparse attention, [B, H, N, Dv]."""
    q, k, v, k_text, v_text, plan, group, scale, words = call
    batch, heads = q.shape[:2]
    text = k_text.shape[2]
    gap, fill = _gaps(plan, text)
    words = q.new_ones((1, text), dtype=torch.bool) if words is None else words
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = block_mask(plan, group, words.expand(batch, -1), backward=backward)
    keys, values = (
        torch.cat([F.pad(repeat_heads(x, heads), (0, 0, 0, gap)), F.pad(repeat_heads(t, heads), (0, 0, 0, fill))], 2)
        for x, t in ((k, k_text), (v, v_text))
    )
    q = q.contiguous()  # a slice has other strides for every length of the text, and strides count as shapes do
    if q.device.type == "cpu":
        return eager()(q, keys, values, block_mask=mask, scale=scale)
    # Tiles must divide the plan's blocks; torch's own choice of them does not look at these.
    tiles = {"BLOCK_M": tile(plan.block_q), "BLOCK_N": tile(plan.block_k)}
    with current(q.device):
        return compiled()(q, keys, values, block_mask=mask, scale=scale, kernel_options=tiles)


def _gaps(plan: Blocks, text: int) -> tuple[int, int]:
    """Return how many keys fill up the image's last block, and how many the text."""
    assert plan.n_image is not None
    if not text:
        return 0, 0
    step = plan.block_k * -(-_TEXT_STEP // plan.block_k)
    return -plan.n_image % plan.block_k, -text % step


def block_mask(plan: Blocks, group: int, words: Tensor, *, backward: bool = False) -> Any:
    """Return a plan's lists as torch's BlockMask over image keys, a gap, text keys and what fills them up.

    Args:
        plan: Blocks of the image.
        group: Part of the run.
        words: Text keys to attend to, bool [B, T].
        backward: Whether to make the lists of a backward pass, which take as much again.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, text, device = plan.n_image, words.shape[1], words.device
    assert n is not None
    gap, fill = _gaps(plan, text)
    lists = derived(plan, group, ("flex", text + fill, device), lambda: _lists(plan, group, gap, text + fill, device))
    image = torch.ones(words.shape[0], n, dtype=torch.bool, device=device)
    real = torch.cat([F.pad(image, (0, gap)), F.pad(words, (0, fill))], 1)
    # A compiled kernel reads the lists; only an uncompiled one asks the mask about every block.
    keep = plan.keep[group] if device.type == "cpu" else None
    allowed = _allowed(real) if keep is None else _kept(keep, real, plan.block_q, plan.block_k)
    lengths, size = (n, real.shape[1]), (plan.block_q, plan.block_k)
    if not backward:
        return BlockMask(lengths, *lists, None, None, None, None, size, allowed)
    some, numbers, whole, listed = lists
    return BlockMask.from_kv_blocks(
        some, numbers, whole, listed, BLOCK_SIZE=size, mask_mod=allowed, seq_lengths=lengths
    )


def _lists(
    plan: Blocks, group: int, gap: int, text: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counts and numbers of the partial and of the whole key blocks of every row, int32.

    Shapes: [1, H, nq], [1, H, nq, nk + text blocks] and the same two for the whole blocks. torch wants a place for each
    block of keys; the partial ones are the same in all rows, which share one place in memory.
    """
    keep = plan.keep[group].to(device)
    heads, rows, blocks = keep.shape
    text_blocks = text // plan.block_k
    columns = blocks + text_blocks
    # All of the text's, then the image's last block, which counts where it is kept and partial.
    numbers = torch.arange(columns, dtype=torch.int32, device=device).roll(-blocks)
    numbers[text_blocks:].fill_(blocks - 1)
    counts = text_blocks + keep[..., -1].int() * (gap > 0)
    whole = torch.cat([keep[..., :-1], keep[..., -1:] & (gap == 0)], -1)
    # A stable sort puts the kept blocks first, in their order.
    listed = whole.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
    listed = F.pad(listed, (0, text_blocks)).contiguous()
    return counts[None], numbers.expand(1, heads, rows, -1), whole.sum(-1, dtype=torch.int32)[None], listed[None]


def _allowed(real: Tensor) -> Callable[..., Tensor]:
    """Return the mask of single tokens, which a compiled kernel asks in partial blocks."""

    def allowed(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return real[b, column]

    return allowed


def _kept(keep: Tensor, real: Tensor, block_q: int, block_k: int) -> Callable[..., Tensor]:
    """Return the whole mask, which an uncompiled kernel asks everywhere; the text's blocks are all kept."""
    blocks = F.pad(keep, (0, -(-real.shape[1] // block_k) - keep.shape[-1]), value=True)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return blocks[h, row // block_q, column // block_k] & real[b, column]

    return mask_mod


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
