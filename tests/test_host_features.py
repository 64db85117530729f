"""What hosts can do beside a plain call: guess mode, skipped layers, denoisers that take turns, schedulers, settings.
Guidance stays what its definition says, or is refused in words; nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, distance, snapshot
from naive_guidance import build, naive, roots
from torch import nn

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.errors import ConfigError
from attnctl.processors import PAG, AStar, Capture

pytestmark = pytest.mark.usefixtures("no_grad")


# Calls that are more than one pair of prompt and negative prompt


@pytest.mark.parametrize("batch", [1, 2])
def test_guess_mode_of_a_controlnet(batch: int) -> None:
    pipe, kwargs, guidance = build("sd_controlnet", batch=batch)
    kwargs |= {"guess_mode": True}
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 3
    assert distance(guided, naive(pipe, kwargs, guidance)) <= 1e-12
    assert distance(guided, pipes.run(pipe, kwargs)) > 1e-3


def test_the_hosts_own_skipped_layers_are_left_alone() -> None:
    pipe, kwargs, guidance = build("sd3")
    kwargs |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    model, twin, skipped = pipe.transformer, copy.deepcopy(pipe.transformer), 0
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    wrap = guidance.branch(sites, twin).perturb
    attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal skipped
        if given.get("skip_layers") is not None:
            skipped += 1
            return None
        delta = guidance.scale * (output[0] - twin(*args, **given)[0])[1:]
        return (output[0] + torch.cat([delta, delta]),)

    hook = model.register_forward_hook(guide, with_kwargs=True)
    by_hand = pipes.run(pipe, kwargs)
    hook.remove()
    assert skipped == 2  # the host never skips in its first step
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 3
    assert_clean(before, *roots(pipe))
    assert distance(guided, by_hand) <= 1e-12


def test_a_callback_that_switches_the_negative_prompt_off_on_the_way() -> None:
    pipe, kwargs, guidance = build("sd")
    model, twin = pipe.unet, copy.deepcopy(pipe.unet)
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    wrap = guidance.branch(sites, twin).perturb
    attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")
    rows: list[int] = []

    def switch(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        pred = output[0]
        rows.append(pred.shape[0])
        delta = guidance.scale * (pred - twin(*args, **given)[0])[-1:]
        return (pred + delta,)

    kwargs |= {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    hook = model.register_forward_hook(guide, with_kwargs=True)
    by_hand = pipes.run(pipe, kwargs)
    hook.remove()
    assert rows == [2, 1, 1]
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 3
        assert torch.equal(guided, pipes.run(pipe, kwargs))
    assert distance(guided, by_hand) <= 1e-12


# Denoisers that take turns


def experts() -> tuple[Any, dict[str, Any]]:
    """Build Wan 2.2's pipeline: one transformer for the noisy steps, another for the rest."""
    pipe, kwargs = pipes.build("wan", torch.float64)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": pipe.scheduler}
    second = zoo.build("wan", 1, torch.float64, seed=1)[0]
    pipe = diffusers.WanPipeline(**parts, transformer=pipe.transformer, transformer_2=second, boundary_ratio=0.7)
    return pipes.quiet(pipe), kwargs | {"num_inference_steps": 4}


def test_guidance_of_denoisers_that_take_turns() -> None:
    pipe, kwargs = experts()
    guidance = PAG(scale=2.0, sites="blocks.1.attn1")
    plain = pipes.run(pipe, kwargs)
    models, ran, hooks = [pipe.transformer, pipe.transformer_2], [0, 0], []
    for n, model in enumerate(models):
        twin, memory = copy.deepcopy(model), []
        (site,) = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
        wrap = guidance.branch((site,), twin).perturb
        attnctl.control(twin, Replace(sites=site.name, function=wrap), layout="cond")

        def guide(
            module: Any, args: Any, given: Any, output: Any, n: int = n, twin: Any = twin, memory: list[Any] = memory
        ) -> Any:
            ran[n] += 1
            if memory:  # the negative call follows its own
                return (output[0] + memory.pop(),)
            memory.append(guidance.scale * (output[0] - twin(*args, **given)[0]))
            return (output[0] + memory[0],)

        hooks.append(model.register_forward_hook(guide, with_kwargs=True))
    by_hand = pipes.run(pipe, kwargs)
    for hook in hooks:
        hook.remove()
    assert min(ran) >= 2
    before = snapshot(*models, pipe.scheduler)
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 4
        assert handle.report().count("perturbed passes so far") == 2
        assert torch.equal(guided, pipes.run(pipe, kwargs))
    assert_clean(before, *models, pipe.scheduler)
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert distance(guided, by_hand) <= 1e-12
    assert distance(guided, plain) > 1e-3
    with attnctl.control(pipe, AStar(concepts=(1, 3), sites="cross", step_size=5.0)) as handle:
        assert not torch.equal(pipes.run(pipe, kwargs), plain)
        assert handle.guidance_forwards == 4
    with attnctl.control(pipe, PAG(scale=2.0, sites="blocks.1.attn1", start=0.5)) as handle:
        pipes.run(pipe, kwargs)
        assert handle.passes == 2  # of the run, not of each denoiser's part


# Guidance that goes to the negative prediction alone


@pytest.mark.parametrize("recipe", ["sd", "sd3", "pixart", "animatediff", "cogvideox", "wan"])
def test_both_ways_to_combine_give_the_same_sum(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    added, safe = (dataclasses.replace(guidance, combine=combine) for combine in ("add", "rescale_safe"))
    found = []
    for control in (added, safe):
        with attnctl.control(pipe, control):
            found.append(pipes.run(pipe, kwargs, guidance_scale=4.0))
    assert distance(*found) <= (1e-6 if recipe == "cogvideox" else 1e-9)  # it adds up in float32
    assert distance(found[0], pipes.run(pipe, kwargs, guidance_scale=4.0)) > 1e-3


def test_a_pipeline_that_does_not_tell_its_guidance_scale() -> None:
    pipe, kwargs, guidance = build("pixart")
    control = dataclasses.replace(guidance, combine="rescale_safe")
    with attnctl.control(pipe, control), pytest.raises(ConfigError, match=r"PixArtSigmaPipeline does not tell"):
        pipes.run(pipe, kwargs, guidance_scale=torch.full((1, 1, 1, 1), 4.0))  # no number


def test_the_second_denoiser_has_a_guidance_scale_of_its_own() -> None:
    pipe, kwargs = experts()
    kwargs |= {"guidance_scale": 4.0, "guidance_scale_2": 2.5}
    found = []
    for combine in ("add", "rescale_safe"):
        with attnctl.control(pipe, PAG(scale=2.0, sites="blocks.1.attn1", combine=combine)):
            found.append(pipes.run(pipe, kwargs))
    assert distance(*found) <= 1e-9


def test_a_family_that_counts_guidance_from_the_prompt() -> None:
    model, inputs = zoo.build("cosmos", dtype=torch.float64)
    pipe = types.SimpleNamespace(transformer=model, guidance_scale=3.0, do_classifier_free_guidance=True)
    prompt, negative = (zoo.take(inputs, [row]) for row in (0, 1))
    sums = []
    for combine in ("add", "rescale_safe"):
        control = PAG(scale=2.0, sites="*.1.attn1", combine=combine)
        with attnctl.control(pipe, control, layout="sequential") as handle:
            handle.set_step(0, 2)
            c, u = zoo.call(model, prompt), zoo.call(model, negative)
        sums.append(c + pipe.guidance_scale * (c - u))  # as diffusers' Cosmos pipelines do
    assert distance(*sums) <= 1e-9
    c, u = zoo.call(model, prompt), zoo.call(model, negative)
    assert distance(sums[0], c + pipe.guidance_scale * (c - u)) > 1e-3


def test_maps_of_denoisers_that_take_turns_are_joined_step_by_step() -> None:
    pipe, kwargs = experts()

    def recorded(**options: Any) -> Any:
        with attnctl.control(pipe, Capture(words=(1, 3), **options)) as handle:
            pipes.run(pipe, kwargs)
            return handle.maps

    steps = [recorded(start=i / 4, stop=(i + 1) / 4)["3"] for i in range(4)]
    apart = recorded(keep=("steps",))
    assert apart.steps == (0, 1, 2, 3)
    assert {s.name for s in apart.sites} == {s.name for s in attnctl.find_sites(pipe) if s.kind == "cross"}
    for i, want in enumerate(steps):
        torch.testing.assert_close(apart.get_map("3", step=i), want)
    every = torch.stack(steps)
    torch.testing.assert_close(recorded()["3"], every.mean(0))
    torch.testing.assert_close(apart["3"], every.mean(0))
    heads, layers = apart.sites[0].heads, len(apart.sites)
    torch.testing.assert_close(recorded(reduce="sum")["3"], every.sum(0) * heads * layers)
    peaks = recorded(reduce="max", keep=("steps",))
    torch.testing.assert_close(recorded(reduce="max")["3"], peaks["3"])
    with pytest.raises(ConfigError, match="changed its denoiser on the way"):
        recorded(reduce="ema")


SCHEDULERS = (
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_evaluate_and_draw_in_their_own_ways(name: str) -> None:
    pipe, kwargs, guidance = build("sd")
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == len(pipe.scheduler.timesteps) >= 3
        assert torch.equal(guided, pipes.run(pipe, kwargs))
    assert distance(guided, naive(pipe, kwargs, guidance)) <= 1e-12
    assert distance(guided, pipes.run(pipe, kwargs)) > 1e-3


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def slicing(pipe: Any) -> None:
    pipe.enable_attention_slicing(1)


@pytest.mark.parametrize("change", [freeu, channels_last, slicing])
def test_settings_of_the_host(change: Any) -> None:
    pipe, kwargs, guidance = build("sd")
    change(pipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    assert_clean(before, *roots(pipe))
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert distance(guided, naive(pipe, kwargs, guidance)) <= 1e-12
    assert distance(guided, plain) > 1e-3


def test_under_autocast() -> None:
    pipe, kwargs, guidance = build("sd", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = pipes.run(pipe, kwargs)
        with attnctl.control(pipe, guidance):
            guided = pipes.run(pipe, kwargs)
        by_hand = naive(pipe, kwargs, guidance)
        assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert distance(guided, by_hand) < 0.05
    assert distance(guided, by_hand) < 0.2 * distance(guided, plain)
