"""Regions: texts and areas that are none are refused, in words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from attnctl.errors import ConfigError
from attnctl.processors import Regions

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regions(prompts=(), areas=()), "one text per region"),
        (lambda: Regions(prompts=("a", ""), areas=HALVES), "none of them empty"),
        (lambda: Regions(prompts=("a",), areas=HALVES), "1 prompts and 2 areas"),
        (lambda: Regions(prompts=("a",), areas=((0.5, 0, 0.5, 1),)), "is empty"),
        (lambda: Regions(prompts=("a",), areas=((0, 0, 1.5, 1),)), "areas"),
        (lambda: Regions(prompts=("a",), areas=(torch.zeros(4, 4),)), "mask is empty"),
        (lambda: Regions(prompts=("a",), areas=(torch.full((4, 4), 255.0),)), "0 to 1"),
        (lambda: Regions(prompts=("a",), areas=(torch.ones(5),)), r"\[height, width\]"),
        (lambda: Regions(prompts=("a",), areas=((0, 0, 1),)), "a box has four"),
        (lambda: Regions(prompts=("a",), areas=((1, 0, 0, 1),)), "left before right"),
        (lambda: Regions(prompts=("a",), areas=((math.nan, 0, 1, 1),)), "0 to 1"),
        (lambda: Regions(prompts=("a",), areas=(None,)), "is no area"),
        (lambda: Regions(prompts=("a",), areas=([[1], [1, 0]],)), "is no area"),
        (lambda: Regions(prompts=("a",), areas=(torch.ones(4, 4, device="meta"),)), "on meta"),
        (lambda: Regions(prompts=("a",), areas=None), "is no list"),  # type: ignore[arg-type]
        (lambda: Regions(prompts=None, areas=HALVES), "is no list"),  # type: ignore[arg-type]
        (lambda: Regions(embeds=(), areas=()), "one mapping"),
    ],
)
def test_what_is_no_region_is_refused(make: Callable[[], Regions], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
