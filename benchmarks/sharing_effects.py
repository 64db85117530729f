"""What shared attention does to a batch, judged.

python benchmarks/sharing_effects.py > benchmarks/results/effects_sharing.json

Every batch asks the shipped text2image model for four objects and says nothing of the background. Counted are the
pictures 2 to 4 of each batch that have the background of picture 1, and those that show the object that was asked for.
Settings are chosen on tuning batches; the figures come from other prompts and other seeds. Every comparison is paired:
the same prompts and noise with and without the method; intervals are 95 % bootstrap intervals over the batches.
The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import Consistent, Control, MasaCtrl, StyleAligned
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import COLORS, SHAPES

TUNING_SEED, REPORT_SEED = 61_000, 610_000
PICTURES = 4
TRIED: dict[str, tuple[Control, ...]] = {
    "StyleAligned": tuple(StyleAligned(stop=stop, bias=bias) for stop in (0.3, 1.0) for bias in (0.0, 0.7)),
    "Consistent": (Consistent(), Consistent(share=1.0)),
    "MasaCtrl": (MasaCtrl(), MasaCtrl(start=0.3)),
}


def batches(seed: int, n: int) -> list[list[tuple[str, str]]]:
    """Draw batches of four objects, (colour, shape), no two of one colour or shape."""
    rng = np.random.default_rng(seed)
    return [
        list(zip(rng.permutation(list(COLORS))[:PICTURES], rng.permutation(SHAPES)[:PICTURES], strict=True))
        for _ in range(n)
    ]


def run(pipe: Any, drawn: Sequence[Sequence[tuple[str, str]]], seed: int, control: Control | None) -> dict[str, Any]:
    """Generate and judge every batch: per batch the shares of pictures 2 to 4 that agree and that are right."""
    marks: dict[str, list[float]] = {"background": [], "object": []}
    with attnctl.control(pipe, control) if control is not None else nullcontext():
        for i, objects in enumerate(tqdm(drawn, desc="plain" if control is None else control.describe(), disable=None)):
            noise = [torch.Generator().manual_seed(seed + PICTURES * i + j) for j in range(PICTURES)]
            prompts = [f"a {color} {shape}" for color, shape in objects]
            images = pipe(prompts, num_inference_steps=STEPS, guidance_scale=3.0, generator=noise).images
            seen = [judge(np.asarray(image)) for image in images]
            marks["background"].append(np.mean([v.background == seen[0].background for v in seen[1:]]))
            shown = [(c, s) in {(f.color, f.shape) for f in v.things} for (c, s), v in zip(objects, seen, strict=True)]
            marks["object"].append(np.mean(shown[1:]))
    return marks


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=32, help="batches of the report")
    parser.add_argument("--tune", type=int, default=8, help="batches of every setting tried")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = attnctl.load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    tuning, report = batches(1, options.tune), batches(2, options.n)
    plain = run(pipe, report, REPORT_SEED, None)
    rows: dict[str, Any] = {"plain": {m: round(100 * float(np.mean(v)), 1) for m, v in plain.items()}}
    for name, tried in TRIED.items():
        found = {c: run(pipe, tuning, TUNING_SEED, c) for c in tried}
        # Agreement counts where the picture still shows what was asked for.
        best = max(found, key=lambda c: float(np.mean(found[c]["background"]) + np.mean(found[c]["object"])))
        marks = run(pipe, report, REPORT_SEED, best)
        rows[name] = {
            "setting": best.describe(),
            **{m: round(100 * float(np.mean(v)), 1) for m, v in marks.items()},
            **{f"gain_{m}_points": interval(np.array(marks[m]) - np.array(plain[m])) for m in marks},
        }
        print(f"{name}: {rows[name]}", file=sys.stderr)
    print(json.dumps({"pictures": (PICTURES - 1) * options.n, "steps": STEPS, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
