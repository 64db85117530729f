"""Sums of exponentials that block-sparse kernels return, and attention in whole numbers of 8 and 4 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_sparse import masked_dense, qkv, random_plan
from torch import Tensor

from attnctl.errors import BackendError, PlanError
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.sparse.simulated import rounded
from attnctl.kernels.sparse.sums import block_sparse_with_sums
from attnctl.plans import BlockPlan
from attnctl.plans.blocks import Blocks

SIZES = [(96, 16, 16, 0, True), (90, 32, 16, 5, False), (70, 16, 32, 20, True)]


def logits_of(q: Tensor, k: Tensor, plan: Blocks, image: slice) -> Tensor:
    """Write the kept logits out in float64 [B, H, N, N]; -inf elsewhere."""
    n, total = image.stop - image.start, q.shape[2]
    seen = torch.ones(plan.heads, total, total, dtype=torch.bool)
    tokens = plan.keep[0].repeat_interleave(plan.block_q, -2).repeat_interleave(plan.block_k, -1)
    seen[:, image, image] = tokens[:, :n, :n]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)


@pytest.mark.parametrize(("n", "bq", "bk", "text", "first"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_those_of_the_kept_logits(
    n: int, bq: int, bk: int, text: int, first: bool, dtype: torch.dtype
) -> None:
    plan = random_plan(4, n, bq, bk, n_text=text, text_first=first)
    q, k, v = (x.to(dtype) for x in qkv(4, n + text, hk=2, dv=24, b=2))
    out, sums = block_sparse_with_sums(q, k, v, plan)
    assert torch.equal(out, block_sparse(q, k, v, plan, backend="gather"))
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = logits_of(q, k, plan, plan.span(n + text)).logsumexp(-1)
    assert (sums - want).abs().max() <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)


def test_parts_of_one_softmax_join_by_their_sums() -> None:
    keep = (torch.arange(6)[:, None] + torch.arange(6)) % 2 == torch.tensor([0, 1])[:, None, None]
    plan, other = BlockPlan.from_mask(keep, 16, n_text=4, n_image=96), BlockPlan.from_mask(~keep, 16, n_image=96)
    q, k, v = qkv(2, 100, 32)
    image = plan.span(100)
    near, log_near = block_sparse_with_sums(q, k, v, plan)
    far, log_far = block_sparse_with_sums(*(x[:, :, image] for x in (q, k, v)), other)
    share = (log_far - log_near[:, :, image]).sigmoid()[..., None]
    whole = near[:, :, image] + share * (far - near[:, :, image])
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))[:, :, image]
    assert (whole - dense).abs().max() <= 1e-5


def test_sums_with_words_orders_means_and_gradients() -> None:
    plan = random_plan(2, 60, 16, 16, n_text=3, order=[2, 5], grid=(3, 4, 5))
    q, k, v = qkv(2, 63, 16, b=2)
    words = torch.tensor([[True, False, True], [True, True, True]])
    grads = [x.clone().requires_grad_() for x in (q, k, v)]
    plain, sums = block_sparse_with_sums(q, k, v, plan, words=words)
    traced, same = block_sparse_with_sums(*grads, plan, words=words)
    assert (traced - plain).abs().max() <= 1e-6
    assert (sums - same).abs().max() <= 1e-5
    assert not same.requires_grad
    traced.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in grads)
    hidden = q.clone()  # what a query sees of text alone: a word that is left out changes no sum
    changed = k.clone()
    changed[0, :, 1] += 3
    assert torch.equal(block_sparse_with_sums(hidden, changed, v, plan, words=words)[1], sums)
    rest = Blocks(keep=plan.keep, block_q=16, block_k=16, order=(0, 0), grid=None, n_image=60, n_text=3, rest=True)
    assert (block_sparse_with_sums(q, k, v, rest)[1] > block_sparse_with_sums(q, k, v, plan_without(rest))[1]).any()
    with pytest.raises(BackendError, match="kernels that return sums"):
        block_sparse_with_sums(q, k, v, plan, backend="flex")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="triton"):
        block_sparse_with_sums(q, k, v, plan, backend="triton")  # for GPUs
    with pytest.raises(PlanError, match="2 heads"):
        block_sparse_with_sums(*qkv(4, 63, 16), plan)


def plan_without(blocks: Blocks) -> Blocks:
    """Return blocks of which those that are left out count for nothing."""
    return Blocks(
        keep=blocks.keep, block_q=blocks.block_q, block_k=blocks.block_k, order=blocks.order, grid=None,
        n_image=blocks.n_image, n_text=blocks.n_text,
    )  # fmt: skip


def test_rounding_a_tile_at_a_time() -> None:
    x = torch.randn(2, 21, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 8:16] *= 100  # a loud tile spoils no other
    for bits in (8, 4):
        out = rounded(x, (8, 4), bits)
        for r in range(0, 21, 8):
            for c in range(0, 10, 4):
                tile, made = x[:, r : r + 8, c : c + 4], out[:, r : r + 8, c : c + 4]
                step = tile.abs().amax((-2, -1), keepdim=True) / (2 ** (bits - 1) - 1)
                assert ((made - tile).abs() <= step / 2 + 1e-12).all()
                whole = made / step
                assert (whole - whole.round()).abs().max() <= 1e-9
    assert torch.equal(rounded(torch.zeros(1, 5, 5), (4, 4), 8), torch.zeros(1, 5, 5))
    assert rounded(torch.zeros(1, 0, 5), (4, 4), 8).shape == (1, 0, 5)


@pytest.mark.parametrize(("n", "bq", "bk", "text", "first"), SIZES)
def test_whole_numbers_against_the_exact_map(n: int, bq: int, bk: int, text: int, first: bool) -> None:
    plan = random_plan(4, n, bq, bk, n_text=text, text_first=first)
    q, k, v = qkv(4, n + text, 64, hk=2, b=2)
    k = k + 3 * torch.linspace(-1, 1, 64)  # an uneven mean, as real keys have
    want = masked_dense(q, k, v, plan, plan.span(n + text))
    errors = {
        bits: float((block_sparse(q, k, v, plan, backend=f"simulated_int{bits}") - want).norm() / want.norm())
        for bits in (8, 4)
    }
    assert 1e-4 < errors[8] <= 4e-2  # 8 bits throughout
    assert errors[8] < errors[4] <= 0.3


def test_orders_make_the_numbers_of_a_tile_alike() -> None:
    """Heads that look along the columns: in that order a tile's weights are alike, and round better."""
    grid, n = (1, 16, 16), 256
    at = torch.arange(n)
    column = (at % 16).double()
    q = torch.stack([column, torch.ones(n).double()], -1)
    k = torch.stack([column, -column.square() / 2], -1)
    q, k = (2.0 * x[None, None].float() for x in (q, k))  # a sharp band of columns
    v = torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(1, 16, 16, dtype=torch.bool)
    errors: dict[str, float] = {}
    for order in ("FHW", "FWH"):
        plan = BlockPlan.from_mask(keep, 16, [order], 0, grid=grid)
        want: Any = masked_dense(q, k, v, plan, slice(0, n))
        out = block_sparse(q, k, v, plan, backend="simulated_int4")
        errors[order] = float((out - want).norm() / want.norm())
    assert errors["FWH"] < errors["FHW"]
