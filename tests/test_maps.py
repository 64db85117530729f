"""Word maps of every family against an explicit float64 softmax, and how they are recorded, read and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, gradients, snapshot
from test_kernels import dense_map
from torch import Tensor

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.errors import ConfigError, NeverApplied, UnsupportedModelError
from attnctl.processors import PAG, Capture, Control, SoftPAG

PLACES = (1, 3)
# Families whose image queries read text keys; the others have neither cross- nor joint attention with text.
WITH_TEXT = [n for n in zoo.NAMES if n not in ("svd", "mochi", "lumina2")]


class Probe:
    """Note the explicit map of every text attention in float64: image rows, and the columns of some text tokens."""

    def __init__(self, places: tuple[int, ...] = PLACES, phases: tuple[str, ...] = ("base",)) -> None:
        self.places = places
        self.maps: dict[str, list[Tensor]] = {}
        self.phases: set[str] = set()

    def control(self) -> Control:
        """Return the control that notes."""
        return Replace(function=self.see)

    def see(self, call: Any, proceed: Any) -> Tensor:
        """Note [rows, heads, image tokens, places]."""
        out: Tensor = proceed(call)
        kind, name = call.site.kind, call.site.name
        second = call.index != 0
        if kind not in ("cross", "joint") or second or call.state.phase != "base":
            return out
        probs = dense_map(call.q.float(), call.k.float(), call.mask, call.scale)
        first, n, text = 0, call.q.shape[-2], call.k.shape[-2]
        if kind == "joint":
            text = {"auraflow": zoo.TEXT + 8, "zimage": 32}.get(self.family(call), zoo.TEXT)
            first = 0 if family_of(call.state.denoiser).text == "first" else n - text
            probs = probs[..., slice(text, None) if first == 0 else slice(0, n - text), :]
        self.maps.setdefault(name, []).append(probs[..., [first + p for p in self.places]])
        return out

    @staticmethod
    def family(call: Any) -> str:
        return {"AuraFlow": "auraflow", "Z-Image": "zimage"}.get(family_of(call.state.denoiser).name, "")


@pytest.mark.parametrize("name", WITH_TEXT)
def test_maps_of_every_family_are_the_explicit_softmax(name: str) -> None:
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    probe = Probe()
    before = snapshot(model)
    capture = Capture(words=PLACES, keep=("heads",))
    with torch.no_grad(), attnctl.control(model, capture, probe.control(), layout="cond") as handle:
        zoo.call(model, inputs)
        maps = handle.maps
    assert_clean(before, model)
    assert maps.layers.keys() == probe.maps.keys()
    for site, layer in maps.layers.items():
        want = torch.cat(probe.maps[site])  # families without batches call once a sample
        assert layer.dtype == torch.float32
        assert layer.shape[:4] == (2, 2, 1, want.shape[1])
        f, h, w = layer.shape[-3:]
        m = want.shape[0] // 2
        got = layer[:, :, 0].permute(0, 3, 2, 4, 5, 1).reshape(2, m, f // m, want.shape[1], h * w, 2)
        got = got.transpose(2, 3).flatten(3, 4).flatten(0, 1)  # [rows, heads, tokens, words]
        assert (got - want[..., : got.shape[2], :]).abs().max() <= 2e-6, site
    with torch.no_grad(), attnctl.control(model, Capture(words=PLACES), layout="cond"):
        assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lumina2", "nothing tells image from text tokens"),  # prompts of uneven lengths put images at uneven places
    ],
)
def test_uneven_layouts_are_refused_in_words(name: str, message: str) -> None:
    model, inputs = zoo.build(name)
    with (
        attnctl.control(model, Capture(words=(1,)), layout="cond"),
        pytest.raises(UnsupportedModelError, match=message),
    ):
        zoo.call(model, inputs)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sd", {"words": ("cat",)}),
    ("sd_img2img", {"words": ("a", "cat")}),
    ("sd_inpaint9", {"words": ("cat",)}),
    ("sd_controlnet", {"words": ("cat",)}),
    ("sdxl", {"words": PLACES}),
    ("sd3", {"words": PLACES}),
    ("flux", {"words": PLACES}),
    ("flux_cfg", {"words": PLACES}),
    ("qwen", {"words": PLACES}),
    ("pixart", {"words": PLACES}),
    ("sana", {"words": PLACES}),
    ("animatediff", {"words": ("cat",)}),
    ("wan", {"words": PLACES}),
    ("cogvideox", {"words": PLACES}),
    ("ltx", {"words": PLACES}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_recording_leaves_every_pipeline_as_it_is(name: str, options: dict[str, Any]) -> None:
    pipe, kwargs = pipes.build(name)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, Capture(**options)) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        maps = handle.maps
    assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()
    steps = 2 if name == "sd_img2img" else 3
    assert maps.steps == tuple(range(steps))
    frames = zoo.FRAMES if name in ("animatediff", "wan", "cogvideox", "ltx") else None
    for word, values in maps.items():
        assert values.shape == (1, *([frames] if frames else []), *maps.grid), word
        assert 0 < values.min() <= values.max() < 1
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("adapter", ["ip", "lora"])
def test_words_and_places_beside_adapters(adapter: str) -> None:
    pipe, kwargs = pipes.build("sd")
    bare = pipes.run(pipe, kwargs)
    if adapter == "ip":
        kwargs |= pipes.load_ip_adapter(pipe)  # computes a second attention, over image tokens, at every text site
    else:
        pipe.load_lora_weights(pipes.lora_state(pipe))
    plain = pipes.run(pipe, kwargs)
    assert not torch.equal(plain, bare)
    words, probe = Capture(words=("cat",), sites="mid"), Probe(tuple(range(77)))
    points = Capture(points=((0.5, 0.5),), sites="mid")
    with attnctl.control(pipe, words, points, probe.control()) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        (site,) = handle.result(words).layers
        got = handle.result(words).layers[site][0, 0, 0, 0, 0].flatten()
        assert torch.allclose(handle.result(points)["0.5,0.5"].sum(), torch.ones(()), atol=1e-5)
    want = torch.stack(probe.maps[site])[:, 1].mean((0, 1))[:, cat_place(pipe)].mean(-1)
    assert (got - want).abs().max() <= 1e-6


def cat_place(pipe: Any, prompt: str = "a cat") -> list[int]:
    ids = pipe.tokenizer(prompt).input_ids
    return [i for i, t in enumerate(pipe.tokenizer.convert_ids_to_tokens(ids)) if t == "cat</w>"]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("rows", ["cond", "uncond"])
def test_batches_and_pictures_a_prompt_with_and_without_guidance(guided: bool, rows: str) -> None:
    pipe, kwargs = pipes.build("sd", dtype=torch.float64)
    kwargs |= {"prompt": ["a cat", "the big cat"], "negative_prompt": ["ugly cat", "cat"], "num_images_per_prompt": 2}
    kwargs |= {"guidance_scale": 3.0 if guided else 1.0}
    probe = Probe(tuple(range(77)))
    with attnctl.control(pipe, Capture(words=("cat",), rows=rows), probe.control()) as handle:
        pipes.run(pipe, kwargs)
        if not guided and rows == "uncond":
            with pytest.raises(NeverApplied, match="negative prompt that guidance uses"):
                _ = handle.maps
            return
        maps = handle.maps
    texts = kwargs["prompt"] if rows == "cond" else kwargs["negative_prompt"]
    assert maps.prompts == (texts[0], texts[0], texts[1], texts[1])
    assert maps.images == 4
    for site, layer in maps.layers.items():
        want = torch.stack(probe.maps[site]).mean((0, 2))  # steps and heads: [rows, tokens, places]
        if guided:
            want = want[4:] if rows == "cond" else want[:4]
        for n, text in enumerate(maps.prompts):
            places = cat_place(pipe, text)
            assert maps.tokens[n] == (tuple(places),)
            got = layer[n].reshape(-1)
            assert (got - want[n, :, places].mean(-1)).abs().max() <= 1e-6


def test_prompts_of_a_batch_may_have_different_words() -> None:
    pipe, kwargs = pipes.build("sd", batch=2)  # "a cat", "a black bear in the water"
    with attnctl.control(pipe, Capture()) as handle:
        pipes.run(pipe, kwargs)
        every = handle.maps
    assert every.words == ("a", "cat", "black", "bear", "in", "the", "water")
    assert every["a"].isfinite().all()
    assert every["cat"][0].isfinite().all()
    assert every["cat"][1].isnan().all()
    assert every.image(0).keys() == {"a", "cat"}
    assert torch.equal(every.image(1)["bear"], every["bear"][1])
    own = Capture(words=(("cat",), ("black bear", "a")))
    with attnctl.control(pipe, own) as handle:
        pipes.run(pipe, kwargs)
        assert handle.maps.words == ("cat", "black bear", "a")
        assert torch.equal(handle.maps["cat"][0], every["cat"][0])
        both = (every["black"][1] + every["bear"][1]) / 2
        tokens = handle.maps.tokens[1][1]
        if len(tokens) == 2:
            assert (handle.maps["black bear"][1] - both).abs().max() <= 1e-7


def test_negative_words_of_a_sequential_pair() -> None:
    pipe, kwargs = pipes.build("wan")
    found = {}
    for rows in ("cond", "uncond"):
        with attnctl.control(pipe, Capture(words=PLACES, rows=rows, prompt="")) as handle:
            pipes.run(pipe, kwargs)
            found[rows] = handle.maps["1"]
    swapped = {**kwargs, "prompt_embeds": kwargs["negative_prompt_embeds"]}
    swapped["negative_prompt_embeds"] = kwargs["prompt_embeds"]
    assert not torch.equal(found["cond"], found["uncond"])
    assert found["cond"].shape == found["uncond"].shape


def test_steps_heads_and_layers_can_be_kept_apart_and_add_up() -> None:
    pipe, kwargs = pipes.build("sd")
    kept = Capture(words=("cat",), reduce="none")
    with attnctl.control(pipe, kept) as handle:
        pipes.run(pipe, kwargs)
        apart = handle.maps
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        pipes.run(pipe, kwargs)
        whole = handle.maps
    assert kept.keep == ("steps", "heads")
    steps = torch.stack([apart.get_map("cat", step=s) for s in apart.steps])
    heads = torch.stack([apart.get_map("cat", head=h) for h in range(4)])
    for values in (steps, heads):
        assert (values.mean(0) - whole["cat"]).abs().max() <= 1e-6
    assert (apart["cat"] - whole["cat"]).abs().max() <= 1e-6
    names = [s.name for s in whole.sites]
    layers = torch.stack([whole.get_map("cat", layers=n, size=whole.grid) for n in names])
    assert (layers.mean(0) - whole["cat"]).abs().max() <= 1e-6
    mid = whole.get_map("cat", layers="mid")
    assert mid.shape == (1, 4, 3)
    assert whole.get_map("cat", layers="mid", size=(8, 6)).shape == (1, 8, 6)


def test_sum_and_max() -> None:
    pipe, kwargs = pipes.build("sd")
    found = {}
    for reduce in ("mean", "sum", "max", "none"):
        with attnctl.control(pipe, Capture(words=("cat",), reduce=reduce, sites="mid")) as handle:
            pipes.run(pipe, kwargs)
            found[reduce] = handle.maps
    apart = next(iter(found["none"].layers.values()))
    assert torch.allclose(found["sum"]["cat"], apart.sum((2, 3))[:, 0, 0], atol=1e-6)
    assert torch.equal(found["max"]["cat"], apart.amax((2, 3))[:, 0, 0])
    assert torch.allclose(found["sum"]["cat"], found["mean"]["cat"] * 12, atol=1e-5)


def test_a_running_mean_forgets() -> None:
    pipe, kwargs = pipes.build("sd")
    apart, running = Capture(words=("cat",), keep=("steps",)), Capture(words=("cat",), reduce="ema", decay=0.75)
    with attnctl.control(pipe, apart, running) as handle:
        pipes.run(pipe, kwargs)
        each, got = handle.result(apart), handle.result(running)
    want = each.get_map("cat", step=0)
    for step in (1, 2):
        want = 0.75 * want + 0.25 * each.get_map("cat", step=step)
    assert torch.allclose(got["cat"], want, atol=1e-6)
    assert got.about == {"steps_reduced": "ema, decay 0.75"}


def test_a_window_and_some_heads() -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("cat",), reduce="none")) as handle:
        pipes.run(pipe, kwargs)
        every = handle.maps
    with attnctl.control(pipe, Capture(words=("cat",), reduce="none", start=0.3, stop=0.9, heads=(3, 1))) as handle:
        pipes.run(pipe, kwargs)
        some = handle.maps
    assert some.steps == (1, 2)
    for name, layer in some.layers.items():
        assert torch.equal(layer, every.layers[name][:, :, 1:3, [3, 1]])
    assert torch.equal(some.get_map("cat", step=2, head=3), every.get_map("cat", step=2, head=3))


def test_a_second_run_forgets_the_first() -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        pipes.run(pipe, kwargs)
        first = handle.maps
        pipes.run(pipe, {**kwargs, "prompt": "the cat"}, num_inference_steps=2)
        second = handle.maps
        pipes.run(pipe, kwargs)
        third = handle.maps
    assert second.steps == (0, 1)
    assert second.prompts == ("the cat",)
    assert torch.equal(third["cat"], first["cat"])
    assert first.steps == (0, 1, 2)  # what was read stays


def test_perturbed_passes_are_not_recorded() -> None:
    pipe, kwargs = pipes.build("sd")
    guide = SoftPAG(scale=0.5, sites=("mid", "up.1"))
    maps = {}
    for controls in ((Capture(words=("cat",)),), (guide, Capture(words=("cat",))), (Capture(words=("cat",)), guide)):
        with attnctl.control(pipe, *controls) as handle:
            out = pipes.run(pipe, kwargs, num_inference_steps=1)
            maps[controls] = (handle.maps["cat"], out)
    alone, *others = maps.values()
    for values, out in others:
        assert torch.equal(values, alone[0])  # the first step sees the same latents
        assert not torch.equal(out, alone[1])
    with attnctl.control(pipe, guide):
        assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=1), others[0][1])


def test_joint_maps_beside_pag() -> None:
    pipe, kwargs = pipes.build("sd3")
    with attnctl.control(pipe, PAG(scale=2.0)):
        guided = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, PAG(scale=2.0), Capture(words=PLACES)) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), guided)
        assert handle.maps.steps == (0, 1, 2)


def test_several_captures_are_read_one_by_one() -> None:
    pipe, kwargs = pipes.build("sd")
    cond, uncond = Capture(words=("cat",)), Capture(words=("ugly",), rows="uncond", sites="mid")
    with attnctl.control(pipe, cond, uncond) as handle:
        pipes.run(pipe, kwargs)
        assert handle.result(cond).words == ("cat",)
        assert handle.result(uncond).words == ("ugly",)
        assert len(handle.result(uncond).layers) == 1
        with pytest.raises(ConfigError, match=r"there are 2\. Use handle.result"):
            _ = handle.maps
        assert torch.equal(handle.result(0).get_map("cat"), handle.result(cond).get_map("cat"))
        assert handle.result(Capture(words=("cat",))).words == ("cat",)  # equal to the one that is attached
        with pytest.raises(ConfigError, match="none of the attached controls"):
            handle.result(Capture(words=("dog",)))


def test_embeddings_with_the_prompt_told() -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        pipes.run(pipe, kwargs)
        want = handle.maps["cat"]
    embeds = pipe.encode_prompt("a cat", "cpu", 1, True, "ugly")
    call = {k: v for k, v in kwargs.items() if "prompt" not in k}
    call |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    for capture in (Capture(words=("cat",), prompt="a cat"), Capture(words=(cat_place(pipe)[0],))):
        with attnctl.control(pipe, capture) as handle:
            pipes.run(pipe, call)
            assert torch.equal(next(iter(handle.maps.values())), want)
    with (
        attnctl.control(pipe, Capture(words=("cat",))),
        pytest.raises(ConfigError, match="the prompt is not known"),
    ):
        pipes.run(pipe, call)


def test_gradients_pass_and_checkpointing_records_once() -> None:
    model, inputs = zoo.build("sd15")
    plain = gradients(model, inputs)
    with attnctl.control(model, Capture(words=PLACES), layout="cond") as handle:
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, inputs), plain, strict=True))
        once = handle.maps["1"]
    model.enable_gradient_checkpointing()
    model.train()
    with attnctl.control(model, Capture(words=PLACES), layout="cond") as handle:
        gradients(model, inputs)
        assert torch.allclose(handle.maps["1"], once, atol=1e-6)
        assert not handle.maps["1"].requires_grad
