"""Block-sparse attention: orders, plans and kernels against recorded tensors and dense float64 maps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import attnctl
from attnctl.errors import BackendError, PlanError
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.sparse.lists import bundles, coarser, csr
from attnctl.plans import BlockPlan
from attnctl.plans.orders import LAYOUTS, ORDERS, first_alike, permutation, permute_heads, restore_heads, tile_shape

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures" / "paro"
HERE = ("gather", "reference")
"""Kernels that run anywhere; those for GPUs are tested in test_sparse_kernels.py."""


def fixture(name: str) -> tuple[dict, dict[str, Tensor]]:
    facts = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return facts, load_file(FIXTURES / f"{name}.safetensors")


def masked_dense(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, image: slice) -> Tensor:
    """Attend with the whole map in float64 and the plan's mask written out token by token, in the model's order."""
    heads, n = q.shape[1:3]
    keep = torch.ones(heads, n, n, dtype=torch.bool)
    count = image.stop - image.start
    tokens = plan.keep[0].repeat_interleave(plan.block_q, -2)[:, :count]
    tokens = tokens.repeat_interleave(plan.block_k, -1)[:, :, :count]
    for h in range(heads):
        order = permutation(plan.grid, plan.order[h], plan.block_k) if plan.grid else torch.arange(count)
        place = order.argsort()
        keep[h, image, image] = tokens[h][place][:, place]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).double() for x in (k, v))
    logits = q.double() @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v


def random_plan(
    heads: int, n: int, bq: int, bk: int, *, density: float = 0.4, n_text: int = 0, seed: int = 0, **options: object
) -> BlockPlan:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(heads, -(-n // bq), -(-n // bk), generator=g) < density
    keep[torch.arange(heads)[:, None], torch.arange(keep.shape[1]), torch.randint(keep.shape[2], keep.shape[:2])] = True
    return BlockPlan.from_mask(keep, bk, block_q=bq, n_text=n_text, n_image=n, **options)  # type: ignore[arg-type]


def qkv(heads: int, n: int, d: int = 16, *, dv: int | None = None, hk: int | None = None, b: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(b, h, n, w, generator=g) for h, w in ((heads, d), (hk or heads, d), (hk or heads, dv or d))]


def test_orders_are_the_published_ones() -> None:
    facts, t = fixture("layout_small")
    grid, text, order = tuple(facts["grid_FHW"]), facts["n_text"], tuple(t["order"].tolist())
    assert list(ORDERS) == facts["order_ids"]
    for name in "qkv":
        ours = permute_heads(t[name][:, :, text:], grid, order)
        assert torch.equal(ours, t[f"{name}_perm"][:, :, text:])
        assert torch.equal(restore_heads(ours, grid, order), t[name][:, :, text:])
    assert permute_heads(t["q"], grid, (0,) * 8) is t["q"]


@pytest.mark.parametrize(
    ("grid", "block", "tile", "flat"),
    [
        ((8, 32, 32), 64, (4, 4, 4), (1, 8, 8)),
        ((1, 16, 16), 16, (1, 4, 4), (1, 4, 4)),
        ((13, 30, 45), 64, (4, 4, 4), (1, 8, 8)),
        ((4, 3, 2), 64, (4, 3, 2), (1, 3, 2)),
    ],
)
def test_tiles_are_boxes_of_a_block(grid: tuple, block: int, tile: tuple, flat: tuple) -> None:
    assert (tile_shape(grid, block), tile_shape(grid, block, flat=True)) == (tile, flat)
    for order, shape in (("TILE", tile), ("SQUARE", flat)):
        laid = permutation(grid, LAYOUTS.index(order), block)
        assert torch.equal(laid.sort().values, torch.arange(laid.numel()))
        places = torch.stack(torch.unravel_index(laid[: shape[0] * shape[1] * shape[2]], grid), -1)
        assert places.amin(0).tolist() == [0, 0, 0]
        assert (places.amax(0) + 1).tolist() == list(shape)
    # An image has two orders of axes, and boxes are squares there.
    assert [first_alike((1, 16, 16), o, 16) for o in range(8)] == [0, 1, 0, 0, 1, 1, 6, 6]


@pytest.mark.parametrize("name", ["bsa_equal", "bsa_ragged"])
@pytest.mark.parametrize("backend", HERE)
def test_recorded_block_sparse_attention(name: str, backend: str) -> None:
    facts, t = fixture(name)
    plan = BlockPlan.from_mask(t["mask"], facts["block"])
    out = attnctl.attention(t["q"], t["k"], t["v"], plan=plan, backend=backend)
    assert (out.double() - t["out"]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["calib_4x8x8", "calib_partial_3x7x9"])
@pytest.mark.parametrize("backend", HERE)
def test_recorded_reordered_attention(name: str, backend: str) -> None:
    facts, t = fixture(name)
    q, k, v = (t[x][None] for x in "qkv")
    for i in range(t["mask"].shape[1]):
        plan = BlockPlan.from_mask(
            t["mask"][:, i].contiguous(), facts["block"], t["order"].tolist(), facts["n_text"], grid=facts["grid_FHW"]
        )
        want = t["out_sparse"][:, i][None]
        out = attnctl.attention(q, k, v, plan=plan, backend=backend)
        assert (out.double() - want).norm() / want.norm() <= 1e-5


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("n", "bq", "bk"), [(96, 16, 16), (90, 16, 16), (90, 32, 16), (70, 16, 32), (33, 32, 8)])
@pytest.mark.parametrize("n_text", [0, 5])
def test_kernels_are_the_masked_map(backend: str, n: int, bq: int, bk: int, n_text: int) -> None:
    for first in (True, False):
        plan = random_plan(4, n, bq, bk, n_text=n_text, text_first=first)
        q, k, v = qkv(4, n + n_text, hk=2, dv=24, b=2)
        out = attnctl.attention(q, k, v, plan=plan, backend=backend)
        assert (out - masked_dense(q, k, v, plan, plan.span(n + n_text))).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", HERE)
def test_a_full_mask_is_dense_attention(backend: str) -> None:
    q, k, v = qkv(8, 2 * 5 * 7 + 3)
    keep = torch.ones(8, 5, 5, dtype=torch.bool)
    plan = BlockPlan.from_mask(keep, 16, list(LAYOUTS), 3, grid=(2, 5, 7))
    assert (attnctl.attention(q, k, v, plan=plan, backend=backend) - attnctl.attention(q, k, v)).abs().max() <= 1e-6


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_plan_is_the_masked_map(data: st.DataObject) -> None:
    grid = tuple(data.draw(st.integers(1, 6), label=x) for x in "fhw")
    n = grid[0] * grid[1] * grid[2]
    bq, bk = (data.draw(st.integers(1, 20), label=x) for x in ("bq", "bk"))
    order = data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=2), label="order")
    n_text = data.draw(st.integers(0, 4), label="text")
    density = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="density")
    plan = random_plan(2, n, bq, bk, density=density, n_text=n_text, order=order, grid=grid)
    q, k, v = qkv(2, n + n_text, 8)
    out = attnctl.attention(q, k, v, plan=plan)
    assert (out - masked_dense(q, k, v, plan, plan.span(n + n_text))).abs().max() <= 2e-6


def test_gradients_are_those_of_the_masked_map() -> None:
    plan = random_plan(2, 40, 16, 8, n_text=3, order=[2, 5], grid=(2, 4, 5))
    ours, theirs = ([x.double().requires_grad_() for x in qkv(2, 43)] for _ in range(2))
    attnctl.attention(*ours, plan=plan).square().sum().backward()
    masked_dense(*theirs, plan, plan.span(43)).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-12  # type: ignore[operator]


def test_lists_made_in_inference_mode_serve_gradients_later() -> None:
    plan = random_plan(2, 63, 16, 8, n_text=3, order=[2, 5], grid=(3, 3, 7))
    with torch.inference_mode():
        attnctl.attention(*qkv(2, 66), plan=plan)
    inputs = [x.requires_grad_() for x in qkv(2, 66)]
    attnctl.attention(*inputs, plan=plan).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs)


def test_what_is_not_kept_is_not_read() -> None:
    """NaN where the plan keeps nothing must not reach the result, whatever the kernel."""
    plan = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool)[None].expand(2, 4, 4).contiguous(), 16, n_image=60)
    q, k, v = qkv(2, 60)
    for x in (k, v):
        x[:, :, 16:32] = torch.nan
    rows = torch.cat([torch.arange(16), torch.arange(32, 60)])
    out = block_sparse(q, k, v, plan, backend="gather")
    assert out[:, :, rows].isfinite().all()


def test_lists_of_a_large_mask() -> None:
    keep = torch.rand(3, 40, 50) < 0.3
    keep[..., 7] = True
    plan = BlockPlan.from_mask(keep, 8, block_q=10, n_image=400)
    counts, indices = csr(plan, 0, torch.device("cpu"))
    for h in range(3):
        for row in range(40):
            assert indices[h, row, : counts[h, row]].tolist() == keep[h, row].nonzero()[:, 0].tolist()
        seen = torch.cat([b.rows for b in bundles(plan, 0, h, 1, torch.device("cpu"))])
        assert seen.sort().values.tolist() == list(range(40))
    assert torch.equal(coarser(keep, 3)[:, 13], keep[:, 39])
    assert bundles(plan, 0, 0, 1, torch.device("cpu")) is bundles(plan, 0, 0, 1, torch.device("cpu"))


def test_groups_of_steps() -> None:
    plan = BlockPlan.from_mask(torch.ones(4, 1, 2, 2, dtype=torch.bool), 8)
    assert [plan.group_at(i, 10) for i in range(12)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert plan.group_at(-1, 10) == 0
    assert plan.density == 1


def test_density_counts_text_and_partial_blocks() -> None:
    keep = torch.tensor([[[True, False], [True, True]]])
    plan = BlockPlan.from_mask(keep, 8, n_image=12, n_text=4)
    assert plan.density == (8 * 8 + 4 * 12 + 4 * (24 + 4)) / 16**2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": torch.ones(1, 2, 2)}, "expected a bool tensor"),
        ({"keep": torch.ones(2, 2, dtype=torch.bool)}, "expected a bool tensor"),
        ({"keep": torch.zeros(1, 2, 2, dtype=torch.bool)}, "keeps no key block"),
        ({"block": 0}, "block=0 must be a whole number"),
        ({"n_text": -1}, "n_text=-1 must be a whole number"),
        ({"order": [0]}, "one order for each of 2 heads"),
        ({"order": [0, 8], "grid": (1, 4, 8)}, "Order 8 is unknown"),
        ({"order": ["FHW", "FHV"], "grid": (1, 4, 8)}, "Did you mean"),
        ({"order": [0, 1]}, "grid=.* must be given"),
        ({"grid": (1, 4, 0)}, "expected \\(frames, rows, columns\\)"),
        ({"grid": (1, 4, 9)}, "36 image tokens make 3 x 3 blocks"),
        ({"grid": (1, 4, 8), "n_image": 31}, "which has 32 tokens"),
        ({"block_q": 64}, "No number of tokens makes"),
    ],
)
def test_bad_plans_are_refused(arguments: dict, message: str) -> None:
    good = {"keep": torch.ones(2, 2, 2, dtype=torch.bool), "block": 16}
    with pytest.raises(PlanError, match=message):
        BlockPlan.from_mask(**(good | arguments))


def test_bad_calls_are_refused() -> None:
    plan = BlockPlan.from_mask(torch.ones(2, 2, 2, dtype=torch.bool), 16, n_image=32)
    with pytest.raises(PlanError, match="for 2 heads; this attention has 3"):
        attnctl.attention(*qkv(3, 32), plan=plan)
    with pytest.raises(PlanError, match="32 image and 0 text tokens; the sequence has 33"):
        attnctl.attention(*qkv(2, 33), plan=plan)
    with pytest.raises(PlanError, match="self-attention"):
        attnctl.attention(*qkv(2, 32)[:1], *qkv(2, 31)[1:], plan=plan)
    with pytest.raises(BackendError, match="Did you mean 'gather'"):
        attnctl.attention(*qkv(2, 32), plan=plan, backend="gathr")
    with pytest.raises(BackendError, match="a mask were given together"):
        attnctl.attention(*qkv(2, 32), plan=plan, mask=torch.ones(32, 32, dtype=torch.bool))
    with pytest.raises(PlanError, match="Step group 3"):
        block_sparse(*qkv(2, 32), plan, group=3)
