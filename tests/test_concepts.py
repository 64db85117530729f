"""Maps of concepts: against the text stream written out, without a trace on the image, read and refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, snapshot
from diffusers import FirstBlockCacheConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnctl
from attnctl.core.hosts.words import Concept
from attnctl.data.map_files import describe
from attnctl.data.maps import WordMaps
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.processors import PAG, Capture
from attnctl.processors.capture import concepts
from attnctl.processors.capture.concepts import concept_outputs, concept_shares, concept_sites, embed_concepts
from attnctl.shapes import load_shapes

NAMES = ("cat", "sky", "a red sled")


@pytest.fixture(autouse=True)
def vectors(monkeypatch) -> Tensor:
    """Stand in for the text encoders that the tiny pipelines lack."""
    made = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    real = concepts.embed_concepts

    def embed(pipe: Any, names: Any) -> Any:
        if getattr(pipe, "text_encoder", None) is not None:
            return real(pipe, names)
        return made[: len(names)], tuple(Concept(n, (0,)) for n in names)

    monkeypatch.setattr(concepts, "embed_concepts", embed)
    return made


class Stream:
    """The concept stream written out, from what the blocks of a plain run were called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls, self.outputs = model, [], []
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda m, a, kwargs: self.calls.append((m, kwargs)), with_kwargs=True)

    def see(self, call: Any, proceed: Any) -> Tensor:
        """Note the image's attention outputs in the double blocks."""
        out: Tensor = proceed(call)
        if call.site.kind == "joint" and hasattr(call.site.module, "add_k_proj"):
            self.outputs.append(out[:, :, call.image])
        return out

    def maps(self, vectors: Tensor, rows: slice) -> list[Tensor]:
        """Return the shares of each block of each step, [rows, image tokens, concepts]."""
        found, c = [], vectors
        for n, (block, kwargs) in enumerate(self.calls):
            x, temb = kwargs["hidden_states"][rows], kwargs["temb"][rows]
            if n % len(self.model.transformer_blocks) == 0:
                c = self.model.context_embedder(vectors).expand(len(x), -1, -1)
            o, c = self.block(block, x, c, temb, kwargs.get("image_rotary_emb"))
            image = self.outputs[n][rows].transpose(1, 2).flatten(2)  # heads joined
            found.append((image @ o.transpose(1, 2)).softmax(-1))
        return found

    @staticmethod
    def block(block: Any, x: Tensor, c: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return the concepts' attention outputs, heads joined, and what becomes of the concepts."""
        attn = block.attn
        many = block.norm1_context(c, emb=temb) if not last(block) else (block.norm1_context(c, temb),)
        nx = block.norm1(x, emb=temb)[0]

        def heads(y: Tensor, norm: Any) -> Tensor:
            y = y.unflatten(-1, (attn.heads, -1))
            return y if norm is None else norm(y)

        def turned(y: Tensor, place: slice) -> Tensor:  # [B, N, H, D], pairs of channels turned by an angle
            if rotary is None:
                return y
            cos, sin = (t[place].unsqueeze(1).to(y.dtype) for t in rotary)
            real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
            return y * cos + torch.stack([-imaginary, real], -1).flatten(3) * sin

        q = turned(heads(attn.add_q_proj(many[0]), attn.norm_added_q), slice(0, 1))
        k = turned(heads(attn.add_k_proj(many[0]), attn.norm_added_k), slice(0, 1))
        v = heads(attn.add_v_proj(many[0]), None)
        kx, vx = turned(heads(attn.to_k(nx), attn.norm_k), slice(zoo.TEXT, None)), heads(attn.to_v(nx), None)
        k, v = torch.cat([k, kx], 1), torch.cat([v, vx], 1)
        weights = (torch.einsum("bchd,bnhd->bhcn", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        o = torch.einsum("bhcn,bnhd->bchd", weights, v).flatten(2)
        if last(block):
            return o, c
        _, gate, shift, scale, gate_mlp = (m if m.dim() == 3 else m.unsqueeze(1) for m in many)
        c = c + gate * attn.to_add_out(o)
        return o, c + gate_mlp * block.ff_context(block.norm2_context(c) * (1 + scale) + shift)


def last(block: Any) -> bool:
    return getattr(block, "context_pre_only", False)


def sd35() -> tuple[Any, Any]:
    """Build SD3's pipeline around a transformer with dual attention and q/k norms."""
    pipe, kwargs = pipes.build("sd3", dtype=torch.float64)
    model, _ = zoo.build("sd35")
    pipe.register_modules(transformer=model.double())
    return pipe, kwargs


HOSTS = {"sd3": lambda: pipes.build("sd3", dtype=torch.float64), "sd35": sd35,
         "flux": lambda: pipes.build("flux", dtype=torch.float64),
         "flux_cfg": lambda: pipes.build("flux_cfg", dtype=torch.float64)}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_maps_are_those_of_the_stream_written_out(name: str, vectors: Tensor) -> None:
    pipe, kwargs = HOSTS[name]()
    model = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    capture = Capture(concepts=NAMES, sites="transformer_blocks", keep=("steps",))
    with attnctl.control(pipe, capture) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        maps = handle.maps
    stream = Stream(model)
    with attnctl.control(pipe, Replace(function=stream.see)):
        pipes.run(pipe, kwargs)
    blocks = len(model.transformer_blocks)
    assert list(maps.layers) == [f"transformer_blocks.{n}.attn" for n in range(blocks)]
    with torch.no_grad():
        want = stream.maps(vectors, slice(1, 2) if name.startswith("sd3") else slice(None))
    calls = 2 if name == "flux_cfg" else 1  # with and without the prompt
    for n, layer in enumerate(maps.layers.values()):
        for step in range(3):
            got = layer[:, :, step, 0, 0].flatten(2).transpose(1, 2).double()
            assert (got - want[step * calls * blocks + n]).abs().max() < 1e-6, (n, step)
    assert all(w.std() > 1e-3 for w in want)


def test_concepts_that_are_the_prompt_are_the_text_stream_without_text() -> None:
    """The block itself, given the concepts as its text, does the same at the cost of the whole image."""
    pipe, kwargs = pipes.build("sd3")
    model = pipes.denoiser(pipe)
    seen: list[dict[str, Any]] = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    pipes.run(pipe, kwargs, num_inference_steps=1)
    hook.remove()
    c = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.transformer_blocks[0](**{**seen[0], "encoder_hidden_states": c})[0]
        _, mine = Stream.block(model.transformer_blocks[0], seen[0]["hidden_states"], c, seen[0]["temb"], None)
    assert (whole - mine).abs().max() < 1e-5


def test_the_published_blocks_are_the_default() -> None:
    model, _ = zoo.build("flux", num_layers=19)
    sites = attnctl.find_sites(model)
    family = attnctl.core.hosts.families.family_of(model)
    assert [s.name for s in concept_sites(sites, None, family)] == [
        f"transformer_blocks.{n}.attn" for n in range(15, 19)
    ]
    assert "2502.04320" in str(Capture(concepts=NAMES).default_source(family))
    pipe, kwargs = pipes.build("sd3")
    with attnctl.control(pipe, Capture(concepts=NAMES)) as handle:
        pipes.run(pipe, kwargs)
        assert list(handle.maps.layers) == ["transformer_blocks.3.attn"]
        assert len(handle.sites) == 4, "concepts go through the blocks before"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_beside_guidance_with_replay_nothing_changes(name: str) -> None:
    """The concepts run through modules whose outputs the perturbed pass takes over: theirs must not be taken."""
    pipe, kwargs = pipes.build(name)
    guide = PAG(sites=3)
    with attnctl.control(pipe, guide):
        plain = pipes.run(pipe, kwargs)
    late = Capture(concepts=NAMES, start=0.5, sites="transformer_blocks")  # the first pass is watched without it
    with attnctl.control(pipe, guide, late, Capture(points=((0.5, 0.5),))) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        beside = handle.result(late)
    with attnctl.control(pipe, late) as handle:
        pipes.run(pipe, kwargs)
        assert handle.maps.steps == beside.steps == (2,)
    with attnctl.control(pipe, late, PAG(sites=3, scale=0.0)) as handle:
        pipes.run(pipe, kwargs)
        alone = handle.result(late)
    assert [m.shape for m in alone.layers.values()] == [m.shape for m in beside.layers.values()]


def test_maps_are_shares_and_say_so(tmp_path) -> None:
    pipe, kwargs = pipes.build("flux", batch=2)
    pipes.run(pipe, kwargs)  # the pipeline leaves something of its own on the denoiser
    before = snapshot(pipes.denoiser(pipe))
    with attnctl.control(pipe, Capture(concepts=NAMES, sites=[1, 2], heads=(1,), reduce="ema")) as handle:
        pipes.run(pipe, kwargs)
        maps = handle.maps
    assert_clean(before, pipes.denoiser(pipe))
    assert maps.words == NAMES
    assert maps["cat"].shape == (2, 8, 6)
    total = maps.stacked().sum(0)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert maps.of == "concepts"
    assert describe(maps)["normalisation"] == "share of the concepts"
    maps.save(tmp_path / "m.safetensors")
    assert torch.equal(WordMaps.load(tmp_path / "m.safetensors")["sky"], maps["sky"])


def test_negative_rows_and_one_call_each() -> None:
    pipe, kwargs = pipes.build("sd3")
    found = {}
    for rows in ("cond", "uncond"):
        with attnctl.control(pipe, Capture(concepts=NAMES, rows=rows, sites=0)) as handle:  # type: ignore[arg-type]
            pipes.run(pipe, kwargs)
            found[rows] = handle.maps["cat"]
    assert not torch.equal(found["cond"], found["uncond"])


def test_checkpointing_takes_concepts_through_once() -> None:
    _, inputs = zoo.build("flux")
    pipe, kwargs = pipes.build("flux")
    pipe.transformer.enable_gradient_checkpointing()
    with attnctl.control(pipe, Capture(concepts=NAMES, sites="transformer_blocks")) as handle:
        pipe.transformer.train()
        latents = kwargs["prompt_embeds"].requires_grad_()
        out = pipe.transformer(**{**inputs, "encoder_hidden_states": latents[:, : zoo.TEXT]}, return_dict=False)[0]
        before = {k: v.clone() for k, v in handle.maps.layers.items()}
        out.sum().backward()
        assert all(torch.equal(v, before[k]) for k, v in handle.maps.layers.items())
    assert latents.grad is not None


def test_layers_that_are_offloaded_give_the_same_maps() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe, kwargs = pipes.build("flux")
    captures = Capture(concepts=NAMES, sites="transformer_blocks"), Capture(words=(1, 3))

    def maps() -> list[WordMaps]:
        with attnctl.control(pipe, *captures) as handle:
            pipes.run(pipe, kwargs)
            return [handle.result(c) for c in captures]

    want = maps()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    try:
        got = maps()
    finally:
        remove_hook_from_module(pipe.transformer, recurse=True)
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(layer, b.layers[n]) for n, layer in a.layers.items())


# Pure functions


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_outputs_and_shares_are_the_formulas(heads: int, many: int, tokens: int) -> None:
    g = torch.Generator().manual_seed(heads * 100 + many * 10 + tokens)
    q, k, v = (torch.randn(2, heads, many, 4, generator=g, dtype=torch.float64) for _ in range(3))
    ik, iv = (torch.randn(2, heads, tokens, 4, generator=g, dtype=torch.float64) for _ in range(2))
    keys, values = torch.cat([k, ik], 2), torch.cat([v, iv], 2)
    want = (q @ keys.transpose(-1, -2) / 2).softmax(-1) @ values
    assert torch.allclose(concept_outputs(q, k, v, ik, iv), want, atol=1e-12)
    shares = concept_shares(iv, want)
    logits = torch.stack([(iv[:, :, :, None] * want[:, :, None]).sum((1, -1))])[0]
    assert torch.allclose(shares, logits.softmax(-1), atol=1e-12)
    assert torch.allclose(shares.sum(-1), torch.ones(2, tokens, dtype=torch.float64))


def test_a_concept_is_the_mean_of_its_own_words() -> None:
    pipe = load_shapes("mmdit")
    found, own = embed_concepts(pipe, ("circle", "red circle"))
    states = pipe.encode_prompt(["circle", "red circle"], None, None, do_classifier_free_guidance=False)[0]
    assert [c.positions for c in own] == [(1,), (1, 2)]
    assert torch.equal(found[0], states[0, 1])
    assert torch.equal(found[1], states[1, 1:3].mean(0))


def test_on_the_shipped_model() -> None:
    pipe = load_shapes("mmdit")
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "max_sequence_length": 0}
    with attnctl.control(pipe, Capture(concepts=("circle", "gray"))) as handle:
        pipe("a red circle on gray", **call, output_type="latent")
        assert handle.maps["circle"].shape == (1, 16, 16)
        assert handle.maps.prompts == ("",)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"concepts": "cat"}, "give two or more words"),
        ({"concepts": ("cat",)}, "of one alone is 1 everywhere"),
        ({"concepts": ("cat", " ")}, "give two or more words"),
        ({"concepts": ("cat", 3)}, "give two or more words"),
        ({"concepts": ("cat", "cat")}, "names a concept twice"),
        ({"concepts": NAMES, "words": ("cat",)}, "beside words or points"),
        ({"concepts": NAMES, "points": ((0.5, 0.5),)}, "beside words or points"),
        ({"concepts": NAMES, "refine": 1}, "join all heads"),
        ({"concepts": NAMES, "keep": ("heads",)}, "join all heads"),
        ({"concepts": NAMES, "reduce": "none"}, "join all heads"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capture(**fields)


def test_what_concepts_cannot_go_through_is_refused() -> None:
    model, _ = zoo.build("sd3")
    with pytest.raises(ConfigError, match="control the pipeline"):
        attnctl.control(model, Capture(concepts=NAMES))
    for name in ("hunyuanvideo", "lumina2"):
        model, _ = zoo.build(name)
        with pytest.raises(UnsupportedModelError, match="have none that is known"):
            concept_sites(attnctl.find_sites(model), None, attnctl.core.hosts.families.family_of(model))
    with pytest.raises(UnsupportedModelError, match="no encode_prompt"):
        embed_concepts(SimpleNamespace(unet=model), NAMES)
    pipe, kwargs = pipes.build("flux")
    with pytest.raises(SiteError, match="Capture of concepts"):
        attnctl.control(pipe, Capture(concepts=NAMES, sites="single_transformer_blocks"))
    pipes.run(pipe, kwargs)
    before = snapshot(pipe.transformer)
    pipe.transformer.transformer_blocks[0]._compiled_call_impl = lambda *a, **k: None
    try:
        with attnctl.control(pipe, Capture(concepts=NAMES)), pytest.raises(UnsupportedModelError, match="compiled"):
            pipes.run(pipe, kwargs)
    finally:
        del pipe.transformer.transformer_blocks[0]._compiled_call_impl
    assert_clean(before, pipe.transformer)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with attnctl.control(pipe, Capture(concepts=NAMES)), pytest.raises(UnsupportedModelError, match="disable_cache"):
        pipes.run(pipe, kwargs)
    with pytest.raises(ConfigError, match="is cut off"):
        attnctl.control(load_shapes("mmdit"), Capture(concepts=("cat " * 40, "sky")))
