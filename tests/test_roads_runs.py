"""What runs counts, not what was attached: steps, timesteps, words, guidance scale and scheduler of a call."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo_pipelines as pipes
from contract import Through, assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.errors import ConflictError, UnsupportedModelError
from attnctl.processors import PAG, SLG, AStar, Capture, Guidance, Rescale

Kwargs = dict[str, Any]


def sharing(pipe: Any, scheduler: Any = None, kind: Any = None, **parts: Any) -> Any:
    """Build another pipeline of the same components, with a scheduler of its own if one is given."""
    components = {**pipe.components, **({} if scheduler is None else {"scheduler": scheduler}), **parts}
    options = {"requires_safety_checker": False} if "safety_checker" in components else {}
    return pipes.quiet((kind or type(pipe))(**components, **options))


def alone(pipe: Any, kwargs: Kwargs, *controls: Any, **overrides: Any) -> tuple[Tensor, int]:
    """Run a pipeline with controls attached to itself."""
    with attnctl.control(pipe, *controls) as handle:
        return pipes.run(pipe, kwargs, **overrides), handle.passes


# Pipelines that share a denoiser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, "own", "euler"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_pipeline_of_the_same_components_has_its_own_steps(scheduler: str | None, kind: str) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    made = {None: None, "own": diffusers.DDIMScheduler(), "euler": diffusers.EulerDiscreteScheduler()}[scheduler]
    host = diffusers.StableDiffusionImg2ImgPipeline if kind == "image" else None
    other, call = sharing(pipe, made, host), kwargs
    if kind == "image":
        call = {k: v for k, v in kwargs.items() if k not in ("height", "width", "latents")}
        call |= {
            "image": torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(2)).double(),
            "strength": 0.6,
        }
    control = PAG(scale=2.0, sites="mid", stop=0.5)
    steps = {"num_inference_steps": 10}
    expected, passes = alone(other, call, control, **steps)
    assert passes == (3 if kind == "image" else 5)
    before = snapshot(pipe.unet, pipe.scheduler, other.scheduler)
    with attnctl.control(pipe, control) as handle:
        first = pipes.run(pipe, kwargs)  # 3 steps of its own
        done = handle.passes
        for _ in range(2):
            assert torch.equal(pipes.run(other, call, **steps), expected)
            assert handle.passes == done + passes
            done = handle.passes
        assert torch.equal(pipes.run(pipe, kwargs), first)
    assert_clean(before, pipe.unet, pipe.scheduler, other.scheduler)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_and_rescale_are_those_of_the_pipeline_that_runs(rescale: float) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    other = sharing(pipe, diffusers.DDIMScheduler())
    for combine in ("auto", "rescale_safe"):
        control = PAG(scale=2.0, sites="mid", combine=combine)  # type: ignore[arg-type]
        call = {"guidance_scale": 3.5, "guidance_rescale": rescale}
        expected, _ = alone(other, kwargs, control, **call)
        with attnctl.control(pipe, control):
            pipes.run(pipe, kwargs, guidance_scale=9.0, guidance_rescale=0.3)
            assert torch.equal(pipes.run(other, kwargs, **call), expected)


def test_words_are_those_of_the_call_that_runs() -> None:
    pipe, kwargs = pipes.build("sd")
    other = sharing(pipe, diffusers.DDIMScheduler())
    capture = Capture(words=("cat",))
    texts = {"prompt": "a fine dog beside a cat", "negative_prompt": "bad"}
    with attnctl.control(other, capture) as handle:
        pipes.run(other, kwargs | texts)
        expected = handle.maps
    with attnctl.control(pipe, capture) as handle:
        pipes.run(pipe, kwargs)
        pipes.run(other, kwargs | texts)
        maps = handle.maps
    assert maps.tokens == expected.tokens
    assert maps.prompts == expected.prompts
    assert torch.equal(maps["cat"], expected["cat"])


def test_latents_are_moved_in_the_pipeline_that_runs_or_refused() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    control = AStar(concepts=(1, 2), sites="mid")
    for scheduler in (diffusers.DDIMScheduler(), None):
        other = sharing(pipe, scheduler)
        expected, _ = alone(other, kwargs, control, num_inference_steps=4)
        with attnctl.control(pipe, control):
            pipes.run(pipe, kwargs)
            assert torch.equal(pipes.run(other, kwargs, num_inference_steps=4), expected)
    other = sharing(pipe, diffusers.EulerDiscreteScheduler())
    with attnctl.control(pipe, control), pytest.raises(UnsupportedModelError, match="must be attached to the pipeline"):
        pipes.run(other, kwargs)


# Steps and timesteps -----------------------------------------------------------------------------------------------


def by_hand_times(pipe: Any, kwargs: Kwargs, control: Guidance, **call: Any) -> tuple[list[float], list[float]]:
    """Return the timesteps that a control reckoned with, and those that the denoiser was called with."""
    reckoned, given = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, k: given.append(float(a[1])), with_kwargs=True)
    through = Through(sites="mid")
    with attnctl.control(pipe, control, through) as handle:
        state = handle._watched[0].state
        late = pipe.unet.register_forward_pre_hook(lambda m, a, k: reckoned.append(state.timestep), with_kwargs=True)
        pipes.run(pipe, kwargs, **call)
        late.remove()
    hook.remove()
    return reckoned, given


@pytest.mark.parametrize(
    "call", [{"denoising_end": 0.5}, {"latents": 1, "denoising_start": 0.3, "denoising_end": 0.8}, {}]
)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_timestep_is_the_one_that_the_denoiser_is_called_with(scheduler: str, call: Kwargs) -> None:
    pipe, kwargs = pipes.build("sdxl")
    pipe.scheduler = getattr(diffusers, scheduler)()
    if "denoising_start" in call:
        pipe = sharing(pipe, kind=diffusers.StableDiffusionXLImg2ImgPipeline, add_watermarker=False)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("height", "width")} | {
            "image": torch.randn(1, 4, 16, 12)
        }
        call = {k: v for k, v in call.items() if k != "latents"}
    reckoned, given = by_hand_times(
        pipe, kwargs, PAG(scale=2.0, sites="mid", adaptive=0.5), num_inference_steps=8, **call
    )
    assert len(given) < 8 or not call
    assert np.allclose(reckoned, given, atol=1e-3)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
def test_controls_attached_in_a_callback_act_at_the_run_s_own_steps(scheduler: str) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    pipe.scheduler = getattr(diffusers, scheduler)()
    control = PAG(scale=2.0, sites="mid", start=0.5)
    handles: list[Any] = []

    def attach(pipe: Any, i: int, t: Any, tensors: Kwargs) -> Kwargs:
        if i == 1:
            handles.append(attnctl.control(pipe, control))
        return tensors

    expected, passes = alone(pipe, kwargs, control, num_inference_steps=6)
    out = pipes.run(pipe, kwargs, num_inference_steps=6, callback_on_step_end=attach)
    assert torch.equal(out, expected)
    assert handles[0].passes == passes
    handles[0].detach()


def test_steps_of_a_scheduler_s_copy_are_not_steps_of_the_run() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    control, capture = PAG(scale=2.0, sites="mid", stop=0.5), Capture(words=("cat",), keep=("steps",))
    expected, passes = alone(pipe, kwargs, control, num_inference_steps=6)

    def preview(pipe: Any, i: int, t: Any, tensors: Kwargs) -> Kwargs:
        twin = copy.deepcopy(pipe.scheduler)
        for _ in range(2):
            twin.step(tensors["latents"], t, tensors["latents"])
        twin.set_timesteps(3)
        return tensors

    with attnctl.control(pipe, control, capture) as handle:
        assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=6, callback_on_step_end=preview), expected)
        assert handle.passes == passes == 3
        assert handle.maps.steps == tuple(range(6))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_pipeline_that_steps_with_a_copy_is_refused(guidance: float) -> None:
    pipe, kwargs = pipes.build("sd")
    other = sharing(pipe)
    before = snapshot(pipe.unet, pipe.scheduler)

    control = PAG(scale=2.0, sites="mid", stop=0.5)
    with attnctl.control(other, control), pytest.raises(UnsupportedModelError, match="scheduler"):
        _steps_with_a_copy(other, kwargs | {"guidance_scale": guidance})
    assert_clean(before, pipe.unet, pipe.scheduler)


def _steps_with_a_copy(pipe: Any, kwargs: Kwargs) -> None:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    rows = 2 if kwargs["guidance_scale"] > 1 else 1
    x = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(rows, 7, pipe.unet.config.cross_attention_dim)
    pipe._guidance_scale = kwargs["guidance_scale"]
    pipe._cross_attention_kwargs = None
    for t in scheduler.timesteps:
        noise = pipe.unet(torch.cat([x] * rows), t, encoder_hidden_states=text, return_dict=False)[0]
        x = scheduler.step(noise[-1:], t, x).prev_sample


# What never acts, and what runs no more ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_control_that_no_step_reaches_is_told(steps: int) -> None:
    pipe, kwargs = pipes.build("sd3")
    late = PAG(scale=2.0, sites="joint", start=0.9)
    with (
        attnctl.control(pipe, SLG(), late, PAG(scale=0.0, sites="joint")),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        pipes.run(pipe, kwargs, num_inference_steps=steps)
    texts = [str(w.message) for w in seen if "acted at no step" in str(w.message)]
    assert len(texts) == 2
    for text, name in zip(texts, ("SLG", "PAG"), strict=True):
        assert name in text
        assert ("the run's only step" if steps == 1 else f"the {steps} steps") in text
    assert ("0.25" in texts[0]) == (steps == 4)


def test_a_weight_that_falls_to_nothing_before_its_window_is_the_cause() -> None:
    pipe, kwargs = pipes.build("sd3")
    fallen = PAG(scale=2.0, sites="joint", scope="all", start=0.6, adaptive=1.0)
    with attnctl.control(pipe, fallen), pytest.warns(UserWarning, match="adaptive=1 has its weight fall to 0"):
        pipes.run(pipe, kwargs)


def test_nothing_is_told_where_all_act_or_nothing_ran() -> None:
    pipe, kwargs = pipes.build("sd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attnctl.control(pipe, PAG(scale=2.0, sites="mid", start=0.4, stop=0.7)) as handle:
            pipes.run(pipe, kwargs)
            handle.enabled = False
            pipes.run(pipe, kwargs)
        with attnctl.control(pipe.unet, PAG(scale=2.0, sites="mid", start=0.5), layout="cond") as handle:
            x, text = torch.randn(1, 4, 16, 12), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
            for i in range(3):
                handle.set_step(i, 3)
                pipe.unet(x, 500, text)


def test_a_hand_written_loop_hears_of_what_never_acts() -> None:
    pipe, _ = pipes.build("sd")
    x, text = torch.randn(1, 4, 16, 12), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    with attnctl.control(pipe.unet, PAG(scale=2.0, sites="mid", start=0.9), layout="cond") as handle:
        for i in range(3):
            handle.set_step(i, 3)
            if i < 2:
                pipe.unet(x, 500, text)
        with pytest.warns(UserWarning, match="the 3 steps of the run begin at 0, 0.333, 0.667"):
            pipe.unet(x, 500, text)


@pytest.mark.parametrize("how", ["other", "compiled", "compiled in place"])
def test_a_denoiser_that_is_replaced_under_control_is_refused(how: str) -> None:
    pipe, kwargs = pipes.build("sd")
    own = pipe.unet
    before = snapshot(own, pipe.scheduler)
    with attnctl.control(pipe, PAG(scale=2.0, sites="mid")) as handle:
        pipes.run(pipe, kwargs)
        if how == "other":
            pipe.unet = copy.deepcopy(own)
        elif how == "compiled":
            pipe.unet = torch.compile(own, backend="eager")
        else:
            own.compile(backend="eager")
        error = ConflictError if how == "other" else UnsupportedModelError
        with pytest.raises(error, match=r"pipe\.unet was"):
            pipes.run(pipe, kwargs)
        handle.enabled = False
        pipe.unet, own._compiled_call_impl = own, None
        pipes.run(pipe, kwargs)
    for name in ("_compiled_call_impl", "_is_torch_compile"):  # what torch leaves on a module that it compiled
        vars(own).pop(name, None)
    assert_clean(before, own, pipe.scheduler)


def test_a_denoiser_that_is_replaced_in_the_run_is_refused_at_the_next_step() -> None:
    pipe, kwargs = pipes.build("sd")

    def swap(pipe: Any, i: int, t: Any, tensors: Kwargs) -> Kwargs:
        pipe.unet = copy.deepcopy(pipe.unet)
        return tensors

    with attnctl.control(pipe, PAG(scale=2.0, sites="mid")), pytest.raises(ConflictError, match="was replaced"):
        pipes.run(pipe, kwargs, callback_on_step_end=swap)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_rope"])
def test_a_scale_that_the_pipeline_sets_later_is_not_read(name: str) -> None:
    pipe, kwargs = pipes.build(name, torch.float64)
    call = {"use_dynamic_cfg": True, "guidance_scale": 6.0}
    site = attnctl.find_sites(pipe)[1].name
    added, _ = alone(pipe, kwargs, PAG(scale=2.0, sites=site, scope="all", combine="add"), **call)
    safe, _ = alone(pipe, kwargs, PAG(scale=2.0, sites=site, scope="all", combine="rescale_safe"), **call)
    assert torch.allclose(added, safe, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sd", "sana", "pixart", "animatediff"])
def test_a_scale_that_a_callback_changes_counts_where_the_pipeline_reads_it(name: str) -> None:
    """Some pipelines read the attribute in each step, others the argument of the call."""
    pipe, kwargs = pipes.build(name, torch.float64)

    def change(pipe: Any, i: int, t: Any, tensors: Kwargs) -> Kwargs:
        pipe._guidance_scale = 2.0 + i
        return tensors

    site = attnctl.find_sites(pipe)[0].name
    outs = [
        alone(pipe, kwargs, PAG(scale=2.0, sites=site, combine=how), callback_on_step_end=change)[0]  # type: ignore[arg-type]
        for how in ("add", "rescale_safe")
    ]
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[0].abs().max()


class Still(diffusers.T2IAdapter):
    """An adapter that adds nothing to a tiny UNet, of whose picture nobody asks."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.zeros(1, 1, 1, 1, dtype=x.dtype)] * 2


def test_a_rescale_that_only_the_call_has_is_read() -> None:
    pipe, kwargs = pipes.build("sdxl", torch.float64)
    adapter = Still(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=8).double()
    adapter = sharing(pipe, kind=diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter)
    call: Kwargs = {"image": torch.rand(1, 3, 32, 24), "guidance_rescale": 0.7}
    ways: Any = ("auto", "rescale_safe", "add")
    outs = {how: alone(adapter, kwargs, PAG(scale=2.0, sites="mid", combine=how), **call)[0] for how in ways}
    assert torch.equal(outs["auto"], outs["rescale_safe"])
    assert not torch.allclose(outs["auto"], outs["add"])
    with attnctl.control(adapter, Rescale(phi=0.7)), pytest.raises(ConflictError, match=r"guidance_rescale=0\.7"):
        pipes.run(adapter, kwargs, **call)
