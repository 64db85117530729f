"""The events of one step as an attached control receives them, and what a further pass leaves when it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import zoo_pipelines as pipes
from contract import ALL_KINDS, Through, assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.errors import BackendError, ConfigError, ConflictError
from attnctl.processors import PAG, Branch, Capture, Control

Event = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Log(Control):
    """Note every event; change the call, its output and the latents by factors."""

    events: list[Event] = field(default_factory=list, compare=False)
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    kinds = ALL_KINDS

    def attached(self, sites: Any, denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return Live(self)


class Live(LiveControl):
    changes_latents = True
    records = True

    def __init__(self, control: _Log) -> None:
        self.events, self.factors = control.events, control.factors

    def begin_run(self) -> None:
        self.events.append(("begin_run", None))

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        self.events.append(("before_call", passes.state.rows.role))
        return {**passes.state.bound, "sample": passes.state.bound["sample"] * self.factors[0]}

    def wrap(self, call: Any, proceed: Any) -> Tensor:
        self.events.append(("wrap", call.state.phase))
        return proceed(call)

    def after_call(self, output: Any) -> Any:
        self.events.append(("after_call", None))
        return (output[0] * self.factors[1], *output[1:])

    def stepping(self, latents: Tensor) -> Tensor:
        self.events.append(("stepping", None))
        return latents * self.factors[2]

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        self.events.append(("stepped", step))
        return latents

    def result(self, parts: Any) -> list[Event]:
        return self.events


def test_the_events_of_a_step_come_in_order() -> None:
    pipe, kwargs = pipes.build("sd")
    log = _Log(sites="mid_block.attentions.0.transformer_blocks.0.attn2")
    with attnctl.control(pipe, log) as handle:
        pipes.run(pipe, kwargs, num_inference_steps=2)
        assert handle.result(log) is handle.maps is log.events
    one = [("before_call", "both"), ("wrap", "base"), ("after_call", None), ("stepping", None)]
    run = log.events[log.events.index(("before_call", "both")) :]
    assert run == [*one, ("stepped", 0), *one, ("stepped", 1)]
    assert ("begin_run", None) in log.events


def test_what_the_events_return_is_what_the_run_goes_on_with() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    a, b, c = 1.1, 0.9, 1.05
    forward, step = pipe.unet.forward, pipe.scheduler.step
    with attnctl.control(pipe, _Log(sites=site, factors=(a, b, c))):
        out = pipes.run(pipe, kwargs)
    pipe.unet.forward = lambda sample, *args, **rest: tuple(
        x * b if n == 0 else x for n, x in enumerate(forward(sample * a, *args, **rest))
    )
    pipe.scheduler.step = lambda noise, t, sample, **rest: step(noise, t, sample * c, **rest)
    assert torch.allclose(out, pipes.run(pipe, kwargs), rtol=0, atol=1e-12)


# What a further pass leaves when it fails --------------------------------------------------------------------------


class Boom(Exception):
    """Raised on purpose."""


def _raising(*args: Any, **kwargs: Any) -> Any:
    raise Boom


@dataclass(frozen=True, kw_only=True)
class _Failing(PAG):
    """PAG whose perturbed pass fails at one place, as long as `armed` holds True."""

    where: str = "begin"
    armed: list[bool] = field(default_factory=lambda: [True], compare=False)

    def branch(self, sites: Any, denoiser: torch.nn.Module) -> Branch:
        plain = super().branch(sites, denoiser)

        def fail(going_on: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: _raising() if self.armed[0] else going_on(*args, **kwargs)

        if self.where == "begin":
            return dataclasses.replace(plain, begin=fail(lambda state: None))
        if self.where == "block":
            block = denoiser.get_submodule("mid_block.resnets.0")
            return dataclasses.replace(plain, blocks={block: fail(lambda module, forward: forward)})
        return dataclasses.replace(plain, perturb=fail(plain.perturb))


@pytest.mark.parametrize("where", ["begin", "block", "perturb", "begin_call", "rows"])
@pytest.mark.parametrize("replay", [True, False])
def test_a_perturbed_pass_that_fails_leaves_the_handle_as_it_was(
    where: str, replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    control = _Failing(scale=2.0, sites="mid", where=where if where in ("begin", "block") else "perturb")
    control.armed[0] = False
    with attnctl.control(pipe, control, replay=replay):
        guided = pipes.run(pipe, kwargs)
    before = snapshot(pipe.unet, pipe.scheduler)
    with attnctl.control(pipe, control, replay=replay) as handle:
        with monkeypatch.context() as patch:
            if where == "begin_call":
                from attnctl.core.call import CallState

                begin = CallState.begin_call
                patch.setattr(CallState, "begin_call", lambda self, *a: _raising() if self.bound else begin(self, *a))
            elif where == "rows":
                patch.setattr("attnctl.core.passes.take_rows", _raising)
            else:
                control.armed[0] = True
            with pytest.raises(Boom):
                pipes.run(pipe, kwargs)
        control.armed[0] = False
        w = handle._watched[0]
        assert not w.running
        assert not w.forwards
        assert all(link.wrappers is None for link in w.links.values())
        assert not any("forward" in vars(m) for m in pipe.unet.modules())
        assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert_clean(before, pipe.unet, pipe.scheduler)


@pytest.mark.parametrize("kind", ["extra_pass", "beside", "snapshot"])
def test_everything_is_put_back_after_a_failure_beside_the_base_pass(kind: str) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    through = Through(sites="mid")
    pag = PAG(scale=2.0, sites="mid")
    tried: list[bool] = []

    @dataclass(frozen=True, kw_only=True)
    class Aside(Control):
        kinds = ALL_KINDS

        def attached(self, sites: Any, denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
            return Side()

    class Side(LiveControl):
        def before_call(self, passes: LiveDenoiser) -> None:
            self.passes: Any = passes

        def fail(self, site: str) -> None:
            w = self.passes
            if kind == "extra_pass":
                w.extra_pass("side", dict(w.state.bound), {site: _raising})
            with w.beside({}) if kind == "beside" else w.snapshot()():
                w.state.phase = "elsewhere"
                _raising()

        def wrap(self, call: Any, proceed: Any) -> Tensor:
            w = self.passes
            if not tried:
                tried.append(True)
                state = dict(vars(w.state))
                links = [(link, link.wrappers, link.reached) for link in w.links.values()]
                with pytest.raises(Boom):
                    self.fail(call.site.name)
                assert vars(w.state) == state
                assert [(link, link.wrappers, link.reached) for link in w.links.values()] == links
                assert not w.running
                assert w.prefix is None or not w.prefix.paused
            return proceed(call)

    with attnctl.control(pipe, pag, through):
        plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, pag, through, Aside(sites="mid")):
        beside = pipes.run(pipe, kwargs)
    assert tried
    assert torch.equal(plain, beside)


# Two kinds of handle, one behaviour --------------------------------------------------------------------------------


def _backbone() -> torch.nn.Module:
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **small).eval()


@pytest.mark.parametrize("model", ["backbone", "denoiser"])
def test_both_kinds_of_handle_refuse_and_answer_alike(model: str) -> None:
    target = _backbone() if model == "backbone" else pipes.build("sd")[0].unet
    capture = Capture(words=("class",)) if model == "backbone" else Capture(words=(1,))
    before = snapshot(target)
    with pytest.raises(BackendError, match="backend='nonsense' is unknown"):
        attnctl.control(target, capture, backend="nonsense")
    with pytest.raises(ConfigError, match="layout='nonsense' is unknown"):
        attnctl.control(target, capture, layout="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no control"):
        attnctl.control(target)
    with attnctl.control(target, capture) as handle:
        assert attnctl.handle_of(target) is handle
        with pytest.raises(ConflictError, match="under control already"):
            attnctl.control(target, capture)
        with pytest.raises(ConfigError, match="set_step"):
            handle.set_step(3, 3)
        handle.set_step(0, 3)
        assert handle.passes == handle.guidance_forwards == 0
        with pytest.raises(ConfigError, match="none of the attached controls"):
            handle.result(Capture(words=(2,)))
    assert_clean(before, target)
    with pytest.raises(ConflictError, match="detached"):
        handle.enabled = True
