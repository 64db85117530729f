"""Which kernel `auto` takes: the faster one, SDPA on a tie, and SDPA where the other refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kernels import qkv
from torch import Tensor

from attnctl import kernels
from attnctl.errors import BackendError
from attnctl.kernels import dispatch, timing
from attnctl.kernels.sparse import triton
from attnctl.plans import BlockPlan

torch.set_num_threads(1)


def test_the_faster_kernel_is_taken_and_sdpa_on_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sdpa": 1.0, "xformers": 1.0, "flex": 1.0, "triton": 0.5}
    timed: list[str] = []

    def milliseconds(call: Any, device: torch.device) -> float:
        timed.append(call())
        if times[timed[-1]] < 0:
            raise RuntimeError("no such kernel")
        return times[timed[-1]]

    monkeypatch.setattr(timing, "_FASTEST", {})
    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    card = torch.device("cuda:1")

    def fastest(kind: str, *names: str) -> str:
        return timing.fastest((kind, card), {n: partial(str, n) for n in names}, card)

    assert fastest("tie", "sdpa", "xformers") == "sdpa"
    times["xformers"] = 0.97
    assert fastest("nearly a tie", "sdpa", "xformers") == "sdpa"
    times["xformers"] = 0.5
    assert fastest("tie", "sdpa", "xformers") == "sdpa"  # timed once for a kind of call
    assert fastest("faster", "sdpa", "xformers") == "xformers"
    times["xformers"] = -1.0
    assert fastest("refused", "sdpa", "xformers") == "sdpa"
    times["flex"] = -1.0
    assert fastest("first refused", "flex", "triton") == "triton"
    timed.clear()
    assert fastest("alone", "triton") == "triton"
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert fastest("captured", "flex", "triton") == "flex"
    assert not timed
    assert timing.size_class(4096) == timing.size_class(4097) != timing.size_class(4095)


def test_a_refused_call_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> Tensor:
        raise NotImplementedError("value and query widths differ\nand so on")

    monkeypatch.setattr(dispatch, "_REFUSED", set())
    monkeypatch.setattr(dispatch, "choose", lambda q, k, v, mask, backend: "xformers")
    monkeypatch.setitem(dispatch._KERNELS, "xformers", dispatch._KERNELS["xformers"]._replace(run=refuses))
    q, k, v = qkv()
    with pytest.warns(UserWarning, match=r"xformers refused a call \(NotImplementedError: value and"):
        out = kernels.attention(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert dispatch._kind(q, k, v, None) in dispatch._REFUSED
    with pytest.raises(NotImplementedError):
        kernels.attention(q, k, v, backend="xformers")


def test_probes_are_made_on_the_device_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dispatch, "probe", lambda name, device, *rest: asked.append(device) or "no")
    q, k, v = (x.to("meta") for x in qkv())
    with pytest.raises(BackendError):
        kernels.choose(q, k, v, None, "math")
    assert set(asked) == {"meta"}


@pytest.mark.parametrize("card", ["cuda:1", "cuda:3", "cpu"])
def test_kernels_are_chosen_timed_and_launched_on_the_device_of_the_tensors(
    card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which need not be that of the tensors, nor of its make."""
    runtime = pytest.importorskip("triton.runtime")
    at: list[str] = ["cuda:0"]

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        at.append(str(device))
        yield
        at.pop()

    class Event:
        def __init__(self, **_: object) -> None: ...

        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: float(at[-1].rpartition(":")[2])  # noqa: E731

    archs = {"cuda:0": 80, "cuda:1": 90, "cuda:3": 89}
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=archs[at[-1]]))
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(runtime.driver, "_active", active, raising=False)
    device, launched = torch.device(card), []
    there = card if card != "cpu" else "cuda:0"
    assert triton._launched(lambda num_stages: launched.append((at[-1], num_stages)), device, 3) is None
    assert launched == [(there, 3)]
    assert triton._architecture(device) == archs[there]
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    plan = BlockPlan.from_mask(keep, 128, n_image=256)
    tall = 128 if archs[there] == 90 else 64
    assert triton.tiles(plan, torch.float16, device) == (tall, 64)
    if card != "cpu":
        assert timing.milliseconds(lambda: None, device) == float(card[-1])
    assert at == ["cuda:0"]
