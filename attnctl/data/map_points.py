"""A map as prompts for a segmenting model: points inside and outside of what it shows, and the part with its peak.

Positive points are the peaks of the blurred map, one per connected part above a share of its largest value, as VL-SAM
(arXiv 2410.00163) takes points from attention. Negative points, the lowest places outside, are this project's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnctl.errors import ConfigError, whole

__all__ = ["peak_part", "points_in"]

Point = tuple[int, int]


def peak_part(values: Any, mask: Any) -> np.ndarray:
    """Keep of a mask [h, w] the connected part that holds the mask's highest value: bool [h, w].

    A mask without a pixel stays empty.
    """
    import cv2

    map_, inside = np.asarray(values, np.float32), np.asarray(mask, bool)
    if not inside.any():
        return inside
    _, parts = cv2.connectedComponents(inside.astype(np.uint8), connectivity=8)
    top = np.unravel_index(np.where(inside, map_, -np.inf).argmax(), inside.shape)
    return parts == parts[top]


def points_in(
    values: Any, mask: Any, *, positive: int = 1, negative: int = 0, blur: float = 0.02
) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """Choose points of a map that lie in a mask, and points that lie far outside.

    Args:
        values: The map [h, w] on the pixels of its picture.
        mask: What the map shows, bool [h, w].
        positive: Most points inside: the peaks of the connected parts, the highest first.
        negative: Most points outside: the lowest places, each at least an eighth of the shorter side from the mask
            and from the other points.
        blur: Deviation of the Gaussian blur, as a share of the picture's longer side.

    Returns:
        Positive and negative points (x, y), in pixels. There are fewer where the map has no more.
    """
    import cv2

    whole(positive, "positive", 1, of="points")
    whole(negative, "negative", 0, of="points")
    map_, inside = np.asarray(values, np.float32), np.asarray(mask, bool)
    if map_.ndim != 2 or map_.shape != inside.shape:
        raise ConfigError(f"A map {map_.shape} and a mask {inside.shape} were given; expected two of one size [h, w].")
    smooth = cv2.GaussianBlur(map_, (0, 0), max(blur * max(map_.shape), 1e-3))
    if not inside.any():
        return (), ()
    heat = np.where(inside, smooth, -np.inf)
    low = smooth.min()
    n, parts = cv2.connectedComponents((heat >= low + 0.5 * (heat.max() - low)).astype(np.uint8), connectivity=8)
    peaks = [np.where(parts == i, heat, -np.inf) for i in range(1, n)]
    peaks.sort(key=lambda part: -float(part.max()))
    tops = tuple(_place(part) for part in peaks[:positive])
    gap = max(1, min(map_.shape) // 8)
    free = ~cv2.dilate(inside.astype(np.uint8), np.ones((2 * gap + 1,) * 2, np.uint8)).astype(bool)
    chosen: list[Point] = []
    while free.any() and len(chosen) < negative:
        x, y = _place(np.where(free, -smooth, -np.inf))
        chosen.append((x, y))
        free[max(y - gap, 0) : y + gap + 1, max(x - gap, 0) : x + gap + 1] = False
    return tops, tuple(chosen)


def _place(values: np.ndarray) -> Point:
    y, x = np.unravel_index(values.argmax(), values.shape)
    return int(x), int(y)
