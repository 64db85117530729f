"""Where places of the image look: self-, joint and temporal attention of query points against an explicit softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, snapshot
from test_columns import Largest
from test_kernels import MASKS, dense_map, make_mask, qkv
from torch import Tensor

import attnctl
from attnctl.core.hosts.linear import linear_attention
from attnctl.core.hosts.listing import halve, unet_halvings
from attnctl.data.maps import WordMaps
from attnctl.data.specs import control_from_dict, control_to_dict, parse_control
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels import linear_rows, query_rows
from attnctl.processors import PAG, Capture
from attnctl.processors.capture.points import token_at

POINTS = ((0.1, 0.9), (0.6, 0.2))


# Kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("hk", [4, 1])
def test_rows_are_those_of_the_dense_map(mask: str, hk: int) -> None:
    q, k, _ = qkv(hk=hk, s=5, dtype=torch.float64)
    m = make_mask(mask, 2, 4, 9, 5)
    for scale in (None, 0.3):
        out = query_rows(q, k, [7, 0, 7], mask=m, scale=scale)
        assert (out - dense_map(q, k, m, scale)[:, :, [7, 0, 7]]).abs().max() <= 1e-12


def test_rows_keep_their_gradient_and_hold_no_map() -> None:
    q, k, _ = qkv(n=600, d=8)
    q, k = q.requires_grad_(), k.requires_grad_()
    with Largest() as seen:
        query_rows(q, k, [3]).square().sum().backward()
    assert seen.elements <= q.numel()
    assert q.grad is not None
    assert k.grad is not None
    assert q.grad[:, :, 3].abs().min() > 0
    assert q.grad[:, :, 4].abs().max() == 0


def test_linear_rows_weigh_the_values_as_the_kernel_does() -> None:
    q, k, v = qkv()
    want = linear_attention(q, k, v)[:, :, [2, 5]]
    assert torch.allclose(linear_rows(q, k, [2, 5]) @ v, want, atol=1e-5)


@pytest.mark.parametrize("places", [[], [9], [-1]])
def test_places_must_be_queries(places: list[int]) -> None:
    q, k, _ = qkv()
    with pytest.raises(ConfigError, match="each from 0 to 8"):
        query_rows(q, k, places)


def test_a_point_lies_in_its_token() -> None:
    assert token_at((0.0, 0.0), 3, 5) == (0, 0)
    assert token_at((1.0, 1.0), 3, 5) == (2, 4)
    assert token_at((0.5, 0.34), 3, 5) == (1, 2)


# Every family ---------------------------------------------------------------------------------------------------


class Probe:
    """Note the explicit map of every self- and joint attention: image queries by image keys, in float64."""

    def __init__(self) -> None:
        self.maps: dict[str, tuple[Tensor, Any]] = {}

    def control(self) -> Replace:
        return Replace(function=self.see)

    def see(self, call: Any, proceed: Any) -> Tensor:
        out: Tensor = proceed(call)
        if call.site.kind in ("self", "joint", "temporal") and call.index == 0 and call.state.phase == "base":
            image = call.image or slice(0, call.q.shape[2])
            if call.kernel is linear_attention:
                whole = linear_rows(call.q, call.k, range(call.q.shape[2])).double()
            else:
                whole = dense_map(call.q.float(), call.k.float(), call.mask, call.scale)
            self.maps[call.site.name] = whole[..., image, image], call.grid
        return out


# One row a sample and frame; the others attend over all frames at once, or pad their rows unevenly.
IMAGES = ("sd15", "sdxl", "sd3", "sd35", "flux", "pixart", "sana", "qwen", "animatediff")


@pytest.mark.parametrize("name", IMAGES)
def test_points_of_every_family_are_the_explicit_softmax(name: str) -> None:
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    probe, before = Probe(), snapshot(model)
    capture = Capture(points=POINTS, keep=("heads",))
    with torch.no_grad(), attnctl.control(model, capture, probe.control(), layout="cond") as handle:
        out = zoo.call(model, inputs)
        maps = handle.maps
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)
    assert torch.allclose(out, plain, atol=1e-5)
    spatial = {n for n, (_, grid) in probe.maps.items() if grid is not None}
    assert maps.layers.keys() == spatial
    for site, layer in maps.layers.items():
        whole, (_, h, w) = probe.maps[site]
        frames = layer.shape[4]
        assert layer.shape == (2, 2, 1, whole.shape[1], frames, h, w)
        for n, point in enumerate(POINTS):
            row, column = token_at(point, h, w)
            want = whole[:, :, row * w + column].reshape(2, frames, -1, h, w).transpose(1, 2)
            assert (layer[:, n, 0] - want).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["cogvideox", "wan", "ltx"])
def test_attention_over_all_frames_needs_the_frame(name: str) -> None:
    model, inputs = zoo.build(name)
    with (
        torch.no_grad(),
        attnctl.control(model, Capture(points=POINTS), layout="cond"),
        pytest.raises(ConfigError, match=r"a point needs its frame: \(x, y, frame\)"),
    ):
        zoo.call(model, inputs)
    probe, points = Probe(), ((0.1, 0.9, 1), (0.6, 0.2, 0))
    with torch.no_grad(), attnctl.control(model, Capture(points=points), probe.control(), layout="cond") as handle:
        zoo.call(model, inputs)
        maps = handle.maps
    assert maps.words == ("0.1,0.9,1", "0.6,0.2,0")
    for site, layer in maps.layers.items():
        whole, (frames, h, w) = probe.maps[site]
        for n, point in enumerate(points):
            row, column = token_at(point, h, w)
            want = whole[:, :, (point[2] * h + row) * w + column].mean(1).reshape(2, frames, h, w)
            assert (layer[:, n, 0, 0] - want).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["animatediff", "unet3d", "latte"])
def test_temporal_attention_gives_a_share_a_frame(name: str) -> None:
    model, inputs = zoo.build(name)
    probe, points = Probe(), ((0.1, 0.9, 1), (0.6, 0.2, 0))
    chosen = [s.name for s in attnctl.find_sites(model) if s.kind == "temporal" and "transformer_in" not in s.name]
    capture = Capture(points=points, sites=chosen)
    with torch.no_grad(), attnctl.control(model, capture, probe.control(), layout="cond") as handle:
        zoo.call(model, inputs)
        maps = handle.maps
    assert maps.layers
    grid = next(link.state.last_grid for w in handle._watched for link in w.links.values())
    for site, layer in maps.layers.items():
        whole = probe.maps[site][0].mean(1)  # [rows places, frames, frames]
        frames = whole.shape[-1]
        assert layer.shape == (2, 2, 1, 1, frames, 1, 1)
        h, w = grid[1:]
        if hasattr(model.config, "block_out_channels"):
            h, w = halve(h, w, unet_halvings(site, len(model.config.block_out_channels)) or 0)
        for n, point in enumerate(points):
            row, column = token_at(point, h, w)
            want = whole.unflatten(0, (2, -1))[:, row * w + column, point[2]]
            assert (layer[:, n, 0, 0, :, 0, 0] - want).abs().max() <= 1e-6
        assert torch.allclose(layer.sum(4), torch.ones(()), atol=1e-5)
    assert maps["0.1,0.9,1"].shape == (2, frames, 1, 1)


# Pipelines ------------------------------------------------------------------------------------------------------


def test_a_pipeline_stays_as_it_is_and_the_maps_can_be_read_and_kept(tmp_path: Path) -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    capture = Capture(points=POINTS, keep=("steps",), sites="up_blocks")
    with attnctl.control(pipe, capture) as handle:
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        maps = handle.maps
        assert "self" in handle.report() or "attn1" in handle.report()
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert (maps.of, maps.words, maps.steps) == ("points", ("0.1,0.9", "0.6,0.2"), (0, 1, 2))
    for site, layer in maps.layers.items():
        assert "attn1" in site
        assert torch.allclose(layer.sum((-2, -1)), torch.ones(()), atol=1e-5)
    assert maps["0.1,0.9"].shape == (1, *maps.grid)
    maps.save(tmp_path / "points.safetensors")
    assert WordMaps.load(tmp_path / "points.safetensors").of == "points"


def test_batches_halves_and_perturbed_passes() -> None:
    pipe, kwargs = pipes.build("sd")
    kwargs |= {"prompt": ["a cat", "the big cat"], "negative_prompt": ["ugly", "cat"]}
    cond, uncond = Capture(points=POINTS, sites="mid"), Capture(points=POINTS, sites="mid", rows="uncond")
    with attnctl.control(pipe, cond, uncond, PAG(sites="mid")) as handle:
        pipes.run(pipe, kwargs)
        one, other = handle.result(cond), handle.result(uncond)
    assert one.images == other.images == 2
    assert not torch.equal(one["0.1,0.9"], other["0.1,0.9"])
    probe = Probe()
    with attnctl.control(pipe, PAG(sites="mid"), probe.control()):
        pipes.run(pipe, kwargs | {"num_inference_steps": 1})
    with attnctl.control(pipe, cond, PAG(sites="mid")) as handle:
        pipes.run(pipe, kwargs | {"num_inference_steps": 1})
        (name,) = handle.maps.layers
    whole, (_, h, w) = probe.maps[name]
    row, column = token_at(POINTS[0], h, w)
    want = whole[2:, :, row * w + column].mean(1).reshape(2, h, w)
    assert (handle.result(cond)["0.1,0.9"] - want).abs().max() <= 1e-6


def test_heads_and_grouped_frames_of_a_video() -> None:
    pipe, kwargs = pipes.build("animatediff")
    each, one = Capture(points=((0.5, 0.5),), heads=(1,)), Capture(points=((0.5, 0.5, 1),), heads=(1,))
    with attnctl.control(pipe, each, one) as handle:
        pipes.run(pipe, kwargs)
        frames, single = handle.result(each)["0.5,0.5"], handle.result(one)["0.5,0.5,1"]
    assert frames.shape[:2] == (1, zoo.FRAMES)
    assert torch.equal(frames[:, 1], single)


def test_no_map_of_a_flux_sized_sequence_is_built() -> None:
    n_image, n_text = 4096, 512
    q, k = (torch.randn(1, 1, n_text + n_image, 128) for _ in range(2))
    with Largest() as seen:
        query_rows(q, k, [n_text + 7, n_text + 4000])
    assert seen.elements <= q.numel() < (n_text + n_image) * n_image // 16


# Records and refusals -------------------------------------------------------------------------------------------


def test_points_survive_records_and_the_command_line() -> None:
    control = Capture(points=((0.5, 0.25), (1, 0)))
    assert control_from_dict(control_to_dict(control)) == control
    assert parse_control("Capture(points=((0.5, 0.25), (1, 0)))") == control


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": ()}, r"points=\(\): give points as shares"),
        ({"points": (0.5, 0.5)}, "give points as shares"),
        ({"points": ((0.5,),)}, "give points as shares"),
        ({"points": ((0.5, 0.5), (0.5, 0.5, 1))}, "give points as shares"),
        ({"points": (("left", 0.5),)}, "give points as shares"),
        ({"points": ((1.5, 0.5),)}, "lies outside the image"),
        ({"points": ((float("nan"), 0.5),)}, "lies outside the image"),
        ({"points": ((0.5, 0.5, -1),)}, "lies outside the image"),
        ({"points": ((0.5, 0.5, 0.5),)}, "lies outside the image"),
        ({"points": ((0.5, 0.5), (0.5, 0.5))}, "names a point twice"),
        ({"points": ((0.5, 0.5),), "words": ("cat",)}, "words and points were both given"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capture(**fields)


def test_sites_that_do_not_fit() -> None:
    pipe, kwargs = pipes.build("animatediff")
    with pytest.raises(SiteError, match="over frames in part"):
        attnctl.control(pipe, Capture(points=POINTS, sites=["self", "temporal"]))
    with pytest.raises(SiteError):
        attnctl.control(pipe, Capture(points=POINTS, sites="cross"))
    with (
        attnctl.control(pipe, Capture(points=POINTS, sites="temporal")),
        pytest.raises(ConfigError, match="attends over frames, so a point needs its frame"),
    ):
        pipes.run(pipe, kwargs)
    with (
        attnctl.control(pipe, Capture(points=((0.5, 0.5, 9),))),
        pytest.raises(ConfigError, match=f"frame 9 of the point 0.5,0.5,9 is past the end: .* {zoo.FRAMES} frames"),
    ):
        pipes.run(pipe, kwargs)


def test_keys_that_are_not_the_images_own_are_refused() -> None:
    model, inputs = zoo.build("sd15")
    attn: Any = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    for projection in (attn.to_k, attn.to_v):
        projection.register_forward_hook(lambda module, args, out: torch.cat([out] * 2, 1))

    with (
        torch.no_grad(),
        attnctl.control(model, Capture(points=POINTS), layout="cond"),
        pytest.raises(UnsupportedModelError, match="not the image's own"),
    ):
        zoo.call(model, inputs)
