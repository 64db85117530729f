"""Two processes share a sequence (diffusers' context parallelism): whole layers are right, all else is refused."""

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
from attnctl.processors import PAG, SLG, TPG, Capture

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
    control = SLG(scale=2.0, sites=[s.name for s in sites[1:3]], start=0.0, stop=0.6)
    want, plain = steps(model, inputs, control), call(model, inputs)
    kind = {"scope": "all"} if sites[1].kind == "joint" else {}
    guidance = PAG(sites=sites[1].name, **kind)
    early = attnctl.control(model, guidance, layout="cond")
    model.enable_parallelism(config=parallel.ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(UnsupportedModelError, match="context parallelism"):
        call(model, inputs)  # split after it was put under control
    early.detach()
    got = steps(model, inputs, control)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (want[0] - plain).abs().max() > 1e-3
    split = call(model, inputs)
    assert (split - plain).abs().max() <= 1e-5 * plain.abs().max()
    for refused in (guidance, TPG(sites=sites[1].name), Capture(words=(1,))):
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
