"""Prompts per region: against the formula written out with a dense mask, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
import zoo_pipelines as pipes
from contract import Replace
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.data.specs import control_to_dict
from attnctl.errors import ConfigError, ConflictError, UnsupportedModelError
from attnctl.kernels.areas import box_on_grid, mask_on_grid, patterns
from attnctl.plans import Online
from attnctl.processors import NAG, PAG, Regions, SparseAttention
from attnctl.processors.negative.beside import check_beside
from attnctl.processors.regions.live import RegionText

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
LEFT, RIGHT, BASE = "a black bear", "the red water", "a bear in the water"

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def sd() -> Any:
    """Stable Diffusion in double precision, one picture without classifier-free guidance."""
    pipe, call = pipes.build("sd")
    pipe.unet.double(), pipe.text_encoder.double()
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    call |= {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": noise, "negative_prompt": None}
    return pipe, call


@pytest.fixture(scope="module")
def mmdit() -> Any:
    """The shipped joint-attention model in double precision."""
    pipe = attnctl.load_shapes("mmdit")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, *(m for n, m in pipe.components.items() if n.startswith("text_encoder") and m)):
        part.double()
    return pipe


def run(pipe: Any, call: dict[str, Any], *controls: Any, **more: Any) -> Tensor:
    """Run a pipeline under controls and return its latents."""
    if not controls:
        return pipes.run(pipe, call | more)
    with attnctl.control(pipe, *controls):
        return pipes.run(pipe, call | more)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Areas


def test_boxes_cover_tokens_by_their_share() -> None:
    cover = box_on_grid((0.25, 0.0, 1.0, 0.5), 3, 2)
    assert torch.allclose(cover, torch.tensor([[0.5, 1.0], [0.25, 0.5], [0.0, 0.0]]))
    mask = torch.zeros(6, 4)
    mask[:3, 1:] = 1
    assert torch.allclose(mask_on_grid(mask, 3, 2), cover)


def test_tokens_are_grouped_by_their_regions() -> None:
    inside = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    groups = {regions: places.tolist() for regions, places in patterns(inside)}
    assert groups == {(0,): [0], (0, 1): [1], (1,): [2], (): [3]}


# Cross-attention


def test_one_region_over_all_is_its_prompt(sd: Any) -> None:
    pipe, call = sd
    plain = run(pipe, call | {"prompt": LEFT})
    everywhere = Regions(prompts=(LEFT,), areas=((0, 0, 1, 1),), base=0.0, stop=1.0)
    assert far(run(pipe, call | {"prompt": BASE}, everywhere), plain) < 1e-12
    same = Regions(prompts=(BASE, BASE), areas=HALVES, stop=1.0)
    assert far(run(pipe, call | {"prompt": BASE}, same), run(pipe, call | {"prompt": BASE})) < 1e-12


def test_cross_attention_mixes_the_outputs(sd: Any) -> None:
    pipe, call = sd
    keys: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for prompt in (LEFT, RIGHT):
        seen = keys[prompt] = {}

        def note(c: AttnCall, proceed: Proceed, seen: Any = seen) -> Tensor:
            seen[c.site.name] = (c.k, c.v)
            return proceed(c)

        run(pipe, call | {"prompt": prompt}, Replace(sites="cross", function=note))

    def naive(c: AttnCall, proceed: Proceed) -> Tensor:
        assert c.grid is not None
        _, h, w = c.grid
        areas = ((0.0, 0.0, 0.5, 0.6), (0.4, 0.0, 1.0, 1.0))
        shares = [box_on_grid(a, h, w).flatten().double()[:, None] for a in areas]
        total = shares[0] + shares[1]
        covered = total.clamp_max(1) * 0.7
        out = (1 - covered) * proceed(c)
        for prompt, share in zip((LEFT, RIGHT), shares, strict=True):
            k, v = keys[prompt][c.site.name]
            out = out + covered * share / total.clamp_min(1e-6) * F.scaled_dot_product_attention(c.q, k, v)
        return out

    expected = run(pipe, call | {"prompt": BASE}, Replace(sites="cross", function=naive))
    regions = Regions(prompts=(LEFT, RIGHT), areas=((0, 0, 0.5, 0.6), (0.4, 0, 1, 1)), base=0.3, stop=1.0)
    assert far(run(pipe, call | {"prompt": BASE}, regions), expected) < 1e-12


def test_negative_rows_stay_and_guidance_adds_up(sd: Any) -> None:
    pipe, call = sd
    regions = Regions(prompts=(LEFT, RIGHT), areas=HALVES, stop=1.0)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(c: AttnCall, proceed: Proceed) -> Tensor:
        out = proceed(c)
        seen.append((out[0], F.scaled_dot_product_attention(c.q, c.k, c.v)[0]))
        return out

    guided = {"prompt": BASE, "guidance_scale": 4.0, "negative_prompt": "ugly"}
    plain = run(pipe, call | guided)
    out = run(pipe, call | guided, Replace(sites="cross", function=watch), regions)
    assert all(torch.equal(a, b) for a, b in seen)
    assert far(out, plain) > 1e-3
    assert far(run(pipe, call | guided, regions, PAG(scale=2.0, sites="mid")), out) > 1e-4
    assert torch.equal(run(pipe, call | guided), plain)  # nothing is left behind


# Joint attention


AREAS = ((0.0, 0.0, 0.5, 0.7), (0.4, 0.0, 1.0, 0.7))
TEXTS = ("a red circle on gray", "a blue square on gray", "a red circle and a blue square on gray")


def one_sequence(pipe: Any, base: float, isolation: str) -> tuple[Replace, dict[str, Tensor]]:
    """Return what attends to image, base text and regions' texts under a dense mask, and the texts' embeddings."""
    left, right, whole = ([pipe.encode_prompt(t, t, t, max_sequence_length=0)[i] for i in (0, 2)] for t in TEXTS)
    edges = np.cumsum([0, *(x[0].shape[1] for x in (whole, left, right))])
    order = {s.name: i for i, s in enumerate(attnctl.find_sites(pipe)) if s.kind == "joint"}

    def dense(c: AttnCall, proceed: Proceed) -> Tensor:
        total, grid = c.k.shape[2], c.grid
        tokens = total - int(edges[-1])  # the text stands behind the image in this host
        assert grid is not None
        inside = torch.stack([box_on_grid(a, *grid[1:]).flatten() >= 0.5 for a in AREAS])
        bias = torch.full((total, total), -math.inf, dtype=torch.float64)
        place = [slice(tokens + edges[i], tokens + edges[i + 1]) for i in range(3)]
        bias[place[0], place[0]] = bias[place[0], :tokens] = 0
        alone = isolation == "all" or (isolation == "alternate" and order[c.site.name] % 2 == 0)
        together = (inside[:, :, None] & inside[:, None]).any(0) | ~(inside.any(0)[:, None] | inside.any(0)[None])
        bias[:tokens, :tokens] = 0 if not alone else torch.where(together, 0.0, -math.inf).double()
        covered = inside.any(0)
        weight = torch.tensor(math.log(base / (1 - base)) if base else -math.inf, dtype=torch.float64)
        bias[:tokens, place[0]] = torch.where(covered, weight, weight.new_zeros(()))[:, None]
        for r in (0, 1):
            bias[place[r + 1], place[r + 1]] = 0
            bias[place[r + 1], :tokens] = torch.where(inside[r], 0.0, -math.inf).double()[None]
            bias[:tokens, place[r + 1]] = torch.where(inside[r], 0.0, -math.inf).double()[:, None]
        return F.scaled_dot_product_attention(
            c.q, c.k, c.v, bias[total - c.q.shape[2] :]
        )  # or the text's queries alone

    embeds = {"prompt_embeds": torch.cat([whole[0], left[0], right[0]], 1), "pooled_prompt_embeds": whole[1]}
    return Replace(sites="joint", function=dense), embeds


def joint_call(pipe: Any) -> dict[str, Any]:
    noise = torch.randn(1, *_latents(pipe), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": noise, "output_type": "latent"}


@pytest.mark.parametrize(("base", "isolation"), [(0.3, "none"), (0.0, "all"), (0.2, "alternate")])
def test_joint_attention_equals_one_sequence_under_a_dense_mask(mmdit: Any, base: float, isolation: Any) -> None:
    dense, embeds = one_sequence(mmdit, base, isolation)
    with attnctl.control(mmdit, dense):
        expected = mmdit(**embeds, **joint_call(mmdit)).images
    regions = Regions(prompts=TEXTS[:2], areas=AREAS, base=base, isolation=isolation, stop=1.0)
    with attnctl.control(mmdit, regions):
        out = mmdit(TEXTS[2], max_sequence_length=0, **joint_call(mmdit)).images
    assert far(out, expected) < 1e-10


@pytest.mark.parametrize("place", [0, -1])
def test_guidance_beside_regions_in_joint_attention(mmdit: Any, place: int) -> None:
    name = [s.name for s in attnctl.find_sites(mmdit) if s.kind == "joint"][place]
    regions = Regions(prompts=TEXTS[:2], areas=AREAS, stop=1.0)
    outs = []
    for controls in ((regions,), (PAG(sites=[name], scale=2.0), regions), (regions, PAG(sites=[name], scale=2.0))):
        with attnctl.control(mmdit, *controls):
            outs.append(mmdit(TEXTS[2], max_sequence_length=0, **joint_call(mmdit)).images)
    assert torch.equal(outs[1], outs[2])
    assert outs[1].isfinite().all()
    assert far(outs[1], outs[0]) > 1e-3


def _latents(pipe: Any) -> tuple[int, int, int]:
    config = pipe.transformer.config
    return config.in_channels, config.sample_size, config.sample_size


# What is refused


@pytest.mark.parametrize("embeds", [torch.randn(1, 7, 8), torch.randn(3, 77, 32)])
def test_embeddings_of_another_model_or_batch_are_refused(sd: Any, embeds: Tensor) -> None:
    pipe, call = sd
    given = {f"{name}prompt_embeds": pipe.encode_prompt([BASE], "cpu", 1, False)[0] for name in ("", "negative_")}
    regions = Regions(embeds=({"prompt_embeds": embeds},), areas=HALVES[:1], stop=1.0)
    with pytest.raises(ConfigError, match="does not take the embeddings that were given for a region's prompt"):
        run(pipe, call | {"prompt": None} | given, regions)


@pytest.mark.usefixtures("no_grad")
def test_a_text_for_a_video_has_one_row_or_one_for_each_frame() -> None:
    model, inputs = zoo.build("animatediff", dtype=torch.float64)  # 2 rows of 3 frames
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for rows in (1, 3):
        regions = Regions(embeds=({"encoder_hidden_states": text.expand(rows, -1, -1)},), areas=HALVES[:1], stop=1.0)
        with attnctl.control(model, regions, layout="uncond_first") as handle:
            handle.set_step(0, 3, 600.0)
            found.append(zoo.call(model, inputs))
    assert torch.equal(*found)
    assert not torch.equal(found[0], zoo.call(model, inputs))
    for rows in (2, 6):
        regions = Regions(embeds=({"encoder_hidden_states": text.expand(rows, -1, -1)},), areas=HALVES[:1], stop=1.0)
        with attnctl.control(model, regions, layout="uncond_first") as handle:
            handle.set_step(0, 3, 600.0)
            with pytest.raises(ConfigError, match="the call has 3 rows"):
                zoo.call(model, inputs)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (2000, 3)])
def test_masks_of_every_size_and_overlapping_areas(sd: Any, size: tuple[int, int]) -> None:
    pipe, call = sd
    whole = run(pipe, call | {"prompt": BASE}, Regions(prompts=(LEFT,), areas=((0, 0, 1, 1),), stop=1.0))
    for areas in ((torch.ones(size),), (torch.ones(size), (0, 0, 1, 1))):
        out = run(pipe, call | {"prompt": BASE}, Regions(prompts=(LEFT,) * len(areas), areas=areas, stop=1.0))
        assert far(out, whole) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_batches_of_several_pictures_per_prompt(sd: Any, scale: float) -> None:
    pipe, call = sd
    noise = torch.randn(4, 4, 16, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    texts = {"prompt": ["a cat", f"{BASE}, {RIGHT}"], "negative_prompt": ["", "ugly"]}
    regions = Regions(prompts=(LEFT, " ".join([RIGHT] * 40)), areas=HALVES, stop=1.0)  # the second is cut at its end
    out = run(pipe, call | texts, regions, num_images_per_prompt=2, latents=noise, guidance_scale=scale)
    for i, row in enumerate(noise):
        one = {name: given[i // 2] for name, given in texts.items()}
        alone = run(pipe, call | one, regions, latents=row[None], guidance_scale=scale)
        assert far(out[i : i + 1], alone) < 1e-12


def test_masks_come_from_files_and_pictures(sd: Any, tmp_path: Path) -> None:
    pipe, call = sd
    mask = np.zeros((32, 24), np.uint8)
    mask[:, :12] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    left = (HALVES[0], str(tmp_path / "left.png"), tmp_path / "left.png", Image.fromarray(mask), mask / 255)
    made = [Regions(prompts=(LEFT,), areas=(area,), stop=1.0) for area in left]
    outs = [run(pipe, call | {"prompt": BASE}, regions) for regions in made]
    assert all(far(out, outs[0]) < 1e-6 for out in outs)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    for name, words in (("none.png", "none.png"), ("black.png", "black all over")):
        with pytest.raises(ConfigError, match=words):
            attnctl.control(pipe, Regions(prompts=(LEFT,), areas=(str(tmp_path / name),)))


def test_regions_and_a_negative_prompt_at_one_site_are_refused(sd: Any) -> None:
    with pytest.raises(ConflictError):
        attnctl.control(sd[0], Regions(prompts=(LEFT,), areas=HALVES[:1]), NAG())


def test_regions_and_a_choice_of_blocks_at_one_site_are_refused(mmdit: Any) -> None:
    halves = Regions(prompts=("a red circle",), areas=((0, 0, 0.5, 1),))
    with pytest.raises(ConflictError, match="choice of blocks"):
        attnctl.control(mmdit, halves, SparseAttention(Online(density=0.5, block=8)))


def test_a_region_without_a_token_is_refused(mmdit: Any) -> None:
    call = {"prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(ConfigError, match=r"areas\[1\] covers half of no image token"):
        run(mmdit, call, Regions(prompts=("a", "b"), areas=(HALVES[0], (0.0, 0.0, 0.01, 0.01))))


def test_an_error_behind_the_first_site_is_the_one_that_is_seen(mmdit: Any) -> None:
    def broken(c: AttnCall, proceed: Proceed) -> Tensor:
        raise UnsupportedModelError("a word of its own")

    last = [s.name for s in attnctl.find_sites(mmdit) if s.kind == "joint"][-1]
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    regions = Regions(prompts=TEXTS[:2], areas=AREAS, stop=1.0)
    hooks = len(mmdit.transformer._forward_hooks)
    with (
        attnctl.control(mmdit, Replace(sites=last, function=broken), regions),
        pytest.raises(UnsupportedModelError, match="a word of its own"),
    ):
        mmdit(TEXTS[2], max_sequence_length=0, **call)
    assert len(mmdit.transformer._forward_hooks) == hooks


def test_masks_are_compared_shown_and_of_the_controls_own() -> None:
    mask = torch.ones(8, 8)
    one, other = (Regions(prompts=("a",), areas=(area,)) for area in (mask, HALVES[0]))
    assert one == Regions(prompts=("a",), areas=(mask,)) == copy.deepcopy(one) != other
    assert repr(one) == "Regions(prompts=('a',), areas=(mask [8, 8],))"
    embeds = tuple(Regions(embeds=({"prompt_embeds": mask * i},), areas=HALVES[:1]) for i in (1, 2))
    assert embeds[0] != embeds[1]
    assert "embeds=({prompt_embeds},)" in embeds[0].describe()
    assert NAG(negative_embeds={"prompt_embeds": mask}) != NAG(negative_embeds={"prompt_embeds": 2 * mask})
    mask.zero_()
    assert float(one.areas[0].sum()) == 64
    with pytest.raises(ConfigError, match=r"areas\[0\] = a Tensor of shape \(8, 8\).*name of a file"):
        control_to_dict(one)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_calls_with_embeddings_encode_other_texts_for_every_picture(sd: Any, scale: float) -> None:
    pipe, call = sd
    more = {"guidance_scale": scale, "num_images_per_prompt": 2, "latents": call["latents"].repeat(4, 1, 1, 1)}
    texts = {"prompt": [BASE, "a cat"], "negative_prompt": [LEFT, RIGHT]}
    given = {f"{name}_embeds": pipe.encode_prompt(text, "cpu", 1, False)[0] for name, text in texts.items()}
    for control in (Regions(prompts=(LEFT, RIGHT), areas=HALVES, stop=1.0), NAG(negative_prompt="two birds")):
        out = run(pipe, call | {"prompt": None} | given, control, **more)
        assert far(out, run(pipe, call | texts, control, **more)) < 1e-12


def test_embeddings_of_one_text_serve_a_batch() -> None:
    pipe, call = pipes.build("sd3", batch=2)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    rows = [{n: call[f"negative_{n}"][i : i + 1] for n in names} for i in (0, 0, 1)]
    batch = {n: torch.cat([rows[0][n], rows[1][n]]) for n in names}
    one, both = (Regions(embeds=(e,), areas=HALVES[:1], stop=1.0) for e in (rows[0], batch))
    assert torch.equal(run(pipe, call, one), run(pipe, call, both))


def test_a_negative_prompt_outlives_guidance(sd: Any) -> None:
    pipe, call = sd
    more = {"guidance_scale": 4.0, "latents": call["latents"].repeat(2, 1, 1, 1), "num_inference_steps": 3}

    def end(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]} if step == 0 else {}

    more |= {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    texts = {"prompt": [BASE, "a cat"], "negative_prompt": [LEFT, RIGHT]}
    out = run(pipe, call | texts, NAG(), **more)
    assert out.isfinite().all()
    assert far(out, run(pipe, call | texts, NAG(stop=0.3), **more)) > 1e-3


def test_a_pipeline_that_shares_the_denoiser(sd: Any) -> None:
    image = diffusers.StableDiffusionImg2ImgPipeline(**sd[0].components, requires_safety_checker=False)
    call = {"prompt": BASE, "image": torch.zeros(1, 3, 32, 24), "strength": 0.5, "num_inference_steps": 2}
    pipes.quiet(image).vae.double()
    for control in (Regions(prompts=(LEFT,), areas=HALVES[:1], stop=1.0), NAG(negative_prompt=LEFT)):
        with attnctl.control(sd[0], control):
            out = pipes.run(image, call)
        assert torch.equal(out, run(image, call, control))


def test_errors_name_the_control_that_was_given(mmdit: Any) -> None:
    model = mmdit.transformer
    regions = Regions(prompts=("a",), areas=HALVES[:1])
    config = model.config
    shapes = ((config.in_channels, 8, 8), (5, config.joint_attention_dim), (config.pooled_projection_dim,))
    latents, text, pooled = (torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes)
    with attnctl.control(model, regions, layout="cond") as handle:
        handle.set_step(0, 1)
        with pytest.raises(UnsupportedModelError, match="Regions: a bare model encodes no prompts"):
            model(latents, text, pooled, torch.zeros(1))
    model.enable_gradient_checkpointing()
    try:
        with torch.enable_grad(), pytest.raises(UnsupportedModelError, match=r"^Regions takes a region's prompt"):
            check_beside(model, RegionText.name, RegionText.what)
    finally:
        model.disable_gradient_checkpointing()
