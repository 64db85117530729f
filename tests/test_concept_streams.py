"""Maps of concepts in FLUX.2, Qwen-Image and CogVideoX: against the model's own blocks, the concepts as their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from test_roads_words import klein, qwen
from torch import Tensor

import attnctl
from attnctl.core.hosts.words import Concept
from attnctl.processors import Capture
from attnctl.processors.capture import concepts
from attnctl.processors.capture.concepts import embed_concepts

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = ("cat", "sky", "sled")


def flux2() -> Any:
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=zoo.build("flux2")[0], **parts
    )


def entered_flux(model: Any, x: Tensor) -> Tensor:
    return model.context_embedder(x)


def entered_qwen(model: Any, x: Tensor) -> Tensor:
    return model.txt_in(model.txt_norm(x))


def entered_cog(model: Any, x: Tensor) -> Tensor:
    return model.patch_embed.text_proj(x)


HOSTS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], int]] = {
    "flux2": (flux2, entered_flux, 32),
    "qwen": (lambda: pipes.build("qwen")[0], entered_qwen, 16),
    "cogvideox_rope": (lambda: pipes.build("cogvideox_rope")[0], entered_cog, 32),
}


def at_first(tables: Any, image: int) -> Any:
    """Give every concept the place of the first token of the text, and the whole image its own."""
    if tables is None:
        return None
    a, b = tables
    if a.is_complex():
        return a, b[:1].expand(len(NAMES), -1)
    if a.shape[0] == image:
        return tables
    rows = [0] * len(NAMES) + list(range(a.shape[0] - image, a.shape[0]))
    return a[rows], b[rows]


@pytest.mark.parametrize("name", HOSTS)
def test_maps_are_those_of_the_models_own_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, enter, width = HOSTS[name]
    pipe = build()
    model = pipe.transformer.double()
    inputs = zoo.build(name, dtype=torch.float64)[1]
    inputs.pop("encoder_hidden_states_mask", None)
    vectors = torch.randn(len(NAMES), width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = tuple(Concept(n, (0,)) for n in NAMES)
    monkeypatch.setattr(concepts, "embed_concepts", lambda pipe, names: (vectors, own))
    plain = zoo.call(model, inputs)
    with attnctl.control(pipe, Capture(concepts=NAMES, sites="transformer_blocks.*")) as handle:
        assert torch.equal(zoo.call(model, inputs), plain)
        maps = handle.maps
    calls: list[dict[str, Any]] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    hooks = []
    for block in model.transformer_blocks:
        attn = getattr(block, "attn", None) or block.attn1
        hooks.append(block.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True))
        hooks.append(attn.to_out[0].register_forward_pre_hook(lambda m, a: images.append(a[0])))
        if name != "cogvideox_rope":
            hooks.append(attn.to_add_out.register_forward_pre_hook(lambda m, a: texts.append(a[0])))
    zoo.call(model, inputs)
    seen, c = list(images), enter(model, vectors).expand(len(plain), -1, -1)
    layers = tuple(maps.layers.values())
    for n, (block, given, layer) in enumerate(zip(model.transformer_blocks, list(calls), layers, strict=True)):
        image = given["hidden_states"].shape[1]
        told = {**given, "encoder_hidden_states": c}
        told["image_rotary_emb"] = at_first(given.get("image_rotary_emb"), image)
        images.clear()
        texts.clear()
        out = block.forward(**told)
        c = out[1] if name == "cogvideox_rope" else out[0]
        o = images[0][:, : len(NAMES)] if name == "cogvideox_rope" else texts[0]
        want = (seen[n][:, -image:] @ o.mT).softmax(-1)
        got = layer[:, :, 0, 0].flatten(2).transpose(1, 2).double()
        assert (got - want).abs().max() < 1e-6, n
        assert want.std() > 1e-4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("make", [klein, qwen])
def test_a_concept_in_a_template_is_its_own_token(make: Callable[[], Any]) -> None:
    pipe = make()
    options = {"text_encoder_out_layers": (1, 2, 3)} if make is klein else {}
    if options:
        plain = pipe.encode_prompt
        pipe.encode_prompt = lambda *args, **kwargs: plain(*args, **{**options, **kwargs})
    found, own = embed_concepts(pipe, ("cat", "mat"))
    states = pipe.encode_prompt(prompt=["cat", "mat"], device="cpu")[0]
    for vector, state, concept in zip(found, states, own, strict=True):
        assert torch.equal(vector, state[list(concept.positions)].mean(0))
        assert "".join(concept.tokens).strip("Ġ") == concept.word
