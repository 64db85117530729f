"""The shapes world: what a scene is, how it is drawn, how it is said, and which prompts are asked.

A scene is one or two plain coloured shapes on a plain background, 64x64 RGB. Everything in it is known exactly, so a
picture can be judged exactly (see `judge`). Two objects of one scene differ in colour and in shape and never overlap.

Held out: the colour-shape pairs in `HELD_OUT` occur in training as single objects only, never beside a second object.
Prompts for two objects come in three disjoint splits: "tuning" (choose settings on it), "report" (print figures of it)
and "heldout" (at least one of the objects is a held-out pair).
"""

from __future__ import annotations

import difflib
import re
import zlib
from dataclasses import dataclass
from itertools import combinations, product

import cv2
import numpy as np

from attnctl.errors import ConfigError, JudgeError, nearest, shown

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT",
    "SHAPES",
    "SIZE",
    "WORDS",
    "Scene",
    "Thing",
    "caption",
    "outline",
    "pair_prompts",
    "parse",
    "render",
    "sample",
    "single_prompts",
]

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (112, 112, 112),
    "black": (18, 18, 18),
    "brown": (100, 62, 30),
    "teal": (15, 95, 100),
}
HELD_OUT: tuple[tuple[str, str], ...] = (("red", "ring"), ("blue", "triangle"), ("white", "cross"))
SPLITS = ("tuning", "report", "heldout")

# Every word of the world is one token. The motion words are for videos; the rest lets a user say a little more.
WORDS: tuple[str, ...] = (
    *SHAPES, *COLORS, *BACKGROUNDS, "a", "an", "the", "and", "on", "of", "with", "is", "to", "in", "no",
    "moving", "left", "right", "up", "down", "still", "slow", "fast", "then", "above", "below", "beside",
    "one", "two", "three", "small", "large", "object", "shape", "background", "picture", "video",
    ",", ".",
)  # fmt: skip

_RADII = (10.0, 14.0)
_GAP = 3.0
_ZOOM = 4  # supersampling of the renderer
_SHIFT = 4  # fixed-point bits of OpenCV's sub-pixel drawing
_RING_HOLE = 0.55
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
    "cross": (
        (-0.34, -1.0), (0.34, -1.0), (0.34, -0.34), (1.0, -0.34), (1.0, 0.34), (0.34, 0.34),
        (0.34, 1.0), (-0.34, 1.0), (-0.34, 0.34), (-1.0, 0.34), (-1.0, -0.34), (-0.34, -0.34),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """Describe one object: centre `x`, `y` and half extent `size`, all in pixels of the 64x64 picture.

    Raises:
        ConfigError: an unknown shape or colour.
    """

    shape: str
    color: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    size: float = 12.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(
                f"Unknown shape {self.shape!r}; known: {', '.join(SHAPES)}." + nearest(self.shape, SHAPES)
            )
        if self.color not in COLORS:
            raise ConfigError(
                f"Unknown colour {self.color!r}; known: {', '.join(COLORS)}." + nearest(self.color, COLORS)
            )

    @property
    def pair(self) -> tuple[str, str]:
        """Return (colour, shape)."""
        return self.color, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """Describe a picture: its objects, drawn in this order, on a plain background.

    Raises:
        ConfigError: an unknown background.
    """

    things: tuple[Thing, ...]
    background: str = "gray"

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ConfigError(
                f"Unknown background {self.background!r}; known: {', '.join(BACKGROUNDS)}."
                + nearest(self.background, BACKGROUNDS)
            )


def outline(image: np.ndarray, thing: Thing, value: tuple[int, ...], zoom: float) -> None:
    """Fill the shape of `thing` into `image`, whose pixels are `zoom` times finer than the scene's."""
    one = 1 << _SHIFT
    # OpenCV puts pixel centres on whole numbers, scenes put them on halves.
    cx, cy, r = thing.x * zoom - 0.5, thing.y * zoom - 0.5, thing.size * zoom
    if thing.shape in ("circle", "ring"):
        centre = (round(cx * one), round(cy * one))
        if thing.shape == "circle":
            cv2.circle(image, centre, round(r * one), value, -1, cv2.LINE_8, _SHIFT)
            return
        # A thick line leaves what lies inside the hole untouched.
        width = r * (1 - _RING_HOLE)
        cv2.circle(image, centre, round((r - width / 2) * one), value, round(width), cv2.LINE_8, _SHIFT)
        return
    points = np.array(_OUTLINES[thing.shape]) * r + (cx, cy)
    cv2.fillPoly(image, [np.round(points * one).astype(np.int32)], value, cv2.LINE_8, _SHIFT)


def render(scene: Scene) -> np.ndarray:
    """Draw the scene, anti-aliased: uint8 RGB [64, 64, 3]."""
    if not isinstance(scene, Scene):
        raise JudgeError(f"{shown(scene)} was given; expected a Scene, which parse(...) makes of a caption.")
    canvas = np.empty((SIZE * _ZOOM, SIZE * _ZOOM, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        outline(canvas, thing, COLORS[thing.color], _ZOOM)
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def caption(scene: Scene) -> str:
    """Say the scene: "a red circle and a blue square on gray"."""
    return _say(tuple(t.pair for t in scene.things), scene.background)


def parse(text: str) -> Scene:
    """Read a caption back: the objects it asks for, in its order (places and sizes are the defaults).

    Raises:
        JudgeError: the text is not of the form "a COLOUR SHAPE [and a COLOUR SHAPE ...] on BACKGROUND".
    """
    if not isinstance(text, str):
        raise JudgeError(f"{shown(text)} was given; expected a caption, such as 'a red circle on gray'.")
    head, sep, background = text.strip().lower().rstrip(".").partition(" on ")
    things = []
    for part in re.split(r"\s+and\s+|\s*,\s*", head):
        words = part.split()
        if words and words[0] in ("a", "an", "the"):
            words = words[1:]
        if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
            raise JudgeError(_refusal(text, part, words))
        things.append(Thing(words[1], words[0]))
    background = background.removesuffix(" background").strip() if sep else "gray"
    if background not in BACKGROUNDS:
        raise JudgeError(_refusal(text, background, [background]))
    return Scene(tuple(things), background)


def sample(rng: np.random.Generator, n_objects: int = 1, split: str = "train") -> Scene:
    """Draw a random scene of `n_objects` things that do not overlap.

    Args:
        rng: NumPy generator; the scene is a function of its state.
        n_objects: 1 to 3 (training uses 1 and 2 only).
        split: "train" keeps the held-out pairs out of scenes with several objects; "any" does not.

    Raises:
        ConfigError: `n_objects` or `split` is out of range.
    """
    if not 1 <= n_objects <= 3:
        raise ConfigError(f"n_objects must be 1, 2 or 3, got {n_objects}.")
    if split not in ("train", "any"):
        raise ConfigError(f"split must be 'train' or 'any', got {split!r}.")
    names = tuple(COLORS)
    while True:
        colors = [names[i] for i in rng.permutation(len(names))[:n_objects]]
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:n_objects]]
        pairs = list(zip(colors, shapes, strict=True))
        if n_objects == 1 or split == "any" or not any(p in HELD_OUT for p in pairs):
            break
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    while True:
        things = tuple(_place(rng, color, shape) for color, shape in pairs)
        if all(_apart(a, b) for a, b in combinations(things, 2)):
            return Scene(things, background)


def single_prompts() -> tuple[str, ...]:
    """List all 120 prompts for one object: every colour, shape and background."""
    return tuple(_say(((c, s),), b) for c, s, b in product(COLORS, SHAPES, BACKGROUNDS))


def pair_prompts(seed: int, n: int, split: str = "report") -> tuple[str, ...]:
    """Draw `n` prompts for two objects that differ in colour and shape; without repeats while they last.

    Raises:
        ConfigError: `split` is not one of "tuning", "report", "heldout".
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}." + nearest(split, SPLITS))
    pairs = tuple(product(COLORS, SHAPES))
    pool = [
        _say((a, b) if flip else (b, a), background)
        for a, b in combinations(pairs, 2)
        if a[0] != b[0] and a[1] != b[1] and _split_of(a, b) == split
        for flip, background in product((True, False), BACKGROUNDS)
    ]
    order = np.random.default_rng(seed).permutation(len(pool))
    return tuple(pool[order[i % len(pool)]] for i in range(n))


def _split_of(a: tuple[str, str], b: tuple[str, str]) -> str:
    if a in HELD_OUT or b in HELD_OUT:
        return "heldout"
    # A hash, not a draw: the splits stay the same whatever is sampled from them.
    return "tuning" if zlib.crc32(repr(sorted((a, b))).encode()) % 3 == 0 else "report"


def _say(pairs: tuple[tuple[str, str], ...], background: str) -> str:
    return " and ".join(f"a {c} {s}" for c, s in pairs) + f" on {background}"


def _place(rng: np.random.Generator, color: str, shape: str) -> Thing:
    size = rng.uniform(*_RADII)
    x, y = rng.uniform(size + 2, SIZE - size - 2, 2)
    return Thing(shape, color, float(x), float(y), float(size))


def _apart(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.size + b.size + _GAP


def _refusal(text: str, part: str, words: list[str]) -> str:
    vocabulary = (*COLORS, *SHAPES, *BACKGROUNDS)
    hints = [
        f"{w!r}: did you mean {c[0]!r}?"
        for w in words
        if w not in vocabulary and (c := difflib.get_close_matches(w, vocabulary, n=1))
    ]
    return (
        f"Cannot read {part!r} in {text!r}. Expected 'a COLOUR SHAPE [and a COLOUR SHAPE] on BACKGROUND' with colours "
        f"{', '.join(COLORS)}; shapes {', '.join(SHAPES)}; backgrounds {', '.join(BACKGROUNDS)}. {' '.join(hints)}"
    ).rstrip()
