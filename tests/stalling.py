"""Run controls on a tiny model on the pretend CUDA device and print the waits after the first step (test_stalls.py)."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pretend_cuda
import torch
import zoo
from contract import own
from test_paro import plan_for
from torch import Tensor, nn

import attnctl
from attnctl.core.control import Control
from attnctl.errors import AttnctlError
from attnctl.processors import NAG, PAG, PARO, SEG, SLG, TPG, AgentAttention, Capture, EnhanceAVideo, SoftPAG

STEPS = 3
NEAR = 1e-4


def controls(model: nn.Module, inputs: Any) -> Iterator[tuple[str, Callable[[], Control]]]:
    """Return makers of controls; those that a family has no place for are refused when they are attached."""
    sites = own(attnctl.find_sites(model))
    middle, last = sites[len(sites) // 2], sites[-1]
    heads = [(middle.name, 0), (last.name, last.heads - 1)]
    yield "PAG", lambda: PAG(sites=middle.name)
    yield "PAG, adaptive", lambda: PAG(sites=middle.name, adaptive=0.5)
    yield "SoftPAG, heads", lambda: SoftPAG(u=0.6, heads=heads)
    for target in ("uniform", "query_mean", "argmax"):
        yield f"SoftPAG, {target}", lambda target=target: SoftPAG(u=0.6, sites=middle.name, target=target)
    yield "SEG", lambda: SEG(sites=middle.name, sigma=2.0)
    yield "SEG, mean", lambda: SEG(sites=middle.name, sigma=math.inf)
    yield "SLG", lambda: SLG(sites=middle.name, start=0.0, stop=1.0)
    yield "TPG", lambda: TPG(sites=middle.name)
    yield "NAG", NAG
    yield "AgentAttention", lambda: AgentAttention(max_downsample=4)
    yield "EnhanceAVideo", lambda: EnhanceAVideo(weight=4.0)
    yield "Capture", lambda: Capture(words=(1, 2))
    yield "Capture, heads", lambda: Capture(words=(1,), heads=(0, 1), keep=("heads",))
    yield "Capture, points", lambda: Capture(points=((0.5, 0.5), (0.1, 0.9)))
    plan = plan_for(model, inputs, density=0.5)
    yield "PARO", lambda: PARO(plan, kernel="gather")


def outputs(model: nn.Module, inputs: Any, control: Control) -> tuple[list[Tensor], list[list[str]]]:
    """Return the predictions of all steps, and the waits of each."""
    found, waits = [], []
    layout = "uncond_first" if isinstance(control, NAG) else "cond"
    with attnctl.control(model, control, layout=layout) as handle:  # type: ignore[arg-type]
        for step in range(STEPS):
            handle.set_step(step, STEPS, timestep=900 - 200 * step)
            with pretend_cuda.Stalls() as stalls:
                found.append(pretend_cuda.back(zoo.call(model, inputs)).clone())
            waits.append(stalls.found)
    return found, waits


def main() -> int:
    """Print a line for every wait after the first step, and for every prediction that is not the CPU's."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    name = sys.argv[1]
    model, inputs = zoo.build(name)
    makers = dict(controls(model, inputs))
    card, given = pretend_cuda.move_module(zoo.build(name)[0]), pretend_cuda.moved(inputs)
    for what, make in makers.items():
        try:
            wanted, _ = outputs(model, inputs, make())
        except AttnctlError:
            continue
        computed, waits = outputs(card, given, make())
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(computed, wanted, strict=True))
        if apart > NEAR:
            print(f"{name}, {what}: {apart:.1e} from the CPU's")
        for line in dict.fromkeys(waits[-1]):
            print(f"{name}, {what}: {waits[-1].count(line)} x {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
