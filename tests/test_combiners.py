"""Rules that put predictions together: against recorded guiders, by hand on whole pipelines, together, and refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from combined_runs import SCALE, apg, built, by_hand, dot, fdg, flux_grid, in_x0, mag, tcfg, zero_star
from contract import assert_clean, distance, snapshot
from diffusers.guiders import tangential_classifier_free_guidance as tangential
from naive_guidance import EXACT, roots
from safetensors.torch import load_file
from torch import Tensor

import attnctl
from attnctl.core.call import CallState
from attnctl.core.hosts.spaces import Way
from attnctl.kernels import combining
from attnctl.pipelines.guider import ControlGuider
from attnctl.processors import (
    APG,
    FDG,
    PAG,
    SEG,
    SLG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    GuidanceInterval,
    MaG,
    Rescale,
)
from attnctl.processors.combining.combiner import Moment

pytestmark = pytest.mark.usefixtures("no_grad")
FIXTURES = Path(__file__).parent / "fixtures"
ALL = (APG(), CFGZeroStar(), TCFG(), MaG(), FDG(), CFGPlusPlus(), GuidanceInterval(), Rescale())


# Formulas


CONTROLS = {
    "zero_star": CFGZeroStar(scale=5.0),
    "apg": APG(scale=5.0, norm=3.0),
    "apg_plain": APG(scale=5.0, eta=1.0, momentum=0.0),
    "tcfg": TCFG(scale=5.0),
    "mag": MaG(scale=10.0),
}


@pytest.mark.parametrize("shape", ["image", "video", "tokens"])
def test_equal_to_diffusers_guiders(shape: str) -> None:
    cases = load_file(FIXTURES / "combiners/cases.safetensors")
    names = {c["name"] for c in json.loads((FIXTURES / "combiners/cases.json").read_text()) if c["shape"] == shape}
    loose = {"zero_star": 1e-6, "tcfg": 1e-5}
    memories: dict[str, dict[Any, Any]] = {name: {} for name in CONTROLS}
    for step in range(3):
        c, u = cases[f"{shape}.{step}.c"], cases[f"{shape}.{step}.u"]
        made = {"cfg": combining.linear(u, c, 5.0)}
        made["cfg_rescale"] = Rescale().finished(made["cfg"], c, _moment(step, {}))
        for name, control in CONTROLS.items():
            made[name] = control.total(u, c, Way(), _moment(step, memories[name]))
        for name in names:
            expected = cases[f"{shape}.{step}.{name}"]
            assert (made[name] - expected).abs().max() <= loose.get(name, 1e-12) * expected.abs().max(), name


def _moment(step: int, memory: dict[Any, Any], scale: float | None = None) -> Moment:
    return Moment(CallState(step=step, steps=10), scale, memory, step)


def test_frequency_decoupled_equals_the_recording() -> None:
    cases = load_file(FIXTURES / "fdg/cases.safetensors")
    for name, control in (("plain", FDG()), ("parallel", FDG(scales=(8.0, 3.0), parallel=(0.2, 1.0)))):
        out = control.rule(cases[f"{name}.u"], cases[f"{name}.c"], _moment(0, {}))
        assert (out - cases[f"{name}.out"]).abs().max() <= 1e-12


def test_the_momentum_fills_before_it_acts() -> None:
    draws = [[torch.randn(1, 4, 6, 6, dtype=torch.float64) for _ in range(2)] for _ in range(2)]
    filling, plain = APG(fill_steps=1, momentum=0.5), APG(momentum=0.5)
    memories: list[dict[Any, Any]] = [{}, {}]
    first, second = ([c.rule(u, p, _moment(i, m, 3.0)) for c, m in zip((filling, plain), memories, strict=True)]
                     for i, (u, p) in enumerate(draws))  # fmt: skip
    assert torch.equal(first[0], combining.linear(*draws[0], 3.0))
    assert not torch.equal(*first)
    assert torch.equal(*second)


@pytest.mark.parametrize("shape", [(2, 3, 12, 20), (1, 4, 7, 5), (1, 2, 3, 9, 16), (1, 1, 2, 1)])
def test_pyramids_of_any_size_give_back_what_they_were_made_of(shape: tuple[int, ...]) -> None:
    u, c = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    for levels in (2, 3):
        flat = combining.frequency_decoupled(u, c, (3.0,) * levels, (1.0,) * levels)
        assert torch.allclose(flat, combining.linear(u, c, 3.0), atol=1e-12, rtol=0)


def test_limits_of_the_rules() -> None:
    u, c = (torch.randn(2, 4, 6, 6, dtype=torch.float64) for _ in range(2))
    one = [APG(scale=1.0, eta=1.0, norm=0.0, momentum=0.0), CFGZeroStar(scale=1.0), MaG(scale=1.0), FDG(scales=(1, 1))]
    for control in (*one, TCFG(scale=1.0), CFGPlusPlus(scale=1.0)):
        assert torch.allclose(control.rule(u, c, _moment(3, {})), c, atol=1e-12), control
    plain = APG(scale=7.0, eta=1.0, norm=0.0, momentum=0.0).rule(u, c, _moment(0, {}))
    assert torch.allclose(plain, combining.linear(u, c, 7.0), atol=1e-12)
    for control in (APG(scale=5.0), CFGZeroStar(scale=5.0), MaG(scale=5.0), TCFG(scale=5.0), FDG()):
        for x in (c, torch.zeros_like(c)):  # nothing to guide with, and nothing at all
            assert torch.allclose(control.rule(x, x, _moment(3, {})), x, atol=1e-7), control
    two = combining.projected(u, c, 3.0, eta=0.0, norm=2.0)  # rows do not meet
    assert torch.equal(two[:1], combining.projected(u[:1], c[:1], 3.0, eta=0.0, norm=2.0))
    d = two - u
    assert (dot(d, c).abs() <= 1e-10).all()
    assert (dot(d, d).sqrt() <= 6.0 + 1e-9).all()


# Whole pipelines, against sums by hand

APG_FIELDS = {"eta": 0.2, "norm": 3.0}
RULES: dict[str, tuple[Any, Any]] = {
    "apg": (APG(**APG_FIELDS), functools.partial(apg, w=SCALE, beta=-0.5, **APG_FIELDS)),
    "zero": (CFGZeroStar(scale=6.0), functools.partial(zero_star, w=6.0, zero=1)),
    "zero_late": (CFGZeroStar(zero_init_steps=0), functools.partial(zero_star, w=SCALE, zero=0)),
    "tcfg": (TCFG(), functools.partial(tcfg, w=SCALE)),
    "mag": (MaG(scale=9.0, alpha=2.0), functools.partial(mag, w=9.0, alpha=2.0)),
    "fdg": (FDG(scales=(8.0, 3.0)), functools.partial(fdg, scales=(8.0, 3.0))),
    "fdg_packed": (FDG(), functools.partial(fdg, scales=(10.0, 5.0), unpack=flux_grid)),
    "x0": (
        APG(space="x0", **APG_FIELDS),
        in_x0(functools.partial(apg, w=SCALE, beta=-0.5, **APG_FIELDS)),
    ),
    "interval": (
        GuidanceInterval(interval=(0.3, 0.6)),
        lambda u, c, at: u + SCALE * (c - u) if 0.3 <= at["step"] / at["steps"] < 0.6 else c,
    ),
    "rescale": (Rescale(phi=0.6), lambda u, c, at: _rescaled(u + SCALE * (c - u), c)),
}
CASES = [
    *[("sd", name) for name in ("apg", "zero", "tcfg", "mag", "fdg", "interval", "rescale")],
    *[("sd3", name) for name in ("apg", "zero", "x0", "fdg")],
    *[("flux_cfg", name) for name in ("apg", "zero", "fdg_packed", "x0", "interval")],
    *[("wan", name) for name in ("apg", "zero", "tcfg", "rescale", "x0", "interval")],
    *[("qwen", name) for name in ("apg", "zero_late", "fdg_packed", "interval")],
    *[("cogvideox", name) for name in ("apg", "zero", "mag")],
    *[("pixart", name) for name in ("apg", "tcfg")],
]


def _rescaled(p: Tensor, c: Tensor) -> Tensor:
    ratio = [a.flatten(1).std(1) for a in (c, p)]
    return p * (0.6 * ratio[0] / ratio[1] + 0.4).view(-1, *[1] * (p.ndim - 1))


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_a_pipeline_uses_the_sum(recipe: str, name: str) -> None:
    pipe, kwargs, plain = built(recipe)
    control, rule = RULES[name]
    with attnctl.control(pipe, control):
        out = pipes.run(pipe, kwargs)
    assert distance(out, plain) > 1e-3
    assert distance(out, by_hand(recipe, pipe, kwargs, rule)) <= EXACT[recipe]


PERTURB = {"sd": "mid", "sd3": 1, "wan": "blocks.1.attn1", "flux_cfg": 1, "cogvideox": 1}


@pytest.mark.parametrize(
    ("recipe", "name", "other"),
    [
        *[(recipe, "apg", PAG) for recipe in ("sd", "sd3", "wan")],
        *[(recipe, "zero", SLG) for recipe in ("sd3", "wan", "flux_cfg")],
        ("cogvideox", "apg", SEG),
        ("sd", "rescale", PAG),
    ],
)
def test_one_sum_with_perturbed_passes(recipe: str, name: str, other: Any) -> None:
    pipe, kwargs, _ = built(recipe)
    control, rule = RULES[name]
    guidance = other(scale=2.0, sites=PERTURB[recipe], start=0.0, stop=1.0)
    with attnctl.control(pipe, guidance, control):
        out = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, control, guidance):
        assert torch.equal(out, pipes.run(pipe, kwargs))
    if name == "rescale":  # over the whole sum
        return
    assert distance(out, by_hand(recipe, pipe, kwargs, rule, guidance)) <= EXACT[recipe]


def test_the_pipelines_own_rescale_comes_after_the_sum() -> None:
    pipe, kwargs, _ = built("sd")
    control, rule = RULES["tcfg"]
    with attnctl.control(pipe, control):
        out = pipes.run(pipe, kwargs, guidance_rescale=0.6)
    hand = by_hand("sd", pipe, kwargs, lambda u, c, at: _rescaled(rule(u, c, at), c))
    assert distance(out, hand) <= 1e-12


@pytest.mark.parametrize("control", ALL, ids=lambda c: type(c).__name__)
def test_off_is_bit_exact_and_nothing_stays(control: Any) -> None:
    pipe, kwargs, plain = built("sd")
    before = snapshot(*roots(pipe))
    with (
        pytest.warns(UserWarning, match="acted at no step"),
        attnctl.control(pipe, dataclasses.replace(control, start=0.5, stop=0.5)),
    ):
        assert torch.equal(plain, pipes.run(pipe, kwargs))
    with attnctl.control(pipe, control) as handle:
        first = pipes.run(pipe, kwargs)
        assert torch.equal(first, pipes.run(pipe, kwargs))  # what a rule keeps ends with its run
        handle.enabled = False
        assert torch.equal(plain, pipes.run(pipe, kwargs))
    assert_clean(before, *roots(pipe))
    assert torch.equal(plain, pipes.run(pipe, kwargs))


def test_rows_of_one_batch_do_not_meet() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64, batch=2)
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with attnctl.control(pipe, APG(norm=2.0), GuidanceInterval(interval=(0.0, 0.5)), Rescale()):
        both = pipes.run(pipe, kwargs, latents=noise)
        alone = pipes.run(pipe, kwargs | {k: kwargs[k][1] for k in ("prompt", "negative_prompt")}, latents=noise[1:])
    assert distance(both[1:], alone) <= 1e-12


def test_denoisers_that_take_turns_share_one_memory() -> None:
    pipe, kwargs = pipes.build("wan", torch.float64)
    twin = diffusers.WanPipeline(
        **{**pipe.components, "transformer_2": copy.deepcopy(pipe.transformer)}, boundary_ratio=0.9
    )
    pipes.quiet(twin)
    with attnctl.control(pipe, APG(norm=3.0)):
        one = pipes.run(pipe, kwargs)
    with attnctl.control(twin, APG(norm=3.0)):
        two = pipes.run(twin, kwargs)
    assert distance(two, one) <= 1e-12  # the same weights in both: as if there was one


# Guiders


@pytest.mark.parametrize(
    ("controls", "guider"),
    [
        (
            [APG(norm=2.0)],
            lambda: diffusers.AdaptiveProjectedGuidance(
                guidance_scale=SCALE,
                adaptive_projected_guidance_momentum=-0.5,
                adaptive_projected_guidance_rescale=2.0,
                eta=0.0,
            ),
        ),
        ([CFGZeroStar()], lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE)),
        ([TCFG()], lambda: diffusers.TangentialClassifierFreeGuidance(guidance_scale=SCALE)),
        (
            [GuidanceInterval(interval=(0.0, 0.5)), Rescale(phi=0.5)],
            lambda: diffusers.ClassifierFreeGuidance(guidance_scale=SCALE, stop=0.5, guidance_rescale=0.5),
        ),
    ],
)
def test_a_modular_pipeline_agrees_with_diffusers_guider(
    controls: list[Any], guider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3")
    pipe, kwargs, _ = built("sd3")
    modular = blocks.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    modular.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = {name: value for name, value in kwargs.items() if name.endswith("embeds")}

    def made(one: Any) -> Tensor:
        modular.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=one)
        for _ in range(2):  # momentum ends with a run
            out = modular(**given, height=128, width=96, latents=noise, num_inference_steps=4, output="latents")
        return out

    theirs, ours = made(guider()), made(ControlGuider(controls, guidance_scale=SCALE))
    if isinstance(controls[0], TCFG):
        # diffusers rounds c and u to float32 before its decomposition. Without that its guider computes our sum.
        with monkeypatch.context() as patch:
            patch.setattr(tangential, "normalized_guidance", in_float64(tangential.normalized_guidance))
            exact = made(guider())
        assert distance(ours, exact) <= 1e-12 < 1e-7 < distance(theirs, exact)
        theirs = exact
    assert distance(ours, theirs) <= 1e-6


def in_float64(function: Any) -> Any:
    """Let a function's `.float()` keep float64."""

    def called(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", Tensor.double)
            return function(*args)

    return called
