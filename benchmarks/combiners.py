"""What rules that replace u + w (c - u) do to pictures, judged: `python benchmarks/combiners.py`.

Each rule chooses its setting and its guidance scale on tuning prompts and tuning seeds, and so does plain
classifier-free guidance; the figures come from other prompts and other seeds. Comparisons are paired: the same prompt
and the same noise; intervals are 95 % bootstrap intervals of the mean difference over the pairs. `--part block` does
the same with the control that `attnctl hunt --unit block` has found (its `blocks.json`, named by --blocks). `--part
strong` fixes classifier-free guidance at a scale that is too high, where most of these rules make their claim: plain
and ruled pictures at that scale, and plain ones at the best.

The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from judged import MARKS, STEPS, interval, run

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.data.specs import parse_control
from attnctl.processors import (
    APG,
    FDG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    Control,
    GuidanceInterval,
    MaG,
    Rescale,
)
from attnctl.shapes.scenes import pair_prompts

TUNING_SEED, REPORT_SEED = 45_000, 520_000
SCALES = (1.5, 3.0)
RULES: dict[str, tuple[Control, ...]] = {
    "APG": (APG(norm=0.0), APG(norm=0.0, eta=0.5, momentum=0.0)),
    "CFG-Zero*": (CFGZeroStar(zero_init_steps=0),),
    "interval": (GuidanceInterval(interval=(0.0, 0.6)), GuidanceInterval(interval=(0.2, 0.8))),
}
STRONG, BEST = 8.0, 2.0
AT_STRONG: dict[str, tuple[Control, ...]] = {
    "APG": (APG(norm=0.0, momentum=0.0), APG(norm=0.0, eta=0.5, momentum=0.0), APG(norm=5.0, momentum=0.0)),
    "CFG-Zero*": (CFGZeroStar(zero_init_steps=0), CFGZeroStar()),
    "CFG++": (CFGPlusPlus(scale=0.6), CFGPlusPlus(scale=0.9)),
    "FDG": (FDG(scales=(8.0, 2.0)), FDG(scales=(8.0, 4.0))),
    "interval": (GuidanceInterval(interval=(0.0, 0.6)), GuidanceInterval(interval=(0.2, 0.8))),
    "MaG": (MaG(alpha=4.0), MaG(alpha=8.0)),
    "rescale": (Rescale(phi=0.7), Rescale(phi=1.0)),
    "TCFG": (TCFG(),),
}


def strong(n: int, n_tune: int) -> dict[str, Any]:
    """Tune each rule at a scale that is too high, and report there."""
    pipe = attnctl.load_shapes("text2image")
    tuning, table, chosen = pair_prompts(15, n_tune, "tuning"), [], {}
    for name, settings in AT_STRONG.items():
        found = [float(np.mean(run(pipe, tuning, STRONG, TUNING_SEED + 1000, c)["right"])) for c in settings]
        table += [{"control": c.describe(), "right": round(100 * r, 1)} for c, r in zip(settings, found, strict=True)]
        print(table[-len(settings) :], file=sys.stderr, flush=True)
        chosen[name] = settings[max(range(len(found)), key=lambda i: (found[i], -i))]
    prompts = pair_prompts(16, n, "report")
    arms: dict[str, tuple[Control | None, float]] = {"plain": (None, STRONG), "plain at the best scale": (None, BEST)}
    arms |= {name: (control, STRONG) for name, control in chosen.items()}
    runs = {name: run(pipe, prompts, scale, REPORT_SEED + 1000, c) for name, (c, scale) in arms.items()}
    used = {name: {"cfg": s, "control": "plain" if c is None else c.describe()} for name, (c, s) in arms.items()}
    return {"model": "text2image", "pictures": n, "settings": used, "tuning": table} | _gains(runs)


def rules(n: int, n_tune: int) -> dict[str, Any]:
    """Tune plain guidance and each rule on one half of the world, report on the other."""
    pipe = attnctl.load_shapes("text2image")
    tuning = pair_prompts(13, n_tune, "tuning")
    table: list[dict[str, Any]] = []

    def right(control: Control | None, scale: float) -> float:
        marks = run(pipe, tuning, scale, TUNING_SEED, control)
        share = float(np.mean(marks["right"]))
        name = "plain" if control is None else control.describe()
        table.append({"cfg": scale, "control": name, "right": round(100 * share, 1)})
        print(f"tuning: CFG {scale:g}, {name}: {100 * share:.1f} %", file=sys.stderr, flush=True)
        return share

    chosen: dict[str, tuple[Control | None, float]] = {}
    for name, settings in ({"plain": (None,)} | RULES).items():
        tried = [(right(c, s), i, j, c, s) for i, c in enumerate(settings) for j, s in enumerate(SCALES)]
        best = max(tried, key=lambda entry: (entry[0], -entry[1], -entry[2]))
        chosen[name] = best[3], best[4]
    prompts = pair_prompts(14, n, "report")
    runs = {name: run(pipe, prompts, s, REPORT_SEED, c) for name, (c, s) in chosen.items()}
    used = {name: {"cfg": s, "control": "plain" if c is None else c.describe()} for name, (c, s) in chosen.items()}
    return {"model": "text2image", "pictures": n, "settings": used, "tuning": table} | _gains(runs)


def block(path: Path, n: int) -> dict[str, Any]:
    """Judge the control that a search for blocks has found, on prompts and seeds that it has not seen."""
    found = json.loads(path.read_text(encoding="utf-8"))
    pipe, scale, steps = attnctl.load_shapes("mmdit"), found["plan"]["guidance"], found["plan"]["steps"]
    options = {"max_sequence_length": 0, "steps": steps}
    prompts = pair_prompts(14, n, "report")
    controls = {"plain": None, "found": parse_control(found["control"])}
    runs = {name: run(pipe, prompts, scale, REPORT_SEED, c, **options) for name, c in controls.items()}
    search = {name: found[name] for name in ("control", "baseline", "images", "ranking", "refused")}
    return {"model": "mmdit", "pictures": n, "steps": steps, "cfg": scale, "search": search} | _gains(runs)


def _gains(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shares = {name: {m: round(100 * float(np.mean(r[m])), 1) for m in MARKS} for name, r in runs.items()}
    others = {name: r for name, r in runs.items() if name != "plain"}
    gains = {
        m: {name: interval(np.array(r[m]) - np.array(runs["plain"][m])) for name, r in others.items()}
        for m in ("right", "bound")
    }
    return {"shares_percent": shares, "gain_right_points": gains["right"], "gain_bound_points": gains["bound"]}


def main() -> int:
    """Run one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("rules", "strong", "block"), default="rules")
    parser.add_argument("--blocks", type=Path, default=Path("heads/blocks.json"), help="what the search has written")
    parser.add_argument("-n", type=int, default=96, help="pictures of the report")
    parser.add_argument("--tune", type=int, default=24, help="pictures of every setting tried")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result = {"part": options.part, "steps": STEPS, "versions": versions, "machine": platform.machine()}
    if options.part == "block":
        result |= block(options.blocks, options.n)
    else:
        result |= (rules if options.part == "rules" else strong)(options.n, options.tune)
    for name, shares in result["shares_percent"].items():
        gain = result["gain_right_points"].get(name)
        change = f"  {gain[0]:+.1f} [{gain[1]:+.1f}, {gain[2]:+.1f}]" if gain else ""
        print(f"{name:25}{'  '.join(f'{m} {shares[m]:5.1f} %' for m in MARKS)}{change}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
