"""SparseAttention: what is refused, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, ConflictError, SiteError
from attnctl.plans import Neighborhood, Online, Radial, SlidingTile
from attnctl.processors import SparseAttention
from attnctl.processors.sparse.live import axes_for


@pytest.fixture(scope="module")
def sd3() -> tuple[Any, dict[str, Any], Tensor]:
    pipe, kwargs = zoo_pipelines.build("sd3", dtype=torch.float64)
    return pipe, kwargs, zoo_pipelines.run(pipe, kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Online(density=0.0), "Online: density"),
        (lambda: Online(density=0.5, mass=0.5), "give one of them"),
        (lambda: Online(mass=1.5), "Online: mass"),
        (lambda: Online(every=0), "Online: every"),
        (lambda: Online(by="magic"), "Online: by"),  # type: ignore[arg-type]
        (lambda: Online(order="TILES"), "Did you mean 'TILE'"),
        (lambda: Online(schedule=0.5), "expected shares"),  # type: ignore[arg-type]
        (lambda: Online(mass=0.5, budget="model"), "each row's own"),
        (lambda: Neighborhood(window=0), "Neighborhood: window"),
        (lambda: Neighborhood(window=(1, 2, 3, 4)), "one to three whole numbers"),
        (lambda: SlidingTile(window=2), "odd numbers of tiles"),
        (lambda: Radial(decay=0.0), "Radial: decay"),
        (lambda: SparseAttention(3), "expected Online"),  # type: ignore[arg-type]
        (lambda: SparseAttention(dense_steps=-1), "dense_steps=-1"),
        (
            lambda: axes_for(Neighborhood(window=9), (1, 8, 8), "a.b"),
            r"at a\.b, whose image tokens lie on 8 x 8: window",
        ),
        (lambda: axes_for(Neighborhood(window=3, stride=4), (1, 8, 8), "a"), "Take a stride up to the window"),
        (lambda: axes_for(Neighborhood(window=(3, 3, 3)), (1, 8, 8), "a"), "has 3 numbers, and the grid 2 axes"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_bad_places(sd3: tuple[Any, dict[str, Any], Tensor]) -> None:
    pipe, kwargs, plain = sd3
    sd15 = zoo.build("sd15")[0]
    with pytest.raises(SiteError):
        attnctl.control(sd15, SparseAttention(sites="cross"))
    with pytest.raises(ConfigError, match="leaves none of the"):
        attnctl.control(pipe, SparseAttention(dense_layers=99))
    with pytest.raises(ConflictError, match="one kernel computes an attention"):
        attnctl.control(pipe, SparseAttention(), SparseAttention(Neighborhood(window=3)))
    with (
        pytest.raises(ConfigError, match="do not fit into an axis"),
        attnctl.control(pipe, SparseAttention(Neighborhood(window=50))),
    ):
        zoo_pipelines.run(pipe, kwargs)
    assert torch.equal(zoo_pipelines.run(pipe, kwargs), plain)
