"""Where concept maps of the shipped mmdit model lie: do they peak inside the object that they name?

    python benchmarks/concepts.py > benchmarks/results/concepts.json

One picture a prompt of one object, such as "a red circle on gray"; concepts: "a red circle" and "gray" at the default
blocks and at block 5 (the best of the tuning pictures, which had other seeds), and the bare words "circle" and "gray".
Pictures that the judge finds wrong are left out. Beside it, on the same pictures, the word map of "circle": its
attention probability in all layers. Then the concepts without the prompt: each picture noised to `--strength` and run
through the model once, with an empty prompt. Shares come with 95 % Wilson intervals; the table goes to stderr, the JSON
to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
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
from attnctl.shapes.evaluate import generate, wilson
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, parse, single_prompts

CFG = 3.0  # the best of the model card
SEED = 900_000
LATE = 0.5  # maps of the second half of a run: early steps place nothing yet


def inside(values: Tensor, box: Sequence[int]) -> bool:
    """Tell whether a map [h, w] peaks inside a box of pixels."""
    left, top, right, bottom = box
    y, x = divmod(int(_large(values).argmax()), SIZE)
    return left <= x < right and top <= y < bottom


def shares(values: Tensor, box: Sequence[int]) -> tuple[float, float]:
    """Return a map's mean inside and outside a box of pixels."""
    whole, within = _large(values), torch.zeros(SIZE, SIZE, dtype=torch.bool)
    within[box[1] : box[3], box[0] : box[2]] = True
    return float(whole[within].mean()), float(whole[~within].mean())


def _large(values: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(values[None, None].float(), (SIZE, SIZE), mode="bicubic")[0, 0]


def study(pipe: Any, n: int, steps: int, strength: float) -> dict[str, Any]:
    """Make the pictures and count the peaks that lie inside; note the mean share inside and outside the object."""
    peaks: dict[str, list[bool]] = {}
    means: dict[str, list[tuple[float, float]]] = {}
    boxes: list[float] = []
    every = single_prompts()
    for number in tqdm(range(n)):
        prompt = every[(7 * number) % len(every)]
        scene = parse(prompt)
        shape, phrase = scene.things[0].shape, f"a {scene.things[0].color} {scene.things[0].shape}"
        captures = {
            "phrase": (phrase, Capture(concepts=(phrase, scene.background), start=LATE)),
            "phrase, block 5": (phrase, Capture(concepts=(phrase, scene.background), sites=5, start=LATE)),
            "bare word": (shape, Capture(concepts=(shape, scene.background), start=LATE)),
            "word map": (shape, Capture(words=(shape,), start=LATE)),
        }
        with attnctl.control(pipe, *(capture for _, capture in captures.values())) as handle:
            (image,) = generate(pipe, [prompt], scale=CFG, seed=SEED + number, steps=steps, max_sequence_length=0)
            maps = {name: handle.result(capture)[word][0] for name, (word, capture) in captures.items()}
        verdict = judge(image)
        if not verdict.matches(prompt).right:
            continue
        seen = Capture(concepts=(phrase, scene.background))
        picture = Image.fromarray(image)
        maps["phrase, empty prompt"] = image_maps(
            pipe, picture, "", seen, strength=strength, max_sequence_length=0
        )[phrase][0]  # fmt: skip
        left, top, right, bottom = box = verdict.things[0].box
        boxes.append((right - left) * (bottom - top) / SIZE**2)
        for name, values in maps.items():
            peaks.setdefault(name, []).append(inside(values, box))
            means.setdefault(name, []).append(shares(values, box))
    found = {
        name: {
            "n": len(hits),
            "inside": wilson(sum(hits), len(hits)),
            "means": np.mean(means[name], 0).round(4).tolist(),
        }
        for name, hits in peaks.items()
    }
    return {"pictures": n, "right": len(boxes), "chance": round(100 * float(np.mean(boxes or [0])), 1), "maps": found}


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=48, help="pictures")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--strength", type=float, default=0.3, help="noise level of the pictures that are looked at")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    result: dict[str, Any] = {"n": args.n, "steps": args.steps, "cfg": CFG, "strength": args.strength}
    result |= study(attnctl.load_shapes("mmdit"), args.n, args.steps, args.strength)
    for name, row in result["maps"].items():
        share, low, high = row["inside"]
        within, outside = row["means"]
        told = (
            f"{share:5.1f} % inside ({low:.1f} to {high:.1f}) of {row['n']}; mean {within:.3f}, outside {outside:.3f}"
        )
        print(f"{name:22}{told}", file=sys.stderr)
    print(f"a random place: {result['chance']} %", file=sys.stderr)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    print(json.dumps(result | {"versions": versions}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
