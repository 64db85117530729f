"""Pictures and videos under sparse attention against dense ones, at equal executed density.

For `benchmarks/sparse.py --quality`, with `--model mmdit` or `--model videodit`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paro_models import executed, mean_interval

import attnctl
from attnctl.core.live import LiveControl
from attnctl.pipelines import calibrate
from attnctl.plans import Neighborhood, Online
from attnctl.processors import PARO, SparseAttention
from attnctl.processors.sparse.live import LiveSparse

BLOCK = 16  # one row of the 16 x 16 grid of shapes mmdit, two of the 8 x 8 of each of videodit's 9 latent frames
TARGETS = (0.65, 0.3, 0.5)
# Of the 16 blocks of a row how many are kept, and steps from one choice to the next: over 20 steps they make up the
# executed density, or a little less.
ONLINE = {0.65: (9, 5), 0.5: (6, 5), 0.3: (3, 10)}
CARRIED = {0.65: (7, 5), 0.5: (4, 4), 0.3: (3, 10)}
PARO_STEPS = {0.65: (0.5, 6), 0.5: (0.3, 6), 0.3: (0.3, 0)}


@dataclass(frozen=True)
class Subject:
    """A shipped model, what it is asked for, and how what it makes is judged.

    Attributes:
        name: Its name among the shapes.
        pipe: The pipeline.
        prompts: Prompts of the report.
        tuning: Two other prompts, for plans.
        window: A window that keeps about 0.65 of the maps.
        call: How plans' runs are called.
        make: Makes what the prompts ask for, each uint8 [..., 3].
        right: Marks it, 1 or 0 each.
    """

    name: str
    pipe: Any
    prompts: list[str]
    tuning: list[str]
    window: tuple[int, ...]
    call: dict[str, Any]
    make: Callable[[], list[np.ndarray]]
    right: Callable[[list[np.ndarray]], list[float]]


def subject(name: str, count: int, steps: int, scale: float) -> Subject:
    """Load a model, with `count` report prompts."""
    from attnctl.shapes.motion import clip_prompts
    from attnctl.shapes.scenes import pair_prompts
    from attnctl.shapes.tokenizer import MAX_LENGTH
    from attnctl.shapes.training.evaluate import generate, score
    from attnctl.shapes.training.evaluate_video import generate_clips, mark

    pipe = attnctl.load_shapes(name)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale}
    if name == "mmdit":
        prompts, call["max_sequence_length"] = list(pair_prompts(12, count, "report")), 0
        make = lambda: generate(  # noqa: E731
            pipe, prompts, scale=scale, seed=700_000, steps=steps, batch=16, max_sequence_length=0
        )
        return Subject(
            name, pipe, prompts, list(pair_prompts(11, 2, "tuning")), (13, 13), call, make,
            lambda made: score(made, prompts)["right"],
        )  # fmt: skip
    clips = clip_prompts(12, count)
    call |= {"num_frames": 17, "height": 64, "width": 64, "max_sequence_length": MAX_LENGTH}
    return Subject(
        name, pipe, clips, clip_prompts(11, 2), (9, 7, 6), call,
        lambda: generate_clips(pipe, clips, scale=scale, seed=700_000, steps=steps),
        lambda made: [float(row["right"]) for row in mark(made, clips)],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Oracle(SparseAttention, abstract=True):
    """Choose by the true map of each step, and compute no step densely: what no selector can know."""

    def attached(self, *where: Any) -> LiveControl | None:
        live = super().attached(*where)
        assert isinstance(live, LiveSparse)
        live.dense_choices = False
        return live


def controls(target: float, who: Subject, steps: int) -> dict[str, Any]:
    """Return the controls that compute one share of the maps, by name; where it is a plan, the share itself as well."""
    share, dense = PARO_STEPS[target]
    plan = calibrate(who.pipe, who.tuning, density=share, block=BLOCK, groups=4, call=who.call, quiet=True).plan
    few: dict[str, Any] = {"block": BLOCK, "rest": "drop"}
    made = {
        "Online": Online(density=ONLINE[target][0] / 16, every=ONLINE[target][1], block=BLOCK),
        "Online, carry": Online(density=CARRIED[target][0] / 16, every=CARRIED[target][1], block=BLOCK, carry=True),
        "top-k of pooled means": Online(density=target, by="pooled", every=1, **few),
        "top-k of pooled means, rest as means": Online(density=target, by="pooled", every=1, block=BLOCK),
    }
    if target == TARGETS[0]:
        made["Online, rest dropped"] = Online(density=ONLINE[target][0] / 16, every=ONLINE[target][1], **few)
        made["windows"] = Neighborhood(window=who.window)
    found: dict[str, Any] = {n: SparseAttention(s, kernel="masked") for n, s in made.items()}
    oracle = _Oracle(Online(density=target, every=1, **few), kernel="masked")
    share_of_plan = executed(plan, dense, steps)
    paro = PARO(plan, dense_steps=dense, kernel="masked")
    if who.name == "mmdit":  # what it costs to round the same plan's numbers
        for bits in (8, 4):
            rounded = PARO(plan, dense_steps=dense, kernel=f"simulated_int{bits}")
            found[f"PARO, weights and values in {bits} bits"] = rounded, share_of_plan
    return {"PARO": (paro, share_of_plan), "oracle": oracle, **found}


def measure_quality(
    model: str, pictures: int, steps: int, scale: float, targets: Sequence[float], out: Path | None
) -> dict[str, Any]:
    """Compare what a shipped model makes, in decibels and by the judge, at each share of `targets`.

    Rows are written to `out` as they come, beside those of other shares of the same study that are there already.

    Plans are calibrated on two tuning prompts; the figures are those of report prompts with other seeds.
    """
    from attnctl.shapes.training.evaluate import wilson

    who = subject(model, pictures, steps, scale)
    dense = who.make()
    right = who.right(dense)
    result: dict[str, Any] = {
        "model": f"shapes:{model}", "pictures": pictures, "steps": steps, "cfg": scale, "block": BLOCK,
        "dense_right": wilson(int(sum(right)), pictures),
    }  # fmt: skip
    rows = result["rows"] = other_shares(out, result, targets)
    for target in targets:
        baseline: np.ndarray | None = None
        for name, control in controls(target, who, steps).items():
            control, share = control if isinstance(control, tuple) else (control, None)
            with attnctl.control(who.pipe, control) as handle:
                images = who.make()
                share = handle.result(control) if share is None else share
            psnr = decibels(dense, images)
            baseline = psnr if baseline is None else baseline
            marks = who.right(images)
            rows.append({
                "target": target, "method": name, "executed": round(share, 4), "psnr_db": mean_interval(psnr),
                "over_paro_db": mean_interval(psnr - baseline), "right": wilson(int(sum(marks)), pictures),
                "right_points_from_dense": mean_interval(100 * (np.array(marks) - np.array(right))),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def other_shares(out: Path | None, study: dict[str, Any], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Return the rows that `out` holds of shares that this run leaves out, if they are of the same study."""
    if out is None or not out.exists():
        return []
    before = json.loads(out.read_text())
    before = before.get("quality", before)  # a recording, or what this wrote
    rows = [row for row in before.pop("rows", []) if row["target"] not in targets]
    if rows and before != json.loads(json.dumps(study)):
        raise SystemExit(f"{out} holds shares of another study ({before}, not {study}): give another --out.")
    return rows


def decibels(dense: list[np.ndarray], images: list[np.ndarray]) -> np.ndarray:
    """Return the PSNR of each picture or video; 100 dB where it is the same."""
    errors = [((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(dense, images, strict=True)]
    return np.asarray(-10 * np.log10(np.array(errors).clip(1e-10)))
