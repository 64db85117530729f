"""How well expressions are found by attention, on scenes of which every pixel is known: RefAM against plain maps.

    python benchmarks/referring.py > benchmarks/results/referring.json

Drawn scenes of two objects, and the frames of drawn clips of one, are noised and looked at once by the shipped mmdit,
with "the red circle" as prompt. A plain map is the mean over all words of the expression; its mask is Otsu's. Each step
of RefAM is added in turn: stop words left out, magnets appended, sinks redistributed, and of the mask the part with the
peak. Noise level and layers are chosen for each on tuning scenes, of other seeds. Intersection over union with the true
mask; intervals are 95 % bootstrap intervals over pictures or clips, of the difference to the plain maps in pairs. The
table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from judged import interval
from PIL import Image
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.core.hosts.words import prompt_words
from attnctl.data.map_points import peak_part, points_in
from attnctl.data.maps import WordMaps, otsu, resized
from attnctl.pipelines import image_maps
from attnctl.pipelines.referring import MAGNETS, STOP_WORDS, expression_map
from attnctl.processors.capture.tokens import TokenCapture
from attnctl.shapes.motion import sample_clip
from attnctl.shapes.scenes import SIZE, Scene, Thing, outline, render, sample

TUNING_SEED, REPORT_SEED, CLIP_SEED = 71_000, 710_000, 720_000
STRENGTHS = (0.15, 0.3)
LAYERS: dict[str, tuple[int, ...] | None] = {"all": None, "middle half": (2, 3, 4, 5), "last quarter": (6, 7)}
ARMS: dict[str, dict[str, bool]] = {
    "plain": {"filter": False, "magnets": False, "sinks": False, "part": False},
    "stop words left out": {"filter": True, "magnets": False, "sinks": False, "part": False},
    "and magnets": {"filter": True, "magnets": True, "sinks": False, "part": False},
    "and sinks": {"filter": True, "magnets": True, "sinks": True, "part": False},
    "and the part with the peak": {"filter": True, "magnets": True, "sinks": True, "part": True},
    "plain, the part with the peak": {"filter": False, "magnets": False, "sinks": False, "part": True},
}
Look = tuple[str, np.ndarray, dict[tuple[float, bool], WordMaps]]


def true_mask(thing: Thing) -> np.ndarray:
    """Draw what an object covers: bool [64, 64], by half of a pixel or more."""
    canvas = np.zeros((SIZE * 4, SIZE * 4), np.uint8)
    outline(canvas, thing, (255,), 4)
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA) > 127


def looks(pipe: Any, scenes: Sequence[Scene], seed: int, name: str) -> list[Look]:
    """Look at every object of every scene: the expression, its true mask, and the maps by noise level and magnets."""
    found: list[Look] = []
    for i, scene in enumerate(tqdm(scenes, desc=name, disable=None)):
        picture = Image.fromarray(render(scene))
        for thing in scene.things:
            text = f"the {thing.color} {thing.shape}"
            maps = {
                (strength, magnets): image_maps(
                    pipe,
                    picture,
                    " ".join([text, *(MAGNETS if magnets else ())]),
                    TokenCapture(),
                    strength=strength,
                    seed=seed + i,
                    max_sequence_length=0,
                )
                for strength in STRENGTHS
                for magnets in (False, True)
            }
            found.append((text, true_mask(thing), maps))
    return found


def score(look: Look, arm: Mapping[str, bool], strength: float, layers: tuple[int, ...] | None) -> dict[str, float]:
    """Segment one object in one way: intersection over union, and how many of its points lie where they should."""
    text, truth, by_setting = look
    maps = by_setting[strength, arm["magnets"]]
    if layers is not None:
        sites = tuple(s for s in maps.sites if s.depth in layers)
        maps = replace(maps, sites=sites, layers={s.name: maps.layers[s.name] for s in sites})
    words = [w for w in prompt_words(text) if not (arm["filter"] and w in STOP_WORDS)]
    heat = resized(expression_map(maps, words, 10.0 if arm["sinks"] else None)[None], (SIZE, SIZE))[0]
    mask = np.asarray(heat >= otsu(heat))
    if arm["part"]:
        mask = peak_part(heat, mask)
    inside, outside = points_in(heat, mask, positive=1, negative=3)
    return {
        "iou": float((mask & truth).sum() / (mask | truth).sum()),
        "inside": float(np.mean([truth[y, x] for x, y in inside])),
        "outside": float(np.mean([not truth[y, x] for x, y in outside])) if outside else 1.0,
    }


def tuned(tuning: Sequence[Look], arm: Mapping[str, bool]) -> tuple[float, str]:
    """Choose noise level and layers by the mean intersection over union on the tuning scenes."""

    def mean(setting: tuple[float, str]) -> float:
        return float(np.mean([score(one, arm, setting[0], LAYERS[setting[1]])["iou"] for one in tuning]))

    return max(((s, name) for s in STRENGTHS for name in LAYERS), key=mean)


def table(tuning: Sequence[Look], report: Sequence[Look], each: int) -> dict[str, Any]:
    """Score every arm at its tuned setting, and its difference to the plain maps.

    Looks of one picture or clip, `each` in a row, are averaged before the interval is drawn: they are not independent.
    """
    rows: dict[str, Any] = {}
    plain: np.ndarray | None = None
    for name, arm in ARMS.items():
        strength, layers = tuned(tuning, arm)
        marks = [score(one, arm, strength, LAYERS[layers]) for one in report]
        ious = np.array([m["iou"] for m in marks])
        plain = ious if plain is None else plain
        rows[name] = {
            "strength": strength,
            "layers": layers,
            "miou": round(100 * float(ious.mean()), 1),
            "gain_points": interval((ious - plain).reshape(-1, each).mean(1)),
            "points_inside": round(100 * float(np.mean([m["inside"] for m in marks])), 1),
            "points_outside": round(100 * float(np.mean([m["outside"] for m in marks])), 1),
        }
        print(f"{name:32} {rows[name]}", file=sys.stderr)
    return rows


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=32, help="scenes of the report, two expressions each")
    parser.add_argument("--tune", type=int, default=10, help="scenes on which settings are chosen")
    parser.add_argument("--clips", type=int, default=8, help="clips of the report, four frames each")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pipe = attnctl.load_shapes("mmdit")
    pipe.set_progress_bar_config(disable=True)
    draw = [np.random.default_rng(seed) for seed in (TUNING_SEED, REPORT_SEED, CLIP_SEED)]
    scenes = [[sample(rng, 2) for _ in range(n)] for rng, n in zip(draw[:2], (options.tune, options.n), strict=True)]
    tuning = looks(pipe, scenes[0], TUNING_SEED, "tuning")
    report = looks(pipe, scenes[1], REPORT_SEED, "scenes")
    clips = [sample_clip(draw[2]) for _ in range(options.clips)]
    frames = [clip.frame(i) for clip in clips for i in (0, 5, 10, 15)]
    result = {"expressions": len(report), "pictures": table(tuning, report, 2)}
    result |= {"frames": len(frames), "clips": options.clips}
    result["clip frames"] = table(tuning, looks(pipe, frames, CLIP_SEED, "clips"), 4)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
