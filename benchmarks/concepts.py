"""Where concept maps of the shipped mmdit model lie: do they peak inside the object that they name?

    python benchmarks/concepts.py > benchmarks/results/concepts.json

Drawn scenes, of which the place of every object is known, are noised to `--strength` and looked at once, with an empty
prompt. Scenes of one object: the concepts are "a red circle" and "gray", and once the bare "circle" and "gray". Scenes
of two: both objects and the background. Each at the default blocks and at block 5, the best on tuning pictures. Beside
it, the word map of the bare noun, the prompt being the scene's caption: attention probability in all layers. With
`--made N` the same of N pictures that the model makes (those that the judge finds right), from the second half of their
run. Shares come with 95 % Wilson intervals; the table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from judged import STEPS
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import attnctl
from attnctl.pipelines import image_maps
from attnctl.processors import Capture
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, caption, parse, render, sample, single_prompts
from attnctl.shapes.training.evaluate import generate, wilson

CFG = 3.0  # the best of the model card
SEED = 900_000
BEST = 5  # block; chosen on 15 pictures that the model made from other seeds
LATE = 0.5  # maps of the second half of a run: early steps place nothing yet


@dataclass
class Tally:
    """What was counted of one kind of map."""

    inside: list[bool] = field(default_factory=list)
    means: list[tuple[float, float]] = field(default_factory=list)

    def add(self, values: Tensor, box: Sequence[float]) -> None:
        """Note whether a map [h, w] peaks inside a box of pixels, and its mean inside and outside."""
        whole = torch.nn.functional.interpolate(values[None, None].float(), (SIZE, SIZE), mode="bicubic")[0, 0]
        left, top, right, bottom = (round(v) for v in box)
        y, x = divmod(int(whole.argmax()), SIZE)
        self.inside.append(left <= x < right and top <= y < bottom)
        within = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        within[max(top, 0) : bottom, max(left, 0) : right] = True
        self.means.append((float(whole[within].mean()), float(whole[~within].mean())))

    def told(self) -> dict[str, Any]:
        """Return the share of peaks inside with its interval, and the mean shares inside and outside."""
        within, outside = np.mean(self.means, 0).round(4).tolist()
        n = len(self.inside)
        return {"n": n, "inside": wilson(sum(self.inside), n), "mean inside": within, "mean outside": outside}


def phrase(thing: Any) -> str:
    """Name an object as captions do."""
    return f"a {thing.color} {thing.shape}"


def captures(scene: Any, **options: Any) -> dict[str, tuple[list[str], Capture]]:
    """Return for each kind of map the names of the objects, and what records them."""
    phrases, nouns = [phrase(t) for t in scene.things], [t.shape for t in scene.things]
    full, bare = (*phrases, scene.background), (*nouns, scene.background)
    return {
        "phrase": (phrases, Capture(concepts=full, **options)),
        f"phrase, block {BEST}": (phrases, Capture(concepts=full, sites=BEST, **options)),
        "bare noun": (nouns, Capture(concepts=bare, **options)),
        "word map": (nouns, Capture(words=tuple(nouns), **options)),
    }


def drawn(pipe: Any, n: int, objects: int, strength: float) -> dict[str, Any]:
    """Look at drawn scenes of one or two objects."""
    rng, tallies = np.random.default_rng(SEED + objects), dict[str, Tally]()
    areas: list[float] = []
    host = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    for number in tqdm(range(n), desc=f"{objects} drawn"):
        scene = sample(rng, objects)
        picture = Image.fromarray(render(scene))
        boxes = [(t.x - t.size, t.y - t.size, t.x + t.size, t.y + t.size) for t in scene.things]
        areas += [(2 * t.size) ** 2 / SIZE**2 for t in scene.things]
        for name, (words, capture) in captures(scene).items():
            prompt = caption(scene) if capture.words else ""
            options = {"strength": strength, "seed": SEED + number, "max_sequence_length": 0}
            maps = image_maps(host, picture, prompt, capture, **options)
            for word, box in zip(words, boxes, strict=True):
                tallies.setdefault(name, Tally()).add(maps[word][0], box)
    chance = round(100 * float(np.mean(areas)), 1)
    return {"scenes": n, "chance": chance, **{name: tally.told() for name, tally in tallies.items()}}


def made(pipe: Any, n: int, steps: int) -> dict[str, Any]:
    """Look at pictures of one object while the model makes them."""
    tallies, every = dict[str, Tally](), single_prompts()
    for number in tqdm(range(n), desc="made"):
        prompt = every[(7 * number) % len(every)]
        kinds = captures(parse(prompt), start=LATE)
        with attnctl.control(pipe, *(capture for _, capture in kinds.values())) as handle:
            (image,) = generate(pipe, [prompt], scale=CFG, seed=SEED + number, steps=steps, max_sequence_length=0)
            maps = {name: handle.result(capture)[words[0]][0] for name, (words, capture) in kinds.items()}
        verdict = judge(image)
        if verdict.matches(prompt).right:
            for name, values in maps.items():
                tallies.setdefault(name, Tally()).add(values, verdict.things[0].box)
    return {"pictures": n, **{name: tally.told() for name, tally in tallies.items()}}


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=96, help="drawn scenes of one object, and of two")
    parser.add_argument("--made", type=int, default=0, help="pictures of one object that the model makes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--strength", type=float, default=0.3, help="noise level at which scenes are looked at")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pipe = attnctl.load_shapes("mmdit")
    result: dict[str, Any] = {"strength": args.strength, "steps": args.steps, "cfg": CFG}
    result["one object"] = drawn(pipe, args.n, 1, args.strength)
    result["two objects"] = drawn(pipe, args.n, 2, args.strength)
    if args.made:
        result["made"] = made(pipe, args.made, args.steps)
    for part in ("one object", "two objects", "made"):
        for name, row in result.get(part, {}).items():
            if isinstance(row, dict):
                share, low, high = row["inside"]
                told = f"{share:5.1f} % inside ({low:.1f} to {high:.1f}) of {row['n']}"
                means = f"mean {row['mean inside']:.3f}, outside {row['mean outside']:.3f}"
                print(f"{part:12} {name:16} {told}; {means}", file=sys.stderr)
        if "chance" in result.get(part, {}):
            print(f"{part:12} a random place  {result[part]['chance']} %", file=sys.stderr)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    print(json.dumps(result | {"versions": versions}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
