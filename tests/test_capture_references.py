"""Where words lie in reference pictures: places against those by hand, maps against softmax written out, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_host_pipelines as hosts
import zoo_pipelines as pipes
from contract import Replace, assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.core.hosts.references import references_of
from attnctl.errors import ConfigError
from attnctl.processors import Capture

pytestmark = pytest.mark.usefixtures("no_grad")
# Tokens of the image, and grids of the pictures beside it.
HOSTS: dict[str, tuple[int, list[tuple[int, int, int]]]] = {
    "flux_kontext": (48, [(1, 8, 6)]),
    "qwen_edit": (48, [(1, 78, 52)]),
    "qwen_edit_plus": (48, [(1, 78, 52), (1, 78, 52)]),
}


def seen(pipe: Any, kwargs: dict[str, Any], **options: Any) -> list[Any]:
    """Return the attention calls of the prompt's rows in the first site of a run of one step."""
    calls: list[Any] = []

    def see(call: Any, proceed: Any) -> Tensor:
        if call.site.depth == 0 and call.state.rows.role != "uncond":
            calls.append(call.with_(found=references_of(call.state), at=call.on_image()[0].start))
        return proceed(call)

    with attnctl.control(pipe, Replace(function=see)):
        pipes.run(pipe, kwargs, num_inference_steps=1, **options)
    return calls


@pytest.mark.parametrize("name", HOSTS)
def test_maps_of_words_lie_on_the_reference(name: str) -> None:
    pipe, kwargs = hosts.build(name)
    model = pipes.denoiser(pipe)
    calls = seen(pipe, kwargs)
    call = calls[0]
    image, grids = HOSTS[name]
    assert [g for _, g in call.found] == grids, call.found
    assert [n for n, _ in call.found] == [image + sum(g[1] * g[2] for g in grids[:i]) for i in range(len(grids))]
    before = snapshot(model)
    plain = pipes.run(pipe, kwargs, num_inference_steps=1)
    captures = [Capture(words=(1, 3), reference=n) for n in range(len(grids))]
    with attnctl.control(pipe, *captures, Capture(words=(1, 3))) as handle:
        assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=1), plain)
        found = [handle.result(c) for c in captures]
    assert_clean(before, model)
    part = call.rows(call.state.rows.cond) if call.state.rows.role == "both" else call
    for maps, (n, (_, h, w)) in zip(found, call.found, strict=True):
        layer = maps.layers[call.site.name]
        assert layer.shape[-2:] == (h, w)
        q = part.q[:, :, call.at + n : call.at + n + h * w].double()
        scale = part.q.shape[-1] ** -0.5 if part.scale is None else part.scale
        logits = q @ part.k.double().mT * scale
        if part.mask is not None:
            assert part.mask.dtype == torch.bool
            mask = part.mask.expand(*part.mask.shape[:2], part.q.shape[2], -1)[:, :, call.at + n : call.at + n + h * w]
            logits = logits.masked_fill(~mask, -torch.inf)
        columns = logits.softmax(-1)[..., [part.text.start + 1, part.text.start + 3]].mean(1)
        got = layer[:, :, 0, 0, 0].flatten(2).mT.double()
        assert (got - columns).abs().max() < 1e-5


@pytest.mark.parametrize("batched", [False, True])
def test_flux2_numbers_its_pictures_in_position_ids(batched: bool) -> None:
    model, inputs = zoo.build("flux2", dtype=torch.float64)
    sizes = ((4, 3), (5, 2))
    beside = [torch.cat([zoo.grid_ids(h, w), torch.zeros(h * w, 1)], 1) for h, w in sizes]
    for n, ids in enumerate(beside):
        ids[:, 0] = 10 * (n + 1)
    x, ids = inputs["hidden_states"], torch.cat([inputs["img_ids"], *beside])
    more = torch.randn(len(x), 22, x.shape[2], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    inputs |= {
        "hidden_states": torch.cat([x, more], 1),
        "img_ids": ids[None].expand(len(x), -1, -1) if batched else ids,
    }
    wanted: dict[str, list[Tensor]] = {}

    def see(call: Any, proceed: Any) -> Tensor:
        start, text = call.on_image()[0].stop, call.text.start
        maps = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1)[..., [text + 1, text + 3]].mean(1)
        wanted[call.site.name] = [maps[:, start : start + 12], maps[:, start + 12 : start + 22]]
        return proceed(call)

    captures = [Capture(words=(1, 3), reference=n) for n in (0, 1)]
    with attnctl.control(model, Replace(function=see), layout="cond"):
        plain = zoo.call(model, inputs)
    with attnctl.control(model, *captures, layout="cond") as handle:
        assert torch.equal(zoo.call(model, inputs), plain)
        found = [handle.result(c) for c in captures]
    for n, (maps, size) in enumerate(zip(found, sizes, strict=True)):
        assert maps.layers.keys() == wanted.keys()
        for site, layer in maps.layers.items():
            assert layer.shape[-2:] == size
            assert (layer[:, :, 0, 0, 0].flatten(2).mT.double() - wanted[site][n]).abs().max() < 1e-6


def test_what_no_call_holds_is_refused() -> None:
    pipe, kwargs = hosts.build("flux_kontext")
    with attnctl.control(pipe, Capture(words=(1, 3), reference=1)), pytest.raises(ConfigError, match="tells of 1 ref"):
        pipes.run(pipe, kwargs, num_inference_steps=1)
    plain, given = pipes.build("flux")
    with attnctl.control(plain, Capture(words=(1, 3), reference=0)), pytest.raises(ConfigError, match="tells of 0 ref"):
        pipes.run(plain, given, num_inference_steps=1)
    for fields in ({"points": ((0.5, 0.5),)}, {"concepts": ("a", "b")}, {"refine": 1}):
        with pytest.raises(ConfigError, match="leave out points, concepts and refine"):
            Capture(reference=0, **fields)
    for wrong in (-1, 0.5, "0", True):
        with pytest.raises(ConfigError, match="reference"):
            Capture(reference=wrong)
