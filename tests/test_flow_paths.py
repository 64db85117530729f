"""Rules of flow inversion against the authors' functions, and paths of pipelines against hand-written loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from contract import distance
from safetensors.torch import load_file
from torch import Tensor

from attnctl.core.hosts.paths import Bend, PathScheduler, Route, base_of
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.flow import evaluations, flow_edit, integrate, walk

FIXTURE = Path(__file__).parent / "fixtures" / "flow_editing"
CASES = {k: v.double() for k, v in load_file(FIXTURE / "flow.safetensors").items()}
SETTINGS = json.loads((FIXTURE / "flow.json").read_text())


def field(c: Tensor) -> Callable[[Tensor, float], Tensor]:
    return lambda x, s: torch.tanh(x @ CASES["A"] + s * CASES["b"] + c) @ CASES["B"]


def guided(c: Tensor, scale: float) -> Callable[[Tensor, float], Tensor]:
    u = field(CASES["c_uncond"])
    return lambda x, s: u(x, s) + scale * (field(c)(x, s) - u(x, s))


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("euler", "denoise"),
        ("midpoint", "denoise_rf_solver"),
        ("midpoint", "denoise_midpoint"),
        ("fireflow", "denoise_fireflow"),
    ],
)
def test_rules_equal_the_official_ones(rule: Any, name: str) -> None:
    down = CASES["sigmas"].tolist()
    noise = integrate(field(CASES["c_source"]), walk(rule, CASES["x0"], down[::-1]))
    assert distance(noise, CASES[f"{name}.noise"]) <= 1e-12
    assert distance(integrate(field(CASES["c_source"]), walk(rule, noise, down)), CASES[f"{name}.back"]) <= 1e-12
    assert len(evaluations(rule, down)) == SETTINGS["nfe"][name] / 2


@pytest.mark.parametrize("alpha", ["1", "0.6"])
def test_uniinv(alpha: str) -> None:
    levels = [0.0, *CASES[f"uniinv.zero0.alpha{alpha}.sigmas"].tolist()]
    out = integrate(field(CASES["c_source"]), walk("uniinv", CASES["x0"], levels))
    assert distance(out, CASES[f"uniinv.zero0.alpha{alpha}"]) <= 1e-6


@pytest.mark.parametrize("name", list(SETTINGS["flowedit"]["cases"]))
def test_flow_edit(name: str) -> None:
    case = SETTINGS["flowedit"]["cases"][name]
    noises = iter(CASES[f"{name}.noises"])
    levels = [*(CASES[f"{name}.timesteps"] / 1000).tolist(), 0.0][-case["n_max"] - 1 :]
    source, target = guided(CASES["c_source"], 3.5), guided(CASES["c_target"], 13.5)

    def both(z: Tensor, s: float) -> Tensor:
        a, b = z.chunk(2)
        return torch.cat([source(a, s), target(b, s)])

    out = integrate(both, flow_edit(CASES["x0"], levels, lambda: next(noises), case["n_avg"]))
    assert distance(out.chunk(2)[1], CASES[name]) <= 1e-6


def test_flow_edit_of_nothing() -> None:
    x, levels = CASES["x0"], CASES["sigmas"].tolist()
    source = guided(CASES["c_source"], 3.5)
    draw = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=draw, dtype=x.dtype)

    same = integrate(lambda z, s: source(z, s), flow_edit(x, levels, noise))
    assert distance(same.chunk(2)[1], x) <= 1e-12  # both prompts are one
    assert torch.equal(integrate(lambda z, s: source(z, s), flow_edit(x, levels[-1:], noise)).chunk(2)[1], x)


def test_unknown_rule() -> None:
    with pytest.raises(ConfigError, match="euler, midpoint, fireflow, uniinv"):
        walk("heun", CASES["x0"], [0.0, 1.0])  # type: ignore[arg-type]


# Schedulers ------------------------------------------------------------------------------------------------------


def drive(scheduler: PathScheduler, model: Callable[[Tensor, float], Tensor], x: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x, return_dict=False)[0]
    return x


def test_euler_of_flow_is_the_hosts_own() -> None:
    host = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    model = lambda x, t: torch.sin(3 * x + t / 500)  # noqa: E731
    host.set_timesteps(7)
    y = x
    for t in host.timesteps:
        y = host.step(model(y, float(t)), t, y, return_dict=False)[0]
    assert distance(drive(PathScheduler(base_of(host), Route("euler")), model, x, 7), y) <= 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_of_other_noise_is_ddim(kind: str) -> None:
    host = diffusers.CogVideoXDDIMScheduler(prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    model = lambda x, t: torch.sin(3 * x + t / 500)  # noqa: E731
    host.set_timesteps(8)
    y = x
    for t in host.timesteps:
        y = host.step(model(y, int(t)), int(t), y, return_dict=False)[0]
    assert distance(drive(PathScheduler(base_of(host), Route("euler")), model, x, 8), y) <= 1e-5


def test_a_path_leads_back() -> None:
    """The finer the steps, the nearer the way back ends; better rules end nearer than Euler's."""
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = lambda x, t: torch.tanh(x + t / 1000)  # noqa: E731
    base = base_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    errors: dict[Any, float] = {}
    for rule in ("euler", "midpoint", "fireflow", "uniinv"):
        for steps in (5, 20):
            trail: list[Tensor] = []
            up = PathScheduler(base, Route(rule, up=True), lambda i, y, trail=trail: trail.append(y))
            noise = drive(up, model, x, steps)
            assert len(trail) == steps + 1
            assert torch.equal(trail[0], x)
            assert torch.equal(trail[-1], noise)
            errors[rule, steps] = distance(drive(up.back(), model, noise, steps), x)
        assert errors[rule, 20] < errors[rule, 5] / 3
    assert max(errors[r, 20] for r in ("midpoint", "fireflow", "uniinv")) < errors["euler", 20] / 3


def test_rf_inversion_returns_the_source() -> None:
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = lambda x, t: torch.tanh(x + t / 1000)  # noqa: E731
    base = base_of(diffusers.FlowMatchEulerDiscreteScheduler())
    up = drive(PathScheduler(base, Route(up=True, bend=Bend(noise, 0.5))), model, x, 10)
    assert distance(up, drive(PathScheduler(base, Route(up=True)), model, x, 10)) > 0.1
    straight = drive(PathScheduler(base, Route(up=True, bend=Bend(noise, 1.0))), model, x, 10)
    assert distance(straight, noise) <= 1e-6
    assert distance(drive(PathScheduler(base, Route(bend=Bend(x, 1.0))), model, up, 10), x) <= 1e-6
    assert distance(drive(PathScheduler(base, Route(bend=Bend(x, 1.0, 3))), model, up, 10), x) > 1e-3


def test_changes_between_steps_are_carried() -> None:
    """Latents that a control changes on the way are gone on from, by rules that call the model off the path too."""
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    for rule in ("euler", "midpoint", "fireflow"):
        scheduler = PathScheduler(base_of(diffusers.FlowMatchEulerDiscreteScheduler()), Route(rule))
        scheduler.set_timesteps(4)
        y = x
        for i, t in enumerate(scheduler.timesteps):
            y = scheduler.step(torch.zeros_like(y), t, y + 1 if i == 2 else y, return_dict=False)[0]
        torch.testing.assert_close(y, x + 1)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "wan", "ltx", "cogvideox", "pixart", "sana"])
def test_pipelines_run_on_paths(name: str) -> None:
    """Every host asks for its levels in its own way; Euler's rule gives what its own Euler does."""
    pipe, kwargs = pipes.build(name)
    kwargs = kwargs | {"guidance_scale": 1.0} if "true_cfg_scale" not in kwargs else kwargs | {"true_cfg_scale": 1.0}
    base = pipe.scheduler = base_of(pipe.scheduler)
    start = pipes.run(pipe, kwargs, num_inference_steps=2).float()
    plain = pipes.run(pipe, kwargs, num_inference_steps=2, latents=start)
    pipe.scheduler = PathScheduler(base, Route("euler"))
    assert distance(pipes.run(pipe, kwargs, num_inference_steps=2, latents=start), plain) <= 1e-5
    up = pipe.scheduler = PathScheduler(base, Route("fireflow", up=True))
    noise = pipes.run(pipe, kwargs, num_inference_steps=2, latents=start)
    assert noise.shape == start.shape
    assert up.levels == sorted(up.levels)
    assert len(up.at) == 3


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.EDMEulerScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedulers_that_cannot_be_inverted(scheduler: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="Set"):
        base_of(scheduler)


def test_wans_own_scheduler() -> None:
    wan = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    assert base_of(wan).config.shift == 5.0
    assert isinstance(base_of(diffusers.DPMSolverMultistepScheduler()), diffusers.DDIMScheduler)
