"""Searching the shipped mmdit for heads, in full and on the cheap: `python benchmarks/hunt.py --work runs/hunt`.

Five parts, each resumable (`--part search`, `tune`, `report`, `pictures`, `savings`; all by default); at the end the
run prints the JSON of the parts asked for on stdout; tables go to stderr.

- search: every head of the model on M prompt-seed pairs (the published search at this size); the halved search:
  first-step pruning, half the pairs, successive halving; the affordable search: groups of twelve heads, dealt out twice
  for each pair, at the strength at which sets are used. Each with its own pictures.
- tune: how many of the found heads, at which u, and the u of the best single layer, on tuning prompts. Which layer that
  is, and plain guidance's best scale, `effects.py pag --model mmdit` has found.
- report: plain, the best single layer, and the found sets on other prompts and other seeds, paired.
- pictures: the first prompts of the report, side by side.
- savings: what each saving alone does to the number of pictures and to the choice, from the marks of the full search;
  and time and FLOPs of batching and replay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from judged import interval
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.data.pictures import grid
from attnctl.pipelines import Hunted, HuntPlan, hunt
from attnctl.pipelines.hunting.scorers import ShapesJudge
from attnctl.pipelines.hunting.work import draw
from attnctl.processors import Control, SoftPAG
from attnctl.shapes.scenes import pair_prompts
from attnctl.shapes.training.evaluate import generate, score

STEPS, CFG, U, WEIGHT, K = 8, 3.0, 0.5, 2.5, 6
GROUP = 12
SEARCH_U = 1.0  # one head of 48 at half strength changes too little to be told from chance
SEARCH_SEED, TUNING_SEED, REPORT_SEED = 60_000, 70_000, 800_000
PARTS = ("search", "tune", "report", "pictures", "savings")
OPTIONS = {"max_sequence_length": 0}  # no padding: twice as fast


def plans(pairs: int) -> dict[str, HuntPlan]:
    """Return the searches."""
    texts = pair_prompts(21, pairs, "tuning")
    seeds = tuple((text, SEARCH_SEED + i) for i, text in enumerate(texts))
    common: dict[str, Any] = {
        "k": K, "u": SEARCH_U, "scale": WEIGHT, "steps": STEPS, "guidance": CFG, "call": OPTIONS, "batch": 16,
    }  # fmt: skip
    half = pairs // 2
    cheap = {"prune": 1 / 3, "halving": ((half // 4, 16), (half // 2, 10))}
    return {
        "full": HuntPlan(pairs=seeds, **common),
        "halved": HuntPlan(pairs=seeds[:half], **common, **cheap, baseline=False),
        "affordable": HuntPlan(pairs=seeds, **common | {"u": U}, group=GROUP, repeats=2, baseline=False),
    }


class Bench:
    """The parts, and the folder where what is done is kept."""

    def __init__(self, work: Path, pairs: int, tune: int, report: int) -> None:
        self.pipe = attnctl.load_shapes("mmdit")
        self.work, self.plans, self.n_tune, self.n_report = work, plans(pairs), tune, report
        work.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a result from the folder, or make and keep it."""
        path = self.work / f"{name}.json"
        if not path.exists():
            value = make()
            path.write_text(json.dumps(value, indent=1), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def search(self) -> dict[str, Any]:
        """Run the searches; times add up over interruptions."""
        found = {}
        for name, plan in self.plans.items():
            found[name] = self.kept(f"search_{name}", lambda name=name, plan=plan: self._hunt(name, plan))
            spent, scores = found[name]["cpu_seconds"], found[name]["rounds"][0]["scores"]
            best = sorted(scores, key=lambda s: -s[2])[:K]
            print(f"{name}: {found[name]['images']} images, {spent} s CPU; {best}", file=sys.stderr)
        return found

    def _hunt(self, name: str, plan: HuntPlan) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        result: Hunted = hunt(self.pipe, plan, ShapesJudge(), log=self.work / f"log_{name}", model="shapes:mmdit")
        spent = {
            "wall_seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
            "cpu_seconds_per_image": round((time.process_time() - cpu) / max(1, result.generated), 3),
        }  # fmt: skip
        result.heat_map().save(self.work / f"heat_map_{name}.png")
        return result.to_dict() | spent

    def arm(self, label: str, prompts: Sequence[str], seed: int, control: Control | None, cfg: float = CFG) -> Any:
        """Judge one setting on prompts."""
        name = f"arm_{label}_{len(prompts)}"

        def make() -> dict[str, Any]:
            began = time.process_time()
            with attnctl.control(self.pipe, control) if control is not None else contextlib.nullcontext():
                images = generate(self.pipe, prompts, scale=cfg, seed=seed, steps=STEPS, **OPTIONS)
            spent = round(time.process_time() - began, 1)
            return score(images, prompts) | {"cpu_seconds": spent}

        marks = self.kept(name, make)
        shares = {m: round(100 * float(np.mean(marks[m])), 1) for m in ("present", "bound", "right")}
        print(f"{label}: {shares}", file=sys.stderr)
        return marks

    def sets(self) -> dict[str, list[tuple[str, int]]]:
        """Return the chosen heads of each search, the best first."""
        return {name: [(site, h) for site, h in found["rounds"][0]["chosen"]] for name, found in self.search().items()}

    def tune(self) -> dict[str, Any]:
        """Choose how each competitor does best, by the share of right pictures."""
        prompts = pair_prompts(22, self.n_tune, "tuning")
        tried: dict[str, dict[str, Any]] = {"plain": {}, "layer": {}}
        tried["plain"][f"plain_cfg{CFG:g}"] = (None, CFG)
        for u in (0.25, U, 1.0):
            tried["layer"][f"layer6_u{u:g}"] = (SoftPAG(sites=6, u=u, scale=WEIGHT), CFG)
        sets = self.sets()
        sizes = [*((K, u) for u in (0.25, U, 1.0)), (3, U), (3, 1.0)]
        for name, heads in sets.items():
            tried[name] = {f"{name}_k{k}_u{u:g}": (SoftPAG(heads=heads[:k], u=u, scale=WEIGHT), CFG) for k, u in sizes}
        table, best = [], {}
        for kind, settings in tried.items():
            rights = {}
            for label, (control, cfg) in settings.items():
                marks = self.arm(f"tune_{label}", prompts, TUNING_SEED, control, cfg)
                rights[label] = float(np.mean(marks["right"]))
                told = "plain" if control is None else control.describe()
                table.append(
                    {"kind": kind, "label": label, "cfg": cfg, "control": told, "right": round(100 * rights[label], 1)}
                )
            label = max(rights, key=lambda name: rights[name])
            best[kind] = (label, *settings[label])
        self.best = best
        return {"pictures": self.n_tune, "table": table, "best": {kind: b[0] for kind, b in best.items()}}

    def report(self) -> dict[str, Any]:
        """Compare them on prompts and seeds that nothing was chosen on."""
        self.tune()
        prompts = pair_prompts(23, self.n_report, "report")
        runs = {
            kind: self.arm(f"report_{label}", prompts, REPORT_SEED, control, cfg)
            for kind, (label, control, cfg) in self.best.items()
        }
        right = {kind: np.array(marks["right"]) for kind, marks in runs.items()}

        def against(a: str, b: str) -> tuple[float, float, float]:
            return interval(right[a] - right[b])

        gains = {kind: against(kind, "plain") for kind in runs if kind != "plain"}
        full = gains["full"][0]
        return {
            "pictures": self.n_report, "settings": {kind: b[0] for kind, b in self.best.items()},
            "right_percent": {kind: round(100 * float(r.mean()), 1) for kind, r in right.items()},
            "gain_over_plain_points": gains,
            "over_layer_points": {kind: against(kind, "layer") for kind in self.plans},
            "keeps": {kind: round(gains[kind][0] / full, 3) if full else None for kind in ("halved", "affordable")},
            "cpu_seconds": {kind: marks["cpu_seconds"] for kind, marks in runs.items()},
        }  # fmt: skip

    def pictures(self) -> dict[str, Any]:
        """Draw the first six report prompts in every way, with the judge's frames, into the folder."""
        self.tune()
        prompts = pair_prompts(23, self.n_report, "report")[:6]
        tiles, frames = [], []
        for _, control, cfg in self.best.values():
            with attnctl.control(self.pipe, control) if control is not None else contextlib.nullcontext():
                images = generate(self.pipe, prompts, scale=cfg, seed=REPORT_SEED, steps=STEPS, **OPTIONS)
            tiles += [Image.fromarray(image) for image in images]
            right = score(images, prompts)["right"]
            frames += [(40, 160, 60) if ok else (210, 40, 40) for ok in right]
        names = {
            "plain": "plain",
            "layer": "best layer",
            "full": "full search",
            "halved": "halved search",
            "affordable": "groups",
        }
        labels = [f"{names[kind]}: {b[0]}" for kind, b in self.best.items()]
        note = (
            "The first prompts of the report, not chosen. Green: the judge finds both objects right and nothing else."
        )
        grid(tiles, len(labels), len(prompts), labels, prompts, footer=note, frames=frames, tile=128).save(
            self.work / "pictures.png"
        )
        return {"prompts": prompts, "file": "pictures.png"}

    def savings(self) -> dict[str, Any]:
        """Say what each saving does on its own."""
        found = self.search()["full"]
        plan, pool = self.plans["full"], [(site, h) for site, h in found["pool"]]
        marks = _marks(self.work / "log_full")
        change = {(s, h): v for s, h, v in self.search()["halved"]["change"]}
        mean = {h: float(np.mean(marks[h])) for h in pool}
        chosen = {(s, h) for s, h in found["rounds"][0]["chosen"]}
        base, m = found["baseline"], len(plan.pairs)

        def told(name: str, images: int, picked: Sequence[tuple[str, int]]) -> dict[str, Any]:
            gain = float(np.mean([mean[h] for h in picked]) - base)
            whole = float(np.mean([mean[h] for h in chosen]) - base)
            kept = round(gain / whole, 3) if whole else None
            return {"saving": name, "images": images, "same_heads": len(chosen & set(picked)), "gain_kept": kept}

        def best(heads: Sequence[tuple[str, int]], n: int) -> list[tuple[str, int]]:
            return sorted(heads, key=lambda h: (-float(np.mean(marks[h][:n])), pool.index(h)))

        rows = [told("none (published)", m * len(pool), best(pool, m)[:K])]
        strong = sorted(pool, key=lambda h: -change[h])
        for share in (1 / 3, 1 / 2):
            kept = strong[: len(pool) - int(share * len(pool))]
            rows.append(told(f"first-step pruning, {share:.0%} dropped", m * len(kept), best(kept, m)[:K]))
        for n in (m // 2, m // 4):
            rows.append(told(f"{n} pairs", n * len(pool), best(pool, n)[:K]))
        left, images, seen = list(pool), 0, 0
        for upto, keep in ((m // 4, 24), (m // 2, 12), (m, K)):
            images, seen = images + len(left) * (upto - seen), upto
            left = best(left, upto)[:keep]
        rows.append(told("successive halving", images, left))
        upper = [h for h in pool if int(h[0].split(".")[1]) >= 4]
        rows.append(told("pool: the upper four layers", m * len(upper), best(upper, m)[:K]))
        for row in rows:
            print(row, file=sys.stderr)
        skip = {
            "images, 2 rounds of 3, chosen heads again": m * 2 * len(pool),
            "images, chosen heads skipped": m * (2 * len(pool) - 3),
        }
        return {"choice": rows, "skip_chosen": skip, "calls": self.kept("calls", self._calls)}

    def _calls(self) -> dict[str, Any]:
        """Time and count pictures of one layer's heads, one at a time and 16 together, with and without replay."""
        out: dict[str, Any] = {}
        texts = tuple((text, i) for i, text in enumerate(pair_prompts(24, 8, "tuning")))
        for depth in (2, 6):
            rows = [(((f"transformer_blocks.{depth}.attn", h),), i) for h in (0, 1) for i in range(8)]
            for replay in (False, True):
                plan = HuntPlan(
                    pairs=texts, k=1, u=U, scale=WEIGHT, steps=3, guidance=CFG, call=OPTIONS, batch=16, replay=replay
                )
                name = f"layer {depth}, {'replay' if replay else 'no replay'}"
                with FlopCounterMode(display=False) as flops:
                    draw(self.pipe, plan, rows[:2])
                times = {}
                for batch in (1, 16):
                    began = time.process_time()
                    for i in range(0, len(rows), batch):
                        draw(self.pipe, plan, rows[i : i + batch])
                    times[batch] = round((time.process_time() - began) / len(rows) / 3, 4)
                gflop = round(flops.get_total_flops() / 2 / 3 / 1e9, 4)
                out[name] = {"gflop_per_step": gflop, "cpu_seconds_per_step": times}
                print(name, out[name], file=sys.stderr)
        return out


def _marks(log: Path) -> dict[tuple[str, int], list[float]]:
    """Read the marks of every head alone from a search's log, in the order of the pairs."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for path in sorted(log.glob("marks-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for (heads, i), mark in zip(record.get("rows", []), record["marks"], strict=False):
                if heads:
                    found.setdefault((heads[0][0], heads[0][1]), {})[i] = mark
    return {h: [marks[i] for i in sorted(marks)] for h, marks in found.items()}


def main() -> int:
    """Run the parts asked for and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and what is done")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--pairs", type=int, default=8, help="prompt-seed pairs of the full search")
    parser.add_argument("--tune", type=int, default=24, help="pictures of every setting tried")
    parser.add_argument("-n", type=int, default=96, help="pictures of the report")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.work, options.pairs, options.tune, options.n)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result: dict[str, Any] = {
        "model": "shapes:mmdit", "steps": STEPS, "cfg": CFG, "u": U, "weight": WEIGHT, "k": K, "versions": versions,
        "machine": platform.machine(), "threads": options.threads,
    }  # fmt: skip
    for part in options.part or PARTS:
        result[part] = getattr(bench, part)()
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
