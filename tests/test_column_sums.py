"""Word maps from the sums that the attention kernel has made already: their cost and their exactness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl.core.control import Control
from attnctl.core.live import LiveControl
from attnctl.kernels import columns, sdpa
from attnctl.kernels.maps import key_columns
from attnctl.processors import Capture

R = torch.randn
Host = tuple[nn.Module, dict[str, Any]]


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Count(TorchDispatchMode):
    """Counts the products of attention: those of the fused kernel and those between batches of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.flops += 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
        elif name in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def wide_flux(dtype: torch.dtype = torch.float32) -> Host:
    """Build FLUX with its own proportions of image and text: eight image tokens to one of text."""
    model, inputs = zoo.build("flux", 1, dtype)
    h, w, text = 32, 32, 128
    width = inputs["hidden_states"].shape[-1]
    grid = torch.zeros(h * w, 3)
    grid[:, 1], grid[:, 2] = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    return model, {
        **inputs,
        "hidden_states": R(1, h * w, width, dtype=torch.float64).to(dtype),
        "encoder_hidden_states": R(1, text, inputs["encoder_hidden_states"].shape[-1], dtype=torch.float64).to(dtype),
        "img_ids": grid.to(inputs["img_ids"].dtype),
        "txt_ids": torch.zeros(text, 3, dtype=inputs["txt_ids"].dtype),
    }


def test_words_of_joint_attention_cost_little_more_than_none() -> None:
    model, inputs = wide_flux()
    with Count() as plain:
        want = zoo.call(model, inputs)
    capture = Capture(words=(3, 17, 40, 90))
    with attnctl.control(model, capture, layout="cond") as handle, Count() as counted:
        out = zoo.call(model, inputs)
    assert torch.equal(out, want)
    assert counted.flops <= 1.15 * plain.flops, counted.flops / plain.flops
    assert handle.maps.words == ("3", "17", "40", "90")
    # Every column made anew, in float64, gives the same maps.
    for site in (s for s in attnctl.find_sites(model) if s.kind == "joint"):
        with attnctl.control(model, _Reference(name=site.name), layout="cond") as reference:
            zoo.call(model, inputs)
        (live,) = [live for _, live in reference._watched[0].live]
        got = handle.maps.layers[site.name].reshape(4, -1)
        assert (got.double() - live.map).abs().max() <= 1e-5


@dataclass(frozen=True, kw_only=True)
class _Reference(Control):
    """Compute four columns of one site's map in float64, heads averaged."""

    name: str = ""

    def resolve(self, sites: Any, family: Any) -> Any:
        return tuple(s for s in sites if s.name == self.name)

    def attached(self, sites: Any, denoiser: Any, pipe: Any) -> LiveControl:
        return _Columns()


class _Columns(LiveControl):
    observes = True

    def wrap(self, call: Any, proceed: Any) -> Tensor:
        q, k = call.q.double(), call.k.double()
        whole = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        text = whole[0, :, call.image, call.text][..., [3, 17, 40, 90]]
        self.map = text.mean(0).T
        return proceed(call)


@pytest.mark.parametrize("mask", [None, "keys", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_from_the_kernels_sums(mask: str | None, dtype: torch.dtype) -> None:
    q, k, v = (R(2, 3, n, 24, dtype=torch.float64).to(dtype) for n in (150, 200, 200))
    given = None if mask is None else torch.rand(2, 1, 1 if mask == "keys" else 150, 200) > 0.3
    if mask == "rows":
        given[0, :, 7] = False  # a query that may look nowhere
    out, sums = sdpa.with_sums(q, k, v, mask=given)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given))
    assert sums is not None
    at = torch.tensor([5, 120, 199])
    weights = torch.eye(3)
    want = columns(
        q.double(),
        k.double(),
        torch.zeros(200, 3).index_fill_(0, at, 0).index_put_((at, torch.arange(3)), torch.ones(3)),
        mask=given,
    )
    cut = None if given is None else given[..., at]
    got = key_columns(q, k[:, :, at], weights, sums, mask=cut)
    assert (got.double() - want).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-3)
