"""CFG++ against its own loop, and what controls that put predictions together refuse in words."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from combined_runs import built, tcfg
from contract import assert_clean, distance, snapshot
from naive_guidance import roots
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, ConflictError, UnsupportedModelError
from attnctl.processors import APG, FDG, TCFG, CFGPlusPlus, CFGZeroStar, GuidanceInterval, Rescale

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "wan"])
def test_cfg_plus_plus_puts_back_the_negative_noise(recipe: str) -> None:
    pipe, kwargs = pipes.build(recipe, torch.float64)
    with attnctl.control(pipe, CFGPlusPlus(scale=0.6)):
        out = pipes.run(pipe, kwargs)
    assert distance(out, _plus_plus(recipe, pipe, kwargs)) <= 1e-6  # schedulers' factors are float32


def _plus_plus(recipe: str, pipe: Any, kwargs: dict[str, Any]) -> Tensor:
    """Run CFG++ by hand: the scheduler's step is replaced by the paper's."""
    scheduler, seen, step = pipe.scheduler, [], pipe.scheduler.step
    hook = pipes.denoiser(pipe).register_forward_hook(lambda m, a, o: seen.append(o[0]))

    @functools.wraps(step)
    def own(model_output: Tensor, t: Any, sample: Tensor, *args: Any, **more: Any) -> Any:
        c, u = seen if recipe == "wan" else seen[0].chunk(2)[::-1]
        seen.clear()
        p = u + 0.6 * (c - u)
        if recipe == "sd":
            before = float(scheduler.alphas_cumprod[int(t)])
            last = int(t) - 1000 // scheduler.num_inference_steps
            after = float(scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod)
            x0 = (sample - (1 - before) ** 0.5 * p) / before**0.5
            return (after**0.5 * x0 + (1 - after) ** 0.5 * u,)
        step(p, t, sample, *args, **more)  # counts
        a, b = (float(scheduler.sigmas[scheduler.step_index - i]) for i in (1, 0))
        if recipe == "wan":  # flow: x = (1 - sigma) x0 + sigma eps
            return ((1 - b) * (sample - a * p) + b * (sample + (1 - a) * u),)
        return (sample - a * p + b * u,)

    scheduler.step = own
    try:
        return pipes.run(pipe, kwargs)
    finally:
        del scheduler.step
        hook.remove()


def test_cfg_plus_plus_refuses_other_steps() -> None:
    pipe, kwargs, _ = built("pixart")  # a multistep solver
    with attnctl.control(pipe, CFGPlusPlus()), pytest.raises(UnsupportedModelError, match="first order"):
        pipes.run(pipe, kwargs)
    pipe, kwargs, _ = built("sd")
    with attnctl.control(pipe, CFGPlusPlus()), pytest.raises(UnsupportedModelError, match="fresh noise"):
        pipes.run(pipe, kwargs, eta=1.0)
    assert attnctl.handle_of(pipe) is None


def test_without_two_predictions_it_is_refused_in_words() -> None:
    pipe, kwargs, _ = built("sd")
    before = snapshot(*roots(pipe))
    for control in (APG(), GuidanceInterval(), Rescale(), CFGPlusPlus()):
        with attnctl.control(pipe, control), pytest.raises(UnsupportedModelError, match="classifier-free guidance"):
            pipes.run(pipe, kwargs, guidance_scale=1.0)
    assert_clean(before, *roots(pipe))
    flux, call = pipes.build("flux")
    with attnctl.control(flux, APG()), pytest.raises(UnsupportedModelError, match="true_cfg_scale"):
        pipes.run(flux, call)
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, APG(scale=3.0)), pytest.raises(UnsupportedModelError, match="uncond_first"):
        zoo.call(model, inputs)
    with attnctl.control(model, TCFG(), layout="uncond_first"), pytest.raises(ConfigError, match="no scale of its own"):
        zoo.call(model, inputs)


def test_a_bare_model_takes_a_scale_and_a_layout() -> None:
    for name in ("sd15", "zimage"):  # one tensor for all rows; a list with a tensor for each
        model, inputs = zoo.build(name, 2, torch.float64)
        plain = zoo.call(model, inputs)
        with attnctl.control(model, TCFG(scale=3.0), layout="uncond_first"):
            out = zoo.call(model, inputs)
        expected = tcfg(plain[:1], plain[1:], {}, w=3.0)
        assert distance(out, torch.cat([expected, expected])) <= 1e-12, name


def test_two_rules_at_once_are_refused() -> None:
    pipe, kwargs, _ = built("sd")
    with pytest.raises(ConflictError, match="there is one sum"):
        attnctl.control(pipe, APG(), TCFG())
    for twice in (GuidanceInterval(), Rescale()):
        with pytest.raises(ConflictError, match="cannot act together"):
            attnctl.control(pipe, twice, twice)
    with attnctl.control(pipe, APG(stop=0.5), TCFG(start=0.5)):
        pipes.run(pipe, kwargs)


def test_what_a_pipeline_cannot_hand_on_is_refused() -> None:
    qwen, call, _ = built("qwen")
    with attnctl.control(qwen, CFGZeroStar()), pytest.raises(UnsupportedModelError, match="zero_init_steps=0"):
        pipes.run(qwen, call)
    with attnctl.control(qwen, Rescale()), pytest.raises(ConflictError, match="would do nothing"):
        pipes.run(qwen, call)
    pipe, kwargs, _ = built("sd")
    with attnctl.control(pipe, Rescale()), pytest.raises(ConflictError, match="guidance_rescale"):
        pipes.run(pipe, kwargs, guidance_rescale=0.7)
    video, ask, _ = built("cogvideox")
    with attnctl.control(video, APG()), pytest.raises(ConfigError, match="scale="):
        pipes.run(video, ask, use_dynamic_cfg=True)
    with attnctl.control(video, APG(scale=5.0)):
        pipes.run(video, ask, use_dynamic_cfg=True)


def test_a_pipeline_with_a_formula_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the scheduler is compared with the sum that was meant for it."""
    pipe, kwargs, _ = built("wan")
    # A pipeline that shows another scale than the one that it uses.
    monkeypatch.setattr("attnctl.processors.combining.combiner.cfg_scale", lambda *_: 2.5)
    with attnctl.control(pipe, TCFG(scale=5.0)), pytest.raises(UnsupportedModelError, match="is not the sum"):
        pipes.run(pipe, kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: APG(norm=-1.0),
        lambda: APG(momentum=2.0),
        lambda: APG(eta=float("nan")),
        lambda: APG(space="velocity"),
        lambda: CFGZeroStar(zero_init_steps=-1),
        lambda: CFGPlusPlus(scale=1.5),
        lambda: FDG(scales=(1.0,)),
        lambda: FDG(scales=(1.0, 2.0), parallel=(1.0, 1.0, 1.0)),
        lambda: FDG(scales="10, 5"),
        lambda: GuidanceInterval(interval=(0.8, 0.2)),
        lambda: GuidanceInterval(interval=0.5),
        lambda: Rescale(phi=1.1),
        lambda: attnctl.control(built("sd")[0], APG(sites="mid")),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_pipelines_own_skip_guidance_is_refused() -> None:
    pipe, kwargs, _ = built("sd3")
    own = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with attnctl.control(pipe, TCFG()), pytest.raises(UnsupportedModelError, match="skip_guidance_layers"):
        pipes.run(pipe, kwargs, **own, num_inference_steps=4)
