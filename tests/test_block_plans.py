"""Block plans as files: what is written is read back, and a damaged or hostile file is refused before it does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attnctl.errors import PlanError
from attnctl.plans import BlockPlan, ModelPlan

_JSON, _MASKS = "attnctl_blocks.json", "attnctl_blocks.safetensors"


def some_plan(seed: int = 0, **options: Any) -> BlockPlan:
    keep = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[..., 0] = True
    return BlockPlan.from_mask(keep, 10, [0, 3, 5], 7, grid=(2, 4, 5), about={"mass": 0.9}, **options)


def test_round_trip(tmp_path: Path) -> None:
    plan = ModelPlan(plans={"a.attn": some_plan(1), "b.attn": some_plan(2, text_first=False)}, model="user/model")
    again = ModelPlan.from_pretrained(plan.save_pretrained(tmp_path / "plan"))
    assert again.model == "user/model"
    assert list(again.plans) == ["a.attn", "b.attn"]
    for name, p in plan.plans.items():
        r = again.plans[name]
        assert torch.equal(p.keep, r.keep)
        for field in ("order", "grid", "n_image", "n_text", "text_first", "block_q", "block_k", "about", "density"):
            assert getattr(p, field) == getattr(r, field)
    assert plan.packed_bytes == 2 * 12
    assert (tmp_path / "plan" / _MASKS).stat().st_size < 500
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == [_JSON, _MASKS]


def test_one_plan_alone(tmp_path: Path) -> None:
    plan = some_plan()
    assert torch.equal(BlockPlan.from_pretrained(plan.save_pretrained(tmp_path)).keep, plan.keep)
    ModelPlan(plans={"a": plan, "b": plan}).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="plans of 2 sites"):
        BlockPlan.from_pretrained(tmp_path)


def test_size_for_a_large_model() -> None:
    """CogVideoX-5B: 42 layers, 48 heads, 275 x 275 blocks: 9.5 kB a head; the file has a bit for every block."""
    keep = torch.ones(1, 48, 275, 275, dtype=torch.bool)
    plan = BlockPlan.from_mask(keep, 64, n_text=226, grid=(13, 30, 45))
    assert ModelPlan(plans={"x": plan}).packed_bytes == 48 * 275 * 275 // 8
    assert 42 * 48 * 275 * 275 / 8 < 20e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"kind": "heads"}, "not a block plan"),
        ({"sites": {}}, "list of sites"),
        ({"sites": []}, "at least one site"),
        ({"order": [0, 3, 9]}, "Order 9 is unknown"),
        ({"order": [0, 3, 2.5]}, "whole numbers"),
        ({"order": [0, 3]}, "one order for each of 3 heads"),
        ({"heads": 10**12}, "more than any plan has"),
        ({"heads": 4}, "expected U8"),
        ({"heads": True}, "should be int"),
        ({"blocks": [4, -4]}, "above 0"),
        ({"grid": [2, 4, 6]}, "has 48 tokens"),
        ({"n_image": "x"}, "whole numbers"),
        ({"site": 3}, "has no name"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    some_plan().save_pretrained(tmp_path)
    data = json.loads((tmp_path / _JSON).read_text())
    key = next(iter(change))
    (data if key in ("schema", "kind", "sites") else data["sites"][0]).update(change)
    (tmp_path / _JSON).write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        BlockPlan.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    some_plan().save_pretrained(tmp_path)
    masks = tmp_path / _MASKS
    whole = masks.read_bytes()
    masks.write_bytes(whole[:-5])
    with pytest.raises(PlanError, match="missing or damaged"):
        BlockPlan.from_pretrained(tmp_path)
    masks.unlink()
    with pytest.raises(PlanError, match="missing or damaged"):
        BlockPlan.from_pretrained(tmp_path)
    masks.write_bytes(whole)
    save_file({"1": load_file(masks)["0"]}, masks)
    with pytest.raises(PlanError, match="has no mask for it"):
        BlockPlan.from_pretrained(tmp_path)
    save_file({"0": torch.from_numpy(np.zeros(12, np.uint8))}, masks)
    with pytest.raises(PlanError, match="keeps no key block"):
        BlockPlan.from_pretrained(tmp_path)
    (tmp_path / _JSON).write_bytes(b"\x80\x04pickle")
    with pytest.raises(PlanError, match="not JSON"):
        BlockPlan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="Hub id"):
        BlockPlan.from_pretrained(tmp_path / "nowhere")
