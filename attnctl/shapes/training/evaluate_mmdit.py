"""Measure the shapes mmdit.

`python -m attnctl.shapes.training.evaluate mmdit [--folder DIR] [--quick] [--sheet out.png]`

The guidance scale is chosen on tuning prompts, without null tokens (`max_sequence_length=0`, twice as fast). The
figures are then taken on report prompts with other seeds and plain calls; one more row says what leaving the null
tokens out changes. They go to stdout, to `evaluation.json` and into the model card, both beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from attnctl.shapes.load import WEIGHTS, load_shapes
from attnctl.shapes.scenes import pair_prompts, single_prompts
from attnctl.shapes.training.cards import write_mmdit_card
from attnctl.shapes.training.evaluate import contact_sheet, generate, score, summary, wilson

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

__all__ = ["evaluate_mmdit", "main"]

SCALES = (1.0, 2.0, 3.0, 4.0, 6.0)


def evaluate_mmdit(
    pipe: StableDiffusion3Pipeline, *, n: int = 256, tune: int = 64, steps: int = 20, scales: Sequence[float] = SCALES
) -> dict:
    """Choose the guidance scale on tuning prompts, then measure on report prompts; all shares in percent."""
    singles = [single_prompts()[i * 7 % 120] for i in range(max(n, tune))]
    sweep = {}
    for scale in scales:
        marks = [
            score(generate(pipe, p, scale=scale, seed=10_000, steps=steps, max_sequence_length=0), p)["right"]
            for p in (singles[:tune], list(pair_prompts(1, tune, "tuning")))
        ]
        sweep[scale] = [wilson(int(sum(m)), tune) for m in marks]
        print(f"CFG {scale:g}: single {sweep[scale][0]}, two objects {sweep[scale][1]}", flush=True)
    best = max(sweep, key=lambda s: sweep[s][0][0] + sweep[s][1][0])
    result: dict = {"steps": steps, "scale": best, "n": n, "tune": tune}
    result["sweep"] = {f"{s:g}": {"single": v[0], "pairs": v[1]} for s, v in sweep.items()}
    pairs = list(pair_prompts(2, n, "report"))
    sets = {
        "single": (singles[:n], {}),
        "pairs": (pairs, {}),
        "heldout": (list(pair_prompts(3, max(1, n // 2), "heldout")), {}),
        "pairs without null tokens": (pairs, {"max_sequence_length": 0}),
    }
    for name, (prompts, options) in sets.items():
        marks_of = score(generate(pipe, prompts, scale=best, seed=20_000, steps=steps, **options), prompts)
        result[name] = summary(marks_of)
        print(name, result[name], flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.evaluate mmdit", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, help="a pipeline folder (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=256, help="pictures of a row of the card")
    parser.add_argument("--tune", type=int, default=64, help="pictures for each guidance scale")
    parser.add_argument("--quick", action="store_true", help="2 x 64 pictures at one scale, nothing written")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale of --quick and --sheet")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (PNG)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    pipe = load_shapes("mmdit", folder=args.folder)
    short = {"steps": args.steps, "max_sequence_length": 0}
    if args.sheet is not None:
        prompts = [*[single_prompts()[i * 37 % 120] for i in range(24)], *pair_prompts(4, 24, "report")]
        sheet = contact_sheet(generate(pipe, prompts, scale=args.scale, seed=5, **short), prompts)
        cv2.imwrite(str(args.sheet), sheet[..., ::-1])
    if args.quick:
        for prompts in ([single_prompts()[i * 15 % 119] for i in range(64)], list(pair_prompts(5, 64, "tuning"))):
            marks = score(generate(pipe, prompts, scale=args.scale, seed=7, **short), prompts)
            print({k: round(100 * float(np.mean(v)), 1) for k, v in marks.items()}, flush=True)
    else:
        result = evaluate_mmdit(pipe, n=args.n, tune=args.tune, steps=args.steps)
        parts = (pipe.vae, pipe.text_encoder, pipe.transformer)
        result["params"] = round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
        folder = args.folder or WEIGHTS / "mmdit"
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_mmdit_card(folder, result)
    print(f"{time.monotonic() - began:.0f} s")
    return 0
