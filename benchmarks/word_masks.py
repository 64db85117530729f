"""How well the mask of a word's map is the object that it names: `python benchmarks/word_masks.py`.

Two-object pictures of the shipped text2image model; of those that the judge finds right, the mask of each noun's map
(Otsu's threshold, no setting is tuned) is compared with the pixels of its object and with those of the other one.
Percent are means of the intersection over the union; the interval is a 95 % bootstrap interval of the mean difference
over the nouns. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch
from judged import STEPS, interval

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import Capture
from attnctl.shapes.judge import Found, judge
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SIZE, pair_prompts, parse
from attnctl.shapes.training.evaluate import generate

CFG, SEED, BATCH = 1.5, 730_000, 32


def pixels_of(image: np.ndarray, found: Found, background: str) -> np.ndarray:
    """Tell which pixels of an object's box are nearer to its colour than to the background: bool [64, 64]."""
    inside = np.zeros((SIZE, SIZE), bool)
    left, top, right, bottom = found.box
    inside[top:bottom, left:right] = True
    far = [((image.astype(float) - c) ** 2).sum(-1) for c in (COLORS[found.color], BACKGROUNDS[background])]
    return inside & (far[0] < far[1])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over the union."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def study(n: int) -> dict[str, Any]:
    """Generate, capture and compare."""
    pipe, prompts = attnctl.load_shapes("text2image"), pair_prompts(61, n)
    own: list[float] = []
    other: list[float] = []
    right = 0
    for first in range(0, n, BATCH):
        part = prompts[first : first + BATCH]
        words = tuple(tuple(thing.shape for thing in parse(p).things) for p in part)
        with attnctl.control(pipe, Capture(words=words, sites="up_blocks", start=0.5)) as handle:
            images = generate(pipe, part, scale=CFG, seed=SEED + first, batch=BATCH)
            maps = handle.maps
        masks = {word: maps.mask(word, size=(SIZE, SIZE)).numpy() for word in maps.words}
        for i, (prompt, image) in enumerate(zip(part, images, strict=True)):
            seen = judge(image)
            if not seen.matches(prompt).right:
                continue
            right += 1
            things = {f.shape: pixels_of(image, f, seen.background) for f in seen.things}
            for word, rest in (words[i], words[i][::-1]):
                own.append(overlap(masks[word][i], things[word]))
                other.append(overlap(masks[word][i], things[rest]))
    a, b = np.array(own), np.array(other)
    return {
        "model": "text2image",
        "cfg": CFG,
        "steps": STEPS,
        "pictures": n,
        "right_pictures": right,
        "nouns": len(own),
        "iou_percent": {"own object": round(100 * float(a.mean()), 1), "other object": round(100 * float(b.mean()), 1)},
        "gain_points": interval(a - b),
        "nearer_to_own_percent": round(100 * float((a > b).mean()), 1),
    }


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=96, help="pictures")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = study(options.n)
    print(result, file=sys.stderr)
    print(json.dumps(result | {"torch": torch.__version__}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
