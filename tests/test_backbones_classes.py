"""Attention of timm's rarer classes, read: maps are the softmax that a class computes, laid out by the test itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_backbones_timm import POINT, read, row_of_windows
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.davit import DaVit
from timm.models.efficientvit_msra import EfficientVitMsra
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.levit import Levit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.shvit import SHViT
from timm.models.tiny_vit import TinyVit
from timm.models.tnt import TNT
from timm.models.xcit import Xcit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attnctl
from attnctl.errors import ConfigError
from attnctl.processors import Capture

FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 4, 4), "num_classes": 3}
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


class Softmaxes(TorchFunctionMode):
    """Take down what every softmax gives, and what it has become where it meets the values."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.operands: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "softmax":
            self.outputs.append(out)
        elif name in ("__matmul__", "matmul") and self.outputs:
            self.operands.extend(a for a in args if a.shape[-2:] in (out.shape[-2:], self.outputs[-1].shape[-2:]))
        return out


def softmaxes(model: nn.Module, module: Any, images: Tensor) -> Softmaxes:
    """Run a model, and take down the softmaxes of one module, written out."""
    calls: list[tuple[Any, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(images)
    hook.remove()
    fused = getattr(module, "fused_attn", None)
    if fused is not None:
        module.fused_attn = False
    with torch.no_grad(), Softmaxes() as taken:
        module(*calls[0][0], **calls[0][1])
    if fused is not None:
        module.fused_attn = fused
    return taken


def case(make: Callable[[], nn.Module], size: int = 64, sharp: bool = True) -> tuple[nn.Module, Tensor]:
    """Build a small model whose attention is far from uniform, unless it would overflow, and an image."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters() if sharp else ():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.normal_(p, std=0.1, mean=0.5)
    return model, torch.rand(1, 3, size, size)


WINDOWED: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[int, int]]] = {
    # model, depth of a site, side of its map, window
    "davit": (lambda: DaVit(**FOUR, window_size=3), 0, 16, (3, 3)),
    "gcvit": (lambda: GlobalContextVit(
        img_size=64, window_size=(4, 4, 4, 2), embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), num_classes=3
    ), 0, 16, (4, 4)),
    "gcvit, queries of the generator": (lambda: GlobalContextVit(
        img_size=64, window_size=(4, 4, 4, 2), embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), num_classes=3
    ), 1, 16, (4, 4)),
    "tiny_vit": (lambda: TinyVit(**FOUR, window_sizes=(7, 3, 3, 2)), 0, 8, (3, 3)),
    "sam2": (lambda: HieraDet(embed_dim=8, num_heads=2, stages=(1, 2, 1, 1), window_spec=(8, 4, 4, 4),
                              global_att_blocks=(), num_classes=3), 0, 16, (8, 8)),
    "nest": (lambda: Nest(img_size=64, patch_size=4, num_levels=2, embed_dims=(16, 32), num_heads=(2, 4), depths=(1, 1),
                          num_classes=3), 0, 16, (8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_laid_out_on_the_map(name: str) -> None:
    make, depth, side, window = WINDOWED[name]
    model, image = case(make)
    site = attnctl.find_sites(model)[depth]
    want = softmaxes(model, site.module, image).outputs[-1]
    if want.ndim == 5:  # heads ahead of the blocks
        want = want[0].transpose(0, 1)
    at = (int(POINT[1] * side), int(POINT[0] * side))
    row = row_of_windows(want, side, side, window, 0, at)
    assert row.std() > 1e-3
    torch.testing.assert_close(read(model, image, site.name, points=(POINT,))[0, 0], row, atol=1e-5, rtol=0)


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # model, depth of a site, tokens ahead of the map
    "convit, gated positions": (lambda: ConVit(**VIT, local_up_to_layer=1), 0, 0),
    "convit, class token": (lambda: ConVit(**VIT, local_up_to_layer=1), 1, 1),
    "cait, talking heads": (lambda: Cait(**VIT), 0, 0),
    "tnt, patches": (lambda: TNT(img_size=64, embed_dim=32, inner_dim=16, depth=1, num_heads_inner=2, num_heads_outer=4,
                                 num_classes=3), 1, 1),
    "levit": (lambda: Levit(img_size=128, embed_dim=(16, 32), key_dim=4, depth=(1, 1), num_heads=(2, 4),
                            num_classes=3), 0, 0),
    "differential": (lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256", img_size=64, embed_dim=32, depth=2,
                                               num_heads=4, num_classes=3), 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_rows_are_what_meets_the_values(name: str) -> None:
    make, depth, prefix = SEQUENCES[name]
    model, image = case(make, 128 if name == "levit" else 64)
    site = attnctl.find_sites(model)[depth]
    tokens = 64 if name == "levit" else prefix + 16
    want = softmaxes(model, site.module, image).operands[0].reshape(site.heads, tokens, tokens)
    side = math.isqrt(tokens - prefix)
    at = prefix + int(POINT[1] * side) * side + int(POINT[0] * side)
    got = read(model, image, site.name, points=(POINT,)).flatten(-2)[0, 0]
    torch.testing.assert_close(got, want[:, at, prefix:], atol=1e-5, rtol=0)
    assert want.std() > 1e-3


def test_pixels_of_tnt_are_laid_out_patch_by_patch() -> None:
    model, image = case(SEQUENCES["tnt, patches"][0])
    site = attnctl.find_sites(model)[0]
    want = softmaxes(model, site.module, image).outputs[-1]  # [patches, H, 16, 16]
    row = row_of_windows(want, 16, 16, (4, 4), 0, (int(POINT[1] * 16), int(POINT[0] * 16)))
    torch.testing.assert_close(read(model, image, site.name, points=(POINT,))[0, 0], row, atol=1e-5, rtol=0)


def test_cascaded_groups_are_heads() -> None:
    model, image = case(
        lambda: EfficientVitMsra(
            img_size=128, embed_dim=(16, 16), key_dim=(4, 4), depth=(1, 1), num_heads=(2, 2), window_size=(4, 3),
            kernels=(5, 5), down_ops=(("", 1), ("subsample", 2)), num_classes=3,
        ), 128,
    )  # fmt: skip
    site = attnctl.find_sites(model)[0]
    want = torch.stack(softmaxes(model, site.module, image).outputs, 1)  # [windows, H, N, N]
    row = row_of_windows(want, 8, 8, (4, 4), 0, (int(POINT[1] * 8), int(POINT[0] * 8)))
    torch.testing.assert_close(read(model, image, site.name, points=(POINT,))[0, 0], row, atol=1e-5, rtol=0)


def test_single_head_on_some_channels() -> None:
    model, image = case(lambda: SHViT(embed_dim=(16, 32, 32), partial_dim=(4, 8, 8), depth=(1, 1, 1), num_classes=3))
    site = attnctl.find_sites(model)[0]
    want = softmaxes(model, site.module, image).outputs[-1][0]
    side = math.isqrt(want.shape[-1])
    got = read(model, image, site.name, points=(POINT,))[0, 0, 0]
    row = want[int(POINT[1] * side) * side + int(POINT[0] * side)]
    torch.testing.assert_close(got.flatten(), row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_hiera_unrolls_its_tokens(depth: int) -> None:
    """Depth 1 pools the queries of units, depth 2 those of the whole map."""
    model, image = case(
        lambda: Hiera(img_size=(64, 64), embed_dim=16, stages=(1, 1, 1), q_pool=2, mask_unit_attn=(True, True, False),
                      mask_unit_size=(4, 4), num_classes=3)
    )  # fmt: skip
    site: Any = attnctl.find_sites(model)[depth]
    want = softmaxes(model, site.module, image).outputs[-1][0]
    want = want.transpose(0, 1) if want.ndim == 4 else want[None]  # [units, H, queries, keys]
    order = model.unroll(torch.arange(256.0).reshape(1, 256, 1)).long().flatten()  # type: ignore[operator]
    for stage in range(max(0, depth - 1)):  # one token of every pooled group keeps its place, on a map of half the side
        order = order.reshape(4, -1)[0]
        order = order // (2 * (16 >> stage)) * (8 >> stage) + order % (16 >> stage) // 2
    side = 16 >> max(0, depth - 1)
    keys = order.reshape(-1, want.shape[0]).T  # the token numbers that each unit sees
    queries = order if depth == 0 else order.reshape(4, -1)[0]
    qside = side if depth == 0 else side // 2
    if depth:
        queries = queries // (2 * side) * qside + queries % side // 2
    queries = queries.reshape(-1, want.shape[0]).T
    unit, place = (queries == int(POINT[1] * qside) * qside + int(POINT[0] * qside)).nonzero()[0].tolist()
    row = torch.zeros(site.heads, side * side)
    row[:, keys[unit]] = want[unit, :, place]
    got = read(model, image, site.name, points=(POINT,))[0, 0]
    torch.testing.assert_close(got, row.unflatten(-1, (side, side)), atol=1e-5, rtol=0)


def test_sam2_pools_queries_inside_windows() -> None:
    model, image = case(
        lambda: HieraDet(
            embed_dim=8, num_heads=2, stages=(1, 2, 1, 1), window_spec=(8, 4, 4, 4), global_att_blocks=(), num_classes=3
        )
    )
    site = attnctl.find_sites(model)[1]  # queries of 4 x 4 windows, 2 x 2 pooled; keys of 8 x 8
    want = softmaxes(model, site.module, image).outputs[-1]
    y, x = int(POINT[1] * 8), int(POINT[0] * 8)
    row = want[y // 4 * 2 + x // 4, :, y % 4 * 4 + x % 4].unflatten(-1, (8, 8))
    got = read(model, image, site.name, points=(POINT,))[0, 0]
    top, left = y // 4 * 8, x // 4 * 8
    torch.testing.assert_close(got[:, top : top + 8, left : left + 8], row, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.sum((-1, -2)), torch.ones(site.heads), atol=1e-5, rtol=0)


def test_mvit_pools_queries_and_keys() -> None:
    cfg = MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=2, stride_q=((1, 1), (2, 2)), use_cls_token=True)
    model, image = case(lambda: MultiScaleVit(cfg, img_size=64, num_classes=3))
    for depth, (side, reduced) in enumerate(((16, 4), (8, 8))):
        site = attnctl.find_sites(model)[depth]
        want = softmaxes(model, site.module, image).outputs[-1][0]
        row = want[:, 1 + int(POINT[1] * side) * side + int(POINT[0] * side), 1:].unflatten(-1, (reduced, reduced))
        torch.testing.assert_close(read(model, image, site.name, points=(POINT,))[0, 0], row, atol=1e-5, rtol=0)
        token = read(model, image, site.name, words=("class",)).flatten(-2)[0, 0]
        torch.testing.assert_close(token, want[:, 0, 1:], atol=1e-5, rtol=0)


POOLS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "siglip": (lambda: timm.create_model("vit_base_patch16_siglip_224", **VIT), "pool"),
    "cait": (lambda: Cait(**VIT), "class"),
    "xcit": (lambda: Xcit(**VIT), "class"),
    "clip": (lambda: timm.create_model("resnet50_clip", num_classes=3), "pool"),
    "crossvit": (lambda: timm.create_model("crossvit_tiny_240", num_classes=3), "class"),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_are_sites_of_their_own(name: str) -> None:
    make, word = POOLS[name]
    model, image = case(make, {"crossvit": 240}.get(name, 64), sharp=name != "clip")
    site = next(s for s in attnctl.find_sites(model) if s.kind == "pool")
    want = softmaxes(model, site.module, image).outputs[-1][0, :, 0]
    got = read(model, image, site.name, words=(word,)).flatten(-2)[0, 0]
    torch.testing.assert_close(got, want[:, want.shape[-1] - got.shape[-1] :], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=f"points was asked of {site.name}, which answers {word}"):
        attnctl.control(model, Capture(sites=site.name, points=(POINT,)))
    if name == "siglip":  # those that cannot answer are left out where no site was chosen
        with attnctl.control(model, Capture(points=(POINT,))) as handle:
            assert {s.kind for s in handle.sites} == {"self"}
        with attnctl.control(model, Capture(words=("pool",))) as handle:
            assert [s.name for s in handle.sites] == ["attn_pool"]


def test_keys_that_are_means_of_runs_share_their_weight() -> None:
    model, image = case(lambda: timm.create_model("nextvit_small", num_classes=3), 64, sharp=False)
    site: Any = attnctl.find_sites(model)[0]
    want = softmaxes(model, site.module, image).outputs[-1][0]
    side, run = math.isqrt(want.shape[-2]), site.module.N_ratio
    row = want[:, int(POINT[1] * side) * side + int(POINT[0] * side)].repeat_interleave(run, -1) / run
    got = read(model, image, site.name, points=(POINT,)).flatten(-2)[0, 0]
    torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
