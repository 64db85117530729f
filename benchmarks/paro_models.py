"""Whole runs with and without PARO, for benchmarks/paro.py: pictures of shapes mmdit, latents of tiny models."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnctl
from attnctl.pipelines import calibrate, check_plan
from attnctl.processors import PARO

PAPER_DB = {0.5: 29.14, 0.3: 22.89}
"""PSNR of CogVideoX-5B at 720p, 6 s, 30 steps ("PAROAttention", arXiv 2506.16054)."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"density": 0.5, "block": 16},
    {"density": 0.3, "block": 16},
    {"density": 0.5, "block": 16, "budget": "model"},
    {"density": 0.5, "block": 16, "dense_steps": 0.3},
    {"density": 0.3, "block": 16, "dense_steps": 0.3},
)
"""Blocks of 16 are one row of the 16 x 16 grid; `dense_steps` is a share of the run."""


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the half width of its 95 % interval (normal)."""
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {"mean": round(float(np.mean(values)), 2), "half": round(half, 2)}


def executed(plan: Any, dense_steps: int, steps: int) -> float:
    """Return the share of the image's blocks that a run computes, its dense steps included."""
    share = float(np.mean([float(p.keep.float().mean()) for p in plan.plans.values()]))
    return (dense_steps + share * (steps - dense_steps)) / steps


def measure_shapes(pictures: int, steps: int, scale: float, null_tokens: int) -> dict[str, Any]:
    """Compare sparse with dense pictures of the shipped mmdit model, in decibels and by the judge.

    Calibrated on two tuning prompts; report prompts and other seeds for the figures. The grid is 16 x 16, the largest
    that the model takes.
    """
    from attnctl.shapes.scenes import pair_prompts
    from attnctl.shapes.training.evaluate import generate, score, wilson

    pipe = attnctl.load_shapes("mmdit")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": null_tokens}
    prompts = pair_prompts(12, pictures, "report")
    calibration = list(pair_prompts(11, 2, "tuning"))

    def make() -> list[np.ndarray]:
        return generate(pipe, prompts, scale=scale, seed=700_000, steps=steps, max_sequence_length=null_tokens)

    dense = make()
    marks = {"dense": score(dense, prompts)}
    rows: dict[str, Any] = {}
    for setting in SETTINGS:
        first = round(setting.get("dense_steps", 0) * steps)
        choice = {key: value for key, value in setting.items() if key != "dense_steps"}
        found = calibrate(pipe, calibration, **choice, groups=4, call=call, quiet=True)
        # 256 tokens are too few for a sparse kernel to pay: the masked reference gives the same pictures sooner.
        with attnctl.control(pipe, PARO(found.plan, dense_steps=first, kernel="reference")):
            images = make()
        errors = np.array([((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(dense, images, strict=True)])
        psnr = -10 * np.log10(errors.clip(1e-10))
        name = (
            f"density {setting['density']}, blocks of {setting['block']}, one budget a {setting.get('budget', 'head')}"
        )
        name += f", {first} of {steps} steps dense"
        marks[name] = score(images, prompts)
        rows[name] = {
            "psnr_db": mean_interval(psnr), "psnr_median_db": round(float(np.median(psnr)), 2),
            "psnr_of_mean_error_db": round(float(-10 * np.log10(errors.mean())), 2),
            "wanted_db": PAPER_DB[setting["density"]],
            "executed_image_density": round(executed(found.plan, first, steps), 4),
            "density_with_text": round(found.plan.density, 4), "captured": round(found.captured, 4),
            "captured_in_model_order": round(float(np.mean([r["captured_model_order"] for r in found.rows])), 4),
        }  # fmt: skip
        for mark in ("bound", "right"):
            change = 100 * (np.array(marks[name][mark]) - np.array(marks["dense"][mark]))
            rows[name][f"{mark}_points_from_dense"] = mean_interval(change)
        print(name, rows[name], file=sys.stderr, flush=True)
    shares = {name: {m: wilson(int(sum(v[m])), pictures) for m in ("bound", "right")} for name, v in marks.items()}
    return {
        "pictures": pictures, "steps": steps, "cfg": scale, "null_tokens": null_tokens,
        "calibration_prompts": calibration, "percent_with_95_interval": shares, "plans": rows,
    }  # fmt: skip


def measure_tiny(steps: int) -> dict[str, Any]:
    """Compare latents of tiny random CogVideoX and Wan models, against their own range, on held-out embeddings.

    Weights are random, so maps are nearly even and show no pattern to keep: this says that whole runs work, and what
    dropping costs where nothing can be chosen.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import zoo_pipelines

    rows = {}
    for host in ("cogvideox", "cogvideox_rope", "wan"):
        pipe, kwargs = zoo_pipelines.build(host)
        told = {k: kwargs.pop(k) for k in list(kwargs) if "embeds" in k}
        size = {"num_frames": 17, "height": 16 * (kwargs["height"] // 8), "width": 16 * (kwargs["width"] // 8)}
        call = {**kwargs, **size, "num_inference_steps": steps, "output_type": "latent"}
        call.pop("generator", None)
        other = [{k: v.flip(-1) for k, v in told.items()}, {k: v.flip(-2) for k, v in told.items()}]
        for density in (0.5, 0.3):
            found = calibrate(pipe, [told], density=density, block=16, groups=2, call=call, quiet=True)
            checks = check_plan(pipe, found.plan, other, call=call)
            grid = next(iter(found.plan.plans.values())).grid
            rows[f"{host} {density}"] = {
                "grid": grid, "psnr_db": [c["psnr_db"] for c in checks], "captured": round(found.captured, 4),
                "density_with_text": round(found.plan.density, 4),
                "local_error": round(float(np.mean([e for c in checks for e in c["sites"].values()])), 4),
            }  # fmt: skip
            print(f"{host} {density}: {rows[f'{host} {density}']}", file=sys.stderr, flush=True)
    torch.set_num_threads(1)
    return {"steps": steps, "models": rows}
