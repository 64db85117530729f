"""SLG against a block that returns its input, on tiny models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, middle, run, snapshot
from naive_guidance import LAYOUTS

import attnctl
from attnctl.errors import ConfigError, NeverApplied, UnsupportedModelError
from attnctl.processors import PAG, SLG, CFGZeroStar


@pytest.mark.parametrize("name", ["sd15", "sd3", "sd35", "flux", "pixart", "wan", "ltx", "qwen", "cogvideox"])
def test_slg_equals_a_block_that_returns_its_input(name: str) -> None:
    model, inputs = zoo.build(name)
    site = middle(model)
    block = model.get_submodule(site.rpartition(".")[0])
    guided = run(model, inputs, SLG(scale=1.0, sites=site, start=0.0, stop=1.0))
    with torch.no_grad():
        plain = zoo.call(model, inputs)

        handle = block.register_forward_hook(_given_back, with_kwargs=True)
        skipped = zoo.call(model, inputs)
        handle.remove()
    expected = plain + (plain - skipped)
    assert (guided - expected).norm() <= 1e-5 * expected.norm()
    assert (plain - skipped).norm() > 0.01 * plain.norm()


def test_slg_published_default_and_window() -> None:
    control = SLG()
    assert (control.scale, control.start, control.stop) == (2.8, 0.01, 0.2)
    big, _ = zoo.build("sd3", num_layers=24)
    sites = attnctl.control(big, SLG()).report()
    for block in ("transformer_blocks.7.attn", "transformer_blocks.8.attn", "transformer_blocks.9.attn"):
        assert block in sites
    attnctl.handle_of(big).detach()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SLG(scale=math.inf),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_block_that_never_runs_is_an_error() -> None:
    model, inputs = zoo.build("latte")
    with (
        attnctl.control(model, SLG(sites="temporal_transformer_blocks.1", start=0.0, stop=1.0), layout="cond"),
        pytest.raises(NeverApplied, match=r"temporal_transformer_blocks\.1"),
        torch.no_grad(),
    ):
        zoo.call(model, inputs | {"enable_temporal_attentions": False})


def _given_back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    given = [*args, *kwargs.values()]
    if isinstance(output, torch.Tensor):
        return args[0] if args else kwargs["hidden_states"]
    fit = {tuple(t.shape): t for t in reversed(given) if isinstance(t, torch.Tensor) and t.ndim == 3}
    return tuple(None if o is None else fit[tuple(o.shape)] for o in output)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["sd", "sd3", "wan", "flux_cfg", "cogvideox", "animatediff"])
def test_the_negative_pass_alone(recipe: str) -> None:
    """The negative prompt is predicted by a model without the block, the prompt by the whole one."""
    pipe, kwargs = pipes.build(recipe, torch.float64)
    denoiser = pipes.denoiser(pipe)
    site = middle(denoiser)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(denoiser, pipe.scheduler)
    with attnctl.control(pipe, SLG(sites=site, start=0.0, stop=1.0, skip_in="negative")) as handle:
        out = pipes.run(pipe, kwargs)
        assert handle.passes == 0
        assert torch.equal(out, pipes.run(pipe, kwargs))
    assert_clean(before, denoiser, pipe.scheduler)
    assert torch.equal(plain, pipes.run(pipe, kwargs))
    twin = copy.deepcopy(denoiser)
    twin.get_submodule(site.rpartition(".")[0]).register_forward_hook(_given_back, with_kwargs=True)
    calls = 0

    def mixed(module: Any, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal calls
        calls += 1
        whole, skipped = output[0], twin(*args, **given)[0]
        if LAYOUTS[recipe] == "sequential":
            pred = whole if calls % 2 else skipped
        else:
            pred = torch.cat([skipped.chunk(2)[0], whole.chunk(2)[1]])
        return (pred, *output[1:]) if isinstance(output, tuple) else type(output)(sample=pred)

    hook = denoiser.register_forward_hook(mixed, with_kwargs=True)
    expected = pipes.run(pipe, kwargs)
    hook.remove()
    assert (out - expected).norm() <= 1e-12 * expected.norm()
    assert (out - plain).norm() > 1e-3 * plain.norm()


@torch.no_grad()
def test_the_negative_pass_with_other_guidance() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    skip = SLG(sites="mid", start=0.0, stop=1.0, skip_in="negative")
    with attnctl.control(pipe, skip):
        alone = pipes.run(pipe, kwargs)
    for other in (PAG(scale=1.0, sites="up.1"), CFGZeroStar()):
        with attnctl.control(pipe, skip, other):
            both = pipes.run(pipe, kwargs)
        with attnctl.control(pipe, other, skip):
            assert torch.equal(both, pipes.run(pipe, kwargs))
        assert not torch.equal(both, alone)


@torch.no_grad()
def test_the_negative_pass_needs_a_negative_prompt() -> None:
    pipe, kwargs = pipes.build("sd")
    control = SLG(sites="mid", start=0.0, stop=1.0, skip_in="negative")
    with attnctl.control(pipe, control), pytest.raises(UnsupportedModelError, match="classifier-free guidance"):
        pipes.run(pipe, kwargs, guidance_scale=1.0)
    flux, call = pipes.build("flux")
    with (
        attnctl.control(flux, SLG(sites=1, start=0.0, stop=1.0, skip_in="negative")),
        pytest.raises(UnsupportedModelError, match="true_cfg_scale"),
    ):
        pipes.run(flux, call)
    with pytest.raises(ConfigError, match="negative"):
        SLG(skip_in="both")  # type: ignore[arg-type]
