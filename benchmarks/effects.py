"""What a method does to pictures, judged: `python benchmarks/effects.py pag > benchmarks/results/effects_pag.json`.

Settings are chosen on tuning prompts and tuning seeds; the figures come from other prompts and other seeds. Plain
classifier-free guidance competes at its own best scale. Every comparison is paired: the same prompt and the same noise
with and without the method; intervals are 95 % bootstrap intervals of the mean difference over the pairs.
The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import PAG, Guidance, SoftPAG
from attnctl.shapes.evaluate import generate, score
from attnctl.shapes.scenes import pair_prompts

STEPS = 20
TUNING_SEED, REPORT_SEED = 40_000, 500_000
PLAIN_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
MARKS = ("present", "bound", "right")


def run(pipe: Any, prompts: Sequence[str], scale: float, seed: int, control: Guidance | None) -> dict[str, Any]:
    """Generate and judge one picture a prompt; also time it and count perturbed passes."""
    began = time.perf_counter()
    with attnctl.control(pipe, control) if control is not None else nullcontext() as handle:
        images = generate(pipe, prompts, scale=scale, seed=seed, steps=STEPS)
    seconds = time.perf_counter() - began
    return score(images, prompts) | {"seconds": seconds, "passes": handle.passes if handle is not None else 0}


def interval(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean of paired differences and its bootstrap interval, in points (percent)."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(differences), (draws, len(differences)))
    low, high = np.percentile(differences[picks].mean(1), [2.5, 97.5])
    return round(100 * float(differences.mean()), 1), round(100 * float(low), 1), round(100 * float(high), 1)


def candidates() -> list[Guidance]:
    """List the settings to choose from: where to perturb, how softly, how strongly."""
    found: list[Guidance] = []
    for sites in ("mid", "up.0", "up.1", ["mid", "up.0"]):
        found += [PAG(sites=sites, scale=w) for w in (1.0, 2.0, 4.0)]
    for sites in ("up.0", "up.1"):
        found += [SoftPAG(sites=sites, scale=w, u=0.5) for w in (2.0, 4.0)]
    return found


def tune(pipe: Any, prompts: Sequence[str]) -> tuple[float, float, Guidance, list[dict[str, Any]]]:
    """Choose plain's scale, then the method's scale and setting, by pictures that are right."""
    table: list[dict[str, Any]] = []

    def measure(scale: float, control: Guidance | None) -> float:
        marks = run(pipe, prompts, scale, TUNING_SEED, control)
        share = float(np.mean(marks["right"]))
        name = control.describe() if control is not None else "plain"
        table.append({"cfg": scale, "control": name, **{m: round(100 * float(np.mean(marks[m])), 1) for m in MARKS}})
        return share

    plain = {s: measure(s, None) for s in tqdm(PLAIN_SCALES, desc="plain", disable=None)}
    best_plain = max(plain, key=plain.__getitem__)
    first = {c: measure(best_plain, c) for c in tqdm(candidates(), desc="method", disable=None)}
    leaders = sorted(first, key=first.__getitem__, reverse=True)[:3]
    # The method may want another CFG scale than plain guidance: try its leaders at the neighbours too.
    index = PLAIN_SCALES.index(best_plain)
    neighbours = [s for s in PLAIN_SCALES[max(index - 2, 0) : index + 2] if s != best_plain]
    second = {(best_plain, c): first[c] for c in leaders}
    for s in neighbours:
        second |= {(s, c): measure(s, c) for c in tqdm(leaders, desc=f"method at CFG {s:g}", disable=None)}
    scale, control = max(second, key=second.__getitem__)
    return best_plain, scale, control, table


def report_pag(n: int, n_tune: int) -> dict[str, Any]:
    """Tune on one half of the world, report on the other."""
    pipe = attnctl.load_shapes("text2image")
    plain_scale, scale, control, table = tune(pipe, pair_prompts(11, n_tune, "tuning"))
    prompts = pair_prompts(12, n, "report")
    thirds = type(control)(**{f: getattr(control, f) for f in control.__dataclass_fields__} | {"every": 3})
    runs = {
        "plain": run(pipe, prompts, plain_scale, REPORT_SEED, None),
        "method": run(pipe, prompts, scale, REPORT_SEED, control),
        "method, every=3": run(pipe, prompts, scale, REPORT_SEED, thirds),
    }
    if scale != plain_scale:
        runs["plain at the method's CFG"] = run(pipe, prompts, scale, REPORT_SEED, None)
    shares = {name: {m: round(100 * float(np.mean(r[m])), 1) for m in MARKS} for name, r in runs.items()}
    plain = np.array(runs["plain"]["right"])
    gains = {name: interval(np.array(r["right"]) - plain) for name, r in runs.items() if name not in ("plain",)}
    gain, gain3 = gains["method"][0], gains["method, every=3"][0]
    return {
        "plain_cfg": plain_scale,
        "method_cfg": scale,
        "method": control.describe(),
        "pictures": n,
        "shares_percent": shares,
        "gain_right_points": gains,
        "every3_keeps": round(gain3 / gain, 3) if gain else None,
        "perturbed_passes": {name: r["passes"] for name, r in runs.items()},
        "seconds": {name: round(r["seconds"], 1) for name, r in runs.items()},
        "tuning": table,
    }


def main() -> int:
    """Run one study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("pag",))
    parser.add_argument("-n", type=int, default=512, help="pictures of the report")
    parser.add_argument("--tune", type=int, default=128, help="pictures of every setting tried")
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result = {"study": options.study, "steps": STEPS, "versions": versions, "machine": platform.machine()}
    result |= report_pag(options.n, options.tune)
    print(f"two objects, {result['pictures']} pictures, {STEPS} steps; {result['method']}", file=sys.stderr)
    for name, shares in result["shares_percent"].items():
        gain = result["gain_right_points"].get(name)
        change = f"  {gain[0]:+.1f} [{gain[1]:+.1f}, {gain[2]:+.1f}]" if gain else ""
        figures = "  ".join(f"{m} {shares[m]:5.1f} %" for m in MARKS)
        print(f"{name:28}{figures}{change}", file=sys.stderr)
    print(f"every=3 keeps {result['every3_keeps']} of the gain", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
