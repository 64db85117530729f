"""Forward passes for a gradient end at the last site that it needs, and change no bit of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from latent_runs import PROMPT, SITE, STEPS, WORDS, astar, controlled, sd
from torch import Tensor

import attnctl
from attnctl.processors import AStar
from attnctl.processors.latent import engine as engine

# Early exit --------------------------------------------------------------------------------------------------------

FAMILIES = {"sd": WORDS, "sd2": WORDS, "sdxl": (1, 3), "sd3": (1, 3), "sd35": (1, 3), "flux": (1, 3)}


def of_family(name: str) -> tuple[Any, dict[str, Any]]:
    """Build a pipeline of one family; SD2 and SD3.5 are SD and SD3 with other denoisers."""
    pipe, kwargs = pipes.build({"sd2": "sd", "sd35": "sd3"}.get(name, name))
    if name == "sd2":
        pipe.unet = zoo.build("sd2", 1)[0]
    elif name == "sd35":
        pipe.transformer = zoo.build("sd35", 1)[0]
    return pipe, kwargs | ({"prompt": PROMPT} if name in ("sd", "sd2") else {})


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_early_exit_changes_no_bit_of_the_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs = of_family(name)
    grads: list[Tensor] = []
    compute = engine._Update.gradient

    def spy(self: Any, z: Tensor) -> Any:
        result = compute(self, z)
        grads.append(result[1])
        return result

    monkeypatch.setattr(engine._Update, "gradient", spy)
    if "unet" in pipe.components:
        last = pipe.unet.up_blocks[-1]
    else:
        last = pipe.transformer.single_transformer_blocks[-1] if name == "flux" else pipe.transformer.proj_out
    ran: list[int] = []
    hook = last.register_forward_pre_hook(lambda *_: ran.append(1))
    found, counts = [], []
    for option in ({}, {"early_exit": False}, {"checkpoint": True}):
        grads.clear()
        ran.clear()
        out = controlled(pipe, kwargs, AStar(concepts=FAMILIES[name], **option))
        found.append((out, torch.stack(grads)))
        counts.append(len(ran))
    hook.remove()
    assert found[0][1].any()
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])
    assert counts[0] < counts[1]  # the guidance forwards did not come so far


def test_every_needed_site_is_waited_for() -> None:
    # attn_processors lists the mid block last, but it runs before the up blocks.
    pipe, kwargs = sd()
    sites = ["mid_block.attentions.0.transformer_blocks.0.attn2", SITE]
    a = controlled(pipe, kwargs, astar(sites=sites))
    b = controlled(pipe, kwargs, astar(sites=sites, early_exit=False))
    assert torch.equal(a, b)


def test_no_more_rows_and_passes_than_needed() -> None:
    pipe, kwargs = sd(batch=2)
    rows: list[int] = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    with attnctl.control(pipe, astar(stop=0.5)) as handle:
        pipes.run(pipe, kwargs, num_inference_steps=STEPS)
        assert handle.guidance_forwards == 2
    hook.remove()
    assert rows == [2, 4, 2, 4, 4, 4]


def test_guidance_of_the_real_sd15_keeps_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("astar")
    (row,) = benchmark.count(1)
    assert row["share"] <= 0.50  # of the FLOPs of a forward
    assert benchmark.memory()["ratio"] <= 1 / 6  # of what diffusers' own pipeline keeps for its backward
