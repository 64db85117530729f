"""What a method does to pictures, judged: `python benchmarks/effects.py pag > benchmarks/results/effects_pag.json`.

`--model mmdit` asks the same of the shipped joint-attention model.

Settings are chosen on tuning prompts and tuning seeds; the figures come from other prompts and other seeds. Plain
classifier-free guidance competes at its own best scale. Every comparison is paired: the same prompt and the same noise
with and without the method; intervals are 95 % bootstrap intervals of the mean difference over the pairs.
The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from judged import MARKS, STEPS, interval, run
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import PAG, Guidance, SoftPAG
from attnctl.shapes.scenes import pair_prompts

TUNING_SEED, REPORT_SEED = 40_000, 500_000
PLAIN_SCALES = {"text2image": (1.5, 2.0, 3.0, 4.0, 6.0), "mmdit": (2.0, 3.0, 4.0, 6.0)}
PLACES: dict[str, tuple[Any, ...]] = {
    "text2image": ("down.0", "down.1", "mid", "up.0", "up.1", ("up.0", "up.1"), "self"),
    "mmdit": (4, 5, 6),  # the second half of its eight blocks; each place costs a minute
}
OPTIONS: dict[str, dict[str, Any]] = {
    "text2image": {},
    "mmdit": {"max_sequence_length": 0},
}  # no padding: twice as fast


def tune(pipe: Any, model: str, prompts: Sequence[str]) -> tuple[float, float, Guidance, list[dict[str, Any]]]:
    """Choose plain's scale, then place, weight, softness and CFG scale of the method, by pictures that are right."""
    table: list[dict[str, Any]] = []
    tried: dict[tuple[float, Guidance | None], float] = {}

    def measure(scale: float, controls: Sequence[Guidance | None], label: str) -> None:
        for control in tqdm([c for c in controls if (scale, c) not in tried], desc=label, disable=None):
            marks = run(pipe, prompts, scale, TUNING_SEED, control, **OPTIONS[model])
            tried[scale, control] = float(np.mean(marks["right"]))
            name = control.describe() if control is not None else "plain"
            shares = {m: round(100 * float(np.mean(marks[m])), 1) for m in MARKS}
            table.append({"cfg": scale, "control": name, **shares})
            tqdm.write(f"CFG {scale:g}, {name}: {shares}", file=sys.stderr)

    def best(n: int) -> list[tuple[float, Guidance]]:
        found = [(share, key) for key, share in tried.items() if key[1] is not None]
        return [key for _, key in sorted(found, key=lambda item: item[0], reverse=True)[:n]]  # type: ignore[misc]

    scales = PLAIN_SCALES[model]
    for scale in scales:
        measure(scale, [None], f"plain at CFG {scale:g}")
    plain_scale = max(scales, key=lambda s: tried[s, None])
    measure(plain_scale, [PAG(sites=p, scale=w) for p in PLACES[model] for w in (2.5,)], "places")
    for _, control in best(2 if model == "text2image" else 1):
        where = control.sites
        softer = [SoftPAG(sites=where, scale=control.scale, target=t) for t in ("identity", "query_mean", "uniform")]
        measure(plain_scale, [PAG(sites=where, scale=w) for w in (1.0, 5.0)] + softer, "weights and targets")
    # The method may want another CFG scale than plain guidance.
    index = scales.index(plain_scale)
    for scale in {scales[max(index - 1, 0)], scales[min(index + 1, len(scales) - 1)]} - {plain_scale}:
        measure(scale, [c for _, c in best(2 if model == "text2image" else 1)], f"method at CFG {scale:g}")
    scale, control = best(1)[0]
    return plain_scale, scale, control, table


def report_pag(model: str, n: int, n_tune: int) -> dict[str, Any]:
    """Tune on one half of the world, report on the other."""
    pipe, options = attnctl.load_shapes(model), OPTIONS[model]
    plain_scale, scale, control, table = tune(pipe, model, pair_prompts(11, n_tune, "tuning"))
    prompts = pair_prompts(12, n, "report")
    thirds = dataclasses.replace(control, every=3)
    runs = {
        "plain": run(pipe, prompts, plain_scale, REPORT_SEED, None, **options),
        "method": run(pipe, prompts, scale, REPORT_SEED, control, **options),
        "method, every=3": run(pipe, prompts, scale, REPORT_SEED, thirds, **options),
    }
    if scale != plain_scale:
        runs["plain at the method's CFG"] = run(pipe, prompts, scale, REPORT_SEED, None, **options)
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
    parser.add_argument("--model", choices=tuple(PLACES), default="text2image")
    parser.add_argument("-n", type=int, default=512, help="pictures of the report")
    parser.add_argument("--tune", type=int, default=64, help="pictures of every setting tried")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result = {
        "study": options.study,
        "model": options.model,
        "steps": STEPS,
        "versions": versions,
        "machine": platform.machine(),
    }
    result |= report_pag(options.model, options.n, options.tune)
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
