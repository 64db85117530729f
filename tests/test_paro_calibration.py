"""What a calibration measures and chooses, against recorded float64 figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attnctl.kernels.block_mass import BlockMass, block_mass, choose_masks, choose_orders

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures" / "paro"


@pytest.fixture(params=["calib_4x8x8", "calib_partial_3x7x9"])
def case(request: pytest.FixtureRequest) -> tuple[dict, dict[str, Tensor]]:
    facts = json.loads((FIXTURES / f"{request.param}.json").read_text(encoding="utf-8"))
    return facts, load_file(FIXTURES / f"{request.param}.safetensors")


def measure(facts: dict, t: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> BlockMass:
    q, k = (t[x][None].to(dtype) for x in "qk")
    image = slice(facts["n_text"], q.shape[2])
    grid, b = tuple(facts["grid_FHW"]), facts["block"]
    return block_mass(q, k, grid, b, b, image=image, eps=facts["eps"], sigma=facts["sigma"])


def test_sums_and_marks(case: tuple[dict, dict[str, Tensor]]) -> None:
    facts, t = case
    found = measure(facts, t)
    assert (found.mass - t["block_mass"]).abs().max() <= 1e-10
    assert (found.sparse - t["m_sparse"]).abs().max() <= 2 / found.mass.shape[-1] ** 2
    assert ((found.uneven - t["m_quant"]) / t["m_quant"]).abs().max() <= 1e-5
    narrow = measure(facts, t, torch.float32)
    assert ((narrow.uneven - t["m_quant"]) / t["m_quant"]).abs().max() <= 1e-4


def test_orders(case: tuple[dict, dict[str, Tensor]]) -> None:
    facts, t = case
    found = measure(facts, t)
    for metric, name in (("paro", "combined_fixed"), ("paro_literal", "combined_literal")):
        _, cost = choose_orders(found, 0.3, metric, facts["alpha"])
        assert (cost - t[name]).abs().max() <= 1e-4
    chosen, _ = choose_orders(found, 0.3, "paro", facts["alpha"])
    sure = torch.tensor([h["margin"] > 1e-3 for h in facts["heads"]])
    assert torch.equal(chosen[sure], t["order"][sure])


def test_masks(case: tuple[dict, dict[str, Tensor]]) -> None:
    facts, t = case
    mass = t["block_mass"][torch.arange(len(t["order"])), t["order"]]
    for i, density in enumerate(facts["densities"]):
        assert torch.equal(choose_masks(mass, density), t["mask"][:, i])


def test_mass_of_chosen_orders_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 60, 8, generator=g), torch.randn(2, 2, 60, 8, generator=g)
    every = block_mass(q, k, (3, 4, 5), 16, 8)
    some = block_mass(q, k, (3, 4, 5), 16, 8, orders=[[0], [5], [2], [3]])
    assert torch.equal(some.mass[:, 0], every.mass[torch.arange(4), torch.tensor([0, 5, 2, 3])])
    assert (every.mass.sum(-1) - 1).abs().max() <= 1e-6


def test_equal_orders_keep_the_model_s() -> None:
    q = torch.zeros(1, 3, 24, 8)
    chosen, _ = choose_orders(block_mass(q, q, (2, 3, 4), 6, 6), 0.5)
    assert chosen.tolist() == [0, 0, 0]


def test_every_row_keeps_a_block() -> None:
    mass = torch.zeros(2, 5, 7)
    mass[:, 0] = 1.0
    keep = choose_masks(mass, 0.1)
    assert keep.any(-1).all()
    assert keep[:, 1:].sum() == 2 * 4
    assert choose_masks(torch.rand(2, 5, 7), 1.0).all()
    rich = torch.stack([torch.full((5, 7), 2.0), torch.full((5, 7), 1.0)])
    assert choose_masks(rich, 0.5, together=True).sum((-2, -1)).tolist() == [35, 5]
