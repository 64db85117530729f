"""Prompt-to-prompt on a tiny pipeline: against explicit maps, and what must not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import zoo_pipelines as pipes
from contract import Replace, assert_clean, distance, snapshot
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.errors import ConfigError
from attnctl.kernels.maps import softmax_map
from attnctl.processors import PromptToPrompt
from attnctl.processors.editing.fusion import cross_edit

SOURCE, TARGET = "a black bear in the water", "a red bear in the water"
BASE = PromptToPrompt(source=SOURCE, target=TARGET, cross_replace=0.8, self_replace=0.7)
STEPS = 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


def run(pipe: Any, **options: Any) -> Tensor:
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    given = {
        "prompt": [SOURCE, TARGET],
        "negative_prompt": ["ugly"] * 2,
        "latents": noise.repeat(2, 1, 1, 1),
        "num_inference_steps": STEPS,
        "height": 32,
        "width": 24,
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**given | options)[0]


def edited(pipe: Any, control: PromptToPrompt, **options: Any) -> Tensor:
    with attnctl.control(pipe, control):
        return run(pipe, **options)


@pytest.mark.parametrize("changes", [{"mode": "replace"}, {"equalizer": {"red": 3.0}}], ids=str)
def test_equals_explicit_maps(pipe: Any, changes: dict[str, Any]) -> None:
    control = dataclasses.replace(BASE, **changes)
    plan = control.plan(pipe)
    follow = plan.follow(STEPS)

    def naive(call: AttnCall, proceed: Proceed) -> Tensor:
        k, maps = call.state.step, softmax_map(call.q, call.k, call.scale)
        if call.site.kind == "cross":
            maps[3] = cross_edit(maps[2], maps[3], plan.how, follow[k])
        elif k < int(STEPS * 0.7):
            maps[3] = maps[2]
        return maps @ call.v

    with attnctl.control(pipe, Replace(sites=["self", "cross"], function=naive)):
        want = run(pipe)
    assert distance(edited(pipe, control), want) <= 1e-5


def test_source_is_its_own(pipe: Any) -> None:
    before = snapshot(pipe.unet, pipe.scheduler)
    plain = run(pipe)
    out = edited(pipe, dataclasses.replace(BASE, blend_words=[["bear"], ["bear"]], blend_threshold=0.9))
    assert torch.equal(out[0], plain[0])
    assert distance(out[1], plain[1]) > 1e-3
    assert torch.equal(edited(pipe, dataclasses.replace(BASE, cross_replace=0.0, self_replace=0.0)), plain)
    assert torch.equal(edited(pipe, dataclasses.replace(BASE, stop=0.0)), plain)
    assert edited(pipe, BASE, guidance_scale=1.0).isfinite().all()
    assert_clean(before, pipe.unet, pipe.scheduler)


def test_blending_keeps_the_source(pipe: Any) -> None:
    words = [["bear"], ["bear"]]
    whole = dataclasses.replace(BASE, blend_words=words, blend_window=(0.0, 1.0), blend_threshold=2.0)
    out = edited(pipe, whole)
    assert torch.equal(out[1], out[0])  # nothing is inside
    nothing = dataclasses.replace(whole, blend_threshold=0.0)
    assert torch.equal(edited(pipe, nothing), edited(pipe, BASE))


def test_bad_input(pipe: Any) -> None:
    for options, message in (
        ({"prompt": [SOURCE, SOURCE]}, "one image beside its source"),
        ({"prompt": [TARGET, SOURCE]}, "one image beside its source"),
        ({"latents": torch.randn(2, 4, 16, 12)}, "different noise"),
    ):
        with attnctl.control(pipe, BASE), pytest.raises(ConfigError, match=message):
            run(pipe, **options)
    with pytest.raises(ConfigError, match="'tree'"):
        attnctl.control(pipe, dataclasses.replace(BASE, blend_words=["tree"]))
    with pytest.warns(UserWarning, match="repeats its source"):
        attnctl.control(pipe, dataclasses.replace(BASE, target=SOURCE)).detach()
    assert attnctl.handle_of(pipe) is None
