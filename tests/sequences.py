"""Random sequences of what users do to a pipeline: attach, run, fail, copy, forget, detach."""

from __future__ import annotations

import functools
from typing import Any

import pairs
import pytest
import torch
import zoo_pipelines as pipes
from hypothesis import strategies as st

import attnctl
from attnctl.core.conflicts import conflict_between
from attnctl.core.sites import select
from attnctl.errors import ConflictError, SiteError


class Boom(BaseException):
    """What a run raises: nothing that a handler of exceptions would catch."""


HOSTS = ("unet", "joint")
CHOICES = st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True)
ACTIONS = st.one_of(
    st.tuples(st.just("attach"), CHOICES),
    st.tuples(st.just("attach"), CHOICES),
    st.tuples(st.just("run"), st.none()),
    st.tuples(st.just("raise in attention"), st.integers(0, 20)),
    st.tuples(st.just("raise in a callback"), st.integers(0, 1)),
    st.tuples(st.just("detach in a callback"), st.none()),
    st.tuples(st.just("toggle in a callback"), st.booleans()),
    st.tuples(st.just("toggle"), st.booleans()),
    st.tuples(st.just("refused"), st.none()),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("forget"), st.none()),
    st.tuples(st.just("detach"), st.none()),
)


@functools.cache
def plain_results(host: str) -> dict[tuple[str, ...], torch.Tensor]:
    """Remember the result of each set of controls."""
    made = pairs.HOSTS[host]()
    return {(): made.plain(())}


def names_of(made: pairs.Host) -> tuple[str, ...]:
    """Name the methods to attach: all but those that need gradients, or calls of their own."""
    return tuple(n for n, c in made.first.items() if not c.moves_latents and type(c).about.group != "Editing")  # type: ignore[union-attr]


def attach(made: pairs.Host, host: str, value: list[int], names: tuple[str, ...], handle: Any) -> tuple[str, ...]:
    """Attach some controls, unless others are there or they refuse each other."""
    known = names_of(made)
    chosen = tuple(dict.fromkeys(known[i % len(known)] for i in value))
    controls = [made.first[n] for n in chosen]
    apart = any(conflict_between(type(a), type(b)) for i, a in enumerate(controls) for b in controls[:i])
    if handle is not None or apart:
        with pytest.raises(ConflictError):
            attnctl.control(made.pipe, *controls)
        return names
    attnctl.control(made.pipe, *controls)
    return chosen


def disturb(made: pairs.Host, action: str, value: Any, handle: Any) -> None:
    """Do one thing to a pipeline under control."""
    if action == "raise in attention":
        model = pipes.denoiser(made.pipe)
        sites = attnctl.find_sites(model)
        module: Any = sites[value % len(sites)].module

        def stop(*_: Any) -> None:
            raise Boom

        hook = module.register_forward_hook(stop)
        try:
            with pytest.raises(Boom):
                pairs.run(made, (), editing=False)
        finally:
            hook.remove()
    elif action.endswith("in a callback"):

        def meanwhile(pipe: Any, step: int, time: Any, values: Any) -> Any:
            if action.startswith("raise") and step == value:
                raise Boom
            if action.startswith("detach"):
                handle.detach()
            if action.startswith("toggle") and handle.attached:
                handle.enabled = value
            return values

        kwargs = {k: v for k, v in made.kwargs.items() if k != "editing"}
        try:
            pipes.run(made.pipe, kwargs, callback_on_step_end=meanwhile)
        except Boom:
            assert action.startswith("raise")
    elif action == "toggle":
        handle.enabled = value
    elif action == "refused":
        with pytest.raises(SiteError):
            attnctl.find_sites(made.pipe) and select(attnctl.find_sites(made.pipe), 10**6)
    else:
        handle.detach()
