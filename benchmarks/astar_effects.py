"""What A-STAR and Attend-and-Excite do to two-object pictures of the shipped model; run by `astar.py --effects`.

Mechanism first: does the overlap of the two nouns' maps at the last step fall, and does each noun's map keep more of
its own early map? Then the marks: both objects right. Settings are chosen on tuning prompts and seeds, the figures come
from others; every comparison is paired (same prompt, same noise).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from judged import MARKS, STEPS, interval
from tqdm import tqdm

import attnctl
from attnctl.processors import PAG, AStar, AttendExcite, Capture, Control
from attnctl.processors.losses import binarise, normalise, retention, segregation
from attnctl.shapes.evaluate import generate, score
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, pair_prompts, parse, single_prompts

TUNING_SEED, REPORT_SEED = 60_000, 700_000
BATCH = 32
CFG = 1.5  # plain guidance's best, as `effects.py pag` finds
EARLY = 0.25  # of the run: where a noun's own early map is taken
Make = Callable[[tuple[tuple[str, ...], ...]], Sequence[Control]]

# Unit-length steps: the length of the latents is about 55, whatever the loss.
SIZES = (0.2, 0.5, 1.0, 2.0)
SITES: tuple[Any, ...] = (None, ("up.0",), ("mid", "up.0"), ("down.0", "up.1"))
WINDOWS = ((0.0, 1.0), (0.0, 0.5), (0.0, 0.25), (0.25, 1.0))
NORMS = ("max", "minmax", "ae", "none")


def nouns(prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Name the shapes of each prompt, which are the concepts."""
    return tuple(tuple(thing.shape for thing in parse(p).things) for p in prompts)


def sampled(pipe: Any, prompts: Sequence[str], seed: int, make: Make | None) -> dict[str, Any]:
    """Generate and judge a picture a prompt, and measure the nouns' maps while at it."""
    marks: dict[str, list[float]] = {name: [] for name in (*MARKS, "overlap", "kept")}
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        words = nouns(part)
        controls = list(make(words)) if make is not None else []
        capture = Capture(words=words, keep=("steps",), sites=["down.1", "mid", "up.0"])
        with attnctl.control(pipe, *controls, capture) as handle:
            images = generate(pipe, part, scale=CFG, seed=seed + first, steps=STEPS, batch=BATCH)
            maps = handle.maps
        scored = score(images, part)
        for name in MARKS:
            marks[name] += scored[name]
        early, late = (_pairs(maps, words, step) for step in (int(EARLY * STEPS), STEPS - 1))
        marks["overlap"] += segregation(late).tolist()
        marks["kept"] += (2 - retention(late, binarise(early))).tolist()
    return marks


def _pairs(maps: Any, words: Sequence[Sequence[str]], step: int) -> torch.Tensor:
    every = maps.stacked(step=step)  # words, images, h, w; NaN where a prompt has no such word
    chosen = [torch.stack([every[maps.words.index(w), i] for w in own]) for i, own in enumerate(words)]
    return normalise(torch.stack(chosen), "max")


def share(marks: dict[str, Any]) -> float:
    """Return the share of pictures with both objects right, in percent."""
    return round(100 * float(np.mean(marks["right"])), 1)


def tune(pipe: Any, n: int, most: int | None) -> dict[str, Any]:
    """Choose size, layers, window and normalisation of both methods, one after the other."""
    prompts = pair_prompts(31, n, "tuning")
    table: list[dict[str, Any]] = []
    left = [most if most is not None else 10_000]

    def tried(kind: type[AStar] | type[AttendExcite], options: dict[str, Any]) -> tuple[float, float]:
        left[0] -= 1
        marks = sampled(pipe, prompts, TUNING_SEED, lambda words: [kind(concepts=words, **options)])
        overlap = round(float(np.mean(marks["overlap"])), 4)
        table.append({"method": kind.__name__, **options, "right": share(marks), "overlap": overlap})
        print(table[-1], file=sys.stderr, flush=True)
        return share(marks), -overlap

    chosen: dict[str, dict[str, Any]] = {}
    for kind in (AStar, AttendExcite):
        best: dict[str, Any] = {"grad_transform": "l2", "step_size": SIZES[1]}
        if kind is AttendExcite:
            best |= {"thresholds": (), "map_norm": "ae"}
        best_mark: tuple[float, float] | None = None
        sweeps: list[list[dict[str, Any]]] = [
            [{"step_size": size} for size in SIZES],
            [{"grad_transform": "sign", "step_size": 0.01}, {"grad_transform": "none", "step_size": 20.0}],
            [{"sites": sites} for sites in SITES[1:]],
            [{"start": a, "stop": b} for a, b in WINDOWS[1:]],
            [{"map_norm": norm} for norm in NORMS if norm != best.get("map_norm", "max")],
        ]
        for change in tqdm(list(itertools.chain(*sweeps)), desc=kind.__name__, disable=None):
            if left[0] <= 0:
                break
            mark = tried(kind, best | change)
            if best_mark is None or mark > best_mark:
                best, best_mark = best | change, mark
        chosen[kind.__name__] = best
    return {"chosen": chosen, "table": table}


def report(pipe: Any, prompts: Sequence[str], chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Measure plain, both methods and A-STAR with PAG on fresh prompts and seeds."""
    pag = PAG(sites="mid", scale=2.5)
    runs: dict[str, Make | None] = {
        "plain": None,
        "AttendExcite": lambda words: [AttendExcite(concepts=words, **chosen["AttendExcite"])],
        "AStar": lambda words: [AStar(concepts=words, **chosen["AStar"])],
        "AStar, segregation alone": lambda words: [AStar(concepts=words, **chosen["AStar"] | {"ret": 0.0})],
        "AStar, retention alone": lambda words: [AStar(concepts=words, **chosen["AStar"] | {"seg": 0.0})],
        "AStar + PAG": lambda words: [AStar(concepts=words, **chosen["AStar"]), pag],
    }
    found = {name: sampled(pipe, prompts, REPORT_SEED, make) for name, make in tqdm(runs.items(), disable=None)}
    plain = {name: np.array(values) for name, values in found["plain"].items()}
    rows: dict[str, Any] = {}
    for name, marks in found.items():
        rows[name] = {mark: round(100 * float(np.mean(marks[mark])), 1) for mark in MARKS}
        rows[name] |= {key: round(float(np.mean(marks[key])), 4) for key in ("overlap", "kept")}
        if name != "plain":
            rows[name]["gain_right_points"] = interval(np.array(marks["right"]) - plain["right"])
            for key in ("overlap", "kept"):
                rows[name][f"{key}_change"] = interval(np.array(marks[key]) - plain[key], percent=False)
        print(name, rows[name], file=sys.stderr, flush=True)
    return rows


def layouts(pipe: Any, n: int, options: dict[str, Any]) -> dict[str, Any]:
    """Ask for one object in one half of the picture; count the centres that lie there."""
    prompts = [single_prompts()[i * 7 % len(single_prompts())] for i in range(n)]
    inside: dict[str, list[float]] = {"plain": [], "masks": []}
    left = np.zeros((16, 16), bool)
    left[:, :8] = True
    for side, mask in (("left", left), ("right", ~left)):
        for first in range(0, n, BATCH):
            part = prompts[first : first + BATCH]
            control = AStar(concepts=nouns(part), **options | {"masks": (mask,), "seg": 0.0})
            for name in inside:
                if name == "masks":
                    with attnctl.control(pipe, control):
                        images = generate(pipe, part, scale=CFG, seed=REPORT_SEED + first, steps=STEPS, batch=BATCH)
                else:
                    images = generate(pipe, part, scale=CFG, seed=REPORT_SEED + first, steps=STEPS, batch=BATCH)
                for image in images:
                    things = judge(image).things
                    if not things:
                        inside[name].append(0.0)
                        continue
                    box = things[0].box
                    inside[name].append(float(((box[0] + box[2]) / 2 < SIZE / 2) == (side == "left")))
    gain = interval(np.array(inside["masks"]) - np.array(inside["plain"]))
    return {name: round(100 * float(np.mean(v)), 1) for name, v in inside.items()} | {"gain_points": gain}


def effects(prompts: int, seeds: int, tuning: int, settings: int | None) -> dict[str, Any]:
    """Tune, then report: `prompts` two-object prompts with `seeds` pictures each."""
    pipe = attnctl.load_shapes("text2image")
    tuned = tune(pipe, tuning, settings)
    many = [p for p in pair_prompts(32, prompts, "report") for _ in range(seeds)]
    rows = report(pipe, many, tuned["chosen"])
    halves = layouts(pipe, max(len(many) // 4, 2), tuned["chosen"]["AStar"])
    print("centres in the half asked for", halves, file=sys.stderr)
    return {"cfg": CFG, "steps": STEPS, "pictures": len(many), **tuned, "report": rows, "layouts": halves}
