"""What isolation does to the colours of two objects, judged.

python benchmarks/isolation_effects.py > benchmarks/results/effects_isolation.json

Prompts for two objects are drawn by the shipped text2image model, each object in its half of the picture by A-STAR's
layout, alone and with `IRDiffusion`, which keeps the halves from seeing each other at self-attention. Counted are the
pictures that show both objects and nothing else, the objects with their own colours, and the pictures with each object
in its half. How long subjects are isolated is chosen on tuning prompts; the figures come from other prompts and seeds.
The same prompts and noise in pairs; intervals are 95 % bootstrap intervals. The table goes to stderr, the JSON to
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import AStar, IRDiffusion
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, pair_prompts, parse
from attnctl.shapes.training.evaluate import generate

TUNING_SEED, REPORT_SEED = 81_000, 810_000
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
TRIED = (0.4, 1.0)
PLACING: dict[str, Any] = {"grad_transform": "l2", "step_size": 1.0, "stop": 0.2}
BATCH = 16


def layout() -> tuple[np.ndarray, np.ndarray]:
    """Draw the masks of the left and the right half."""
    left = np.zeros((SIZE, SIZE))
    left[:, : SIZE // 2] = 1
    return left, 1 - left


def run(pipe: Any, prompts: Sequence[str], seed: int, until: float | None) -> dict[str, np.ndarray]:
    """Generate and judge every prompt: which pictures are right, the share of objects bound, and which are in place."""
    marks: dict[str, list[float]] = {"right": [], "bound": [], "in place": []}
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"until {until}", disable=None):
        part = list(prompts[first : first + BATCH])
        things = [parse(prompt).things for prompt in part]
        nouns = tuple(tuple(t.shape for t in pair) for pair in things)
        controls: list[Any] = [AStar(concepts=nouns, masks=layout(), **PLACING)]
        if until is not None:
            controls.append(IRDiffusion(boxes=(HALVES,), isolate_until=until))
        with attnctl.control(pipe, *controls):
            images = generate(pipe, part, scale=3.0, seed=seed + first, steps=STEPS)
        for image, prompt, pair in zip(images, part, things, strict=True):
            seen = judge(np.asarray(image))
            match = seen.matches(prompt)
            middles = {(f.color, f.shape): (f.box[0] + f.box[2]) / 2 for f in seen.things}
            left, right = (middles.get(t.pair) for t in pair)
            marks["right"].append(match.right)
            marks["bound"].append(float(np.mean(match.bound)))
            marks["in place"].append(left is not None and right is not None and left < SIZE / 2 < right)
    return {name: np.array(values, float) for name, values in marks.items()}


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=48, help="prompts of the report")
    parser.add_argument("--tune", type=int, default=16, help="prompts of every setting tried")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pipe = attnctl.load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    tuning = pair_prompts(11, options.tune, "tuning")
    report = pair_prompts(12, options.n, "report")
    tried = {until: run(pipe, tuning, TUNING_SEED, until) for until in TRIED}
    best = max(tried, key=lambda until: float(tried[until]["bound"].mean() + tried[until]["in place"].mean()))
    before, after = (run(pipe, report, REPORT_SEED, until) for until in (None, best))
    rows = {
        name: {
            "layout": round(100 * float(before[name].mean()), 1),
            "with isolation": round(100 * float(after[name].mean()), 1),
            "gain_points": interval(after[name] - before[name]),
        }
        for name in before
    }
    print(f"isolate_until={best}: {rows}", file=sys.stderr)
    print(json.dumps({"pictures": options.n, "steps": STEPS, "isolate_until": best, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
