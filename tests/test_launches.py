"""Kernels launched at the shapes of real models: chunks are sized by the device's memory, not by a CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from launches import Count, meta
from torch import Tensor

from attnctl.kernels import attention, perturb
from attnctl.kernels.bands import Band
from attnctl.kernels.sparse import dispatch as sparse
from attnctl.kernels.sparse import flex, triton
from attnctl.kernels.sparse.block_mass import block_mass
from attnctl.kernels.temporal import Layer, guided_maps, weigh
from attnctl.plans import BlockPlan
from attnctl.processors.enhance_video import cross_frame_intensity

torch.set_num_threads(1)


class Shape(NamedTuple):
    """Heads, grid of image tokens, text tokens and channels of a head."""

    heads: int
    grid: tuple[int, int, int]
    text: int
    width: int

    @property
    def image(self) -> slice:
        return slice(self.text, self.text + math.prod(self.grid))

    def q(self) -> Tensor:
        return meta(1, self.image.stop, self.heads, self.width).transpose(1, 2)


SHAPES = {
    "FLUX 1024": Shape(24, (1, 64, 64), 512, 128),
    "CogVideoX-5B": Shape(48, (13, 30, 45), 226, 64),
    "HunyuanVideo 720p": Shape(24, (33, 45, 80), 256, 128),
    "Wan 14B 480p": Shape(40, (21, 30, 52), 0, 128),
}


def launched_by_passes(shape: Shape) -> dict[str, int]:
    """Count the launches of one site for each kind of perturbed attention, and for plain attention."""
    q = shape.q()
    calls = {
        "argmax": lambda: perturb(q, q, q, target="argmax"),
        "query mean": lambda: perturb(q, q, q, target="query_mean"),
        "uniform": lambda: perturb(q, q, q, target="uniform", u=0.5),
        "plain": lambda: attention(q, q, q),
    }
    if shape.text:
        calls["image_block"] = lambda: perturb(q, q, q, scope="image_block", image=shape.image)
    launched = {}
    for what, call in calls.items():
        with torch.no_grad(), Count() as count:
            call()
        launched[what] = count.launches
    return launched


@pytest.mark.parametrize("name", SHAPES)
def test_perturbed_attention(name: str) -> None:
    for what, launched in launched_by_passes(SHAPES[name]).items():
        # The map of 118,800 tokens has 1.4 TB in float32: it cannot be had in few parts.
        assert launched <= (200 if (name, what) == ("HunyuanVideo 720p", "argmax") else 64), (what, launched)


LOOKS = ("mass", "paro", "chosen orders")


def launched_by_calibration(shape: Shape, look: str) -> int:
    """Count the launches of one site and step.

    It is looked at for both rows of guidance, of which some pipelines make two calls.
    """
    q = shape.q()
    orders = [[h % 6] for h in range(shape.heads)] if look == "chosen orders" else None
    with torch.no_grad(), Count() as count:
        block_mass(q, q, shape.grid, 64, 64, image=shape.image, orders=orders, eps=1e-3 if look == "paro" else None)
    return 2 * count.launches


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("look", LOOKS)
def test_calibration(name: str, look: str) -> None:
    assert launched_by_calibration(SHAPES[name], look) <= 2000


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernel", ["flex", "triton", "dense"])
def test_sparse_attention(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on CUDA takes flex, Triton or, where neither runs, dense attention; never gather."""
    shape, launched = SHAPES[name], []
    q = shape.q()

    def compiled(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        launched.append("flex")
        return torch.empty_like(q)

    monkeypatch.setattr(flex, "compiled", lambda: compiled)
    monkeypatch.setattr(triton, "_forward", lambda: Grid(launched))
    monkeypatch.setattr(sparse, "_on_cuda", lambda x: True)
    monkeypatch.setattr(sparse, "_FAILED", {})
    monkeypatch.setattr(sparse, "_WARNED", {"dense"})
    monkeypatch.setattr(sparse, "refusal", lambda name, *call: "" if name == kernel else "not this one")
    blocks = -(-math.prod(shape.grid) // 64)
    keep = torch.zeros(1, shape.heads, blocks, blocks, dtype=torch.bool)
    keep[..., ::3] = True
    orders = [h % 6 for h in range(shape.heads)]
    plan = BlockPlan.from_mask(keep, 64, orders, shape.text, grid=shape.grid)
    with torch.no_grad():
        for _ in range(2):  # the first call makes the lists
            launched.clear()
            with Count() as count:
                out = attention(q, q, q, plan=plan)
            assert count.launches + len(launched) <= 200, count.names
    assert launched == ([kernel] if kernel != "dense" else [])
    assert out.shape == q.shape


class Grid:
    """Stand in for the Triton kernel: note each launch."""

    def __init__(self, launched: list[str]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **options: self.launched.append("triton")


def test_temporal_attention() -> None:
    for side, heads, width in ((64, 8, 40), (32, 8, 80), (16, 8, 160)):
        q = meta(2 * side * side, 16, heads, width, dtype=torch.float16).transpose(1, 2)
        band = Band.of(16)
        with torch.no_grad(), Count() as count:
            pieces, _ = guided_maps(q, q, Layer(2, (side, side), slice(1, 2)), band=band)
            weigh(pieces, q, band, 1.5)
        assert count.launches <= 64, count.names
    q = SHAPES["Wan 14B 480p"].q()
    with torch.no_grad(), Count() as count:
        cross_frame_intensity(q, q, 21)
    assert count.launches <= 64, count.names
