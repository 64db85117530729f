"""Attention of timm that reads overlapping blocks, or sums its keys up first: maps are the weights written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backbones_classes import case, softmaxes
from test_backbones_timm import POINT, read
from timm.layers.halo_attn import HaloAttn
from timm.models.coat import CoaT
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attnctl


class Products(TorchFunctionMode):
    """Take down what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__matmul__", "matmul"):
            self.pairs.append(args)
        return func(*args, **(kwargs or {}))


class Behind(nn.Module):
    """A model of one convolution and the attention that is tried."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, width, 4, 4), attention

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        return self.attn(self.stem(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_keys_of_overlapping_blocks(stride: int) -> None:
    model, image = case(lambda: Behind(HaloAttn(8, 12, stride=stride, num_heads=2, block_size=4, halo_size=1), 8), 48)
    (site,) = attnctl.find_sites(model)
    want = softmaxes(model, site.module, image).outputs[-1]  # [heads, blocks, places of a block, keys of a block]
    side, block = 12 // stride, 4 // stride
    numbers = F.pad(torch.arange(1, 145).reshape(12, 12), [1, 1, 1, 1]) - 1
    keys = numbers.unfold(0, 6, 4).unfold(1, 6, 4).reshape(9, 36)
    for y, x in ((0, 0), (side - 1, side // 2), (int(POINT[1] * side), int(POINT[0] * side))):
        which, place = y // block * 3 + x // block, y % block * block + x % block
        row = torch.zeros(2, 145).index_add_(1, keys[which] % 145, want[:, which, place])[:, :144]
        point = ((x + 0.5) / side, (y + 0.5) / side)
        got = read(model, image, site.name, points=(point,))[0, 0].flatten(1)
        torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
        assert row.std() > 1e-3


@pytest.mark.parametrize("parallel", [0, 1])
def test_keys_that_meet_values_first(parallel: int) -> None:
    model, image = case(
        lambda: CoaT(
            img_size=64, patch_size=4, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=parallel,
            num_heads=8, mlp_ratios=(1, 1, 1, 1), num_classes=3,
        )
    )  # fmt: skip
    sites = attnctl.find_sites(model)
    assert len(sites) == 4 + 3 * parallel
    for site in (sites[0], sites[-1]):
        with torch.no_grad(), Products() as taken:
            softmaxes(model, site.module, image)
        (keys, _), (queries, _) = taken.pairs[-2:]
        weights = (site.module.scale * queries @ keys)[0]
        side = round((weights.shape[-1] - 1) ** 0.5)
        at = 1 + int(POINT[1] * side) * side + int(POINT[0] * side)
        got = read(model, image, site.name, points=(POINT,))[0, 0].flatten(1)
        torch.testing.assert_close(got, weights[:, at, 1:], atol=1e-5, rtol=1e-5)
        got = read(model, image, site.name, words=("class",))[0, 0].flatten(1)
        torch.testing.assert_close(got, weights[:, 0, 1:], atol=1e-5, rtol=1e-5)
        assert got.std() > 1e-4


def test_linear_attention_at_several_scales() -> None:
    model, image = case(lambda: Behind(LiteMLA(16, 16, heads=2, dim=8, scales=(3, 5)), 16), 32)
    (site,) = attnctl.find_sites(model)
    with torch.no_grad(), Products() as taken:
        model(image)
    (keys, _), (queries, _) = taken.pairs
    weights = queries @ keys
    weights = (weights / (weights.sum(-1, keepdim=True) + site.module.eps))[0]  # type: ignore[operator]
    got = read(model, image, site.name, points=(POINT,))[0, 0].flatten(1)
    assert len(got) == 6  # two heads at each of three scales
    row = weights[:, int(POINT[1] * 8) * 8 + int(POINT[0] * 8)]
    torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
    assert row.std() > 1e-3
