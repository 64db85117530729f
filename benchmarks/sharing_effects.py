"""What shared attention does to a batch, judged.

python benchmarks/sharing_effects.py > benchmarks/results/effects_sharing.json

`--part style` (the default): every batch asks the shipped text2image model for four objects and says nothing of the
background. Counted are the pictures 2 to 4 of each batch that have the background of picture 1, and those that show the
object that was asked for. `--part subject`: every batch asks for one shape on four backgrounds and says nothing of its
colour. Counted are the pictures 2 to 4 that show the subject of picture 1 (in its colour), those that show the shape,
and those that have the background that was asked for.

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
from attnctl.shapes.judge import Verdict, judge
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES

TUNING_SEED, REPORT_SEED = 61_000, 610_000
PICTURES = 4
TRIED: dict[str, tuple[Control, ...]] = {
    "StyleAligned": tuple(StyleAligned(stop=stop, bias=bias) for stop in (0.3, 1.0) for bias in (0.0, 0.7)),
    "Consistent": (Consistent(), Consistent(share=1.0)),
    "MasaCtrl": (MasaCtrl(), MasaCtrl(start=0.3)),
}


class Style:
    """Four objects, no two of one colour or shape; a background that no prompt names."""

    marks = ("background", "object")

    @staticmethod
    def batches(seed: int, n: int) -> list[list[tuple[str, str]]]:
        """Draw batches of (colour, shape)."""
        rng = np.random.default_rng(seed)
        return [
            list(zip(rng.permutation(list(COLORS))[:PICTURES], rng.permutation(SHAPES)[:PICTURES], strict=True))
            for _ in range(n)
        ]

    prompt = "a {} {}"

    @staticmethod
    def judge(objects: Sequence[tuple[str, str]], verdicts: Sequence[Verdict]) -> tuple[float, ...]:
        """Return the shares of pictures 2 to 4 with the first one's background, and with their object."""
        shown = [pair in {(f.color, f.shape) for f in v.things} for pair, v in zip(objects, verdicts, strict=True)]
        same = [v.background == verdicts[0].background for v in verdicts]
        return float(np.mean(same[1:])), float(np.mean(shown[1:]))


class Subject:
    """One shape on four backgrounds; a colour that no prompt names."""

    marks = ("subject", "object", "background")

    @staticmethod
    def batches(seed: int, n: int) -> list[list[tuple[str, str]]]:
        """Draw batches of (shape, background)."""
        rng = np.random.default_rng(seed)
        return [_on_four(rng) for _ in range(n)]

    prompt = "a {} on {}"

    @staticmethod
    def judge(objects: Sequence[tuple[str, str]], verdicts: Sequence[Verdict]) -> tuple[float, ...]:
        """Return shares of pictures 2 to 4 with the first one's subject, with the shape, and with their background."""
        shape = objects[0][0]
        colors = [{f.color for f in v.things if f.shape == shape} for v in verdicts]
        same = [bool(c & colors[0]) for c in colors]
        there = [bool(c) for c in colors]
        backs = [v.background == back for (_, back), v in zip(objects, verdicts, strict=True)]
        return float(np.mean(same[1:])), float(np.mean(there[1:])), float(np.mean(backs[1:]))


def _on_four(rng: np.random.Generator) -> list[tuple[str, str]]:
    shape = str(rng.choice(SHAPES))
    return [(shape, str(back)) for back in rng.permutation(list(BACKGROUNDS))[:PICTURES]]


PARTS: dict[str, Any] = {"style": Style, "subject": Subject}


def run(
    pipe: Any, part: Any, drawn: Sequence[Sequence[tuple[str, str]]], seed: int, control: Control | None
) -> dict[str, list[float]]:
    """Generate and judge every batch: a list of shares for each mark."""
    found: list[tuple[float, ...]] = []
    with attnctl.control(pipe, control) if control is not None else nullcontext():
        for i, objects in enumerate(tqdm(drawn, desc="plain" if control is None else control.describe(), disable=None)):
            noise = [torch.Generator().manual_seed(seed + PICTURES * i + j) for j in range(PICTURES)]
            prompts = [part.prompt.format(*words) for words in objects]
            images = pipe(prompts, num_inference_steps=STEPS, guidance_scale=3.0, generator=noise).images
            found.append(part.judge(objects, [judge(np.asarray(image)) for image in images]))
    return dict(zip(part.marks, map(list, zip(*found, strict=True)), strict=True))


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=32, help="batches of the report")
    parser.add_argument("--tune", type=int, default=8, help="batches of every setting tried")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", choices=tuple(PARTS), default="style")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    part = PARTS[options.part]
    pipe = attnctl.load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    tuning, report = part.batches(1, options.tune), part.batches(2, options.n)
    plain = run(pipe, part, report, REPORT_SEED, None)
    rows: dict[str, Any] = {"plain": {m: round(100 * float(np.mean(v)), 1) for m, v in plain.items()}}
    for name, tried in TRIED.items():
        found = {c: run(pipe, part, tuning, TUNING_SEED, c) for c in tried}
        # Agreement counts where the picture still shows what was asked for.
        best = max(found, key=lambda c: sum(float(np.mean(found[c][m])) for m in part.marks))
        marks = run(pipe, part, report, REPORT_SEED, best)
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
