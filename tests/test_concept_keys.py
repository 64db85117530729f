"""Maps of concepts where cross-attention reads the text: against keys made by hand, once a run, without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_host_pipelines as hosts
import zoo_pipelines as pipes
from contract import Replace, assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.core.hosts.words import Concept
from attnctl.errors import SiteError, UnsupportedModelError
from attnctl.processors import PAG, Capture
from attnctl.processors.capture import concepts
from attnctl.processors.capture.concepts import embed_concepts
from attnctl.shapes import load_shapes

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = ("cat", "sky", "sled")


def as_they_are(model: Any, x: Tensor) -> Tensor:
    return x


def projected(model: Any, x: Tensor) -> Tensor:
    return model.caption_projection(x)


ENTERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sd": as_they_are,
    "sdxl": as_they_are,
    "animatediff": as_they_are,
    "wan": lambda model, x: model.condition_embedder.text_embedder(x),
    "wan_i2v": lambda model, x: model.condition_embedder.text_embedder(x),
    "ltx": projected,
    "pixart": projected,
    "sana": lambda model, x: model.caption_norm(model.caption_projection(x)),
}


def built(name: str) -> tuple[Any, dict[str, Any], Any]:
    pipe, kwargs = (hosts if name == "wan_i2v" else pipes).build(name, dtype=torch.float64)
    return pipe, kwargs, pipes.denoiser(pipe)


def width_of(pipe: Any, kwargs: dict[str, Any], model: Any) -> int:
    """Return how wide the text is that a run hands the denoiser."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["encoder_hidden_states"].shape[-1]), with_kwargs=True
    )
    pipes.run(pipe, kwargs)
    hook.remove()
    return seen[0]


def stand_in(monkeypatch: pytest.MonkeyPatch, width: int) -> Tensor:
    """Stand in for the text encoders that the tiny pipelines lack."""
    made = torch.randn(len(NAMES), width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = tuple(Concept(n, (0,)) for n in NAMES)
    monkeypatch.setattr(concepts, "embed_concepts", lambda pipe, names: (made, own))
    return made


@pytest.mark.parametrize("name", ENTERED)
def test_maps_are_the_choice_among_keys_made_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs, model = built(name)
    vectors = stand_in(monkeypatch, width_of(pipe, kwargs, model))
    plain, before = pipes.run(pipe, kwargs), snapshot(model)
    with attnctl.control(pipe, Capture(concepts=NAMES, keep=("steps",))) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        maps = handle.maps
    assert_clean(before, model)

    queries: dict[str, list[tuple[Tensor, float | None, int]]] = {}

    def see(call: Any, proceed: Any) -> Tensor:
        if call.site.kind == "cross" and call.index == 0 and call.state.rows.prompts:
            q = call.rows(call.state.rows.cond).q
            queries.setdefault(call.site.name, []).append((q, call.scale, call.folded))
        return proceed(call)

    with attnctl.control(pipe, Replace(function=see)):
        pipes.run(pipe, kwargs)
    tokens = ENTERED[name](model, vectors)
    assert maps.layers
    for site, layer in maps.layers.items():
        attn = model.get_submodule(site)
        k = attn.to_k(tokens)
        norm = getattr(attn, "norm_k", None)
        k = k if norm is None else norm(k)
        k = k.unflatten(-1, (attn.heads, -1)).transpose(0, 1)
        for step, (q, scale, frames) in enumerate(queries[site]):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            want = (scale * q @ k.mT).softmax(-1).mean(1)  # [images * frames, N, concepts]
            want = want.unflatten(0, (-1, frames)).flatten(1, 2)
            got = layer[:, :, step, 0].flatten(2).transpose(1, 2).double()
            assert (got - want).abs().max() < 1e-6, (site, step)
    assert want.std() > 1e-4


def test_keys_are_made_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs, model = built("wan")
    stand_in(monkeypatch, width_of(pipe, kwargs, model))
    calls: list[int] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda m, a: calls.append(a[0].shape[1]))
    with attnctl.control(pipe, Capture(concepts=NAMES)):
        for _ in range(2):
            calls.clear()
            pipes.run(pipe, kwargs)
            assert calls.count(min(calls)) == 1
    hook.remove()


def test_beside_guidance_and_rows_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs = pipes.build("pixart", batch=2)
    stand_in(monkeypatch, width_of(pipe, kwargs, pipes.denoiser(pipe)))
    with attnctl.control(pipe, PAG(sites="self")):
        plain = pipes.run(pipe, kwargs)
    capture = Capture(concepts=NAMES, sites="cross", heads=(1,), start=0.5)
    with attnctl.control(pipe, PAG(sites="self"), capture) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        maps = handle.result(capture)
    assert maps["cat"].shape[0] == 2
    assert not torch.equal(maps["cat"][0], maps["cat"][1])
    total = maps.stacked().sum(0)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_on_the_shipped_models() -> None:
    pipe = load_shapes("text2image")
    found, own = embed_concepts(pipe, ("circle", "red circle"))
    assert found.shape[0] == len(own) == 2
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    with attnctl.control(pipe, Capture(concepts=("circle", "gray"))) as handle:
        pipe("a red circle on gray", **call, output_type="latent")
        assert handle.maps.of == "concepts"
        assert handle.maps["circle"].ndim == 3


def test_what_has_no_text_to_take_their_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs, model = built("wan")
    stand_in(monkeypatch, width_of(pipe, kwargs, model) + 1)
    with (
        attnctl.control(pipe, Capture(concepts=NAMES)),
        pytest.raises(UnsupportedModelError, match="of another form"),
    ):
        pipes.run(pipe, kwargs)
    with pytest.raises(SiteError, match="Capture of concepts"):
        attnctl.control(pipe, Capture(concepts=NAMES, sites="self"))
