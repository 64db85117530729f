"""What controls do to the shipped video transformer, judged, without classifier-free guidance and with it.

    python benchmarks/videodit_effects.py --work runs/videodit > benchmarks/results/effects_videodit.json

PAG, SoftPAG, SEG and SLG (which is STG on a transformer of videos) perturb attention over all frames; EnhanceAVideo
strengthens what frames share. Settings are chosen on tuning prompts and seeds, the figures come from others; every
comparison is paired (same prompt, same noise); intervals are 95 % bootstrap intervals. *right*: object, background,
direction and speed as asked for; *bound*: the object has its colour in 90 % of the frames. Flow and warp error are
ratios to the plain videos' means. What `--work` holds already is not run again. The table goes to stderr, the JSON to
stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from judged import interval, kept

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import PAG, SEG, SLG, Control, EnhanceAVideo, SoftPAG
from attnctl.shapes.motion import clip_prompts
from attnctl.shapes.training.evaluate_video import generate_clips, mark

TUNING_SEED, REPORT_SEED = 81_000, 810_000
REGIMES = {"without": 1.0, "with": 2.0}  # classifier-free guidance
STEPS = 10
WHOLE = {"start": 0.0, "stop": 1.0}
# Depths of self-attention: block n is at depth 2 n, its cross-attention at 2 n + 1.
SETTINGS: dict[str, tuple[Control, ...]] = {
    "PAG": tuple(PAG(sites=s, scale=1.0) for s in (4, 6, 8)),
    "SoftPAG": tuple(SoftPAG(sites=s, scale=w) for s, w in ((6, 1.0), (6, 2.0), (8, 2.0))),
    "SEG": tuple(SEG(sites=s, scale=1.0) for s in (6, 8)),
    "SLG": tuple(SLG(sites=s, scale=1.0, **WHOLE) for s in (4, 6, 8)),
    "EnhanceAVideo": tuple(EnhanceAVideo(weight=w) for w in (1.0, 4.0)),
}
MARKS = ("right", "bound", "direction")


def marks_of(pipe: Any, prompts: Sequence[str], cfg: float, seed: int, control: Control | None) -> dict[str, Any]:
    """Make and judge one video per prompt."""
    began = time.perf_counter()
    with contextlib.nullcontext() if control is None else attnctl.control(pipe, control):
        videos = generate_clips(pipe, prompts, scale=cfg, seed=seed, steps=STEPS)
    rows = mark(videos, list(prompts))
    return {
        "right": [float(r["right"]) for r in rows],
        "bound": [float(r["bound"] >= 0.9) for r in rows],
        "direction": [float(r["direction"]) for r in rows],
        "motion": [float(r["motion_mean"]) for r in rows],
        "warp": [float(r["warp_error"]) for r in rows],
        "seconds": time.perf_counter() - began,
    }


class Study:
    """The shipped model, and a folder in which every finished run is kept."""

    def __init__(self, work: Path, n_tune: int, n: int) -> None:
        self.pipe = attnctl.load_shapes("videodit")
        self.work, self.n_tune, self.n = work, n_tune, n
        self.tuning: list[dict[str, Any]] = []

    def arm(self, kind: str, prompts: Sequence[str], seed: int, cfg: float, control: Control | None) -> dict[str, Any]:
        """Judge one setting, or read what was judged before."""
        name = "plain" if control is None else control.describe()
        label = f"{kind} CFG {cfg:g} {name} {len(prompts)}"
        marks: dict[str, Any] = kept(self.work, label, lambda: marks_of(self.pipe, prompts, cfg, seed, control))
        print(label, {m: round(100 * float(np.mean(marks[m])), 1) for m in MARKS}, file=sys.stderr, flush=True)
        return marks

    def best(self, cfg: float, controls: Sequence[Control]) -> Control:
        """Choose a setting by right videos of the tuning prompts, then by bound ones; the earlier one on a tie."""
        prompts, found = clip_prompts(41, self.n_tune), []
        for control in controls:
            marks = self.arm("tune", prompts, TUNING_SEED, cfg, control)
            found.append((float(np.mean(marks["right"])), float(np.mean(marks["bound"]))))
            self.tuning.append({"cfg": cfg, "control": control.describe(), "right": round(100 * found[-1][0], 1)})
        return controls[max(range(len(controls)), key=lambda i: (*found[i], -i))]

    def regime(self, cfg: float) -> dict[str, Any]:
        """Compare each method's best setting with plain videos."""
        chosen = {name: self.best(cfg, controls) for name, controls in SETTINGS.items()}
        prompts, arms = clip_prompts(42, self.n), {"plain": None} | chosen
        runs = {name: self.arm("report", prompts, REPORT_SEED, cfg, control) for name, control in arms.items()}
        plain = runs["plain"]

        def gain(name: str, key: str) -> tuple[float, float, float]:
            return interval(np.array(runs[name][key]) - np.array(plain[key]))

        return {
            "cfg": cfg,
            "settings": {name: control.describe() for name, control in chosen.items()},
            "shares_percent": {n: {m: round(100 * float(np.mean(r[m])), 1) for m in MARKS} for n, r in runs.items()},
            "gain_right_points": {name: gain(name, "right") for name in chosen},
            "gain_bound_points": {name: gain(name, "bound") for name in chosen},
            "motion_ratio": {n: _ratio(runs[n]["motion"], plain["motion"]) for n in chosen},
            "warp_ratio": {n: _ratio(runs[n]["warp"], plain["warp"]) for n in chosen},
            "seconds": {name: round(r["seconds"], 1) for name, r in runs.items()},
        }


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return round(float(np.nanmean(a) / np.nanmean(b)), 3)


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for what is done (default: one that is removed)")
    parser.add_argument("-n", type=int, default=64, help="videos of the report")
    parser.add_argument("--tune", type=int, default=16, help="videos of every setting tried")
    parser.add_argument("--parts", nargs="+", choices=tuple(REGIMES), default=list(REGIMES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        it = Study(options.work or Path(folder), options.tune, options.n)
        result = {"model": "videodit", "videos": options.n, "steps": STEPS}
        result |= {name: it.regime(cfg) for name, cfg in REGIMES.items() if name in options.parts}
    result |= {"tuning": {"videos": options.tune, "table": it.tuning}}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    for regime in options.parts:
        for name, shares in result[regime]["shares_percent"].items():
            found = result[regime]["gain_right_points"].get(name)
            change = f"  {found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]" if found else ""
            figures = "  ".join(f"{m} {shares[m]:5.1f} %" for m in MARKS)
            print(f"{regime:8}{name:14}{figures}{change}", file=sys.stderr)
    print(json.dumps(result | {"versions": versions, "machine": platform.machine()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
