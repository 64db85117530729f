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
from contract import own

import attnctl
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG, SEG, SLG, TPG, Capture, SoftPAG

parallel = pytest.importorskip("diffusers", minversion="0.42")
FAMILIES = ("wan", "flux")


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


@torch.no_grad()
def one_of_two(rank: int, family: str, path: str) -> None:
    """Compare what this process and the other compute together with what one computes alone."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # the CPU counts as one
    model, inputs = zoo.build(family, 1)
    for name in ("encoder_hidden_states", "txt_ids"):
        if name in inputs:  # an even number of tokens
            inputs[name] = inputs[name][..., :6, :]
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


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_against_one(family: str, tmp_path: Path) -> None:
    """A process that is forked has imported everything already."""
    processes.start_processes(
        one_of_two, (family, str(tmp_path / "meeting")), nprocs=2, start_method="fork", daemon=True
    )
