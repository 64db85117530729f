"""What PARO keeps in memory: lists of one part of the run, shared between equal plans, and nothing after detaching."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from test_paro import plan_for
from test_sparse import masked_dense, qkv, random_plan
from torch import Tensor

import attnctl
from attnctl.errors import BackendError
from attnctl.kernels.sparse import dispatch as sparse
from attnctl.kernels.sparse import flex, triton
from attnctl.kernels.sparse.dispatch import SPARSE, block_sparse
from attnctl.kernels.sparse.lists import derived
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.processors import PARO, paro

torch.set_num_threads(1)
CPU = torch.device("cpu")


def tensors(held: Any) -> Iterator[Tensor]:
    """Return the tensors in nested dictionaries and tuples."""
    if isinstance(held, Tensor):
        yield held
    for inner in held.values() if isinstance(held, dict) else held if isinstance(held, (tuple, list)) else ():
        yield from tensors(inner)


def size(plan: BlockPlan) -> int:
    """Return the bytes of all lists that were derived from a plan."""
    storages = [x.untyped_storage() for x in tensors(plan.cache)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_lists_of_a_long_video_are_small() -> None:
    """CogVideoX-5B has 42 sites of 48 heads, and 17,550 tokens: lists of all sites stay below 1 GiB."""
    keep = torch.zeros(1, 48, 275, 275, dtype=torch.bool)
    keep[..., ::3] = True
    orders = [h % 6 for h in range(48)]
    for make in (
        lambda plan: flex.block_mask(plan, 0, torch.ones(1, 226, dtype=torch.bool)),
        lambda plan: triton._lists(plan, 0, CPU),
    ):
        plan = BlockPlan.from_mask(keep, 64, orders, 226, grid=(13, 30, 45))
        make(plan)
        assert 42 * size(plan) <= 1 << 30


def test_one_part_of_the_run_at_a_time() -> None:
    keep = torch.rand(3, 2, 4, 4) < 0.5
    keep[..., 0] = True
    plan = BlockPlan.from_mask(keep, 16, n_image=64)
    q, k, v = qkv(2, 64)
    for backend in ("gather", "flex"):
        block_sparse(q, k, v, plan, group=0, backend=backend)
        first = [weakref.ref(x) for x in tensors(plan.cache)]
        assert first
        block_sparse(q, k, v, plan, group=2, backend=backend)
        gc.collect()
        assert not any(ref() is not None for ref in first)
    with torch.inference_mode():
        made = derived(plan, 1, ("mine",), lambda: torch.ones(2))
    assert not made.is_inference()
    assert derived(plan, 1, ("mine",), lambda: torch.zeros(2)) is made


def test_equal_plans_share_lists_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("wan")
    plan = plan_for(model, inputs, density=0.3)
    one = next(iter(plan.plans.values()))
    same = ModelPlan(
        plans={
            name: BlockPlan.from_mask(one.keep.clone(), 4, one.order, block_q=8, grid=one.grid) for name in plan.plans
        }
    )
    assert len(same.plans) > 1
    made: list[weakref.ref[BlockPlan]] = []
    copies = paro._copies

    def recorded(plans: Any) -> Any:
        found = copies(plans)
        made.extend(weakref.ref(p) for p in {id(p): p for p in found.values()}.values())
        return found

    monkeypatch.setattr(paro, "_copies", recorded)
    for given, count in ((same, 1), (plan, len(plan.plans))):
        made.clear()
        control = PARO(given)
        handle = attnctl.control(model, control, layout="cond")
        zoo.call(model, inputs)
        gc.collect()
        assert sum(ref() is not None for ref in made) == count
        lists = [weakref.ref(x) for ref in made for x in tensors(getattr(ref(), "cache", {}))]
        assert len(lists) > 1
        handle.detach()
        gc.collect()
        assert not any(ref() is not None for ref in (*made, *lists))
        assert not any(p.cache for p in given.plans.values())


@pytest.mark.parametrize("backend", ["gather", "flex", "reference"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_padding_of_each_prompt_is_left_out(backend: str, first: bool) -> None:
    plan = random_plan(2, 60, 16, 16, n_text=9, text_first=first, order=[2, 5], grid=(3, 4, 5))
    q, k, v = qkv(2, 69, b=2)
    words = torch.ones(2, 9, dtype=torch.bool)
    words[0, 4:] = words[1, 7:] = False
    image = plan.span(69)
    out = block_sparse(q, k, v, plan, words=words, backend=backend)
    for b in range(2):
        at = words[b].nonzero()[:, 0] + (0 if first else 60)
        tokens = torch.cat([at, torch.arange(9, 69)] if first else [torch.arange(60), at])
        few = replace(plan, n_text=len(at))
        want = masked_dense(*(x[b : b + 1, :, tokens] for x in (q, k, v)), few, few.span(len(tokens)))
        assert (out[b : b + 1, :, tokens] - want).abs().max() <= 1e-5
    assert torch.equal(block_sparse(q, k, v, plan, words=words[:1], backend=backend)[:1], out[:1]) or backend == "flex"
    assert image.start == (9 if first else 0)


def test_flex_compiles_few_shapes_for_prompts_of_any_length() -> None:
    plan = random_plan(2, 60, 16, 16, n_text=1)
    lengths = {sum(flex._gaps(plan, t)) + 60 + t for t in range(1, 513)}
    assert len(lengths) == 4


def test_a_kernel_that_fails_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def failing(*call: Any) -> Tensor:
        calls.append("flex")
        raise RuntimeError("recompile_limit reached\nand much more")

    def right(*call: Any) -> Tensor:
        calls.append("triton")
        return SPARSE["reference"].run(*call)

    monkeypatch.setattr(sparse, "_FAILED", {})
    monkeypatch.setattr(sparse, "_WARNED", set())
    monkeypatch.setattr(sparse, "refusal", lambda name, *call: "")
    monkeypatch.setattr(sparse, "fastest", lambda kind, kernels, device: next(iter(kernels)))
    monkeypatch.setitem(SPARSE, "flex", SPARSE["flex"]._replace(run=failing))
    monkeypatch.setitem(SPARSE, "triton", SPARSE["triton"]._replace(run=right))
    plan = random_plan(2, 60, 16, 16)
    q, k, v = qkv(2, 60)
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "_on_cuda", lambda x: True)
        with pytest.warns(UserWarning, match=r"'flex' failed on cpu \(RuntimeError: recompile_limit reached\)") as seen:
            outs = [block_sparse(q, k, v, plan) for _ in range(3)]
        assert len(seen) == 1
        assert calls == ["flex", "triton", "triton", "triton"]
        patch.setitem(SPARSE, "triton", SPARSE["triton"]._replace(run=failing))
        with pytest.warns(UserWarning, match="attention under a plan is dense"):
            dense = block_sparse(q, k, v, plan)
    assert torch.allclose(outs[0], masked_dense(q, k, v, plan, slice(0, 60)).float(), atol=1e-5)
    assert torch.equal(dense, attnctl.attention(q, k, v))
    with pytest.raises((RuntimeError, BackendError), match="recompile_limit"):
        block_sparse(q, k, v, plan, backend="flex")
