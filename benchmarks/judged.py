"""What studies of effects share: judged runs, paired intervals, and a folder of what is done."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import Control
from attnctl.shapes.training.evaluate import generate, score

__all__ = ["MARKS", "STEPS", "interval", "kept", "run"]

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


def kept(work: Path, label: str, make: Callable[[], Any]) -> Any:
    """Return the result that the folder `work` holds under a label, or make and keep it."""
    name = re.sub(r"[^\w.=-]+", "_", label)[:80]
    path = work / f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        value = make()
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
