"""The shipped world: a renderer, an exact judge and small trained models (see `scenes`, `judge` and `load`)."""

from __future__ import annotations

from attnctl.shapes.judge import Found, Match, Verdict, judge
from attnctl.shapes.load import MODELS, load_shapes
from attnctl.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    Thing,
    caption,
    pair_prompts,
    parse,
    render,
    sample,
    single_prompts,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT",
    "MODELS",
    "SHAPES",
    "Found",
    "Match",
    "Scene",
    "Thing",
    "Verdict",
    "caption",
    "judge",
    "load_shapes",
    "pair_prompts",
    "parse",
    "render",
    "sample",
    "single_prompts",
]
