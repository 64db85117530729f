"""Where concept maps of the shipped mmdit model lie: do they peak inside the object that they name?

    python benchmarks/concepts.py > benchmarks/results/concepts.json

One picture for each of the 120 single-object prompts (or `--n` of them); concepts: the shape's word and the
background's. Pictures that the judge finds wrong are left out. Beside it, on the same pictures, the word map of the
shape: its attention probability, over all layers. Then the same concepts without the prompt: each picture noised to
`--strength` and run through the model once, with an empty prompt. Shares come with 95 % Wilson intervals; the table
goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from judged import STEPS
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.pipelines import image_maps
from attnctl.processors import Capture
from attnctl.shapes.evaluate import generate, wilson
from attnctl.shapes.judge import judge
from attnctl.shapes.scenes import SIZE, parse, single_prompts

CFG = 3.0  # the best of the model card
SEED = 900_000
LATE = 0.5  # maps of the second half of a run: early steps place nothing yet


def groups(n: int) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Yield the concepts (shape, background) with the prompts that share them; `n` prompts in all."""
    by: dict[tuple[str, str], list[str]] = {}
    for prompt in single_prompts():
        scene = parse(prompt)
        by.setdefault((scene.things[0].shape, scene.background), []).append(prompt)
    each = -(-n // len(by))
    for concepts, prompts in by.items():
        if n > 0:
            yield concepts, prompts[: min(each, n)]
            n -= each


def inside(values: Tensor, box: Sequence[int]) -> bool:
    """Tell whether a map [h, w] peaks inside a box of pixels."""
    left, top, right, bottom = box
    whole = torch.nn.functional.interpolate(values[None, None].float(), (SIZE, SIZE), mode="bicubic")[0, 0]
    y, x = divmod(int(whole.argmax()), SIZE)
    return left <= x < right and top <= y < bottom


def study(pipe: Any, n: int, steps: int, strength: float) -> dict[str, Any]:
    """Make the pictures and count the peaks that lie inside."""
    found: dict[str, list[bool]] = {"concept": [], "word": [], "concept, empty prompt": []}
    taken, made = [], 0
    for concepts, prompts in groups(n):
        like, word = Capture(concepts=concepts, start=LATE), Capture(words=concepts[:1], start=LATE)
        with attnctl.control(pipe, like, word) as handle:
            images = generate(pipe, prompts, scale=CFG, seed=SEED + made, steps=steps, max_sequence_length=0)
            maps = handle.result(like)[concepts[0]], handle.result(word)[concepts[0]]
        made += len(prompts)
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            verdict = judge(image)
            if not verdict.matches(prompt).right:
                continue
            left, top, right, bottom = box = verdict.things[0].box
            taken.append((right - left) * (bottom - top) / SIZE**2)
            found["concept"].append(inside(maps[0][i], box))
            found["word"].append(inside(maps[1][i], box))
            seen = image_maps(
                pipe, Image.fromarray(image), "", Capture(concepts=concepts), strength=strength, max_sequence_length=0
            )
            found["concept, empty prompt"].append(inside(seen[concepts[0]][0], box))
        print(f"{made} pictures, {len(taken)} right", file=sys.stderr, flush=True)
    peaks = {name: {"n": len(hits), "inside": wilson(sum(hits), len(hits))} for name, hits in found.items()}
    return {"pictures": made, "right": len(taken), "chance": round(100 * float(np.mean(taken or [0])), 1), **peaks}


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=120, help="pictures")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--strength", type=float, default=0.3, help="noise level of the pictures that are looked at")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    result = {"n": args.n, "steps": args.steps, "cfg": CFG, "strength": args.strength}
    result |= study(attnctl.load_shapes("mmdit"), args.n, args.steps, args.strength)
    for name in ("concept", "word", "concept, empty prompt"):
        share, low, high = result[name]["inside"]
        print(f"{name:24} {share:5.1f} % inside ({low:.1f} to {high:.1f}), {result[name]['n']}", file=sys.stderr)
    print(f"a random place: {result['chance']} %", file=sys.stderr)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    print(json.dumps(result | {"versions": versions}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
