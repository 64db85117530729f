"""Where objects land with a prompt per region, judged.

python benchmarks/regions_effects.py > benchmarks/results/effects_regions.json

Every picture asks for two objects, one for the left and one for the right half. A picture is in place when both are
there in their colours and shapes, each in its half; it is right when both are there and nothing else. Settings are
chosen on tuning prompts; the figures come from other prompts and other seeds. Every comparison is paired, and intervals
are 95 % bootstrap intervals over the pictures. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import Regions
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import pair_prompts, parse

TUNING_SEED, REPORT_SEED = 62_000, 620_000
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
MARKS = ("in place", "right")
SETTINGS: tuple[dict[str, Any], ...] = tuple({"stop": s, "base": b} for s in (0.25, 0.4) for b in (0.1, 0.3))


def regions(prompt: str, setting: dict[str, Any]) -> Regions:
    """Give each half the object that is named for it."""
    scene = parse(prompt)
    texts = tuple(f"a {thing.color} {thing.shape} on {scene.background}" for thing in scene.things)
    return Regions(prompts=texts, areas=HALVES, **setting)


def run(pipe: Any, prompts: Sequence[str], seed: int, setting: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Generate and judge one picture per prompt."""
    marks: dict[str, list[bool]] = {mark: [] for mark in MARKS}
    for i, prompt in enumerate(tqdm(prompts, desc=str(setting), disable=None)):
        noise = torch.Generator().manual_seed(seed + i)
        with attnctl.control(pipe, regions(prompt, setting)) if setting is not None else nullcontext():
            image = pipe(prompt, num_inference_steps=STEPS, guidance_scale=3.0, generator=noise, **options).images[0]
        seen = judge(np.asarray(image))
        centre = image.width / 2
        halves = [{(f.color, f.shape) for f in seen.things if (f.x < centre) == left} for left in (True, False)]
        wanted = [thing.pair for thing in parse(prompt).things]
        marks["in place"].append(all(pair in half for pair, half in zip(wanted, halves, strict=True)))
        marks["right"].append(seen.matches(prompt).right)
    return marks


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mmdit", "text2image"), default="mmdit")
    parser.add_argument("-n", type=int, default=64, help="pictures of the report")
    parser.add_argument("--tune", type=int, default=12, help="pictures of every setting tried")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = attnctl.load_shapes(options.model)
    pipe.set_progress_bar_config(disable=True)
    call = {"max_sequence_length": 0} if options.model == "mmdit" else {}
    tuning, report = pair_prompts(31, options.tune, "tuning"), pair_prompts(32, options.n)
    tried = [run(pipe, tuning, TUNING_SEED, setting, call)["in place"] for setting in SETTINGS]
    best = SETTINGS[int(np.argmax([np.mean(marks) for marks in tried]))]
    plain, controlled = (run(pipe, report, REPORT_SEED, setting, call) for setting in (None, best))
    result = {
        "model": options.model,
        "pictures": options.n,
        "steps": STEPS,
        "setting": best,
        "plain_percent": {m: round(100 * float(np.mean(plain[m])), 1) for m in MARKS},
        "regions_percent": {m: round(100 * float(np.mean(controlled[m])), 1) for m in MARKS},
        "gain_points": {m: interval(np.array(controlled[m], float) - np.array(plain[m], float)) for m in MARKS},
    }
    print(result, file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
