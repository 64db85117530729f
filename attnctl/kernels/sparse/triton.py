"""Block-sparse attention as a Triton kernel that loads rows through each head's order; optionally with INT8 logits.

"PAROAttention", arXiv 2506.16054, sections 4 and 5: queries and keys are quantised a block at a time, after rotary
embedding, and the mean of the keys is taken off beforehand, which the softmax does not see ("SageAttention: Accurate
8-Bit Attention for Plug-and-play Inference Acceleration", arXiv 2410.02367). Weights times values stays in the values'
dtype, with float32 sums. Forward only.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl.errors import BackendError
from attnctl.kernels.checks import repeat_heads
from attnctl.kernels.sparse.lists import csr
from attnctl.plans.blocks import BlockPlan
from attnctl.plans.orders import permutation, permute_heads

__all__ = ["declines", "missing", "quantised", "run", "run_int8", "tiles"]

_LEAST, _TILE_Q, _TILE_K, _WIDEST = 16, 128, 64, 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Lists(NamedTuple):
    """What the kernel reads of a plan: see `attnctl.kernels.sparse.triton_forward.forward`."""

    order: Tensor
    rows: Tensor
    counts: Tensor
    lists: Tensor


def interpreted() -> bool:
    """Tell whether Triton runs its programs step by step, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing(device_type: str) -> str:
    """Say why Triton cannot run on a device type, or return ""."""
    if not _installed():
        return "triton is not installed (pip install triton; wheels exist for Linux)"
    if device_type != "cuda" and not interpreted():
        return f"Triton compiles for GPUs, and the tensors are on {device_type!r}"
    return ""


def declines(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str:
    """Say why the kernel does not take a call, or return ""."""
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"the Triton kernel needs q, k, v of one dtype out of float16, bfloat16, float32, not {q.dtype}"
    if q.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter multiplies the bits of bfloat16, not its numbers; use float16 or float32 there"
    for name, block in (("block_q", plan.block_q), ("block_k", plan.block_k)):
        if block < _LEAST or block & (block - 1):
            return f"the Triton kernel needs blocks of 16, 32, 64, ... tokens, and the plan has {name}={block}"
    if max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return f"the Triton kernel takes heads up to {_WIDEST} wide, not {max(q.shape[-1], v.shape[-1])}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "the Triton kernel has no backward pass"
    return ""


def tiles(plan: BlockPlan, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many queries and keys one step of the kernel takes; both divide the plan's blocks."""
    # Without tensor cores, the sums of 128 queries do not fit into the registers.
    return min(plan.block_q, 64 if dtype == torch.float32 else _TILE_Q), min(plan.block_k, _TILE_K)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    group: int,
    image: slice,
    scale: float | None,
    *,
    int8: bool = False,
    warps: int | None = None,
    stages: int = 3,
) -> Tensor:
    """Compute the image rows of block-sparse attention, all tensors in the model's own order.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D].
        v: Values [B, Hk, N, Dv].
        plan: What to compute.
        group: Part of the run.
        image: Where the image tokens lie.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        int8: Multiply queries and keys as 8-bit whole numbers.
        warps: Warps of a program; None for 8 on tiles of 128 queries of wide heads, else 4.
        stages: Depth of the pipeline that loads keys and values; less where the card's shared memory is too small.

    Returns:
        [B, H, n, Dv].

    Raises:
        BackendError: Not even one stage fits into the card's shared memory.
    """
    from triton.runtime.errors import OutOfResources

    from attnctl.kernels.sparse.triton_forward import forward

    batch, heads, total, width = q.shape
    n = image.stop - image.start
    text, text_first = total - n, 0 if image.start else n
    scale = width**-0.5 if scale is None else scale
    tile_q, tile_k = tiles(plan, q.dtype)
    lists = _lists(plan, group, q.device)
    reordered = plan.grid is not None and any(plan.order)
    queries, (k, v) = q[:, :, image], (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    shared_v, widths = heads // v.shape[1], (width, v.shape[-1])
    out = v.new_empty(batch, heads, n, v.shape[-1])
    k_first, k_text = image.start, text_first
    scales_q = scales_k = lists.order  # never read unless INT8
    if int8:
        queries, scales_q, k, scales_k = quantised(q, k, plan, image)
        k_first, k_text = 0, n
    shared_k = heads // k.shape[1]
    padded = [max(_LEAST, 1 << (w - 1).bit_length()) for w in widths]
    steps = plan.block_q // tile_q
    launch = partial(
        forward[(lists.rows.shape[1] * steps, batch * heads)],
        queries, k, v, out, scales_q, scales_k, *lists,
        *(s for x in (queries, k, v, out) for s in x.stride()[:3]),
        n, text, k_first, k_text, image.start, text_first,
        heads, shared_k, shared_v, steps, lists.rows.shape[1], lists.lists.shape[-1],
        scales_q.shape[-1], scales_k.shape[-1], scale * math.log2(math.e),
        WIDTH=widths[0], WIDTH_V=widths[1], PADDED=padded[0], PADDED_V=padded[1],
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, TILE_Q=tile_q, TILE_K=tile_k,
        REORDERED=reordered, INT8=int8, PRECISION="ieee",
        num_warps=warps or (8 if tile_q * padded[0] >= 128 * 128 else 4),
    )  # fmt: skip
    for depth in range(stages, 0, -1):
        try:
            launch(num_stages=depth)
        except OutOfResources as error:
            why = error
        else:
            return out
    raise BackendError(
        f"backend='triton' was given, but blocks of {plan.block_q} x {plan.block_k} with heads {width} wide do not fit "
        f"into this card ({why}). Take smaller blocks, or another kernel."
    )


run_int8 = partial(run, int8=True)


def quantised(q: Tensor, k: Tensor, plan: BlockPlan, image: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay queries and keys out in each head's order and round them to 8 bits, a tile at a time.

    Shapes: q [B, H, N, D]; k [B, Hk, N, D] -> queries int8 [B, H, n, D] and their scales float32 [B, H, tiles]; keys
    int8 [B, H, N, D], the text's behind the image's, and their scales [B, H, image tiles + text tiles].

    A value is its whole number times its tile's scale, the largest of the tile over 127. The mean of the keys is taken
    off: it shifts all logits of a query alike, and with it goes what makes the keys' channels so uneven.
    """
    heads = q.shape[1]
    tile_q, tile_k = tiles(plan, q.dtype)
    k = repeat_heads(k, heads)
    k = k.float() - k.float().mean(2, keepdim=True)
    text = slice(0, image.start) if image.start else slice(image.stop, k.shape[2])
    queries, keys = q[:, :, image].float(), k[:, :, image]
    if plan.grid is not None:
        queries, keys = (permute_heads(x, plan.grid, plan.order) for x in (queries, keys))
    q8, q_scales = _rounded(queries, tile_q)
    k8, k_scales = _rounded(keys, tile_k)
    if text.stop == text.start:
        return q8, q_scales, k8, k_scales
    t8, t_scales = _rounded(k[:, :, text], tile_k)
    return q8, q_scales, torch.cat([k8, t8], 2), torch.cat([k_scales, t_scales], 2)


def _rounded(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Round tiles of tokens to int8 and return them with the tiles' scales.

    Shapes: x float32 [B, H, N, D] -> int8 [B, H, N, D] and float32 [B, H, ceil(N / tile)].
    """
    n = x.shape[2]
    laid = torch.nn.functional.pad(x, (0, 0, 0, -n % tile)).unflatten(2, (-1, tile))
    scales = laid.abs().amax((-2, -1)) / 127
    # A tile of zeros has the scale 0, and 0 / 0 must not become a number.
    small = (laid / scales.clamp_min(1e-30)[..., None, None]).round().to(torch.int8)
    return small.flatten(2, 3)[:, :, :n], scales.contiguous()


def _lists(plan: BlockPlan, group: int, device: torch.device) -> _Lists:
    """Return a plan as what the kernel reads, kept with the plan."""
    key: Any = ("triton", group, device)
    if key not in plan.cache:
        counts, lists = csr(plan, group, device)
        rows = plan.keep[group].sum(-1).argsort(dim=-1, descending=True, stable=True)
        grid = plan.grid
        orders = [permutation(grid, o) for o in plan.order] if grid is not None else [torch.zeros(1)]
        order = torch.stack(orders).int().to(device)
        plan.cache[key] = _Lists(order, rows.int().to(device), counts, lists)
    found: _Lists = plan.cache[key]
    return found
