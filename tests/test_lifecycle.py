"""Random sequences of attaching, running, failing, switching and detaching always end clean and bit-equal."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import attnctl
from attnctl.errors import ConflictError
from attnctl.processors import PAG, SoftPAG

CONTROLS = (
    PAG(scale=2.0, sites="mid"),
    SoftPAG(scale=1.0, u=0.4, heads=[("down_blocks.1.attentions.0.transformer_blocks.0.attn1", 1)]),
    PAG(scale=1.0, sites="up.1", start=0.5),
    PAG(scale=1.0, sites="*attn1", every=2),
)
STEPS = 2


class Boom(RuntimeError):
    """What a run raises."""


@functools.cache
def built() -> tuple[Any, dict[str, Any], torch.Tensor, dict[tuple[int, ...], torch.Tensor]]:
    """Build the pipeline, its plain result, and a memory of guided ones."""
    pipe, kwargs = pipes.build("sd")
    kwargs |= {"num_inference_steps": STEPS}
    return pipe, kwargs, pipes.run(pipe, kwargs), {}


ACTIONS = st.one_of(
    st.tuples(st.just("attach"), st.sets(st.integers(0, len(CONTROLS) - 1), min_size=1, max_size=2)),
    st.tuples(st.just("run"), st.none()),
    st.tuples(st.just("raise in a callback"), st.integers(0, STEPS - 1)),
    st.tuples(st.just("raise in the denoiser"), st.integers(0, 3)),
    st.tuples(st.just("toggle"), st.booleans()),
    st.tuples(st.just("detach"), st.none()),
    st.tuples(st.just("replace processors"), st.none()),
    st.tuples(st.just("swap scheduler"), st.none()),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(actions=st.lists(ACTIONS, min_size=2, max_size=7))
@torch.no_grad()
def test_any_sequence_ends_clean(actions: list[tuple[str, Any]]) -> None:
    pipe, kwargs, plain, guided = built()
    before = snapshot(pipe.unet, pipe.scheduler)
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    handle: attnctl.Handle | None = None
    active: tuple[int, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for action, value in actions:
                handle, active = _do(action, value, pipe, kwargs, handle, active)
                if action == "run":
                    acts = handle is not None and handle.enabled
                    result = pipes.run(pipe, kwargs)
                    expected = guided.setdefault(active, result) if acts else plain
                    assert torch.equal(result, expected), actions
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left = attnctl.handle_of(pipe)
            if left is not None:
                left.detach()
    assert type(pipe.scheduler) is type(scheduler)
    assert "_attnctl" not in vars(pipe.scheduler)
    pipe.scheduler = scheduler
    assert all("Controlled" not in type(p).__name__ for p in pipe.unet.attn_processors.values())
    pipe.unet.set_attn_processor(processors)
    assert_clean(before, pipe.unet, pipe.scheduler)
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def _do(
    action: str, value: Any, pipe: Any, kwargs: Any, handle: attnctl.Handle | None, active: tuple[int, ...]
) -> tuple[attnctl.Handle | None, tuple[int, ...]]:
    """Do one thing to a pipeline; return the handle and the controls that are on it."""
    if action == "attach":
        chosen = tuple(sorted(value))
        if handle is not None:
            with pytest.raises(ConflictError):
                attnctl.control(pipe, *(CONTROLS[i] for i in chosen))
            return handle, active
        return attnctl.control(pipe, *(CONTROLS[i] for i in chosen)), chosen
    if action == "raise in a callback":

        def fail(pipe: Any, step: int, time: Any, values: Any) -> Any:
            if step == value:
                raise Boom
            return values

        with pytest.raises(Boom):
            pipes.run(pipe, kwargs, callback_on_step_end=fail)
    elif action == "raise in the denoiser":
        calls = 0

        def stop(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > value:
                raise Boom

        hook = pipe.unet.up_blocks[-1].register_forward_pre_hook(stop)
        try:
            pipes.run(pipe, kwargs)
        except Boom:
            pass
        finally:
            hook.remove()
    elif action == "toggle" and handle is not None:
        handle.enabled = value
    elif action == "detach" and handle is not None:
        handle.detach()
        return None, ()
    elif action == "replace processors":
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    elif action == "swap scheduler":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return handle, active
