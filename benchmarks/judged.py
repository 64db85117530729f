"""What studies of effects share: judged runs and paired intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import Control
from attnctl.shapes.training.evaluate import generate, score

__all__ = ["MARKS", "STEPS", "interval", "run"]

STEPS = 20
MARKS = ("present", "bound", "right")


def run(
    pipe: Any,
    prompts: Sequence[str],
    scale: float,
    seed: int,
    control: Control | None,
    *,
    steps: int = STEPS,
    **options: Any,
) -> dict[str, Any]:
    """Generate and judge one picture a prompt; also time it and count perturbed passes."""
    began = time.perf_counter()
    with attnctl.control(pipe, control) if control is not None else nullcontext() as handle:
        images = generate(pipe, prompts, scale=scale, seed=seed, steps=steps, **options)
    seconds = time.perf_counter() - began
    return score(images, prompts) | {"seconds": seconds, "passes": handle.passes if handle is not None else 0}


def interval(differences: np.ndarray, draws: int = 10_000, percent: bool = True) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % bootstrap interval, in points (percent) or as they are."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(differences), (draws, len(differences)))
    low, high = np.percentile(differences[picks].mean(1), [2.5, 97.5])
    factor, digits = (100, 1) if percent else (1, 4)
    mean = float(differences.mean())
    return round(factor * mean, digits), round(factor * float(low), digits), round(factor * float(high), digits)
