"""Mark videos of the shapes world: what is where in every frame, how it moves, and is it what was asked.

Every frame goes through `judge`; an object's track is where its colour is seen. A straight line through the track
gives its velocity, which `motion.describe` puts into words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnctl.errors import JudgeError
from attnctl.shapes.judge import Found, Verdict, judge
from attnctl.shapes.motion import Motion, describe, parse_clip
from attnctl.shapes.scenes import SIZE, Thing

__all__ = ["ClipMatch", "ClipVerdict", "Track", "judge_clip"]

_SEEN = 0.5  # the least share of frames in which an object must be seen before its motion is judged


@dataclass(frozen=True, slots=True)
class Track:
    """Say how one object goes through a video.

    Attributes:
        present: share of the frames in which its colour is there.
        bound: share of the frames in which it is there with its own colour and shape.
        velocity: pixels per frame, right and down positive; NaN where it is seen in less than half of the frames.
        wobble: root mean square distance from the straight line of its way, pixels.
        pulse: standard deviation of its area, divided by the mean.
    """

    present: float
    bound: float
    velocity: tuple[float, float]
    wobble: float
    pulse: float

    @property
    def motion(self) -> Motion | None:
        """Return the motion in words, None where it was seen too seldom."""
        return None if np.isnan(self.velocity[0]) else describe(self.velocity)


@dataclass(frozen=True, slots=True)
class ClipMatch:
    """Say how far a video shows what a caption asks for.

    Attributes:
        tracks: of the objects asked for, in order.
        direction: for each: does it go where the caption says (true where the caption says nothing).
        speed: for each: does it go as fast as the caption says (true where the caption says nothing).
        background: share of the frames with the background asked for.
        extra: regions per frame that nobody asked for.
    """

    tracks: tuple[Track, ...]
    direction: tuple[bool, ...]
    speed: tuple[bool, ...]
    background: float
    extra: float

    @property
    def right(self) -> bool:
        """Are shape, colour and background right in nine frames of ten, and direction and speed as asked."""
        there = all(t.bound >= 0.9 for t in self.tracks) and self.background >= 0.9
        return there and all(self.direction) and all(self.speed) and self.extra < 0.1


@dataclass(frozen=True, slots=True)
class ClipVerdict:
    """Hold what the judge saw in every frame.

    Attributes:
        frames: the judge's verdicts.
        flicker: mean absolute change of the pixels that are background in both of two consecutive frames, 0..1.
    """

    frames: tuple[Verdict, ...]
    flicker: float

    def track(self, thing: Thing) -> Track:
        """Follow an object by its colour; where that is seen more than once, by its shape and then by its area."""
        picked = [_pick(v, thing) for v in self.frames]
        seen = [(i, f) for i, f in enumerate(picked) if f is not None]
        n = len(self.frames)
        bound = sum(f.shape == thing.shape for _, f in seen) / n
        if len(seen) < max(2, _SEEN * n):
            return Track(len(seen) / n, bound, (float("nan"), float("nan")), float("nan"), float("nan"))
        t = np.array([i for i, _ in seen], np.float64)
        place = np.array([(f.x, f.y) for _, f in seen])
        velocity = _slope(t, place)
        rest = place - t[:, None] * velocity
        wobble = float(np.sqrt(((rest - rest.mean(0)) ** 2).sum(1).mean()))
        area = np.array([f.area for _, f in seen])
        pulse = float(area.std() / area.mean())
        return Track(len(seen) / n, bound, (float(velocity[0]), float(velocity[1])), wobble, pulse)

    def matches(self, text: str) -> ClipMatch:
        """Compare with a caption.

        Raises:
            JudgeError: the caption is not of this world.
        """
        scene, motions = parse_clip(text)
        tracks = tuple(self.track(thing) for thing in scene.things)
        pairs = tuple((m, t.motion) for m, t in zip(motions, tracks, strict=True))
        return ClipMatch(
            tracks=tracks,
            direction=tuple(saw is not None and wanted.direction in (None, saw.direction) for wanted, saw in pairs),
            speed=tuple(saw is not None and wanted.speed in (None, saw.speed) for wanted, saw in pairs),
            background=float(np.mean([v.background == scene.background for v in self.frames])),
            extra=float(np.mean([_extra(v, scene.things) for v in self.frames])),
        )


def judge_clip(frames: object) -> ClipVerdict:
    """Say what is in a video.

    Args:
        frames: uint8 RGB [n, 64, 64, 3], n >= 2, or a list of PIL images of that size.

    Raises:
        JudgeError: another size or type.
    """
    video = np.stack([np.asarray(f) for f in frames]) if isinstance(frames, list | tuple) and frames else frames
    if not isinstance(video, np.ndarray) or video.shape[1:] != (SIZE, SIZE, 3) or video.dtype != np.uint8:
        got = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise JudgeError(f"The judge reads uint8 RGB videos [frames, {SIZE}, {SIZE}, 3], got {got}.")
    if len(video) < 2:
        raise JudgeError(f"A video has two frames or more, got {len(video)}.")
    verdicts = tuple(judge(f) for f in video)
    return ClipVerdict(verdicts, _flicker(video, verdicts))


def _pick(verdict: Verdict, thing: Thing) -> Found | None:
    alike = [f for f in verdict.things if f.color == thing.color]
    return max(alike, key=lambda f: (f.shape == thing.shape, f.area), default=None)


def _slope(t: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the median slope over all pairs of frames (Theil and Sen), which single bad frames do not move."""
    i, j = np.triu_indices(len(t), 1)
    return np.median((place[j] - place[i]) / (t[j] - t[i])[:, None], axis=0)


def _extra(verdict: Verdict, things: tuple[Thing, ...]) -> int:
    colors = [t.color for t in things]
    return len(verdict.things) - sum(
        min(colors.count(c), sum(f.color == c for f in verdict.things)) for c in set(colors)
    )


def _flicker(video: np.ndarray, verdicts: tuple[Verdict, ...]) -> float:
    """Compare consecutive frames where neither has an object; NaN if that is nowhere."""
    free = np.ones(video.shape[:3], bool)
    for mask, verdict in zip(free, verdicts, strict=True):
        for f in verdict.things:
            left, top, right, bottom = f.box
            mask[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
    both = free[1:] & free[:-1]
    change = np.abs(video[1:].astype(np.float32) - video[:-1]).mean(-1) / 255
    return float(change[both].mean()) if both.any() else float("nan")
