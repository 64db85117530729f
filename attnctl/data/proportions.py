"""Proportions with their uncertainty."""

from __future__ import annotations

import math

__all__ = ["wilson"]


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the bounds of a proportion k/n by Wilson's score interval; z is 1.96 for 95 %."""
    if not n:
        return 0.0, 1.0
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # None and all are their own bounds, which rounding would miss by a last bit.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)
