"""The contract of whole, unmodified pipelines: guidance is what its definition says, whatever else the pipeline does,
and nothing is left behind, whatever goes wrong."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, distance, guidances, snapshot
from naive_guidance import EXACT, LAYOUTS, PLAIN, build, naive, roots
from torch import nn

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG, SoftPAG

pytestmark = pytest.mark.usefixtures("no_grad")


DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
# diffusers' PAG pipelines perturb these by default; SD3's and PixArt's patterns also hit blocks.10 and beyond.
TWIN_SITES = {"sd": "mid", "sdxl": "mid", "sd3": "transformer_blocks.1.attn", "pixart": "transformer_blocks.1.attn1"}


@pytest.mark.parametrize("recipe", PLAIN)
def test_guided_run_is_exact_and_leaves_no_trace(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        steps = handle._watched[0].state.step
        assert handle.passes == steps > 0
        assert torch.equal(guided, pipes.run(pipe, kwargs))
        handle.enabled = False
        assert torch.equal(plain, pipes.run(pipe, kwargs))
        assert handle.passes == 2 * steps
    assert_clean(before, *roots(pipe))
    assert torch.equal(plain, pipes.run(pipe, kwargs))
    assert distance(guided, plain) > 1e-3
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "sd3", "pixart", "flux", "wan", "animatediff", "qwen"])
def test_soft_heads_in_two_layers(recipe: str) -> None:
    pipe, kwargs, _ = build(recipe)
    guidance = guidances(pipes.denoiser(pipe))["SoftPAG"]
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


# Against diffusers' own PAG pipelines


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("recipe", pipes.PAG_TWINS)
def test_equal_to_diffusers_pag(recipe: str, cfg: float) -> None:
    pipe, kwargs = pipes.build(recipe, torch.float64)
    kwargs |= {"guidance_scale": cfg}
    twin = pipes.run(pipes.pag_twin(pipe), kwargs | {"pag_scale": 3.0})
    with attnctl.control(pipe, PAG(scale=3.0, sites=TWIN_SITES[recipe])):
        ours = pipes.run(pipe, kwargs)
    assert distance(ours, twin) <= 1e-12
    assert distance(ours, pipes.run(pipe, kwargs)) > 1e-3


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("recipe", ["sd", "sdxl"])
def test_guidance_rescale_leaves_the_added_guidance_alone(recipe: str, rescale: float) -> None:
    # Rescale measures the prompt's prediction: it must see c, not c + d, and u must carry d alone.
    pipe, kwargs = pipes.build(recipe, torch.float64)
    pipe.scheduler = diffusers.DDIMScheduler(**DDIM)
    kwargs |= {"guidance_scale": 5.0, "guidance_rescale": rescale}
    twin = pipes.run(pipes.pag_twin(pipe), kwargs | {"pag_scale": 3.0})
    for combine in ("auto", "rescale_safe"):
        with attnctl.control(pipe, PAG(scale=3.0, sites="mid", combine=combine)):
            assert distance(pipes.run(pipe, kwargs), twin) <= 1e-12
    with attnctl.control(pipe, PAG(scale=3.0, sites="mid", combine="add")):
        assert (distance(pipes.run(pipe, kwargs), twin) <= 1e-12) == (rescale == 0)


# Rows


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(
    ("recipe", "images"),
    [
        *(("sd", 1), ("sd", 2), ("sdxl", 2), ("pixart", 2), ("sd_inpaint9", 2), ("sd_controlnet", 2)),
        *(("sd3", 1), ("animatediff", 1)),  # these two hosts take one image for a prompt given as an embedding
    ],
)
def test_batches_of_prompts(recipe: str, images: int, cfg: float) -> None:
    pipe, kwargs, guidance = build(recipe, batch=2)
    kwargs |= {"guidance_scale": cfg} | ({"num_images_per_prompt": images} if images > 1 else {})
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs, num_inference_steps=2)
        rows = handle._watched[0].state.rows
    assert rows.prompts == 2 * images
    assert rows.role == ("both" if cfg > 1 else "all")
    layout = "uncond_first" if cfg > 1 else "cond"
    assert distance(guided, naive(pipe, kwargs, guidance, layout=layout, num_inference_steps=2)) <= EXACT[recipe]


@pytest.mark.parametrize("recipe", ["flux", "flux_cfg", "qwen", "wan"])
def test_batches_of_prompts_in_other_layouts(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe, batch=2)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


def test_two_images_from_equal_latents_are_not_taken_for_a_negative_prompt() -> None:
    pipe, kwargs, guidance = build("flux", batch=2)
    latents = zoo.Draw(1, 3).rows(8 * 6, 16).double().repeat(2, 1, 1)
    plain = pipes.run(pipe, kwargs, latents=latents)
    with (
        attnctl.control(pipe, guidance),
        pytest.raises(UnsupportedModelError, match=r'two images.*layout="cond"'),
    ):
        pipes.run(pipe, kwargs, latents=latents)
    with attnctl.control(pipe, guidance, layout="cond"):
        guided = pipes.run(pipe, kwargs, latents=latents)
    assert distance(guided, naive(pipe, kwargs, guidance, layout="cond", latents=latents)) <= 1e-12
    assert torch.equal(plain, pipes.run(pipe, kwargs, latents=latents))
    sd, kwargs, guidance = build("sd", batch=2)  # says itself that there is no guidance
    latents = zoo.Draw(1, 3).rows(4, 16, 12).double().repeat(2, 1, 1, 1)
    with attnctl.control(sd, guidance):
        guided = pipes.run(sd, kwargs, latents=latents, guidance_scale=1.0)
    reference = naive(sd, kwargs, guidance, layout="cond", latents=latents, guidance_scale=1.0)
    assert distance(guided, reference) <= 1e-12


def count_rows(pipe: Any, run: Callable[[], Any]) -> list[int]:
    """Count the rows of every pass through a denoiser, guidance passes included."""
    model = pipes.denoiser(pipe)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    rows: list[int] = []
    last = attnctl.find_sites(model)[-1].module
    hook = last.register_forward_pre_hook(
        lambda m, a, k: rows.append((a or [*k.values()])[0].shape[0]), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    assert first is not None
    return rows


@pytest.mark.parametrize("recipe", ["sd", "sd3", "wan"])
def test_rows_computed_are_the_rows_planned(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    steps = 4
    plain = count_rows(pipe, lambda: pipes.run(pipe, kwargs, num_inference_steps=steps))
    base = sum(plain)
    plans: list[tuple[dict[str, Any], int]] = [
        ({}, steps),
        ({"scale": 0.0}, 0),
        ({"start": 0.5}, 2),
        ({"stop": 0.25}, 1),
        ({"start": 0.25, "stop": 0.75}, 2),
        ({"start": 0.3, "stop": 0.45}, 0),
        ({"every": 2}, 2),
        ({"every": 3}, 2),
        ({"adaptive": 1.0, "adaptive_form": "timestep"}, 0),
        ({"adaptive": 1.0}, 0),
    ]
    for change, expected in plans:
        changed = dataclasses.replace(guidance, **change)
        with attnctl.control(pipe, changed) as handle:
            rows = count_rows(pipe, lambda: pipes.run(pipe, kwargs, num_inference_steps=steps))
            first_step = change.get("adaptive") is not None and recipe != "sd"  # flow matching begins at t = 1000
            assert sum(rows) == base + expected + first_step, change
            assert handle.passes == expected + first_step


@pytest.mark.parametrize("recipe", ["sd", "wan"])
def test_weight_zero_is_the_plain_run(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    for change in ({"scale": 0.0}, {"start": 0.4, "stop": 0.6}):
        with attnctl.control(pipe, dataclasses.replace(guidance, **change)) as handle:
            assert torch.equal(pipes.run(pipe, kwargs), plain)
            assert handle.passes == 0


def test_window_counts_the_steps_that_run() -> None:
    pipe, kwargs, guidance = build("sd_img2img")
    call = {"num_inference_steps": 10, "strength": 0.5}  # the last five of ten timesteps
    windowed = dataclasses.replace(guidance, start=0.4, stop=0.8)
    with attnctl.control(pipe, windowed) as handle:
        guided = pipes.run(pipe, kwargs, **call)
        assert handle.passes == 2
    by_hand = naive(pipe, kwargs, guidance, weight=lambda step: float(step in (2, 3)), **call)
    assert distance(guided, by_hand) <= 1e-12
    adaptive = dataclasses.replace(guidance, adaptive=0.5)
    times = pipe.scheduler.timesteps[5:].tolist()
    assert len(times) == 5
    with attnctl.control(pipe, adaptive):
        guided = pipes.run(pipe, kwargs, **call)
    by_hand = naive(pipe, kwargs, guidance, weight=lambda i: max(0.0, 1 - 0.5**4 * (1000 - times[i])), **call)
    assert distance(guided, by_hand) <= 1e-12


def test_every_reuses_the_last_difference() -> None:
    pipe, kwargs, guidance = build("sd")
    unet, held, calls = pipe.unet, [], 0
    twin = copy.deepcopy(unet)
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    replace = Replace(sites=[s.name for s in sites], function=guidance.branch(sites, twin).perturb)
    attnctl.control(twin, replace, layout="cond")

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal calls
        if calls % 2 == 0:
            held[:] = [guidance.scale * (output[0] - twin(*args, **given)[0])[1:]]
        calls += 1
        return (output[0] + held[0],)

    hook = unet.register_forward_hook(guide, with_kwargs=True)
    by_hand = pipes.run(pipe, kwargs, num_inference_steps=5)
    hook.remove()
    with attnctl.control(pipe, dataclasses.replace(guidance, every=2)) as handle:
        guided = pipes.run(pipe, kwargs, num_inference_steps=5)
        assert handle.passes == 3
        assert torch.equal(guided, pipes.run(pipe, kwargs, num_inference_steps=5))
        assert handle.passes == 6
    assert distance(guided, by_hand) <= 1e-12


# Several controls


def test_two_controls_add_up_and_equal_ones_share_a_pass() -> None:
    pipe, kwargs, guidance = build("sd")
    soft = SoftPAG(scale=1.5, u=0.5, heads=[("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 1)])
    with attnctl.control(pipe, guidance, soft) as handle:
        both = pipes.run(pipe, kwargs)
        assert handle.passes == 6
    assert distance(both, naive(pipe, kwargs, guidance, soft)) <= 1e-12
    parts = [dataclasses.replace(guidance, scale=s) for s in (1.0, 1.5)]
    with attnctl.control(pipe, *parts) as handle:
        shared = pipes.run(pipe, kwargs)
        assert handle.passes == 3
    assert distance(shared, naive(pipe, kwargs, guidance)) <= 1e-12
    windows = [dataclasses.replace(guidance, stop=0.5), dataclasses.replace(guidance, start=0.5)]
    with attnctl.control(pipe, *windows) as handle:
        assert distance(pipes.run(pipe, kwargs), shared) <= 1e-12
        assert handle.passes == 3


def test_switching_off_and_on_between_calls() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        for enabled in (False, True, True, False, False, True):
            handle.enabled = enabled
            assert torch.equal(pipes.run(pipe, kwargs), guided if enabled else plain)
