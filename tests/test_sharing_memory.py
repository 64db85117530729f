"""Regions and shared attention build nothing of the size of queries times keys: every tensor they make is watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl.processors import Consistent, Control, IRDiffusion, MasaCtrl, Regions, ShareAttention, StyleAligned

pytestmark = pytest.mark.usefixtures("no_grad")
SIDE = 48  # the tokens along a side: a map of all of them in one byte each is larger than any other tensor here
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.4, 0.0, 1.0, 1.0))


class Largest(TorchDispatchMode):
    """Note the largest memory that any operation's result lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > self.nbytes:
                self.nbytes, self.by = x.untyped_storage().nbytes(), str(func)
        return made


def large(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a tiny model with inputs of many tokens, for two pictures."""
    model, given = zoo.build(name, 2)
    if name == "flux":
        given |= {
            "hidden_states": torch.randn(2, SIDE**2, model.config.in_channels),
            "img_ids": zoo.grid_ids(SIDE, SIDE),
        }
    else:
        given["sample"] = torch.randn(2, model.config.in_channels, SIDE, SIDE)
    return model, given


def texts(given: Mapping[str, Any]) -> tuple[dict[str, Tensor], ...]:
    return tuple({"encoder_hidden_states": given["encoder_hidden_states"][:1] * scale} for scale in (-1.0, 0.5))


CONTROLS: dict[str, Any] = {
    "Regions": lambda given: Regions(embeds=texts(given), areas=HALVES, stop=1.0),
    "ShareAttention": lambda given: ShareAttention(bias=0.5),
    "StyleAligned": lambda given: StyleAligned(),
    "MasaCtrl": lambda given: MasaCtrl(start=0.0),
    "Consistent": lambda given: Consistent(chance=1.0, late_chance=1.0),
    "IRDiffusion": lambda given: IRDiffusion(boxes=(HALVES, HALVES), references=(0, 1), bias=0.5),
}


@pytest.mark.parametrize("name", ["flux", "sd15"])
@pytest.mark.parametrize("method", CONTROLS)
def test_no_tensor_of_all_queries_by_all_keys(name: str, method: str) -> None:
    model, given = large(name)
    control: Control = CONTROLS[method](given)
    with attnctl.control(model, control, layout="cond") as handle:
        for step in (0, 1):
            handle.set_step(step, 2)
            with Largest() as watch:
                zoo.call(model, given)
    assert watch.nbytes < SIDE**4, watch.by


def test_the_watch_sees_a_dense_mask() -> None:
    q = torch.randn(1, 1, SIDE**2, 4)
    with Largest() as watch:
        mask = torch.zeros(SIDE**2, SIDE**2, dtype=torch.bool)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, ~mask)
    assert watch.nbytes >= SIDE**4
