"""The attention that the user set for a model computes what controls leave plain, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from contract import own

import attnctl
from attnctl.processors import PAG, Capture, SoftPAG

torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect the calls of diffusers' `_native_math`, and give diffusers its attention back afterwards."""
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    seen: list[Any] = []
    name, before = AttentionBackendName._NATIVE_MATH, registry._active_backend
    original = registry._backends[name]

    def counted(**call: Any) -> torch.Tensor:
        seen.append((call["query"].shape, call.get("attn_mask")))
        out: torch.Tensor = original(**call)
        return out

    monkeypatch.setitem(registry._backends, name, counted)
    yield seen
    registry._active_backend = before


def test_plain_attention_runs_on_the_backend_of_the_model(calls: list[Any]) -> None:
    model, inputs = zoo.build("flux")
    sites = own(attnctl.find_sites(model))
    site, every = sites[0], len(sites)
    control = SoftPAG(u=0.5, sites=site.name, scope="all")
    with attnctl.control(model, control, layout="cond"):
        want = zoo.call(model, inputs)
    model.set_attention_backend("_native_math")
    plain = zoo.call(model, inputs)
    assert len(calls) == every
    calls.clear()
    with attnctl.control(model, control, layout="cond") as handle:
        assert (zoo.call(model, inputs) - want).abs().max() <= 1e-5
        told = handle.report()
    # The base pass, and in the further pass the share of plain attention that SoftPAG keeps, at the site and behind it.
    assert len(calls) >= every + 1
    assert "attention set for the model: _native_math; computed with it where a control needs no map" in told
    assert torch.equal(zoo.call(model, inputs), plain)


def test_a_backend_that_is_set_under_control_stays_set(calls: list[Any]) -> None:
    model, inputs = zoo.build("flux")
    handle = attnctl.control(model, PAG(sites=own(attnctl.find_sites(model))[0].name, scope="all"), layout="cond")
    model.set_attention_backend("_native_math")
    handle.detach()
    zoo.call(model, inputs)
    assert len(calls) == len(own(attnctl.find_sites(model)))


def test_a_control_that_only_looks(calls: list[Any]) -> None:
    model, inputs = zoo.build("flux")
    model.set_attention_backend("_native_math")
    plain = zoo.call(model, inputs)
    count = len(calls)
    with attnctl.control(model, Capture(words=(1, 2)), layout="cond"):
        assert torch.equal(zoo.call(model, inputs), plain)
    assert len(calls) == 2 * count


def test_a_backend_of_the_session_goes_first(calls: list[Any]) -> None:
    model, inputs = zoo.build("flux")
    model.set_attention_backend("_native_math")
    site = own(attnctl.find_sites(model))[0]
    zoo.call(model, inputs)
    count = len(calls)
    control = SoftPAG(u=0.5, sites=site.name, scope="all")
    with attnctl.control(model, control, layout="cond", backend="math") as handle:
        zoo.call(model, inputs)
        assert "_native_math; unused" in handle.report()
    with attnctl.control(model, PAG(sites=site.name, scope="all"), layout="cond"):
        zoo.call(model, inputs)
    assert len(calls) > count
