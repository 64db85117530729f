"""Keys that are other tokens than the queries: the text's where the image asks alone, and those of references.

PRX and Qwen-Image 2.1 have the text in front of the image among the keys, Nucleus-Image behind it, and only the image
asks. GLM-Image keeps the keys of its reference images, in front of text and image, which both ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from contract import Replace, assert_clean, distance, snapshot
from diffusers.models.transformers import transformer_glm_image
from test_kernels import dense_map
from test_paro import plan_for
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.errors import AttnctlError
from attnctl.processors import NAG, PAG, PARO, SEG, Capture, MasaCtrl, SoftPAG, StyleAligned
from attnctl.processors.capture.points import token_at

pytestmark = pytest.mark.usefixtures("no_grad")

SITE = "transformer_blocks.1.attn1"
Rows = tuple[slice, slice, slice]
"""The image's rows among the queries, the image among the keys, the text among the keys."""


def naive(change: Callable[[Tensor, Tensor, Rows], Tensor], rows: Callable[[AttnCall], Rows]) -> Replace:
    """Attend at one site in float64 with a map that is written out and changed."""

    def attend(call: AttnCall, proceed: Proceed) -> Tensor:
        q, k, v = call.q.double(), call.k.double(), call.v.double()
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return change(dense_map(q, k, call.mask, call.scale), v, rows(call)).to(call.q.dtype)

    return Replace(function=attend, sites=SITE)


# References -----------------------------------------------------------------------------------------------------


def referenced(pictures: int = 1) -> tuple[nn.Module, dict[str, Any], Callable[[AttnCall], Rows]]:
    """Build GLM-Image that has read pictures, a call that reads their keys, and where its parts lie."""
    model, inputs = zoo.build("glm_image", 1, torch.float64)
    size = inputs["hidden_states"].shape[-2:]
    caches = transformer_glm_image.GlmImageKVCache(num_layers=model.config.num_layers)
    caches.set_mode("write")
    for n in range(pictures):
        other = inputs | {"hidden_states": inputs["hidden_states"].flip(-1) * (n + 1), "kv_caches": caches}
        zoo.call(model, other | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :0]})
    caches.set_mode("read")
    image, text = math.prod(size) // model.config.patch_size**2, inputs["encoder_hidden_states"].shape[1]
    kept = image * pictures

    def rows(call: AttnCall) -> Rows:
        assert call.k.shape[2] == kept + text + image
        assert call.q.shape[2] == text + image
        return slice(text, text + image), slice(kept + text, kept + text + image), slice(kept, kept + text)

    return model, inputs | {"kv_caches": caches}, rows


def own_values(w: Tensor, v: Tensor, at: Rows) -> Tensor:
    out = w @ v
    out[:, :, at[0]] = v[:, :, at[1]]
    return out


def own_and_text(w: Tensor, v: Tensor, at: Rows) -> Tensor:
    """Leave of the image's map onto the image its diagonal alone."""
    w = w.clone()
    block = w[:, :, at[0], at[1]]
    w[:, :, at[0], at[1]] = block * torch.eye(block.shape[-1], dtype=w.dtype)
    return w / w.sum(-1, keepdim=True) @ v


def all_own(w: Tensor, v: Tensor, at: Rows) -> Tensor:
    return v[:, :, -w.shape[2] :]


def halfway(head: int, target: Callable[[Tensor, Tensor, Rows], Tensor]) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    def mixed(w: Tensor, v: Tensor, at: Rows) -> Tensor:
        out, far = w @ v, target(w, v, at)
        out[:, head] = 0.4 * out[:, head] + 0.6 * far[:, head]
        return out

    return mixed


def spread(w: Tensor, v: Tensor, at: Rows) -> Tensor:
    out = w @ v
    out[:, :, at[0]] = v.mean(2, keepdim=True).expand_as(out)[:, :, at[0]]
    return out


GUIDED: dict[str, tuple[Any, Callable[[Tensor, Tensor, Rows], Tensor]]] = {
    "block": (PAG(scale=2.0, sites=SITE), own_and_text),
    "image": (PAG(scale=2.0, sites=SITE, scope="image"), own_values),
    "all": (PAG(scale=2.0, sites=SITE, scope="all"), all_own),
    "a head": (SoftPAG(scale=2.0, u=0.6, heads=[(SITE, 1)], scope="image"), halfway(1, own_values)),
    "a head, block": (SoftPAG(scale=2.0, u=0.6, heads=[(SITE, 1)], scope="image_block"), halfway(1, own_and_text)),
    "uniform": (SoftPAG(scale=2.0, u=1.0, sites=SITE, scope="image", target="uniform"), spread),
    "a head of all": (SoftPAG(scale=2.0, u=0.6, heads=[(SITE, 0)], scope="all"), halfway(0, all_own)),
}


@pytest.mark.parametrize("what", GUIDED)
@pytest.mark.parametrize("pictures", [1, 2])
def test_guidance_beside_references_is_the_definition(what: str, pictures: int) -> None:
    control, change = GUIDED[what]
    model, inputs, rows = referenced(pictures)
    plain, before = zoo.call(model, inputs), snapshot(model)
    with attnctl.control(model, naive(change, rows), layout="cond"):
        far = zoo.call(model, inputs)
    with attnctl.control(model, control, layout="cond"):
        out = zoo.call(model, inputs)
    assert distance(out, plain + 2.0 * (plain - far)) <= 1e-10
    assert distance(out, plain) > 1e-3
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


def test_maps_beside_references_are_the_columns_of_the_text() -> None:
    model, inputs, rows = referenced(2)
    plain, maps = zoo.call(model, inputs), {}

    def see(w: Tensor, v: Tensor, at: Rows) -> Tensor:
        maps["words"], maps["points"] = w[:, :, at[0], at[2]], w[:, :, at[0], at[1]]
        return w @ v

    probe = naive(see, rows)
    with attnctl.control(model, Capture(words=(1, 3), sites=SITE), probe, layout="cond") as handle:
        assert distance(zoo.call(model, inputs), plain) <= 1e-12
        layer = handle.maps.layers[SITE]
    assert (layer[0, :, 0, 0].flatten(1) - maps["words"][0].mean(0).T[[1, 3]]).abs().max() <= 1e-6
    points = ((0.1, 0.9), (0.6, 0.2))
    with attnctl.control(model, Capture(points=points, sites=SITE), probe, layout="cond") as handle:
        zoo.call(model, inputs)
        layer = handle.maps.layers[SITE]
    h, w = layer.shape[-2:]
    for n, point in enumerate(points):
        row, column = token_at(point, h, w)
        assert (layer[0, n].flatten() - maps["points"][0].mean(0)[row * w + column]).abs().max() <= 1e-6


def test_what_is_not_known_beside_references_is_refused() -> None:
    model, inputs, _ = referenced()
    plain = zoo.call(model, inputs)
    other = {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    for control in (NAG(negative_embeds=other), StyleAligned(sites=SITE), MasaCtrl(start=0.0, sites=SITE)):
        refused = pytest.raises(AttnctlError, match=r"reference images|pictures of one batch")
        with refused, attnctl.control(model, control, layout="cond"):
            zoo.call(model, inputs)
        assert torch.equal(zoo.call(model, inputs), plain)
    with attnctl.control(model, SEG(scale=2.0, sites=SITE, sigma=math.inf), layout="cond"):
        assert zoo.call(model, inputs).isfinite().all()


# The image asks alone -------------------------------------------------------------------------------------------


IMAGE_ALONE = ("prx", "nucleus", "qwen21")


def alone(name: str) -> tuple[nn.Module, dict[str, Any], list[AttnCall]]:
    """Build a model, and return its calls in which the image asks alone of text and image."""
    model, inputs = zoo.build(name, 1)
    seen: list[AttnCall] = []

    def note(call: AttnCall, proceed: Proceed) -> Tensor:
        if call.keys is not None:
            seen.append(call)
        return proceed(call)

    with attnctl.control(model, Replace(function=note), layout="cond"):
        zoo.call(model, inputs)
    assert seen
    return model, inputs, seen


@pytest.mark.parametrize("name", IMAGE_ALONE)
def test_points_look_at_the_image(name: str) -> None:
    model, inputs, calls = alone(name)
    points = ((0.1, 0.9), (0.6, 0.2))
    with attnctl.control(model, Capture(points=points, keep=("heads",)), layout="cond") as handle:
        zoo.call(model, inputs)
        maps = handle.maps
    for call in calls:
        whole = dense_map(call.q.double(), call.k.double(), call.mask, call.scale)[..., call.keys]
        layer = maps.layers[call.site.name]
        h, w = layer.shape[-2:]
        for n, point in enumerate(points):
            row, column = token_at(point, h, w)
            assert (layer[:, n, 0].flatten(2) - whole[:, :, row * w + column]).abs().max() <= 1e-5


def test_a_plan_says_that_it_does_not_fit() -> None:
    model, inputs, _ = alone("prx")
    plan = plan_for(model, inputs, density=0.5)
    refused = pytest.raises(AttnctlError, match="image tokens alone to image and text")
    with refused, attnctl.control(model, PARO(plan), layout="cond"):
        zoo.call(model, inputs)
