"""Word maps refined by self-attention against explicit products of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace
from test_columns import Largest
from test_kernels import dense_map, qkv
from torch import Tensor

import attnctl
from attnctl.core.hosts.linear import linear_attention
from attnctl.errors import ConfigError, SiteError
from attnctl.kernels.maps import SelfMap
from attnctl.processors import PAG, Capture
from attnctl.processors.capture.refine import partners, refined

PLACES = (1, 3)


def test_refined_maps_are_powers_of_the_mean_map_times_the_columns() -> None:
    q, k, _ = qkv(dtype=torch.float64)
    maps = torch.rand(2, 3, 9, 2, dtype=torch.float64)
    s = dense_map(q, k).mean(1)
    assert torch.equal(refined(maps, SelfMap(q, k), 0), maps)
    for times in (1, 3):
        want = torch.linalg.matrix_power(s, times).unsqueeze(1) @ maps
        assert torch.allclose(refined(maps, SelfMap(q, k), times), want, atol=1e-12)
    flat = torch.full((2, 1, 9, 1), 0.3, dtype=torch.float64)
    assert torch.allclose(refined(flat, SelfMap(q, k), 4), flat)


def test_linear_attention_refines_by_its_own_rows() -> None:
    q, k, _ = qkv()
    maps = torch.rand(2, 1, 9, 2)
    want = linear_attention(q, k, maps.expand(-1, 4, -1, -1)).mean(1, keepdim=True)
    assert torch.allclose(refined(maps, SelfMap(q, k, linear=True), 1), want, atol=1e-5)


def test_no_map_is_held() -> None:
    n = 1024
    q, k, _ = qkv(n=n, d=8)
    with Largest() as seen:
        refined(torch.rand(2, 1, n, 2), SelfMap(q, k), 2)
    assert seen.elements < n * n // 4


def test_tokens_must_agree() -> None:
    q, k, _ = qkv()
    with pytest.raises(ConfigError, match=r"maps of 2 x 4 tokens cannot be refined by self-attention of 2 x 9"):
        refined(torch.rand(2, 1, 4, 1), SelfMap(q, k), 1)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart", "sana", "animatediff", "wan"])
def test_every_family(name: str) -> None:
    """The mean over heads, refined once, is S A of the same call."""
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    seen: dict[str, Any] = {}

    def see(call: Any, proceed: Any) -> Tensor:
        out: Tensor = proceed(call)
        if call.index == 0 and call.state.phase == "base":
            seen[call.site.name] = call
        return out

    once, none = Capture(words=PLACES, refine=1), Capture(words=PLACES)
    with torch.no_grad(), attnctl.control(model, none, once, Replace(function=see), layout="cond") as handle:
        out = zoo.call(model, inputs)
        a, b = handle.result(none), handle.result(once)
    assert torch.allclose(out, plain, atol=1e-5)
    assert a.layers.keys() == b.layers.keys()
    assert all(s.kind in ("cross", "joint") for s in b.sites)
    for site, layer in b.layers.items():
        block = site.rpartition(".")[0]
        call = seen[site]
        own = call if call.site.kind == "joint" else seen[next(n for n in seen if n.rpartition(".")[0] == block)]
        image = own.image or slice(0, own.q.shape[2])
        q, k = own.q[:, :, image].float(), own.k[:, :, image].float()
        if own.kernel is linear_attention:
            weigh = q.relu() @ k.relu().transpose(-2, -1)
            s = (weigh / (weigh.sum(-1, keepdim=True) + 1e-15)).mean(1)
        else:
            s = dense_map(q, k, scale=own.scale).float().mean(1)
        m = s.shape[0] // 2
        maps = a.layers[site][:, :, 0, 0].unflatten(2, (m, -1)).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
        want = (s @ maps).unflatten(0, (2, m)).permute(0, 3, 1, 2)
        assert (layer[:, :, 0, 0].unflatten(2, (m, -1)).flatten(3) - want).abs().max() <= 1e-5, site


def test_a_pipeline_stays_as_it_is_beside_guidance() -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, Capture(words=("cat",), refine=4, sites="up.1")) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        smooth = handle.maps
    with attnctl.control(pipe, Capture(words=("cat",), sites="up.1")) as handle:
        pipes.run(pipe, kwargs)
        sharp = handle.maps
    assert smooth["cat"].std() < sharp["cat"].std()
    guided = Capture(words=("cat",), refine=1, sites="mid", heads=(0,), keep=("steps",))
    with attnctl.control(pipe, guided, PAG(sites="mid")) as handle:
        pipes.run(pipe, kwargs)
        assert handle.maps.steps == (0, 1, 2)
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refine": -1}, "refine=-1 must be a whole number of times"),
        ({"refine": True}, "refine=True"),
        ({"refine": 1, "points": ((0.5, 0.5),)}, "maps of points are self-attention themselves"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capture(**fields)


def test_a_block_without_self_attention_is_refused() -> None:
    sites = attnctl.find_sites(zoo.build("sd15")[0])
    cross = [s for s in sites if s.kind == "cross"]
    with pytest.raises(SiteError, match="has no self-attention before it"):
        partners(cross, cross)
