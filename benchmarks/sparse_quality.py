"""Pictures under sparse attention against dense ones, at equal executed density: for benchmarks/sparse.py --quality."""

from __future__ import annotations

import json
import sys
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

BLOCK = 16  # one row of the 16 x 16 grid of shapes mmdit
TARGETS = (0.65, 0.3, 0.5)
# Of the 16 blocks of a row how many are kept, and steps from one choice to the next: over 20 steps they make up the
# executed density, or a little less.
ONLINE = {0.65: (9, 5), 0.5: (6, 5), 0.3: (3, 10)}
CARRIED = {0.65: (7, 5), 0.5: (4, 4), 0.3: (3, 10)}
PARO_STEPS = {0.65: (0.5, 6), 0.5: (0.3, 6), 0.3: (0.3, 0)}
WINDOW = (13, 13)


@dataclass(frozen=True, kw_only=True)
class _Oracle(SparseAttention, abstract=True):
    """Choose by the true map of each step, and compute no step densely: what no selector can know."""

    def attached(self, *where: Any) -> LiveControl | None:
        live = super().attached(*where)
        assert isinstance(live, LiveSparse)
        live.dense_choices = False
        return live


def controls(target: float, pipe: Any, prompts: list[str], call: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the controls that compute one share of the maps, by name; where it is a plan, the share itself as well."""
    share, dense = PARO_STEPS[target]
    plan = calibrate(pipe, prompts, density=share, block=BLOCK, groups=4, call=call, quiet=True).plan
    few: dict[str, Any] = {"block": BLOCK, "rest": "drop"}
    made = {
        "Online": Online(density=ONLINE[target][0] / 16, every=ONLINE[target][1], block=BLOCK),
        "Online, carry": Online(density=CARRIED[target][0] / 16, every=CARRIED[target][1], block=BLOCK, carry=True),
        "top-k of pooled means": Online(density=target, by="pooled", every=1, **few),
        "top-k of pooled means, rest as means": Online(density=target, by="pooled", every=1, block=BLOCK),
    }
    if target == TARGETS[0]:
        made["Online, rest dropped"] = Online(density=ONLINE[target][0] / 16, every=ONLINE[target][1], **few)
        made["windows"] = Neighborhood(window=WINDOW)
    found: dict[str, Any] = {n: SparseAttention(s, kernel="masked") for n, s in made.items()}
    oracle = _Oracle(Online(density=target, every=1, **few), kernel="masked")
    paro = PARO(plan, dense_steps=dense, kernel="masked")
    return {"PARO": (paro, executed(plan, dense, steps)), "oracle": oracle, **found}


def measure_quality(pictures: int, steps: int, scale: float, out: Path | None) -> dict[str, Any]:
    """Compare pictures of the shipped mmdit model, in decibels and by the judge; written to `out` row by row.

    Plans are calibrated on two tuning prompts; the figures are those of report prompts with other seeds.
    """
    from attnctl.shapes.scenes import pair_prompts
    from attnctl.shapes.training.evaluate import generate, score, wilson

    pipe = attnctl.load_shapes("mmdit")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": 0}
    prompts, tuning = list(pair_prompts(12, pictures, "report")), list(pair_prompts(11, 2, "tuning"))

    def make() -> list[np.ndarray]:
        return generate(pipe, prompts, scale=scale, seed=700_000, steps=steps, batch=16, max_sequence_length=0)

    dense = make()
    right = score(dense, prompts)["right"]
    rows: list[dict[str, Any]] = []
    result = {
        "model": "shapes:mmdit", "pictures": pictures, "steps": steps, "cfg": scale, "block": BLOCK,
        "dense_right": wilson(int(sum(right)), pictures), "rows": rows,
    }  # fmt: skip
    for target in TARGETS:
        baseline: np.ndarray | None = None
        for name, control in controls(target, pipe, tuning, call, steps).items():
            control, share = control if isinstance(control, tuple) else (control, None)
            with attnctl.control(pipe, control) as handle:
                images = make()
                share = handle.result(control) if share is None else share
            psnr = decibels(dense, images)
            baseline = psnr if baseline is None else baseline
            marks = score(images, prompts)["right"]
            rows.append({
                "target": target, "method": name, "executed": round(share, 4), "psnr_db": mean_interval(psnr),
                "over_paro_db": mean_interval(psnr - baseline), "right": wilson(int(sum(marks)), pictures),
                "right_points_from_dense": mean_interval(100 * (np.array(marks) - np.array(right))),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def decibels(dense: list[np.ndarray], images: list[np.ndarray]) -> np.ndarray:
    """Return each picture's PSNR; 100 dB where it is the same."""
    errors = [((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(dense, images, strict=True)]
    return np.asarray(-10 * np.log10(np.array(errors).clip(1e-10)))
