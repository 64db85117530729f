"""What perturbed guidance does on the shipped mmdit without classifier-free guidance, and with it, judged.

    python benchmarks/no_guidance.py --work runs/no_guidance > benchmarks/results/no_guidance.json

PAG's paper makes its claim without classifier-free guidance; here PAG, SoftPAG, SEG, SLG and a set of heads that
HeadHunter's search finds in that regime are compared with plain pictures there, and then with plain classifier-free
guidance at its own best scale (which `effects.py pag --model mmdit` has found). Settings are chosen on tuning prompts
and seeds, the figures come from others; every comparison is paired (same prompt, same noise); intervals are 95 %
bootstrap intervals. `--others` asks the same of TPG and AutoGuidance, without classifier-free guidance. *shape* is the
judge's overlap (IoU) of an object with the ideal one, over pairs in which both pictures show one. What `--work` holds
already is not run again. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from judged import MARKS, interval, kept, run

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.pipelines import HuntPlan, hunt
from attnctl.pipelines.hunting.scorers import ShapesJudge
from attnctl.processors import PAG, SEG, SLG, TPG, AutoGuidance, Guidance, SoftPAG
from attnctl.shapes.scenes import pair_prompts

SEARCH_SEED, TUNING_SEED, REPORT_SEED = 72_000, 71_000, 710_000
OPTIONS = {"max_sequence_length": 0}  # no padding: twice as fast
WITHOUT, WITH = 1.0, 3.0
WHOLE = {"start": 0.0, "stop": 1.0}
STEPS = 10
K, U, WEIGHT = 6, 0.5, 2.0
SETTINGS: dict[str, tuple[Guidance, ...]] = {
    "PAG": tuple(PAG(sites=s, scale=1.0) for s in (4, 5, 6)),
    "SoftPAG": tuple(SoftPAG(sites=s, scale=w) for s, w in ((5, 2.0), (6, 1.5), (6, 2.0))),
    "SEG": tuple(SEG(sites=s, scale=1.0) for s in (5, 6)),
    "SLG": tuple(SLG(sites=s, scale=1.0, **WHOLE) for s in (4, 5, 6)),
}
OTHERS: dict[str, tuple[Guidance, ...]] = {
    "TPG": tuple(TPG(sites=s, scale=w) for s, w in ((4, 1.0), (6, 1.0), (6, 2.0))),
    "AutoGuidance": tuple(AutoGuidance(dropout=p, scale=w) for p, w in ((0.1, 1.0), (0.2, 1.0), (0.1, 2.0))),
}
AGAIN = 2  # settings of each method that are tried with classifier-free guidance too, the best without it


class Study:
    """The shipped model, and a folder in which every finished run is kept."""

    def __init__(self, work: Path, n_tune: int, n: int, pairs: int) -> None:
        self.pipe = attnctl.load_shapes("mmdit")
        self.work, self.n_tune, self.n, self.pairs = work, n_tune, n, pairs
        self.tuning: list[dict[str, Any]] = []

    def arm(self, kind: str, prompts: Sequence[str], seed: int, cfg: float, control: Guidance | None) -> dict[str, Any]:
        """Judge one setting, or read what was judged before."""
        name = "plain" if control is None else control.describe()
        label = f"{kind} CFG {cfg:g} {name} {len(prompts)}"
        marks: dict[str, Any] = kept(
            self.work, label, lambda: run(self.pipe, prompts, cfg, seed, control, steps=STEPS, **OPTIONS)
        )
        print(label, {m: round(100 * float(np.mean(marks[m])), 1) for m in MARKS}, file=sys.stderr, flush=True)
        return marks

    def best(self, cfg: float, controls: Sequence[Guidance], n: int = 1) -> list[Guidance]:
        """Choose settings by right pictures of the tuning prompts; the earlier one where they tie."""
        prompts = pair_prompts(51, self.n_tune, "tuning")
        rights = [float(np.mean(self.arm("tune", prompts, TUNING_SEED, cfg, c)["right"])) for c in controls]
        for control, right in zip(controls, rights, strict=True):
            self.tuning.append({"cfg": cfg, "control": control.describe(), "right": round(100 * right, 1)})
        order = sorted(range(len(controls)), key=lambda i: (-rights[i], i))
        return [controls[i] for i in order[:n]]

    def heads(self) -> list[tuple[str, int]]:
        """Search for heads in groups, without classifier-free guidance; list them all, the best first."""
        texts = pair_prompts(53, self.pairs, "tuning")
        plan = HuntPlan(
            pairs=tuple((text, SEARCH_SEED + i) for i, text in enumerate(texts)),
            k=2 * K, u=U, scale=WEIGHT, steps=STEPS, guidance=0.0, call=OPTIONS, batch=16, group=12, repeats=2,
            baseline=False,
        )  # fmt: skip
        found = kept(
            self.work,
            f"search {self.pairs}",
            lambda: hunt(self.pipe, plan, ShapesJudge(), log=self.work / "hunt", model="shapes:mmdit").to_dict(),
        )
        self.images = found["images"]
        return [(site, head) for site, head in found["rounds"][0]["chosen"]]

    def report(self, cfg: float, chosen: dict[str, Guidance]) -> dict[str, dict[str, Any]]:
        """Judge plain pictures and those of each method on prompts and seeds that nothing was chosen on."""
        prompts, arms = pair_prompts(52, self.n, "report"), {"plain": None} | chosen
        return {name: self.arm("report", prompts, REPORT_SEED, cfg, control) for name, control in arms.items()}

    def regime(self, cfg: float, chosen: dict[str, Guidance]) -> dict[str, Any]:
        """Compare the methods with plain pictures of one regime, and the set of heads with the best layer."""
        runs = self.report(cfg, chosen)
        return {
            "cfg": cfg,
            "settings": {name: control.describe() for name, control in chosen.items()},
            "shares_percent": {n: {m: round(100 * float(np.mean(r[m])), 1) for m in MARKS} for n, r in runs.items()},
            "shape_percent": {n: round(100 * float(np.mean([v for v in r["iou"] if v])), 1) for n, r in runs.items()},
            "gain_right_points": {name: gain(runs[name], runs["plain"], "right") for name in chosen},
            "gain_shape_points": {name: gain(runs[name], runs["plain"], "iou") for name in chosen},
            "gain_over_layer_points": {n: gain(runs[n], runs["SoftPAG"], "right") for n in chosen if n == "HeadHunter"},
            "seconds": {name: round(r["seconds"], 1) for name, r in runs.items()},
        }


def gain(a: dict[str, Any], b: dict[str, Any], mark: str) -> tuple[float, float, float]:
    """Return how far `a` is above `b`, with its interval; of shapes, over the pairs in which both show one."""
    first, second = np.array(a[mark]), np.array(b[mark])
    both = (first > 0) & (second > 0) if mark == "iou" else np.ones(len(first), bool)
    return interval(first[both] - second[both])


def others(work: Path, n_tune: int, n: int) -> dict[str, Any]:
    """Tune and report the guidances of `OTHERS` without classifier-free guidance."""
    it = Study(work, n_tune, n, 0)
    chosen = {name: it.best(WITHOUT, controls)[0] for name, controls in OTHERS.items()}
    without = it.regime(WITHOUT, chosen)
    tuning = {"pictures": n_tune, "table": it.tuning}
    return {"model": "mmdit", "pictures": n, "steps": STEPS, "without": without, "tuning": tuning}


def study(work: Path, n_tune: int, n: int, pairs: int, parts: Sequence[str]) -> dict[str, Any]:
    """Tune and report without classifier-free guidance, then with it."""
    it = Study(work, n_tune, n, pairs)
    result: dict[str, Any] = {"model": "mmdit", "pictures": n, "steps": STEPS}
    ranked = {name: it.best(WITHOUT, controls, AGAIN) for name, controls in SETTINGS.items()}
    it.report(WITHOUT, {name: found[0] for name, found in ranked.items()})
    if "heads" in parts:
        heads = it.heads()
        sets = [SoftPAG(heads=tuple(heads[:k]), u=u, scale=WEIGHT) for k in (K, 2 * K) for u in (U, 1.0)]
        ranked["HeadHunter"] = it.best(WITHOUT, sets, AGAIN)
        result["heads"] = {"images": it.images, "pairs": pairs, "best_first": heads}
    result["without"] = it.regime(WITHOUT, {name: found[0] for name, found in ranked.items()})
    if "with" in parts:
        result["with"] = it.regime(WITH, {name: it.best(WITH, found)[0] for name, found in ranked.items()})
    return result | {"tuning": {"pictures": n_tune, "table": it.tuning}}


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for what is done (default: one that is removed)")
    parser.add_argument("-n", type=int, default=192, help="pictures of the report")
    parser.add_argument("--tune", type=int, default=24, help="pictures of every setting tried")
    parser.add_argument("--pairs", type=int, default=40, help="prompt-seed pairs of the search for heads")
    told = "more than PAG, SoftPAG, SEG and SLG without classifier-free guidance"
    parser.add_argument("--parts", nargs="*", choices=("heads", "with"), default=("heads", "with"), help=told)
    parser.add_argument("--others", action="store_true", help="instead: TPG and AutoGuidance, without it")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        if options.others:
            result = others(work, options.tune, options.n)
        else:
            result = study(work, options.tune, options.n, options.pairs, options.parts)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    for regime in (name for name in ("without", "with") if name in result):
        for name, shares in result[regime]["shares_percent"].items():
            found = result[regime]["gain_right_points"].get(name)
            change = f"  {found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]" if found else ""
            figures = "  ".join(f"{m} {shares[m]:5.1f} %" for m in MARKS)
            shape = result[regime]["shape_percent"][name]
            print(f"{regime:8}{name:12}{figures}  shape {shape:5.1f} %{change}", file=sys.stderr)
    print(json.dumps(result | {"versions": versions, "machine": platform.machine()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
