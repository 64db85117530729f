"""Where A-STAR's claim might hold: pictures whose nouns' maps overlap from the start, and three objects.

    python benchmarks/astar_regimes.py --log runs.jsonl > benchmarks/results/astar_regimes.json

A-STAR pulls apart maps that overlap. First it is asked whether overlap early in a plain run (a quarter into it) goes
with failure, over a pool of two-object pictures of the shipped text2image model. Then the third of the pool that
overlaps most there is made again, plain, with A-STAR and with Attend-and-Excite: what is chosen by the plain run's
early maps says nothing else of how it ends. Last, three objects, which the model has never been shown. Settings are
those that `astar_effects.py` has chosen on tuning prompts; comparisons are paired (same prompt, same noise), intervals
are 95 % bootstrap intervals. The table goes to stderr, the JSON to stdout; what `--log` holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from astar_effects import BATCH, EARLY, METHODS, Setting, Study, apart, nouns, pair_maps
from judged import STEPS, interval
from tqdm import tqdm

import attnctl
from attnctl.processors import Capture
from attnctl.processors.latent.losses import segregation
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, pair_prompts
from attnctl.shapes.training.evaluate import score

POOL_SEED, THREE_SEED = 730_000, 740_000
CHOSEN: dict[str, Setting | None] = {
    "plain": None,
    "AStar": ("AStar", {"grad_transform": "l2", "step_size": 1.0, "stop": 0.1}),
    "AttendExcite": ("AttendExcite", {"grad_transform": "l2", "step_size": 0.5, "stop": 0.2, "thresholds": ()}),
}
MARKS = ("objects", "bound", "right")


def three_prompts(seed: int, n: int) -> tuple[str, ...]:
    """Draw `n` prompts for three objects of three colours and shapes."""
    rng, prompts = np.random.default_rng(seed), []
    for _ in range(n):
        colors, shapes = (rng.permutation(tuple(names))[:3] for names in (COLORS, SHAPES))
        things = " and ".join(f"a {c} {s}" for c, s in zip(colors, shapes, strict=True))
        prompts.append(f"{things} on {rng.choice(tuple(BACKGROUNDS))}")
    return tuple(prompts)


def pictures(study: Study, items: Sequence[tuple[str, int]], setting: Setting | None) -> dict[str, np.ndarray]:
    """Make and judge one picture for each (prompt, seed); also how much its nouns' maps overlap early and late."""
    marks: dict[str, list[float]] = {name: [] for name in (*MARKS, "early", "late")}
    for first in range(0, len(items), BATCH):
        part = items[first : first + BATCH]
        own = study.once(["regimes", *map(list, part), setting], lambda part=part: _batch(study, part, setting))
        for name, values in own.items():
            marks[name] += values
    return {name: np.array(values) for name, values in marks.items()}


def _batch(study: Study, items: Sequence[tuple[str, int]], setting: Setting | None) -> dict[str, list[float]]:
    prompts = [prompt for prompt, _ in items]
    words = nouns(prompts)
    controls = [] if setting is None else [METHODS[setting[0]](concepts=words, **setting[1])]
    generators = [torch.Generator().manual_seed(seed) for _, seed in items]
    with attnctl.control(study.pipe, *controls, Capture(words=words, keep=("steps",))) as handle:
        made = study.pipe(
            prompts, num_inference_steps=STEPS, guidance_scale=study.world.cfg, generator=generators, output_type="np"
        ).images
        maps = handle.maps
    scored = score(list(np.round(np.asarray(made) * 255).astype(np.uint8)), prompts)
    early, late = (segregation(pair_maps(maps, words, step)).tolist() for step in (int(EARLY * STEPS), STEPS - 1))
    return {name: scored[name] for name in MARKS} | {"early": early, "late": late}


def compared(study: Study, items: Sequence[tuple[str, int]], label: str) -> dict[str, Any]:
    """Compare the methods with plain pictures."""
    runs = {name: pictures(study, items, s) for name, s in tqdm(CHOSEN.items(), desc=label, disable=None)}
    plain = runs["plain"]
    return {
        "pictures": len(items),
        "shares_percent": {n: {m: round(100 * float(r[m].mean()), 1) for m in MARKS} for n, r in runs.items()},
        "overlap": {n: {m: round(float(r[m].mean()), 4) for m in ("early", "late")} for n, r in runs.items()},
        "gain_points": {n: {m: interval(r[m] - plain[m]) for m in MARKS} for n, r in runs.items() if n != "plain"},
        "overlap_of_failures_minus_others": {m: apart(plain["early"], plain[m] == 1) for m in ("bound", "right")},
    }


def study_regimes(study: Study, pool: int, n: int) -> dict[str, Any]:
    """Run both regimes."""
    items = [(prompt, POOL_SEED + i) for i, prompt in enumerate(pair_prompts(36, pool, "report"))]
    plain = pictures(study, items, None)
    most = np.argsort(-plain["early"])[: pool // 3]
    rest = np.argsort(-plain["early"])[pool // 3 :]
    result: dict[str, Any] = {
        "pool": {
            "pictures": pool,
            "overlap_of_failures_minus_others": {m: apart(plain["early"], plain[m] == 1) for m in ("bound", "right")},
            "right_percent": {
                name: round(100 * float(plain["right"][index].mean()), 1)
                for name, index in (("most overlap", most), ("the rest", rest))
            },
        }
    }
    result["most overlap"] = compared(study, [items[i] for i in sorted(most)], "overlap")
    threes = [(prompt, THREE_SEED + i) for i, prompt in enumerate(three_prompts(37, n))]
    result["three objects"] = compared(study, threes, "three objects")
    return result


def table(result: Mapping[str, Any]) -> str:
    """Write the regimes as a Markdown table."""
    lines = [
        "| regime | run | objects right | all bound | all right | all right, points | early overlap |",
        "|---" * 7 + "|",
    ]
    for regime in ("most overlap", "three objects"):
        for name, shares in result[regime]["shares_percent"].items():
            gain = result[regime]["gain_points"].get(name)
            points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain["right"]) if gain else ""
            early = result[regime]["overlap"][name]["early"]
            lines.append(
                f"| {regime} ({result[regime]['pictures']}) | {name} | {shares['objects']} % | {shares['bound']} % | "
                f"{shares['right']} % | {points} | {early:.3f} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pool", type=int, default=288, help="plain pictures of which the third that overlaps is taken"
    )
    parser.add_argument("-n", type=int, default=96, help="pictures of three objects")
    parser.add_argument("--log", type=Path, help="JSON lines of what was run, to go on from")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = Study("text2image", options.log)
    result: dict[str, Any] = {"study": "astar regimes", "cfg": study.world.cfg, "steps": STEPS, "early": EARLY}
    result |= study_regimes(study, options.pool, options.n)
    print(table(result), file=sys.stderr)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    print(json.dumps(result | {"versions": versions, "machine": platform.machine()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
