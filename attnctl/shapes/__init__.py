"""The shipped world: a renderer, an exact judge and small trained models (see `scenes`, `judge` and `load`)."""

from __future__ import annotations

from attnctl.shapes.judge import Found, Match, Verdict, judge
from attnctl.shapes.judge_video import ClipMatch, ClipVerdict, Track, judge_clip
from attnctl.shapes.load import MODELS, load_shapes
from attnctl.shapes.motion import Clip, Motion, clip_caption, clip_prompts, parse_clip, render_clip, sample_clip
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
    "Clip",
    "ClipMatch",
    "ClipVerdict",
    "Found",
    "Match",
    "Motion",
    "Scene",
    "Thing",
    "Track",
    "Verdict",
    "caption",
    "clip_caption",
    "clip_prompts",
    "judge",
    "judge_clip",
    "load_shapes",
    "pair_prompts",
    "parse",
    "parse_clip",
    "render",
    "render_clip",
    "sample",
    "sample_clip",
    "single_prompts",
]
