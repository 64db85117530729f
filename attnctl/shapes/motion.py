"""Scenes in motion: clips of 16 frames in which an object moves at a steady pace, their captions and prompts.

"a red circle moving left fast on gray", "a blue ring still on black". Speeds are in pixels per frame; slow and fast lie
well apart. A caption may leave the speed out, or the motion: then any will do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from attnctl.errors import ConfigError, JudgeError
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, Thing, parse, render

__all__ = [
    "DIRECTIONS",
    "FRAMES",
    "SPEEDS",
    "Clip",
    "Motion",
    "clip_caption",
    "clip_prompts",
    "describe",
    "parse_clip",
    "render_clip",
    "sample_clip",
    "say",
]

FRAMES = 16
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
SPEEDS: dict[str, tuple[float, float]] = {"slow": (0.6, 0.9), "fast": (1.6, 2.0)}  # drawn from, pixels per frame

_RADII = (10.0, 14.0)  # as in still scenes, and the fastest motion just fits
_STILL = 0.3  # below, an object stands still
_FAST = 1.25  # from here on, it is fast
_MARGIN = 2.0
_MOST_FRAMES = 1 + int((SIZE - 2 * (_RADII[1] + _MARGIN)) / SPEEDS["fast"][1])
_PHRASE = re.compile(r"^(?P<thing>.+?)(?: (?P<still>still)| moving (?P<way>\w+)(?: (?P<speed>\w+))?)?$")


@dataclass(frozen=True, slots=True)
class Motion:
    """Name a motion: one of `DIRECTIONS` and of `SPEEDS`; None where nothing is said. What stands still has no speed.

    Raises:
        ConfigError: an unknown word, or a speed where nothing moves.
    """

    direction: str | None = None
    speed: str | None = None

    def __post_init__(self) -> None:
        if self.direction is not None and self.direction not in DIRECTIONS:
            raise ConfigError(f"Unknown direction {self.direction!r}; known: {', '.join(DIRECTIONS)}.")
        if self.speed is not None and self.speed not in SPEEDS:
            raise ConfigError(f"Unknown speed {self.speed!r}; known: {', '.join(SPEEDS)}.")
        if self.speed is not None and self.direction in (None, "still"):
            raise ConfigError(f"A speed needs a direction of motion, got {self.direction!r} with {self.speed!r}.")

    def __str__(self) -> str:
        """Say it: "moving left fast", "still" or nothing."""
        if self.direction in (None, "still"):
            return self.direction or ""
        return f"moving {self.direction}" + (f" {self.speed}" if self.speed else "")

    def fits(self, other: Motion) -> bool:
        """Tell whether `other`, fully known, is what this asks for."""
        return self.direction in (None, other.direction) and self.speed in (None, other.speed)


@dataclass(frozen=True, slots=True)
class Clip:
    """Describe a video: its first frame and, for each object, its velocity in pixels per frame."""

    scene: Scene
    velocities: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.velocities) != len(self.scene.things):
            raise ConfigError(f"{len(self.scene.things)} objects need as many velocities, got {len(self.velocities)}.")

    def frame(self, index: int) -> Scene:
        """Return the scene of frame 0, 1, ..."""
        things = zip(self.scene.things, self.velocities, strict=True)
        return replace(
            self.scene, things=tuple(replace(t, x=t.x + index * u, y=t.y + index * v) for t, (u, v) in things)
        )


def describe(velocity: tuple[float, float]) -> Motion:
    """Put a velocity (pixels per frame) into words; the larger component names the direction."""
    u, v = velocity
    pace = math.hypot(u, v)
    if pace < _STILL:
        return Motion("still")
    if abs(u) >= abs(v):
        direction = "right" if u > 0 else "left"
    else:
        direction = "down" if v > 0 else "up"
    return Motion(direction, "fast" if pace >= _FAST else "slow")


def render_clip(clip: Clip, frames: int = FRAMES) -> np.ndarray:
    """Draw the clip: uint8 RGB [frames, 64, 64, 3]."""
    return np.stack([render(clip.frame(i)) for i in range(frames)])


def clip_caption(clip: Clip, *, speed: bool = True, motion: bool = True) -> str:
    """Say the clip: "a red circle moving left fast on gray"; without its speed or its motion on request."""
    motions = [describe(v) for v in clip.velocities] if motion else [Motion()] * len(clip.velocities)
    if not speed:
        motions = [replace(m, speed=None) for m in motions]
    pairs = zip(clip.scene.things, motions, strict=True)
    return " and ".join(_phrase(t.color, t.shape, m) for t, m in pairs) + f" on {clip.scene.background}"


def parse_clip(text: str) -> tuple[Scene, tuple[Motion, ...]]:
    """Read a caption back: the objects it asks for (places and sizes are the defaults) and their motions.

    Raises:
        JudgeError: the text is not `a COLOUR SHAPE [moving WAY [SPEED] | still] [and ...] on BACKGROUND`.
    """
    head, on, background = text.strip().lower().rstrip(".").partition(" on ")
    things, motions = [], []
    for part in re.split(r"\s+and\s+", " ".join(head.split())):
        phrase = _PHRASE.match(part)
        words = phrase.groupdict() if phrase else {"thing": part, "still": None, "way": None, "speed": None}
        try:
            motions.append(Motion(words["still"] or words["way"], words["speed"]))
        except ConfigError as error:
            raise JudgeError(f"Cannot read {part!r} in {text!r}: {error}") from None
        things.append(words["thing"] or "")
    return parse(" and ".join(things) + on + background), tuple(motions)


def sample_clip(rng: np.random.Generator, motion: Motion | None = None, frames: int = FRAMES) -> Clip:
    """Draw a clip of one object that stays inside the picture; its motion is drawn too where it is not given.

    Args:
        rng: NumPy generator; the clip is a function of its state.
        motion: what the object shall do.
        frames: For how many frames it stays inside, 1 to 17: at the fastest pace there is no room for more.

    Raises:
        ConfigError: `frames` is out of range.
    """
    if not 1 <= frames <= _MOST_FRAMES:
        raise ConfigError(f"A clip that stays inside the picture has 1 to {_MOST_FRAMES} frames, got {frames}.")
    if motion is None or motion.direction is None:
        direction = tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    else:
        direction = motion.direction
    speed = motion.speed if motion is not None and motion.speed else tuple(SPEEDS)[rng.integers(len(SPEEDS))]
    pace = rng.uniform(*SPEEDS[speed])
    u, v = (pace * d for d in DIRECTIONS[direction])
    size = float(rng.uniform(*_RADII))
    low, high = size + _MARGIN, SIZE - size - _MARGIN
    x, y = (_start(rng, low, high, step * (frames - 1)) for step in (u, v))
    thing = Thing(_any(rng, SHAPES), _any(rng, tuple(COLORS)), x, y, size)
    return Clip(Scene((thing,), _any(rng, tuple(BACKGROUNDS))), ((u, v),))


def clip_prompts(seed: int, n: int) -> tuple[str, ...]:
    """Draw `n` prompts for one object: the nine motions in turn, any colour, shape and background."""
    moving = [Motion(d, s) for d, s in product(DIRECTIONS, SPEEDS) if d != "still"]
    motions = (*moving, Motion("still"))
    rng = np.random.default_rng(seed)
    scenes = ((_any(rng, tuple(COLORS)), _any(rng, SHAPES), _any(rng, tuple(BACKGROUNDS))) for _ in range(n))
    return tuple(say(c, s, b, motions[i % len(motions)]) for i, (c, s, b) in enumerate(scenes))


def say(color: str, shape: str, background: str, motion: Motion) -> str:
    """Say one object in motion: "a red circle moving left fast on gray"."""
    return f"{_phrase(color, shape, motion)} on {background}"


def _phrase(color: str, shape: str, motion: Motion) -> str:
    return f"a {color} {shape} {motion}".rstrip()


def _start(rng: np.random.Generator, low: float, high: float, way: float) -> float:
    """Draw where to begin so that `way` pixels further on is inside too."""
    return float(rng.uniform(max(low, low - way), min(high, high - way)))


def _any(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]
