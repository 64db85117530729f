"""Two processes share a sequence (diffusers' context parallelism).

Whole layers, skipped or with one map for all tokens and heads, are right; all else is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import zoo
from contract import assert_clean, own, snapshot

import attnctl
from attnctl.core.hosts import families
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG, SEG, SLG, TPG, Capture, SoftPAG

parallel = pytest.importorskip("diffusers", minversion="0.42")


def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Call a denoiser as pipelines do; under context parallelism it can return nothing but a tuple."""
    return zoo.unpack(model(**inputs, return_dict=False))


def steps(model: Any, inputs: dict[str, Any], control: Any) -> list[torch.Tensor]:
    """Return the predictions of a run of three steps."""
    outputs = []
    with attnctl.control(model, control, layout="cond") as handle:
        for i in range(3):
            handle.set_step(i, 3)
            outputs.append(call(model, inputs))
        assert handle.passes == 2
    return outputs


def joined(rank: int, family: str, path: str, text: int = 6) -> tuple[Any, dict[str, Any]]:
    """Meet the other process; build a model, and inputs with as many tokens of text."""
    dist.init_process_group("cpu:gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # the CPU counts as one
    model, inputs = zoo.build(family, 1)
    for name in ("encoder_hidden_states", "txt_ids"):
        if name in inputs:  # for most ways of splitting an even number
            inputs[name] = inputs[name][..., :text, :]
    return model, inputs


@torch.no_grad()
def one_of_two(rank: int, family: str, path: str) -> None:
    """Compare what this process and the other compute together with what one computes alone."""
    model, inputs = joined(rank, family, path)
    sites = own(attnctl.find_sites(model))
    kind = {"scope": "all"} if sites[1].kind == "joint" else {}
    window = {"scale": 2.0, "start": 0.0, "stop": 0.6}
    names = [s.name for s in sites[1:3]]
    controls = [SLG(sites=names, **window), PAG(sites=names, **kind, **window)]
    targets = ("identity", "uniform", "query_mean", "argmax")
    controls += [SoftPAG(sites=names, scope="all", u=0.7, target=t, **window) for t in targets]
    wanted, plain = [steps(model, inputs, c) for c in controls], call(model, inputs)
    guidance = PAG(sites=sites[1].name, **kind)
    early = attnctl.control(model, guidance, layout="cond")
    model.enable_parallelism(config=parallel.ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(UnsupportedModelError, match="context parallelism"):
        call(model, inputs)  # split after it was put under control
    early.detach()
    for control, want in zip(controls, wanted, strict=True):
        for a, b in zip(steps(model, inputs, control), want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), control
        assert (want[0] - plain).abs().max() > 1e-3, control
    with pytest.raises(UnsupportedModelError, match=r"Under context parallelism.*gradient"), torch.enable_grad():
        steps(model, inputs, controls[1])
    split = call(model, inputs)
    assert (split - plain).abs().max() <= 1e-5 * plain.abs().max()
    refusals = [TPG(sites=names), SEG(sites=names), SoftPAG(heads=[(names[0], 1)]), Capture(words=(1,))]
    refusals += [PAG(sites=names), SoftPAG(sites=names, scope="image")] if kind else []
    for refused in refusals:
        with pytest.raises(UnsupportedModelError, match=r"context parallelism.*Skip whole layers"):
            attnctl.control(model, refused, layout="cond")
        assert torch.equal(call(model, inputs), split)
    dist.destroy_process_group()


@torch.no_grad()
def ring_of_two(rank: int, family: str, path: str) -> None:
    """Refuse what would have to see ring attention, which no SDPA computes; skip whole layers beside it."""
    model, _ = joined(rank, family, path)
    sites = own(attnctl.find_sites(model))
    kind = {"scope": "all"} if sites[1].kind == "joint" else {}
    model.enable_parallelism(config=parallel.ContextParallelConfig(ring_degree=2))
    before = snapshot(model)
    for control in (PAG(sites=sites[1].name, **kind), SoftPAG(sites=[s.name for s in sites], scope="all", u=0.7)):
        with pytest.raises(UnsupportedModelError, match=r"ring attention \(ring_degree=2\).*Use ulysses_degree"):
            attnctl.control(model, control, layout="cond")
        assert_clean(before, model)
    for control in (TPG(sites=sites[1].name), Capture(words=(1,))):  # what no way of splitting allows
        with pytest.raises(UnsupportedModelError, match=r"context parallelism.*Skip whole layers"):
            attnctl.control(model, control, layout="cond")
        assert_clean(before, model)
    with attnctl.control(model, SLG(sites=sites[1].name, start=0.0, stop=1.0), layout="cond"):
        assert type(sites[1].module.processor).__name__ == before_name(sites[1])
    assert_clean(before, model)
    dist.destroy_process_group()


def before_name(site: Any) -> str:
    """Return the name of the class that a host's processor has by itself."""
    return next(c.__name__ for c in type(site.module.processor).__mro__ if not c.__name__.startswith("Controlled"))


@torch.no_grad()
def unlisted_of_two(rank: int, family: str, path: str) -> None:
    """Refuse attention whose kind nothing tells where each process sees a part; skip whole layers all the same."""
    model, inputs = joined(rank, family, path)
    families._BY_CLASS = {}  # type: ignore[assignment]
    sites = [s for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    skip = SLG(sites=[s.name for s in sites[1:2]], scale=2.0, start=0.0, stop=0.6)
    wanted, plain = steps(model, inputs, skip), call(model, inputs)
    model.enable_parallelism(config=parallel.ContextParallelConfig(ulysses_degree=2))
    split, before = call(model, inputs), snapshot(model)
    assert (split - plain).abs().max() <= 1e-5 * plain.abs().max()
    for a, b in zip(steps(model, inputs, skip), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    for control in (PAG(sites=sites[1].name, scope="all"), SoftPAG(sites=sites[0].name, scope="all", target="uniform")):
        refused = pytest.raises(UnsupportedModelError, match=r"context parallelism .* that attnctl does not list")
        with refused, attnctl.control(model, control, layout="cond"):
            call(model, inputs)
        assert_clean(before, model)
        assert torch.equal(call(model, inputs), split)
    dist.destroy_process_group()


@torch.no_grad()
def uneven_of_two(rank: int, family: str, path: str) -> None:
    """Split a sequence whose length is odd (`ulysses_anything`): whole layers are right there too."""
    model, inputs = joined(rank, family, path, text=5)
    sites = own(attnctl.find_sites(model))
    names = [s.name for s in sites[1:3]]
    window = {"scale": 2.0, "start": 0.0, "stop": 0.6}
    controls = [SLG(sites=names, **window), PAG(sites=names, scope="all", **window)]
    controls += [SoftPAG(sites=names, scope="all", u=0.7, target=t, **window) for t in ("query_mean", "argmax")]
    wanted = [steps(model, inputs, c) for c in controls]
    model.enable_parallelism(config=parallel.ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    for control, want in zip(controls, wanted, strict=True):
        for a, b in zip(steps(model, inputs, control), want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), control
    dist.destroy_process_group()


CASES = {
    **{f"{family}, ulysses": (one_of_two, family) for family in ("wan", "flux")},
    **{f"{family}, ring": (ring_of_two, family) for family in ("wan", "flux", "qwen")},
    **{f"{family}, unlisted": (unlisted_of_two, family) for family in ("wan", "flux")},
    "flux, uneven": (uneven_of_two, "flux"),
}


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_against_one(case: str, tmp_path: Path) -> None:
    """A process that is forked has imported everything already."""
    job, family = CASES[case]
    processes.start_processes(job, (family, str(tmp_path / "meeting")), nprocs=2, start_method="fork", daemon=True)
