"""What A-STAR and Attend-and-Excite do to two-object pictures of the shipped models.

    python benchmarks/astar_effects.py --log runs.jsonl > benchmarks/results/astar_effects.json
    python benchmarks/astar_effects.py --model mmdit    # into astar_effects_mmdit.json

Mechanism first: does the overlap of the two nouns' maps at the last step fall, and does each noun's map keep more of
its own early map? Then the marks: both objects right. Settings are chosen on tuning prompts and seeds, the figures come
from others; every comparison is paired (same prompt, same noise). Last, layouts: one object asked for in one half.
The table goes to stderr, the JSON to stdout. Batches that `--log` holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from judged import MARKS, STEPS, interval
from tqdm import tqdm

import attnctl
from attnctl.processors import PAG, AStar, AttendExcite, Capture, Control, SoftPAG
from attnctl.processors.latent.losses import binarise, normalise, retention, segregation
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, pair_prompts, parse, single_prompts
from attnctl.shapes.training.evaluate import generate, score

TUNING_SEED, REPORT_SEED, LAYOUT_SEED = 60_000, 700_000, 800_000
BATCH = 32
EARLY = 0.25  # of the run: where a noun's own early map is taken
METHODS: dict[str, type[AStar] | type[AttendExcite]] = {"AStar": AStar, "AttendExcite": AttendExcite}
Setting = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class World:
    """What is tried on one model.

    Attributes:
        cfg: Plain guidance's best scale, as `effects.py pag` finds.
        partner: What acts together with A-STAR in the last run of the report.
        settings: Tried on the tuning prompts, method and options.
        layouts: Options of A-STAR with masks, tried on tuning prompts.
        options: Further arguments of the pipeline call.
    """

    cfg: float
    partner: Control
    settings: Sequence[Setting]
    layouts: Sequence[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def _unit(method: str, size: float, **options: Any) -> Setting:
    """Make a setting whose steps have a length: a distance in the latents, which begin with a length of about 32."""
    refined = {"thresholds": ()} if method == "AttendExcite" else {}
    return method, {"grad_transform": "l2", "step_size": size, **refined, **options}


WORLDS: dict[str, World] = {
    "text2image": World(
        cfg=1.5,
        partner=PAG(sites="mid", scale=2.5),
        settings=(
            _unit("AStar", 0.5),
            _unit("AStar", 1.5),
            _unit("AStar", 0.5, sites="up.1"),
            _unit("AStar", 1.0, stop=0.2),
            _unit("AStar", 0.5, stop=0.5, map_norm="ae"),
            _unit("AStar", 0.5, map_norm="ae"),
            _unit("AStar", 1.0, stop=0.2, seg=0.0),
            _unit("AStar", 1.0, stop=0.2, ret=0.0),
            _unit("AStar", 1.0, stop=0.2, sites="up.1"),
            _unit("AStar", 0.5, stop=0.2),
            _unit("AStar", 1.0, stop=0.1),
            _unit("AStar", 2.0, stop=0.1),
            _unit("AStar", 1.0, stop=0.1, map_norm="none"),
            _unit("AStar", 1.0, stop=0.1, sites="up.1"),
            _unit("AStar", 0.25, stop=0.5),
            _unit("AStar", 1.0, stop=0.2, map_norm="none"),
            _unit("AttendExcite", 0.25),
            _unit("AttendExcite", 0.5),
            _unit("AttendExcite", 1.0),
            _unit("AttendExcite", 0.5, stop=0.2),
        ),
        layouts=({"grad_transform": "l2", "step_size": 1.0}, {"grad_transform": "l2", "step_size": 2.0, "stop": 0.5}),
    ),
    "mmdit": World(
        cfg=3.0,
        partner=SoftPAG(sites=6, scale=2.5),
        settings=(
            _unit("AStar", 1.0, stop=0.1),
            _unit("AStar", 1.0, stop=0.2),
            _unit("AStar", 0.5, stop=0.5),
            _unit("AttendExcite", 0.5),
            _unit("AttendExcite", 1.0),
        ),
        layouts=({"grad_transform": "l2", "step_size": 1.0}, {"grad_transform": "l2", "step_size": 2.0, "stop": 0.5}),
        options={"max_sequence_length": 0},  # no padding: twice as fast
    ),
}


# What the loss does to the maps, whatever that does to the pictures.
EVERY_STEP = _unit("AStar", 0.5)


class Study:
    """Runs batches of one model, each once."""

    def __init__(self, model: str, log: Path | None) -> None:
        self.model, self.world, self.log = model, WORLDS[model], log
        self.pipe: Any = attnctl.load_shapes(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.done: dict[str, Any] = {}
        if log is not None and log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.done[row["key"]] = row["marks"]

    def once(self, key: Sequence[Any], run: Any) -> dict[str, list[float]]:
        """Return what one batch has given, from the log where it is there."""
        name = json.dumps([self.model, *key])
        if name not in self.done:
            self.done[name] = run()
            if self.log is not None:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": name, "marks": self.done[name]}) + "\n")
        return dict(self.done[name])

    def images(self, prompts: Sequence[str], seed: int) -> list[np.ndarray]:
        """Make one picture a prompt."""
        world = self.world
        return generate(
            self.pipe, prompts, scale=world.cfg, seed=seed, steps=STEPS, batch=len(prompts), **world.options
        )

    def pictures(self, prompts: Sequence[str], seed: int, setting: Setting | None, partner: bool = False) -> Any:
        """Generate and judge a picture a prompt, and measure the nouns' maps while at it."""
        marks: dict[str, list[float]] = {name: [] for name in (*MARKS, "overlap", "kept")}
        for first in range(0, len(prompts), BATCH):
            part = list(prompts[first : first + BATCH])
            key = ["pairs", part[0], len(part), seed + first, setting, partner]
            own = self.once(key, lambda part=part, first=first: self._pairs(part, seed + first, setting, partner))
            for name, values in own.items():
                marks[name] += values
        return marks

    def _pairs(self, prompts: list[str], seed: int, setting: Setting | None, partner: bool) -> dict[str, list[float]]:
        words = nouns(prompts)
        controls: list[Control] = []
        if setting is not None:
            controls = [METHODS[setting[0]](concepts=words, **setting[1])]
        if partner:
            controls.append(self.world.partner)
        with attnctl.control(self.pipe, *controls, Capture(words=words, keep=("steps",))) as handle:
            images = self.images(prompts, seed)
            maps = handle.maps
        scored = score(images, prompts)
        early, late = (pair_maps(maps, words, step) for step in (int(EARLY * STEPS), STEPS - 1))
        overlap, kept = segregation(late).tolist(), (2 - retention(late, binarise(early))).tolist()
        return {name: scored[name] for name in MARKS} | {"overlap": overlap, "kept": kept}

    def halves(self, n: int, first: int, seed: int, options: dict[str, Any] | None) -> list[float]:
        """Ask for one object in the left half in n/2 pictures, and in the right in as many; say where it was."""
        singles, inside = single_prompts(), []
        left = np.zeros((16, 16), bool)
        left[:, : left.shape[1] // 2] = True
        for start in range(0, n, BATCH // 2):
            side = (start // (BATCH // 2)) % 2
            part = [singles[(first + i) * 7 % len(singles)] for i in range(start, min(start + BATCH // 2, n))]
            mask = ~left if side else left

            def run(part: list[str] = part, mask: np.ndarray = mask, start: int = start, side: int = side) -> Any:
                if options is None:
                    images = self.images(part, seed + start)
                else:
                    control = AStar(concepts=nouns(part), masks=(mask,), seg=0.0, **options)
                    with attnctl.control(self.pipe, control):
                        images = self.images(part, seed + start)
                good = [m.right for m in (judge(i).matches(p) for i, p in zip(images, part, strict=True))]
                return {"inside": [_lies(image, side) for image in images], "right": [float(g) for g in good]}

            inside.append(self.once(["halves", part[0], len(part), seed + start, side, options], run))
        return [v for part in inside for v in part["inside"]]


def nouns(prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Name the shapes of each prompt, which are the concepts."""
    return tuple(tuple(thing.shape for thing in parse(p).things) for p in prompts)


def pair_maps(maps: Any, words: Sequence[Sequence[str]], step: int) -> torch.Tensor:
    every = maps.stacked(step=step)  # words, images, h, w; NaN where a prompt has no such word
    chosen = [torch.stack([every[maps.words.index(w), i] for w in own]) for i, own in enumerate(words)]
    return normalise(torch.stack(chosen), "max")


def _lies(image: np.ndarray, side: int) -> float:
    """Tell whether the first object's centre lies left (0) or right (1); without an object it lies nowhere."""
    things = judge(image).things
    if not things:
        return 0.0
    box = things[0].box
    return float(int((box[0] + box[2]) / 2 >= SIZE / 2) == side)


def shares(marks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the marks in percent, and the means of the maps' figures."""
    found = {name: round(100 * float(np.mean(marks[name])), 1) for name in MARKS}
    return found | {name: round(float(np.mean(marks[name])), 4) for name in ("overlap", "kept")}


def tune(study: Study, n: int, again: int) -> dict[str, Any]:
    """Try every setting on n tuning pictures, and the best two of each method on other ones."""
    prompts = pair_prompts(31, n + again, "tuning")
    table: list[dict[str, Any]] = []
    right: dict[str, list[float]] = {}

    def tried(setting: Setting | None, first: int, stop: int, stage: int) -> None:
        marks = study.pictures(prompts[first:stop], TUNING_SEED + first, setting)
        right.setdefault(json.dumps(setting), []).extend(marks["right"])
        name, options = ("plain", {}) if setting is None else setting
        table.append({"stage": stage, "method": name, "options": options, "pictures": stop - first, **shares(marks)})
        print(table[-1], file=sys.stderr, flush=True)

    for setting in tqdm([None, *study.world.settings], desc="tuning", disable=None):
        tried(setting, 0, n, 1)
    if again:
        tried(None, n, n + again, 2)
    chosen: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        own = [s for s in study.world.settings if s[0] == name]
        own.sort(key=lambda s: -float(np.mean(right[json.dumps(s)])))
        if again:
            own = own[:2]
            for setting in own:
                tried(setting, n, n + again, 2)
        chosen[name] = max(own, key=lambda s: float(np.mean(right[json.dumps(s)])))[1]
    return {"chosen": chosen, "table": table}


def report(study: Study, n_prompts: int, seeds: int, chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Measure plain, both methods and A-STAR with another guidance on fresh prompts and seeds."""
    prompts = pair_prompts(32, n_prompts, "report") * seeds
    runs: dict[str, tuple[Setting | None, bool]] = {"plain": (None, False)}
    runs |= {name: ((name, options), False) for name, options in chosen.items()}
    runs["AStar, every step"] = (EVERY_STEP, False)
    runs["AStar + " + study.world.partner.describe()] = (("AStar", chosen["AStar"]), True)
    found = {
        name: study.pictures(prompts, REPORT_SEED, *how)
        for name, how in tqdm(runs.items(), desc="report", disable=None)
    }
    plain = {name: np.array(values) for name, values in found["plain"].items()}
    rows: dict[str, Any] = {}
    for name, marks in found.items():
        rows[name] = shares(marks)
        if name != "plain":
            for mark in ("right", "bound"):
                rows[name][f"gain_{mark}_points"] = interval(np.array(marks[mark]) - plain[mark])
            for key in ("overlap", "kept"):
                rows[name][f"{key}_change"] = interval(np.array(marks[key]) - plain[key], percent=False)
        print(name, rows[name], file=sys.stderr, flush=True)
    difference = np.array(found["AStar"]["right"]) - np.array(found["AttendExcite"]["right"])
    missed = {mark: apart(plain["overlap"], plain[mark] > 0) for mark in ("right", "bound", "present")}
    return {
        "rows": rows,
        "astar_minus_attend_excite_points": interval(difference),
        "plain_overlap_of_failures_minus_others": missed,
    }


def apart(values: np.ndarray, good: np.ndarray, draws: int = 10_000) -> tuple[float, float, float] | None:
    """Return by how much a value is higher in failures, with its 95 % bootstrap interval; None without either kind.

    Whether overlapping maps go with failure is what guidance against overlap rests on.
    """
    bad, fine = values[~good], values[good]
    if not len(bad) or not len(fine):
        return None
    rng = np.random.default_rng(0)
    picked = (rng.choice(part, (draws, len(part))).mean(1) for part in (bad, fine))
    differences = np.subtract(*picked)
    low, high = np.percentile(differences, [2.5, 97.5])
    return round(float(bad.mean() - fine.mean()), 4), round(float(low), 4), round(float(high), 4)


def layouts(study: Study, n: int, tuning: int) -> dict[str, Any]:
    """Choose options of A-STAR with masks on tuning pictures, then count the centres in the half asked for."""
    table = [
        {"options": options, "inside": round(100 * float(np.mean(study.halves(tuning, 500, TUNING_SEED, options))), 1)}
        for options in study.world.layouts
    ]
    print(table, file=sys.stderr, flush=True)
    options = max(table, key=lambda row: row["inside"])["options"]  # type: ignore[arg-type, return-value]
    plain, masks = (np.array(study.halves(n, 0, LAYOUT_SEED, o)) for o in (None, options))  # type: ignore[arg-type]
    return {
        "options": options,
        "pictures": n,
        "plain": round(100 * float(plain.mean()), 1),
        "masks": round(100 * float(masks.mean()), 1),
        "gain_points": interval(masks - plain),
        "tuning": table,
    }


def tables(result: Mapping[str, Any]) -> str:
    """Write a result as the Markdown tables of the documentation."""
    lines = [
        "| run | right | bound | change of right, points | of bound | overlap | change | kept | change |",
        "|---" * 9 + "|",
    ]
    for name, row in result["rows"].items():
        cells = [name, f"{row['right']} %", f"{row['bound']} %"]
        for key in ("gain_right_points", "gain_bound_points"):
            cells.append(_interval(row[key], 1) if key in row else "")
        for key in ("overlap", "kept"):
            cells += [f"{row[key]:.3f}", _interval(row[f"{key}_change"], 3) if f"{key}_change" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| setting | stage | right | bound | overlap | kept |", "|---|---|---|---|---|---|"]
    for row in result["table"]:
        options = ", ".join(
            f"{k}={v!r}" for k, v in row["options"].items() if k not in ("grad_transform", "thresholds")
        )
        name = f"`{row['method']}({options})`" if row["options"] else row["method"]
        figures = f"{row['right']} % | {row['bound']} % | {row['overlap']:.3f} | {row['kept']:.3f}"
        lines.append(f"| {name} | {row['stage']} | {figures} |")
    for mark, values in result.get("plain_overlap_of_failures_minus_others", {}).items():
        if values is not None:
            lines += [
                "",
                f"Plain pictures that are not {mark} have {_interval(values, 3)} more overlap than the others.",
            ]
    if "layouts" in result:
        found = result["layouts"]
        gain = _interval(found["gain_points"], 1)
        lines += [
            "",
            f"In the half asked for: {found['masks']} % with masks, {found['plain']} % without, {gain} points.",
        ]
    return "\n".join(lines)


def _interval(values: Sequence[float], digits: int) -> str:
    mean, low, high = values
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main() -> int:
    """Tune, report, and place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(WORLDS), default="text2image")
    parser.add_argument("--prompts", type=int, default=64, help="two-object prompts of the report")
    parser.add_argument("--seeds", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--tune", type=int, default=32, help="pictures of every setting tried")
    parser.add_argument("--again", type=int, default=32, help="further pictures of the best two settings of a method")
    parser.add_argument("--layouts", type=int, default=96, help="pictures with a layout; 0 for none")
    parser.add_argument("--log", type=Path, help="JSON lines of what was run, to go on from")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tables", type=Path, help="run nothing: print a stored result as Markdown")
    options = parser.parse_args()
    if options.tables is not None:
        print(tables(json.loads(options.tables.read_text(encoding="utf-8"))))
        return 0
    torch.set_num_threads(options.threads)
    study = Study(options.model, options.log)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result: dict[str, Any] = {
        "study": "astar",
        "model": options.model,
        "cfg": study.world.cfg,
        "steps": STEPS,
        "versions": versions,
        "machine": platform.machine(),
    }
    result |= tune(study, options.tune, options.again)
    result |= {"prompts": options.prompts, "seeds": options.seeds}
    result |= report(study, options.prompts, options.seeds, result["chosen"])
    if options.layouts:
        result["layouts"] = layouts(study, options.layouts, BATCH)
        print("centres in the half asked for", result["layouts"], file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
