"""Rows that belong together, and noise that differs between rows that should be alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from torch import Tensor

import attnctl
from attnctl.errors import AttnctlError, ConfigError
from attnctl.processors import AStar, Capture, EnhanceAVideo, PromptToPrompt, SoftPAG

R = torch.randn


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("prompt", ["a cat", {0: "a cat", 1: "a dog"}])
def test_free_noise_says_one_prompt_for_several_frames(prompt: Any) -> None:
    """One prompt is encoded for each frame; prompts that change over the frames are refused in words."""
    pipe, kwargs = pipes.build("animatediff")
    vars(pipe)["motion_adapter"] = SimpleNamespace(config=SimpleNamespace(motion_max_seq_length=32))
    pipe.enable_free_noise(context_length=2, context_stride=1)
    call = {**kwargs, "prompt": prompt, "num_inference_steps": 2}
    plain = pipes.run(pipe, call)
    for control in (Capture(words=("cat",)), AStar(concepts=("a", "cat"), step_size=5.0)):
        with attnctl.control(pipe, control) as handle:
            if isinstance(prompt, dict):
                with pytest.raises(AttnctlError, match="prompt"):
                    pipes.run(pipe, call)
                continue
            out = pipes.run(pipe, call)
            if isinstance(control, Capture):
                assert handle.maps.prompts == ("a cat",)
                assert handle.maps["cat"].isfinite().all()
                assert torch.equal(out, plain)
            else:
                assert out.isfinite().all()
                assert not torch.equal(out, plain)


@pytest.mark.parametrize("control", [Capture(words=(1, 2)), AStar(concepts=(1, 2), sites="blocks.1.attn2")])
def test_one_prompts_embeddings_serve_several_videos(control: Any) -> None:
    pipe, kwargs = pipes.build("wan")
    call = {**kwargs, "num_videos_per_prompt": 2}
    plain = pipes.run(pipe, call, num_inference_steps=2)
    with attnctl.control(pipe, control) as handle:
        out = pipes.run(pipe, call, num_inference_steps=2)
        assert out.isfinite().all()
        if isinstance(control, Capture):
            assert torch.equal(out, plain)
            assert handle.maps.images == 2
        else:
            assert not torch.equal(out, plain)


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_a_video_in_a_batch_is_enhanced_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 4)
    model, inputs = zoo.build(name, 2, torch.float64)
    with attnctl.control(model, EnhanceAVideo(weight=20.0), layout="cond"):
        both = zoo.call(model, inputs)
        alone = torch.cat([zoo.call(model, zoo.take(inputs, [n])) for n in range(2)])
    assert (both - alone).abs().max() < 1e-10


def test_enhancement_beside_guidance_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 4)
    pipe, kwargs = pipes.build("cogvideox", dtype=torch.float64)
    enhance = EnhanceAVideo(weight=20.0)
    outs = []
    for controls in ((enhance,), (enhance, SoftPAG(u=1e-12, sites="transformer_blocks.1"))):
        with attnctl.control(pipe, *controls):
            outs.append(pipes.run(pipe, kwargs, num_inference_steps=2))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


# Noise --------------------------------------------------------------------------------------------------------


def pair(scheduler: Any, **changes: Any) -> Tensor:
    pipe, kwargs = pipes.build("sd")
    pipe.scheduler = scheduler
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    prompts = {"prompt": ["a cat", "a cat"], "negative_prompt": ["ugly", "ugly"]}
    control = PromptToPrompt(
        source="a cat", target="a cat", equalizer={"cat": 1.0}, cross_replace=0.0, self_replace=0.0
    )
    with attnctl.control(pipe, control):
        return pipes.run(pipe, {**kwargs, **prompts, "latents": noise, **changes}, num_inference_steps=3)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.KDPM2AncestralDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.DDPMScheduler(),
        diffusers.LCMScheduler(),
        diffusers.TCDScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_scheduler_that_adds_noise_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=f"{type(scheduler).__name__} adds noise at its steps"):
        pair(scheduler)


@pytest.mark.parametrize("generator", [False, True])
def test_noise_that_only_the_call_asks_for_is_refused(generator: bool) -> None:
    drawn = {"generator": torch.Generator().manual_seed(1)} if generator else {}
    with pytest.raises(ConfigError, match="DDIMScheduler adds noise"):
        pair(diffusers.DDIMScheduler(), eta=1.0, **drawn)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler(), diffusers.DPMSolverMultistepScheduler()],
    ids=lambda s: type(s).__name__,
)
def test_the_same_prompt_twice_gives_the_same_picture(scheduler: Any) -> None:
    out = pair(scheduler)
    assert (out[0] - out[1]).abs().max() < 1e-5
