"""Mark pictures of the shapes world: which objects of which colour and shape are where, and is it what was asked.

OpenCV and NumPy only. A picture is segmented by the nearest of the world's ten colours in Lab; each connected region
of an object colour is refined to a soft coverage mask (how far each pixel lies between background and object colour)
and compared, scaled to its bounding box, with the five shapes; the best intersection over union names the shape and
measures its quality. What is too small, or looks like no shape, still counts as something that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from attnctl.errors import JudgeError
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZE, Thing, outline, parse

__all__ = ["MIN_AREA", "MIN_IOU", "Found", "Match", "Verdict", "judge"]

MIN_AREA = 24  # pixels; the smallest object drawn has about 150
MIN_IOU = 0.75  # a circle cut out of a square has 0.785, but then the square wins

_NAMES = (*COLORS, *BACKGROUNDS)
_N_COLORS = len(COLORS)
_CANON = 48  # side of the frame in which regions and templates are compared
_TRIANGLE = SHAPES.index("triangle")
_ASPECT = 1.45  # the triangle is 2.0 by 1.8


@dataclass(frozen=True, slots=True)
class Found:
    """Describe one region of an object colour; `shape` is None where no template reaches `MIN_IOU`.

    Attributes:
        shape: one of the world's shapes or None.
        color: one of the object colours.
        x: centre of the bounding box in pixels, 0..64.
        y: likewise.
        box: left, top, right, bottom in pixels (right and bottom exclusive).
        area: covered pixels.
        iou: intersection over union with the best template, 0..1.
    """

    shape: str | None
    color: str
    x: float
    y: float
    box: tuple[int, int, int, int]
    area: float
    iou: float


@dataclass(frozen=True, slots=True)
class Match:
    """Say how far a picture shows what a caption asks for.

    Attributes:
        present: for each object asked for, in order: is its colour there at all.
        bound: for each object asked for, in order: is it there with its own colour and shape.
        extra: regions that nobody asked for.
        background: is the background the one asked for.
        iou: mean shape quality of the objects that are bound, 0 if none is.
    """

    present: tuple[bool, ...]
    bound: tuple[bool, ...]
    extra: int
    background: bool
    iou: float

    @property
    def all_present(self) -> bool:
        """Are all colours there."""
        return all(self.present)

    @property
    def right(self) -> bool:
        """Is every object there with its own colour and shape, and nothing else (the background is judged apart)."""
        return all(self.bound) and self.extra == 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold what the judge saw: objects from the largest to the smallest, and the background's name."""

    things: tuple[Found, ...]
    background: str

    def matches(self, text: str) -> Match:
        """Compare with a caption.

        Raises:
            JudgeError: the caption is not of this world.
        """
        scene = parse(text)
        colors = {f.color for f in self.things}
        left = list(self.things)
        bound, quality = [], []
        for thing in scene.things:
            hit = next((f for f in left if (f.color, f.shape) == thing.pair), None)
            bound.append(hit is not None)
            if hit is not None:
                left.remove(hit)
                quality.append(hit.iou)
        # A region that has the colour of an object which is missing is that object misdrawn, not one too many.
        for thing, ok in zip(scene.things, bound, strict=True):
            if not ok and (miss := next((f for f in left if f.color == thing.color), None)) is not None:
                left.remove(miss)
        return Match(
            present=tuple(t.color in colors for t in scene.things),
            bound=tuple(bound),
            extra=len(left),
            background=self.background == scene.background,
            iou=float(np.mean(quality)) if quality else 0.0,
        )


def judge(image: object) -> Verdict:
    """Say what is in a picture.

    Args:
        image: uint8 RGB [64, 64, 3] or a PIL image of that size.

    Raises:
        JudgeError: another size or type.
    """
    rgb = np.asarray(image)
    if rgb.shape != (SIZE, SIZE, 3) or rgb.dtype != np.uint8:
        raise JudgeError(f"The judge reads uint8 RGB pictures of {SIZE}x{SIZE}, got {rgb.dtype} {rgb.shape}.")
    # A light median takes out grain and JPEG mosquitos without rounding the corners of objects this large.
    smooth = cv2.medianBlur(rgb, 3)
    lab = cv2.cvtColor(smooth.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    names, palette = _palette()
    nearest = np.argmin(((lab[:, :, None] - palette) ** 2).sum(-1), axis=-1)
    grounds = np.bincount(nearest.ravel(), minlength=len(names))[_N_COLORS:]
    background = names[_N_COLORS + int(np.argmax(grounds))]
    things = []
    for index in range(_N_COLORS):
        mask = (nearest == index).astype(np.uint8)
        if int(mask.sum()) < MIN_AREA:
            continue
        # Opening takes away the seams of mixed colour between an object and its background.
        core = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
        n, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
        things += [
            _look(rgb, labels == i, names[index], background)
            for i in range(1, n)
            if stats[i, cv2.CC_STAT_AREA] >= MIN_AREA
        ]
    return Verdict(tuple(sorted(things, key=lambda f: -f.area)), background)


def _look(rgb: np.ndarray, region: np.ndarray, color: str, background: str) -> Found:
    """Refine a region to a coverage mask and name its shape."""
    base = np.array(BACKGROUNDS[background], np.float32)
    line = np.array(COLORS[color], np.float32) - base
    near = cv2.dilate(region.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    offset = rgb.astype(np.float32) - base
    cover = np.clip((offset @ line) / float(line @ line), 0, 1)
    # A pixel far from the line between the two colours belongs to something else.
    stray = np.linalg.norm(offset - cover[..., None] * line, axis=-1) > 0.5 * np.linalg.norm(line)
    cover = np.where(near & ~stray, cover, 0).astype(np.float32)
    ys, xs = np.nonzero(cover > 0.5)
    if len(xs) == 0:
        ys, xs = np.nonzero(region)
        cover = region.astype(np.float32)
    left, top, right, bottom = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    # The true edges lie where the coverage profile says, not on whole pixels.
    x0, x1 = _edges(cover.max(0), left, right)
    y0, y1 = _edges(cover.max(1), top, bottom)
    shape, iou = _classify(cover, x0, y0, x1, y1)
    return Found(shape, color, (x0 + x1) / 2, (y0 + y1) / 2, (left, top, right, bottom), float(cover.sum()), iou)


def _edges(profile: np.ndarray, first: int, last: int) -> tuple[float, float]:
    before = float(profile[first - 1]) if first > 0 else 0.0
    after = float(profile[last]) if last < len(profile) else 0.0
    return first + 1 - float(profile[first]) - before, last - 1 + float(profile[last - 1]) + after


def _classify(cover: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> tuple[str | None, float]:
    width, height = max(x1 - x0, 1.0), max(y1 - y0, 1.0)
    templates = _templates()
    iou = np.zeros(len(SHAPES))
    # Sharp corners fade before the box can be seen, so a triangle may reach a little further than its box.
    for reach in (0.0, 1.0, 2.0):
        frame = _frame(cover, x0 - reach / 2, y0 - reach, width + reach, height + reach)
        some = slice(None) if reach == 0 else slice(_TRIANGLE, _TRIANGLE + 1)
        both = np.minimum(templates[some], frame).sum((1, 2))
        iou[some] = np.maximum(iou[some], both / np.maximum(templates[some], frame).sum((1, 2)))
    best = int(np.argmax(iou))
    squeezed = max(width / height, height / width) > _ASPECT
    return (SHAPES[best] if iou[best] >= MIN_IOU and not squeezed else None), float(iou[best])


def _frame(cover: np.ndarray, x0: float, y0: float, width: float, height: float) -> np.ndarray:
    """Sample a box on the fixed frame, 0 or 1."""
    sx, sy = width / _CANON, height / _CANON
    # warpAffine maps the centre of frame pixel i to picture coordinate matrix @ i, with centres on whole numbers.
    matrix = np.array([[sx, 0, x0 + sx / 2 - 0.5], [0, sy, y0 + sy / 2 - 0.5]], np.float32)
    frame = cv2.warpAffine(cover, matrix, (_CANON, _CANON), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return (frame > 0.5).astype(np.float32)


@lru_cache(maxsize=1)
def _palette() -> tuple[tuple[str, ...], np.ndarray]:
    rgb = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)[None] / 255
    return _NAMES, cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Draw the five shapes, each filling its frame: float [5, frame, frame] of 0 and 1."""
    frames = []
    for shape in SHAPES:
        big = np.zeros((400, 400), np.uint8)
        outline(big, Thing(shape, "white", 200.5, 200.5, 180.0), (255,), 1.0)
        ys, xs = np.nonzero(big)
        crop = big[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        frames.append(cv2.resize(crop, (_CANON, _CANON), interpolation=cv2.INTER_AREA) > 127)
    return np.stack(frames).astype(np.float32)
