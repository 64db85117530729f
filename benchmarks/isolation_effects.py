"""What isolation and references do to the objects of a picture, judged.

python benchmarks/isolation_effects.py > benchmarks/results/effects_isolation.json
python benchmarks/isolation_effects.py --part file --model mmdit -n 24 --tune 8

`--part halves` (the default): prompts for two objects are drawn by the shipped text2image model, each object in its
half of the picture by A-STAR's layout, alone and with `IRDiffusion`, which keeps the halves from seeing each other at
self-attention. Counted are the pictures that show both objects and nothing else, the objects with their own colours,
and the pictures with each object in its half. How long subjects are isolated is chosen on tuning prompts; the figures
come from other prompts and seeds.

`--part file`: a picture file of one object is inverted with its caption, and its noise is the reference's row in a
batch with a prompt for the same shape that names no colour. The subject's box is that of the object in a plain picture
of the same noise; pictures that show no such object are left out. Counted are the pictures that show the shape in the
file's colour, those that show the shape, and the references that come out as their file. The bias of the reference's
keys is chosen on tuning pictures.

The same prompts and noise in pairs; intervals are 95 % bootstrap intervals. The table goes to stderr, the JSON to
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.pipelines import invert
from attnctl.processors import AStar, IRDiffusion
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, Scene, Thing, caption, pair_prompts, parse, render, single_prompts
from attnctl.shapes.training.evaluate import generate

TUNING_SEED, REPORT_SEED = 81_000, 810_000
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
TRIED = (0.4, 1.0)
PLACING: dict[str, Any] = {"grad_transform": "l2", "step_size": 1.0, "stop": 0.2}
BATCH = 16
BIASES = (0.0, 1.0, 2.0, 3.0)
MIDDLE = (0.2, 0.2, 0.8, 0.8)  # of the object in a file, which is drawn in the middle
SCALE = 3.0


def layout() -> tuple[np.ndarray, np.ndarray]:
    """Draw the masks of the left and the right half."""
    left = np.zeros((SIZE, SIZE))
    left[:, : SIZE // 2] = 1
    return left, 1 - left


def run(pipe: Any, prompts: Sequence[str], seed: int, until: float | None) -> dict[str, np.ndarray]:
    """Generate and judge every prompt: which pictures are right, the share of objects bound, and which are in place."""
    marks: dict[str, list[float]] = {"right": [], "bound": [], "in place": []}
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"until {until}", disable=None):
        part = list(prompts[first : first + BATCH])
        things = [parse(prompt).things for prompt in part]
        nouns = tuple(tuple(t.shape for t in pair) for pair in things)
        controls: list[Any] = [AStar(concepts=nouns, masks=layout(), **PLACING)]
        if until is not None:
            controls.append(IRDiffusion(boxes=(HALVES,), isolate_until=until))
        with attnctl.control(pipe, *controls):
            images = generate(pipe, part, scale=SCALE, seed=seed + first, steps=STEPS)
        for image, prompt, pair in zip(images, part, things, strict=True):
            seen = judge(np.asarray(image))
            match = seen.matches(prompt)
            middles = {(f.color, f.shape): (f.box[0] + f.box[2]) / 2 for f in seen.things}
            left, right = (middles.get(t.pair) for t in pair)
            marks["right"].append(match.right)
            marks["bound"].append(float(np.mean(match.bound)))
            marks["in place"].append(left is not None and right is not None and left < SIZE / 2 < right)
    return {name: np.array(values, float) for name, values in marks.items()}


class Reference:
    """A file's picture as noise, and a picture of the same shape for it to be the reference of.

    Attributes:
        prompts: The file's caption, and a prompt for the shape alone.
        latents: Noise of both rows.
        box: Where the shape is in the plain picture.
        thing: The object of the file.
    """

    def __init__(self, pipe: Any, thing: Thing, background: str, noise: Tensor, box: tuple[float, ...]) -> None:
        scene = Scene((Thing(thing.shape, thing.color),), background)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reference.png"
            Image.fromarray(render(scene)).save(path)
            with invert(pipe, path, caption(scene), steps=STEPS) as inversion:
                self.latents = torch.cat([inversion.latents[-1], noise])
        self.prompts = [caption(scene), f"a {thing.shape} on {background}"]
        self.box, self.thing = box, thing

    def marks(self, pipe: Any, bias: float | None) -> tuple[float, float, float]:
        """Run both rows, plain or with the reference; return whether subject, shape and reference came out."""
        boxes = ((MIDDLE,), (self.box,))
        control = IRDiffusion(boxes=boxes, references=(0,), bias=bias) if bias is not None else None
        with attnctl.control(pipe, control) if control is not None else nullcontext():
            images = pipe(self.prompts, latents=self.latents, num_inference_steps=STEPS, guidance_scale=SCALE).images
        reference, picture = ({(f.color, f.shape) for f in judge(np.asarray(image)).things} for image in images)
        shapes = {shape for _, shape in picture}
        return float(self.thing.pair in picture), float(self.thing.shape in shapes), float(self.thing.pair in reference)


def references(pipe: Any, prompts: Sequence[str], seed: int) -> Iterator[Reference]:
    """Make references for prompts for one object, where the plain picture shows its shape."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    shape = (1, denoiser.config.in_channels, denoiser.config.sample_size, denoiser.config.sample_size)
    for i, prompt in enumerate(prompts):
        scene = parse(prompt)
        (thing,) = scene.things
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
        plain = f"a {thing.shape} on {scene.background}"
        image = pipe(plain, latents=noise, num_inference_steps=STEPS, guidance_scale=SCALE).images[0]
        seen = [f for f in judge(np.asarray(image)).things if f.shape == thing.shape]
        if seen:
            box = tuple(float(side) / SIZE for side in seen[0].box)
            yield Reference(pipe, thing, scene.background, noise, box)


def from_files(pipe: Any, model: str, n: int, tune: int) -> dict[str, Any]:
    """Study references from files; return the report."""
    prompts = single_prompts()
    order = [prompts[i] for i in np.random.default_rng(21).permutation(len(prompts))]
    third = len(order) // 3
    names = ("subject", "shape", "reference")

    def study(
        which: Sequence[str], count: int, seed: int, biases: Sequence[float | None]
    ) -> dict[float | None, np.ndarray]:
        found: dict[float | None, list[tuple[float, ...]]] = {bias: [] for bias in biases}
        for one in tqdm(
            islice(references(pipe, which, seed), count), desc=f"{model}, files", total=count, disable=None
        ):
            for bias in biases:
                found[bias].append(one.marks(pipe, bias))
        return {bias: np.array(marks) for bias, marks in found.items()}

    tuned = study(order[:third], tune, TUNING_SEED, BIASES)
    # A colour counts on the shape that was asked for alone: `subject` is both.
    best = max(BIASES, key=lambda bias: tuned[bias][:, :2].mean())
    found = study(order[third:], n, REPORT_SEED, (None, best))
    before, after = found[None], found[best]
    rows = {
        name: {
            "plain": round(100 * float(before[:, k].mean()), 1),
            "with reference": round(100 * float(after[:, k].mean()), 1),
            "gain_points": interval(after[:, k] - before[:, k]),
        }
        for k, name in enumerate(names)
    }
    means = {
        f"{bias:g}": dict(zip(names, np.round(100 * tuned[bias].mean(0), 1).tolist(), strict=True)) for bias in BIASES
    }
    return {
        "model": model, "pictures": len(before), "steps": STEPS, "bias": best,
        "tuning": {"pictures": len(tuned[best]), "biases": means}, "rows": rows,
    }  # fmt: skip


def halves(pipe: Any, n: int, tune: int) -> dict[str, Any]:
    """Study isolation of two halves; return the report."""
    tuning, report = pair_prompts(11, tune, "tuning"), pair_prompts(12, n, "report")
    tried = {until: run(pipe, tuning, TUNING_SEED, until) for until in TRIED}
    best = max(tried, key=lambda until: float(tried[until]["bound"].mean() + tried[until]["in place"].mean()))
    before, after = (run(pipe, report, REPORT_SEED, until) for until in (None, best))
    rows = {
        name: {
            "layout": round(100 * float(before[name].mean()), 1),
            "with isolation": round(100 * float(after[name].mean()), 1),
            "gain_points": interval(after[name] - before[name]),
        }
        for name in before
    }
    return {"pictures": n, "steps": STEPS, "isolate_until": best, "rows": rows}


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=48, help="prompts of the report")
    parser.add_argument("--tune", type=int, default=16, help="prompts of every setting tried")
    parser.add_argument("--part", choices=("halves", "file"), default="halves")
    parser.add_argument("--model", choices=("text2image", "mmdit"), default="text2image", help="for files")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pipe = attnctl.load_shapes(options.model if options.part == "file" else "text2image")
    pipe.set_progress_bar_config(disable=True)
    if options.part == "file":
        report = from_files(pipe, options.model, options.n, options.tune)
    else:
        report = halves(pipe, options.n, options.tune)
    for name, row in report["rows"].items():
        print(f"{name:12}{row}", file=sys.stderr)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
