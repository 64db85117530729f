"""Word maps of every family against an explicit float64 softmax, and how they are recorded, read and refused."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, gradients, snapshot
from test_columns import Largest
from test_kernels import dense_map
from torch import Tensor

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.data.maps import WordMaps, normalised, otsu, resized
from attnctl.errors import ConfigError, NeverApplied, SiteError, UnsupportedModelError
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
        second = call.index != (1 if "add_k_proj" in dict(call.site.module.named_children()) and kind == "cross" else 0)
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
        ("mochi", "its rows cannot be told apart"),  # one attention call a sample
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
        with pytest.raises(ConfigError, match="is not a Capture that this handle has attached"):
            handle.result(Capture(words=("cat",)))


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


def test_memory_does_not_grow_with_the_steps_and_no_map_is_built() -> None:
    def kept(steps: int) -> int:
        pipe, kwargs = pipes.build("sd")
        with attnctl.control(pipe, Capture(words=("cat",))) as handle:
            pipes.run(pipe, kwargs, num_inference_steps=steps)
            (own,) = [own for w in handle._watched for _, own in w.attached]
            return sum(p.numel() for layer in own.layers.values() for p in layer.parts)

    assert kept(1) == kept(6)


@pytest.mark.parametrize(
    ("options", "apart", "each"),
    [({}, 1, 4), ({"keep": ("heads",)}, 4, 4), ({"reduce": "none", "store": "float16"}, 3 * 4, 2)],
)
def test_the_bytes_are_those_of_the_formula(options: dict[str, Any], apart: int, each: int) -> None:
    pipe, kwargs = pipes.build("sd", batch=2)
    with attnctl.control(pipe, Capture(words=("a",), sites=("mid", "up.1"), **options)) as handle:
        pipes.run(pipe, kwargs | {"num_images_per_prompt": 2})
        ((_, own),) = handle._watched[0].attached
        tokens = sum(grid[1] * grid[2] for grid in (layer.site.grid for layer in own.layers.values()))
        # images x words x steps and heads that are kept apart x tokens of all layers x bytes of a number
        assert own.bytes == 4 * 1 * apart * tokens * each
        assert own.bytes == sum(p.numel() * p.element_size() for layer in own.layers.values() for p in layer.parts)


def test_no_map_of_a_flux_sized_sequence_is_built() -> None:
    # FLUX at 1024 x 1024: 4096 image and 512 text tokens of 128 channels; one head of 24.
    n_image, n_text = 4096, 512
    model, _ = zoo.build("flux", 1)
    site = next(s for s in attnctl.find_sites(model) if s.kind == "joint")
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n_text + n_image, 128, generator=g) for _ in range(2))
    from attnctl.core.call import CallState
    from attnctl.core.hosts.words import Concept
    from attnctl.core.intercept import AttnCall, SiteHook
    from attnctl.processors.capture.recorder import Recorder

    state = CallState(call=1, steps=1, denoiser=model, family=family_of(model))
    state._grid, state._grid_known = (1, 64, 64), True
    own = Recorder(Capture(words=(1,)), [site], None)
    own.labels, own.concepts = ("1",), [{"1": Concept("1", (1,))}]
    tokens = slice(n_text, n_text + n_image), slice(0, n_text)
    call = AttnCall(q, k, k, None, None, SiteHook(site, state), 0, tokens, lambda *a, **k: q)
    with Largest() as seen:
        own.wrap(call, lambda call: call.q)
    assert seen.elements <= 2 * q.numel() < (n_text + n_image) * n_image // 8
    assert own.maps()["1"].shape == (1, 64, 64)
    some = dense_map(q[:, :, n_text : n_text + 64], k)[..., 1]
    assert (own.maps()["1"].reshape(-1)[:64] - some.reshape(-1)).abs().max() <= 1e-6


# Reading --------------------------------------------------------------------------------------------------------


def some_maps(**options: Any) -> WordMaps:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("a", "cat"), **options)) as handle:
        pipes.run(pipe, kwargs)
        return handle.maps


def test_reading_as_a_mapping_and_normalised() -> None:
    maps = some_maps()
    assert list(maps) == ["a", "cat"]
    assert len(maps) == 2
    assert "cat" in maps
    assert "dog" not in maps
    share = maps.stacked(normalise="share")
    assert torch.allclose(share.sum(0), torch.ones(1, *maps.grid))
    sharp = maps.stacked(normalise="ae")
    assert torch.allclose(sharp, (100 * maps.stacked()).softmax(0))
    minmax = maps.get_map("cat", normalise="minmax")
    assert (minmax.min(), minmax.max()) == (0, 1)
    assert maps.get_map("cat", normalise="max").max() == 1
    assert "'a', 'cat': 1 images, 16x12, 7 layers, 3 steps" in repr(maps)
    assert maps.mask("cat", 0.5).equal(minmax >= 0.5)
    assert maps.mask("cat").dtype == torch.bool
    assert 0 < maps.mask("cat").float().mean() < 1


def test_resizing_keeps_constant_maps_places_and_means() -> None:
    flat_map = torch.full((1, 4, 6), 0.3)
    for size in ((8, 12), (7, 5), (2, 3), (4, 6)):
        assert torch.allclose(resized(flat_map, size), torch.full((1, *size), 0.3))
    bar = torch.zeros(1, 4, 6)
    bar[:, 1] = 1
    big = resized(bar, (16, 24))[0]
    assert big.sum(1).argmax() // 4 == 1
    assert torch.allclose(big.std(1), torch.zeros(16), atol=1e-6)
    assert abs(float(resized(bar, (2, 3)).mean() - bar.mean())) < 0.05  # no row is passed over


def test_normalised_frames_share_one_range() -> None:
    maps = torch.rand(2, 1, 3, 4, 4)
    out = normalised(maps, "minmax")
    assert out.amax((2, 3, 4)).eq(1).all()
    assert not out.amax((3, 4)).eq(1).all()


def test_otsu_parts_two_levels() -> None:
    values = torch.cat([torch.full((50,), 0.1), torch.full((20,), 0.9)]) + 0.01 * torch.randn(
        70, generator=torch.Generator().manual_seed(0)
    )
    assert 0.4 < otsu(values) < 0.6
    assert otsu(torch.full((4,), 0.5)) == 0.5


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: m["catt"], ConfigError, "'catt' was not recorded; these were: a, cat. Did you mean 'cat'"),
        (lambda m: m.get_map("cat", step=0), ConfigError, r'steps were reduced.*keep=\("steps",\)'),
        (lambda m: m.get_map("cat", head=0), ConfigError, r'heads were reduced.*keep=\("heads",\)'),
        (lambda m: m.get_map("cat", normalise="log"), ConfigError, "Choose one of probability, share"),
        (lambda m: m.get_map("cat", size=(0, 3)), ConfigError, "size="),
        (lambda m: m.get_map("cat", layers="up.9"), SiteError, "These maps"),
        (lambda m: m.mask("cat", 2), ConfigError, "threshold=2"),
        (lambda m: m.image(1), ConfigError, "Image 1 is past the end: there are 1"),
    ],
)
def test_bad_reading(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(some_maps(sites="mid"))


def test_a_step_or_head_that_was_not_recorded() -> None:
    maps = some_maps(sites="mid", reduce="none", stop=0.5, heads=(2,))
    with pytest.raises(ConfigError, match="step=2 was not recorded; these were: 0, 1"):
        maps.get_map("cat", step=2)
    with pytest.raises(ConfigError, match="head=0 was not recorded; these were: 2"):
        maps.get_map("cat", head=0)


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduce": "median"}, "Choose one of mean, sum, max, none, ema"),
        ({"keep": ("layers",)}, "keep='layers' is unknown"),
        ({"reduce": "ema", "keep": ("steps",)}, "runs over the steps"),
        ({"reduce": "ema", "decay": 1.0}, "would keep the first step alone"),
        ({"decay": -0.1}, "decay=-0.1 is out of range"),
        ({"rows": "both"}, "rows='both' is unknown"),
        ({"words": "cat"}, r"give a tuple of words"),
        ({"words": ()}, "give a tuple of words"),
        ({"words": (1.5,)}, "1.5 in words"),
        ({"words": ("cat", ("dog",))}, "mixes words and lists"),
        ({"words": (("cat",), ())}, "mixes words and lists"),
        ({"heads": ()}, r"heads=\(\)"),
        ({"heads": (1, 1)}, "give different head numbers"),
        ({"heads": (-1,)}, "give different head numbers"),
        ({"budget": 0}, "budget=0"),
        ({"device": "gpu0"}, "device='gpu0' is unknown"),
        ({"store": "float16"}, r'add keep=\("steps",\)'),
        ({"store": "int8", "keep": ("steps",)}, "store='int8' is unknown"),
        ({"start": 0.9, "stop": 0.1}, "lies after stop"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capture(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("catt",)}, "'catt' is not in the prompt 'a cat'. Did you mean 'cat'"),
        ({"words": (0,)}, "start token"),
        ({"words": ("cat",), "heads": (4,)}, r"heads=\(4,\) do not all exist"),
        ({"words": (("cat",), ("dog",))}, "lists for 2 prompts, but the call has 1"),
        ({"words": ("cat",), "budget": 1000}, r"budget=1000 bytes: \d+ with .*, which is layer \d+ of 7"),
        ({"words": ("cat",), "budget": 30_000, "reduce": "none"}, "budget=30000 bytes"),
        ({"words": ("cat",), "prompt": ("a cat", "a cat")}, "1 rows for 2 prompts"),
    ],
)
def test_bad_input_leaves_nothing_behind(fields: dict[str, Any], message: str) -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    before = snapshot(pipe.unet, pipe.scheduler)

    def go() -> None:
        with attnctl.control(pipe, Capture(**fields)):
            pipes.run(pipe, kwargs)

    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        go()
    after = snapshot(pipe.unet)
    assert {k for k in after if k.startswith("0:")} == {k for k in before if k.startswith("0:")}
    assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_reading_too_early_and_negative_words_without_negative_prompt() -> None:
    pipe, kwargs = pipes.build("sd")
    handle = attnctl.control(pipe, Capture(words=("cat",)))
    with pytest.raises(NeverApplied, match="run the pipeline first"):
        _ = handle.maps
    handle.detach()
    with attnctl.control(pipe, PAG()) as handle, pytest.raises(ConfigError, match="there are 0"):
        _ = handle.maps
    with attnctl.control(pipe, Capture(words=("cat",), rows="uncond")), pytest.raises(ConfigError, match="no negative"):
        pipes.run(pipe, {**kwargs, "negative_prompt": None})


def test_a_bare_denoiser_takes_places_only() -> None:
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, Capture(words=("cat",)), layout="cond"), pytest.raises(ConfigError, match="not known"):
        zoo.call(model, inputs)
    with (
        attnctl.control(model, Capture(words=("cat",), prompt="a cat"), layout="cond"),
        pytest.raises(ConfigError, match="a bare denoiser has no tokenizer"),
    ):
        zoo.call(model, inputs)
    with (
        attnctl.control(model, Capture(words=(zoo.TEXT,)), layout="cond"),
        pytest.raises(ConfigError, match=f"attention sees {zoo.TEXT} text tokens"),
    ):
        zoo.call(model, inputs)


def test_self_attention_is_no_site_for_words() -> None:
    pipe, _ = pipes.build("sd")
    with pytest.raises(SiteError):
        attnctl.control(pipe, Capture(words=("cat",), sites="self"))
    model, _ = zoo.build("svd")
    capture = Capture(words=(1,))
    if not any(s.kind in Capture.kinds for s in attnctl.find_sites(model)):
        with pytest.raises(SiteError):
            attnctl.control(model, capture)


def test_a_map_that_is_not_finite_is_an_error() -> None:
    pipe, kwargs = pipes.build("sd")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        pipe.unet.get_submodule(name).to_q.weight[0, 0] = torch.nan
    for capture in (Capture(words=("cat",), sites="mid"), Capture(words=("cat",), sites="mid", keep=("steps",))):
        with attnctl.control(pipe, capture) as handle:
            pipes.run(pipe, kwargs)
            with pytest.raises(UnsupportedModelError, match=f"maps of {name} hold values that are not finite"):
                _ = handle.maps


def test_a_model_without_text_attention_is_refused() -> None:
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(SiteError, match="no cross- or joint attention, so nothing"):
        attnctl.control(pipe, Capture(words=(1,)))


def test_a_copied_pipeline_records_nothing() -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        other = copy.deepcopy(pipe)
        pipes.run(other, kwargs)
        with pytest.raises(NeverApplied):
            _ = handle.maps
