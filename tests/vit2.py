"""What the tests of vision papers share: recorded cases (tests/fixtures/vit2) and how they are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from attnctl.backbones.mixers import join_heads

FOLDER = Path(__file__).parent / "fixtures" / "vit2"


def fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read inputs, outputs, weights and arguments."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    parts = [{k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("input.", "output.", "sd.")]
    return (*parts, json.loads((FOLDER / f"{name}.json").read_text())["kwargs"])  # type: ignore[return-value]


def close(got: Tensor, want: Tensor, whole: bool = False) -> None:
    """Compare as the fixtures' README says."""
    torch.testing.assert_close(got, want, rtol=1e-3 if whole else 1e-4, atol=1e-4 if whole else 2e-5)


def agrees(name: str, module: nn.Module, weights: dict[str, Tensor], grid: Any = None, whole: bool = False) -> None:
    """Load weights, and compare what a module computes; grid: (height, width) of tokens that it takes as a map."""
    x, y, _, _ = fixture(name)
    module.load_state_dict(weights)
    with torch.no_grad():
        given = x["x"] if grid is None else x["x"].unflatten(1, tuple(grid))
        out = module.eval()(given)
    close(out if grid is None else out.flatten(1, 2), y["y"], whole)


def qkv_of(x: Tensor, weights: dict[str, Tensor], heads: int) -> list[Tensor]:
    """Project tokens to queries, keys and values [B, H, N, D]."""
    y = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
    return list(y.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4))


def project(out: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Join heads and project."""
    return F.linear(join_heads(out), weights["proj.weight"], weights.get("proj.bias"))
