"""What TextCenGen keeps free, judged, beside A-STAR's layouts.

python benchmarks/textcengen_effects.py > benchmarks/results/effects_textcengen.json
python benchmarks/textcengen_effects.py --maps > benchmarks/results/effects_textcengen_maps.json

The shipped text2image model draws one object per prompt, and the upper 40 % of the picture shall stay free. Counted are
the share of the object's pixels that lie in the free space (all that is not background, by colour), the pictures whose
space holds less than a hundredth of object, and those that show what was asked for. The rival is A-STAR with a mask of
the rest of the picture for the object. With --maps it is TextCenGenMaps, the paper's own way, which moves no latents.

Settings are chosen on tuning prompts; the figures come from other prompts and seeds. The same prompts and noise in
pairs; intervals are 95 % bootstrap intervals. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import AStar, Control, TextCenGen, TextCenGenMaps
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import BACKGROUNDS, SIZE, parse, single_prompts
from attnctl.shapes.training.evaluate import generate

TUNING_SEED, REPORT_SEED = 91_000, 910_000
SPACE = (0.0, 0.0, 1.0, 0.4)
ROWS = round(SPACE[3] * SIZE)
FAR = 60.0  # distance in RGB from the background at which a pixel is an object's
BATCH = 16
Things = tuple[tuple[str, str], ...]
"""Colour and noun of the object in each prompt."""
Make = Callable[[Things], Control]


def layout() -> np.ndarray:
    """Draw the mask of what is not the free space."""
    mask = np.zeros((SIZE, SIZE))
    mask[ROWS:] = 1
    return mask


def nouns(things: Things) -> tuple[tuple[str], ...]:
    """Return the noun of each prompt."""
    return tuple((noun,) for _, noun in things)


def moved(**options: Any) -> Make:
    """Return what makes a TextCenGen for the noun of each prompt."""
    return lambda things: TextCenGen(concepts=nouns(things), space=SPACE, grad_transform="l2", **options)


def drawn(**options: Any) -> Make:
    """Return what makes an A-STAR layout for the noun of each prompt."""
    return lambda things: AStar(concepts=nouns(things), seg=0.0, masks=(layout(),), grad_transform="l2", **options)


SETTINGS: dict[str, dict[str, float]] = {
    "step 1 until 0.2": {"step_size": 1.0, "stop": 0.2},
    "step 1 until 0.5": {"step_size": 1.0, "stop": 0.5},
    "step 2 until 0.5": {"step_size": 2.0, "stop": 0.5},
}
TRIED: dict[str, dict[str, Make]] = {
    name: {setting: make(**options) for setting, options in SETTINGS.items()}
    for name, make in {"TextCenGen": moved, "A-STAR layout": drawn}.items()
}


WORDS: dict[str, Callable[[Things], Any]] = {
    "the noun": nouns,
    "colour and noun": lambda things: things,
    "every word": lambda things: (),
}


def rewritten(words: str, stop: float) -> Make:
    """Return what makes a TextCenGenMaps for some words of each prompt."""
    return lambda things: TextCenGenMaps(concepts=WORDS[words](things), space=SPACE, stop=stop)


def run(pipe: Any, prompts: Sequence[str], seed: int, make: Make | None, name: str) -> dict[str, np.ndarray]:
    """Generate and judge every prompt."""
    marks: dict[str, list[float]] = {"inside": [], "free": [], "right": []}
    for first in tqdm(range(0, len(prompts), BATCH), desc=name, disable=None):
        part = list(prompts[first : first + BATCH])
        things = tuple((thing.color, thing.shape) for thing in (parse(prompt).things[0] for prompt in part))
        with attnctl.control(pipe, make(things)) if make is not None else nullcontext():
            images = generate(pipe, part, scale=3.0, seed=seed + first, steps=STEPS)
        for image, prompt in zip(images, part, strict=True):
            seen = judge(np.asarray(image))
            ground = BACKGROUNDS.get(seen.background, BACKGROUNDS[parse(prompt).background])
            thing = np.linalg.norm(np.asarray(image, float) - np.array(ground, float), axis=-1) > FAR
            marks["inside"].append(float(thing[:ROWS].sum() / max(1, thing.sum())))
            marks["free"].append(float(thing[:ROWS].mean() < 0.01))
            marks["right"].append(float(seen.matches(prompt).right))
    return {name: np.array(values) for name, values in marks.items()}


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=48, help="prompts of the report")
    parser.add_argument("--tune", type=int, default=16, help="prompts of every setting tried")
    parser.add_argument("--maps", action="store_true", help="TextCenGenMaps, which moves maps in attention")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pipe = attnctl.load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    prompts = np.random.default_rng(9).permutation(single_prompts()).tolist()
    tuning, report = prompts[: options.tune], prompts[options.tune : options.tune + options.n]
    plain = run(pipe, report, REPORT_SEED, None, "plain")
    rows: dict[str, Any] = {"plain": {m: round(100 * float(v.mean()), 1) for m, v in plain.items()}}
    methods = TRIED
    if options.maps:
        ways = {f"{words} until {stop:g}": rewritten(words, stop) for words in WORDS for stop in (0.5, 1.0)}
        methods = {"TextCenGenMaps": ways}
    for name, tried in methods.items():
        found = {s: run(pipe, tuning, TUNING_SEED, make, f"{name} {s}") for s, make in tried.items()}
        # Free space counts where the picture still shows what was asked for.
        best = max(found, key=lambda s: float(found[s]["right"].mean() - found[s]["inside"].mean()))
        marks = run(pipe, report, REPORT_SEED, tried[best], name)
        rows[name] = {
            "setting": best,
            **{m: round(100 * float(v.mean()), 1) for m, v in marks.items()},
            **{f"gain_{m}_points": interval(marks[m] - plain[m]) for m in marks},
        }
        print(f"{name}: {rows[name]}", file=sys.stderr)
    print(json.dumps({"pictures": options.n, "steps": STEPS, "space": SPACE, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
