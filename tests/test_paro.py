"""PARO on tiny models of every family it is for: full plans change nothing, others are what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines
from contract import Replace, Through, own
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.errors import BackendError, ConfigError, PlanError
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.processors import PAG, PARO, SoftPAG

torch.set_num_threads(1)
MASKED = ("hunyuanvideo", "qwen")  # padded text: see the test for it
HOSTS = ("cogvideox", "cogvideox_rope", "wan", "ltx", "flux", "sd3", "sd35", "pixart", "sd15", "sdxl", *MASKED)


def shapes_of(model: nn.Module, inputs: Any) -> dict[str, AttnCall]:
    """Return one call of every self and joint attention."""
    through = Through()
    with attnctl.control(model, through, layout="cond"):
        zoo.call(model, inputs)
    names = {s.name for s in own(attnctl.find_sites(model))}
    return {c.site.name: c for c in through.seen if c.site.name in names}


def plan_for(
    model: nn.Module, inputs: Any, *, density: float, groups: int = 1, orders: bool = True, block_q: int = 8,
    block_k: int = 4,
) -> ModelPlan:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    plans = {}
    for name, call in shapes_of(model, inputs).items():
        image = call.image or slice(0, call.q.shape[2])
        n, heads = image.stop - image.start, call.q.shape[1]
        keep = torch.rand(groups, heads, -(-n // block_q), -(-n // block_k), generator=g) < density
        keep[..., 0] = True
        order = [h % 6 for h in range(heads)] if orders and call.grid else None
        plans[name] = BlockPlan.from_mask(
            keep,
            block_k,
            order,
            call.q.shape[2] - n,
            block_q=block_q,
            grid=call.grid,
            n_image=n,
            text_first=image.start > 0,
        )
    return ModelPlan(plans=plans)


@pytest.mark.parametrize("host", HOSTS)
def test_families(host: str) -> None:
    model, inputs = zoo.build(host, dtype=torch.float64)
    plain = zoo.call(model, inputs)
    everything = plan_for(model, inputs, density=2.0)
    assert everything.density == 1
    with attnctl.control(model, PARO(everything), layout="cond"):
        assert (zoo.call(model, inputs) - plain).abs().max() <= 1e-9
    half = plan_for(model, inputs, density=0.3)

    def written_out(call: AttnCall, proceed: Proceed) -> Tensor:
        plan = half.plans.get(call.site.name)
        if plan is None or (call.mask is not None and not call.mask.all()):
            return proceed(call)
        return block_sparse(call.q, call.k, call.v, plan, image=call.image, scale=call.scale, backend="reference")

    with attnctl.control(model, Replace(function=written_out), layout="cond"):
        want = zoo.call(model, inputs)
    with attnctl.control(model, PARO(half), layout="cond") as handle:
        out = zoo.call(model, inputs)
        assert len(handle.sites) == len(half.plans)
    assert (out - want).abs().max() <= 1e-9 or host in MASKED
    assert not torch.equal(out, plain)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("host", MASKED)
def test_text_padding_is_left_out_exactly(host: str) -> None:
    """These hosts mask padded words: with every block kept, nothing may change for the rest."""
    model, inputs = zoo.build(host, dtype=torch.float64)
    call = next(iter(shapes_of(model, inputs).values()))
    assert call.mask is not None
    assert not call.mask.all()
    plain = zoo.call(model, inputs)
    with attnctl.control(model, PARO(plan_for(model, inputs, density=2.0)), layout="cond"):
        assert (zoo.call(model, inputs) - plain).abs().max() <= 1e-9


def test_pipeline_with_groups_of_steps_and_guidance() -> None:
    pipe, kwargs = zoo_pipelines.build("sd3", dtype=torch.float64)
    plain = zoo_pipelines.run(pipe, kwargs)
    through = Through()
    with attnctl.control(pipe, through):
        zoo_pipelines.run(pipe, kwargs)
    call = next(c for c in through.seen if c.site.kind == "joint")
    assert call.image is not None
    n = call.image.stop - call.image.start
    keep = torch.rand(2, call.q.shape[1], -(-n // 4), -(-n // 4)) < 0.3
    keep[..., 0] = True
    keep[1] = True  # the second half of the run computes everything
    plan = BlockPlan.from_mask(keep, 4, n_text=call.q.shape[2] - n, n_image=n, text_first=call.image.start > 0)
    with attnctl.control(pipe, PARO(plan, sites="joint")):
        sparse = zoo_pipelines.run(pipe, kwargs)
    assert not torch.allclose(sparse, plain)
    with attnctl.control(pipe, PARO(plan, sites="joint", start=0.5)):
        assert (zoo_pipelines.run(pipe, kwargs) - plain).abs().max() <= 1e-9
    with attnctl.control(pipe, PARO(plan, sites="joint", dense_steps=10**6)):
        assert torch.equal(zoo_pipelines.run(pipe, kwargs), plain)
    # A full plan under guidance is guidance.
    full = BlockPlan.from_mask(torch.ones_like(keep), 4, n_text=plan.n_text, n_image=n, text_first=plan.text_first)
    for guidance in (PAG(sites="joint"), SoftPAG(sites="joint", u=0.4, heads=None)):
        with attnctl.control(pipe, guidance):
            want = zoo_pipelines.run(pipe, kwargs)
        with attnctl.control(pipe, PARO(full, sites="joint"), guidance):
            assert (zoo_pipelines.run(pipe, kwargs) - want).abs().max() <= 1e-8
    assert torch.equal(zoo_pipelines.run(pipe, kwargs), plain)


def test_another_resolution_stays_dense_and_says_so_once() -> None:
    model, inputs = zoo.build("wan")
    plain = zoo.call(model, inputs)
    plan = plan_for(model, inputs, density=0.3)
    other = {
        name: BlockPlan.from_mask(torch.ones(1, p.heads, 1, 1, dtype=torch.bool), 64, grid=(1, 5, 5))
        for name, p in plan.plans.items()
    }
    with (
        attnctl.control(model, PARO(ModelPlan(plans=other)), layout="cond"),
        pytest.warns(UserWarning, match=r"leaves attention dense: the plan was made for a grid of \(1, 5, 5\)") as told,
    ):
        assert torch.equal(zoo.call(model, inputs), plain)
    assert len(told) == 1


def test_plan_from_a_folder(tmp_path: Path) -> None:
    model, inputs = zoo.build("wan")
    plan = plan_for(model, inputs, density=0.3)
    folder = str(plan.save_pretrained(tmp_path))
    outputs = []
    for source in (plan, folder):
        with attnctl.control(model, PARO(source), layout="cond"):
            outputs.append(zoo.call(model, inputs))
    assert torch.equal(*outputs)
    assert PARO(folder).plan == folder


def test_bad_input(tmp_path: Path) -> None:
    model, inputs = zoo.build("wan")
    plan = plan_for(model, inputs, density=0.3)
    with pytest.raises(PlanError, match=r"for another model: .* has no site"):
        attnctl.control(zoo.build("sd3")[0], PARO(plan))
    name, one = next(iter(plan.plans.items()))
    fewer = BlockPlan.from_mask(one.keep[:, :1].contiguous(), 4, block_q=8, n_image=one.n_image)
    with pytest.raises(PlanError, match="heads, its plan 1"):
        attnctl.control(model, PARO(ModelPlan(plans={name: fewer})))
    with pytest.raises(ConfigError, match=r"expected an attnctl\.plans\.ModelPlan"):
        PARO(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dense_steps=-1"):
        PARO(plan, dense_steps=-1)
    with pytest.raises(ConfigError, match="leaves none of the"):
        attnctl.control(model, PARO(plan, dense_layers=99))
    with pytest.raises(BackendError, match="expected 'auto' or one of"):
        PARO(plan, kernel="magic")
    with pytest.raises(PlanError, match="does not exist"):
        PARO(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("kernel", "message"), [("triton", "compiles for GPUs|not installed"), ("xformers", "CUDA only")]
)
def test_a_kernel_that_cannot_run_here_says_so_and_leaves_nothing(
    kernel: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, inputs = zoo.build("sd3")
    plain = zoo.call(model, inputs)
    plan = plan_for(model, inputs, density=0.5)
    with pytest.raises(BackendError, match=message), attnctl.control(model, PARO(plan, kernel=kernel), layout="cond"):
        zoo.call(model, inputs)
    assert torch.equal(zoo.call(model, inputs), plain)
    assert repr(plan) == f"ModelPlan(any model, {len(plan.plans)} sites, density {plan.density:.3f})"
    assert len(repr(next(iter(plan.plans.values())))) < 120
