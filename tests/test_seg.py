"""SEG against its formula, written out by hand on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from contract import middle, run

import attnctl
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors import SEG, SoftPAG


@pytest.mark.parametrize("name", ["sd15", "pixart", "latte"])
def test_seg_infinite_equals_query_mean(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    site = middle(model)
    seg = run(model, inputs, SEG(scale=2.0, sites=site))
    mean = run(model, inputs, SoftPAG(scale=2.0, u=1.0, sites=site, target="query_mean"))
    assert (seg - mean).norm() <= 1e-10 * mean.norm()


def test_seg_grows_from_plain_to_the_mean() -> None:
    model, inputs = zoo.build("sd15")
    site = middle(model)
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    effects = [float((run(model, inputs, SEG(sites=site, sigma=s)) - plain).norm()) for s in (0.0, 0.3, 1.0, math.inf)]
    assert effects[0] == 0.0
    assert 0 < effects[1] < effects[2]


def test_seg_refuses_linear_attention_and_frames() -> None:
    sana, _ = zoo.build("sana")
    with pytest.raises(UnsupportedModelError, match="linear"):
        attnctl.control(sana, SEG(sites=middle(sana)))
    wan, inputs = zoo.build("wan")
    with pytest.raises(UnsupportedModelError, match="inf"):
        run(wan, inputs, SEG(sites=middle(wan), sigma=1.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SEG(sigma=-1.0),
        lambda: SEG(sigma=math.nan),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
