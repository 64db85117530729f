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
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl.errors import BackendError
from attnctl.kernels.checks import current, repeat_heads
from attnctl.kernels.sparse.lists import csr, derived, lay_out, layout
from attnctl.kernels.sparse.rest import with_means
from attnctl.plans.blocks import Blocks

__all__ = ["declines", "missing", "quantised", "run", "run_int8", "run_with_sums", "tiles"]

_LEAST, _TILE_Q, _TILE_K, _WIDEST = 16, 128, 64, 256
_FLAT = 1e-30  # in place of a factor 0: -inf times 0 is no number
_NO_CARD = 0
_WARP_GROUPS = (90, 100, 103)  # architectures whose products run on four warps at once
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Lists(NamedTuple):
    """What the kernel reads of a plan: see `attnctl.kernels.sparse.triton_forward.forward`."""

    ids: Tensor
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


def declines(q: Tensor, k: Tensor, v: Tensor, plan: Blocks) -> str:
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


def tiles(plan: Blocks, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return how many queries and keys one step of the kernel takes on a device; both divide the plan's blocks."""
    # Without tensor cores, and before Hopper's, the sums of 128 queries do not fit into the registers.
    tall = dtype != torch.float32 and _architecture(device) in (*_WARP_GROUPS, _NO_CARD)
    return min(plan.block_q, _TILE_Q if tall else 64), min(plan.block_k, _TILE_K)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    group: int,
    image: slice,
    scale: float | None,
    words: Tensor | None = None,
    *,
    int8: bool = False,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """Compute the image rows of block-sparse attention; see `run_with_sums`."""
    out, sums = run_with_sums(
        q, k, v, plan, group, image, scale, words, int8=int8, warps=warps, stages=stages, sums=plan.rest
    )
    return out if sums is None else with_means(out, sums, q, k, v, plan, group, image, scale)


def run_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Blocks,
    group: int,
    image: slice,
    scale: float | None,
    words: Tensor | None = None,
    *,
    int8: bool = False,
    warps: int | None = None,
    stages: int | None = None,
    sums: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute the image rows of block-sparse attention, all tensors in the model's own order.

    Blocks that are left out count for nothing here.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D].
        v: Values [B, Hk, N, Dv].
        plan: What to compute.
        group: Part of the run.
        image: Where the image tokens lie.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Text keys to attend to, bool [B or 1, T]; None for all.
        int8: Multiply queries and keys as 8-bit whole numbers.
        warps: Warps of a program; None for 8 on tiles of 128 queries of wide heads, else 4.
        stages: Depth of the pipeline that loads keys and values; None for the architecture's, less where the card's
            shared memory is too small.
        sums: Whether to return the log of every query's sum of exponentials.

    Returns:
        [B, H, n, Dv], and the sums in float32, [B, H, n], or None.

    Raises:
        BackendError: Not even one stage fits into the card's shared memory.
    """
    batch, heads, total, width = q.shape
    n = image.stop - image.start
    text, text_first = total - n, 0 if image.start else n
    scale = width**-0.5 if scale is None else scale
    if scale < 0:  # the kernel looks for the largest product
        q, scale = -q, -scale
    lists = _lists(plan, group, q.device)
    queries, (k, v) = q[:, :, image], (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    shared_v, widths = heads // v.shape[1], (width, v.shape[-1])
    out = v.new_empty(batch, heads, n, v.shape[-1])
    k_first, k_text = image.start, text_first
    scales_q = scales_k = lists.order  # never read unless INT8
    shown = lists.order if words is None else words.expand(batch, -1).to(torch.int8).contiguous()
    if int8:
        queries, scales_q, k, scales_k = quantised(q, k, plan, group, image)
        k_first, k_text = 0, n
    tensors = queries, k, v, out
    logs = q.new_empty((batch, heads, n), dtype=torch.float32) if sums else None
    align = _alignment(tensors)
    tile_q, tile_k = tiles(plan, q.dtype, q.device)
    padded = [max(_LEAST, 1 << (w - 1).bit_length()) for w in widths]
    arch = _architecture(q.device)
    # Before Hopper, sums as wide as the tile is tall would make each warp hold all of the queries, and spill.
    split = arch not in _WARP_GROUPS and padded[1] >= 2 * _TILE_K
    steps = plan.block_q // tile_q
    launch = partial(
        _forward()[(lists.rows.shape[1] * steps, batch * heads)],
        *tensors, lists.order if logs is None else logs, scales_q, scales_k, *lists, shown,
        *(s // align for x in tensors for s in x.stride()[:2]),
        n, text, k_first, k_text, image.start, text_first,
        heads, heads // k.shape[1], shared_v, steps, lists.rows.shape[1], lists.lists.shape[-1],
        scales_q.shape[-1], scales_k.shape[-1], max(scale * math.log2(math.e), _FLAT),
        *(x.stride(2) for x in tensors), align, *widths, padded[0], padded[1] >> split,
        plan.block_q, plan.block_k, tile_q, tile_k,
        REORDERED=plan.grid is not None and any(plan.order), SPLIT=split, WORDS=words is not None, INT8=int8,
        PRECISION="ieee", SUMS=sums,
        num_warps=warps or (8 if tile_q * padded[0] >= 128 * 128 else 4),
    )  # fmt: skip
    why = _launched(launch, q.device, stages or (3 if arch == 90 else 2))
    if why is None:
        return out, logs
    raise BackendError(
        f"backend='triton' was given, but blocks of {plan.block_q} x {plan.block_k} with heads {width} wide do not fit "
        f"into this card ({why}). Take smaller blocks, or another kernel."
    )


def _forward() -> Any:
    from attnctl.kernels.sparse.triton_forward import forward

    return forward


def _launched(launch: Callable[..., Any], device: torch.device, stages: int) -> Exception | None:
    """Launch on the tensors' device with as deep a pipeline as fits; return why not even one stage does."""
    from triton.runtime.errors import OutOfResources

    why: Exception | None = None
    with current(device):
        for depth in range(stages, 0, -1):
            try:
                launch(num_stages=depth)
            except OutOfResources as error:
                why = error
            else:
                return None
    return why


def _architecture(device: torch.device) -> int:
    """Return a card's compute capability as one number, 0 where there is none or programs are interpreted."""
    if interpreted() or not _installed():
        return _NO_CARD
    from triton.runtime import driver

    try:
        with current(device):
            return int(driver.active.get_current_target().arch)
    except RuntimeError:
        return _NO_CARD


def _alignment(tensors: Sequence[Tensor]) -> int:
    """Return the largest power of two, up to 16, that divides every stride of batches and heads."""
    align = _LEAST
    while align > 1 and any(s % align for x in tensors for s in x.stride()[:2]):
        align //= 2
    return align


run_int8 = partial(run, int8=True)


def quantised(q: Tensor, k: Tensor, plan: Blocks, group: int, image: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay queries and keys out in each head's order and round them to 8 bits, a tile at a time.

    Shapes: q [B, H, N, D]; k [B, Hk, N, D] -> queries int8 [B, H, n, D] and their scales float32 [B, H, tiles]; keys
    int8 [B, H, N, D], the text's behind the image's, and their scales [B, H, image tiles + text tiles].

    A value is its whole number times its tile's scale, the largest of the tile over 127. The mean of the keys is taken
    off: it shifts all logits of a query alike, and with it goes what makes the keys' channels so uneven.
    """
    heads = q.shape[1]
    tile_q, tile_k = tiles(plan, q.dtype, q.device)
    k = repeat_heads(k, heads)
    k = k.float() - k.float().mean(2, keepdim=True)
    text = slice(0, image.start) if image.start else slice(image.stop, k.shape[2])
    queries, keys = q[:, :, image].float(), k[:, :, image]
    queries, keys = (lay_out(x, plan, group) for x in (queries, keys))
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


def _lists(plan: Blocks, group: int, device: torch.device) -> _Lists:
    """Return a plan as what the kernel reads."""

    def make() -> _Lists:
        counts, lists = csr(plan, group, device)
        rows = counts.argsort(dim=-1, descending=True, stable=True).int()
        orders = layout(plan, group, device)
        ids, order = (rows, rows) if orders is None else (orders.ids.int(), orders.there.int())
        return _Lists(ids, order, rows, counts, lists)

    return derived(plan, group, ("triton", device), make)
