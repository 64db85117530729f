"""Measure a shapes model.

`python -m attnctl.shapes.training.evaluate {text2image,mmdit,video,video-still,videodit} [--folder DIR] [--quick]`

The guidance scale is chosen on tuning prompts; the figures are then taken on report prompts with other seeds. They go
to stdout, to `evaluation.json` and into the model card, both beside the weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.data import proportions
from attnctl.processors import Capture
from attnctl.shapes.judge import judge
from attnctl.shapes.load import WEIGHTS, load_shapes
from attnctl.shapes.scenes import SIZE, pair_prompts, parse, single_prompts
from attnctl.shapes.training.card import write_card

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

__all__ = ["contact_sheet", "evaluate", "generate", "localisation", "main", "score", "summary", "wilson"]

SCALES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
_REPORT, _TUNE = 512, 120  # prompts of a report, and those that choose the scale
_BATCH = 32


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    """Return a share and its 95 % Wilson interval, in percent."""
    low, high = proportions.wilson(hits, n, 1.96)
    return round(100 * hits / max(n, 1), 1), round(100 * low, 1), round(100 * high, 1)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    seed: int,
    steps: int = 20,
    batch: int = 32,
    **options: Any,
) -> list[np.ndarray]:
    """Make one picture per prompt, uint8 RGB; picture i has the noise of seed + i, whatever the batch size."""
    images: list[np.ndarray] = []
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        out = pipe(
            part, num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="np", **options
        ).images
        images += list(np.round(out * 255).astype(np.uint8))
    return images


def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, list[float]]:
    """Mark pictures: `present`, `bound` (all objects), `right`, `background` (1 or 0 each), `objects` and `iou`."""
    marks = [judge(image).matches(prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        "present": [float(m.all_present) for m in marks],
        "bound": [float(all(m.bound)) for m in marks],
        "right": [float(m.right) for m in marks],
        "objects": [sum(m.bound) / len(m.bound) for m in marks],
        "background": [float(m.background) for m in marks],
        "iou": [m.iou for m in marks],
    }


def localisation(
    pipe: StableDiffusionPipeline, *, scale: float, n: int, seed: int, steps: int = 20
) -> dict[str, list[float]]:
    """Say for single-object pictures whether the noun's map peaks inside its object's box.

    Returns:
        For "mid", "up" (mean of each block's layers) and "mid+up": 1 or 0 per picture that the judge finds
        right, and under "chance" the share of the picture that the boxes take.
    """
    singles = single_prompts()
    inside: dict[str, list[float]] = {"mid": [], "up": [], "mid+up": [], "chance": []}
    for first in range(0, n, _BATCH):
        prompts = [singles[(7 * (first + i)) % len(singles)] for i in range(min(_BATCH, n - first))]
        words = tuple((parse(p).things[0].shape,) for p in prompts)
        # Early steps place nothing yet: the second half of the run.
        capture = Capture(words=words, sites=("mid", "up_blocks"), start=0.5)
        with attach(pipe, capture) as handle:
            images = generate(pipe, prompts, scale=scale, seed=seed + first, steps=steps, batch=_BATCH)
            maps = handle.maps
        nouns = {name: _of_each(layer, [maps.words.index(w) for (w,) in words]) for name, layer in maps.layers.items()}
        groups = {
            "mid": [m for k, m in nouns.items() if k.startswith("mid_block")],
            "up": [m for k, m in nouns.items() if k.startswith("up_blocks")],
        }
        groups["mid+up"] = groups["mid"] + groups["up"]
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            verdict = judge(image)
            if not verdict.matches(prompt).right:
                continue
            left, top, right, bottom = verdict.things[0].box
            inside["chance"].append((right - left) * (bottom - top) / SIZE**2)
            for group, layers in groups.items():
                y, x = _peak([m[i] for m in layers])
                inside[group].append(float(left <= x < right and top <= y < bottom))
    return inside


def _of_each(layer: Tensor, words: Sequence[int]) -> Tensor:
    """Take one word for each picture out of a layer's maps [pictures, words, 1, 1, 1, h, w]: [pictures, h, w]."""
    return layer[torch.arange(len(words)), words, 0, 0, 0]


def _peak(layers: Iterable[Tensor]) -> tuple[int, int]:
    total = torch.zeros(SIZE, SIZE)
    for layer in layers:
        grid = (layer / layer.sum())[None, None]
        total += F.interpolate(grid, (SIZE, SIZE), mode="bicubic", align_corners=False)[0, 0] * layer.numel()
    place = int(total.argmax())
    return divmod(place, SIZE)


def contact_sheet(images: Sequence[np.ndarray], prompts: Sequence[str], columns: int = 8) -> np.ndarray:
    """Lay pictures out with their prompts; a green frame means right, a red one wrong. uint8 RGB."""
    side, text = 2 * SIZE, 26
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (side + text + 6), columns * (side + 6), 3), 255, np.uint8)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        y, x = (i // columns) * (side + text + 6), (i % columns) * (side + 6)
        frame = (40, 160, 60) if judge(image).matches(prompt).right else (210, 40, 40)
        sheet[y : y + side + 6, x : x + side + 6] = frame
        big = cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
        sheet[y + 3 : y + side + 3, x + 3 : x + side + 3] = big
        words = prompt.replace("a ", "")
        for line, part in enumerate(words.split(" and ", 1)):
            place = (x + 3, y + side + 15 + 12 * line)
            cv2.putText(sheet, part, place, cv2.FONT_HERSHEY_SIMPLEX, 0.32, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


def summary(marks: dict[str, list[float]]) -> dict:
    """Turn what `score` returned into shares in percent with their intervals, and the mean shape quality."""
    result: dict = {k: wilson(int(sum(v)), len(v)) for k, v in marks.items() if k not in ("iou", "objects")}
    result["objects"] = round(100 * float(np.mean(marks["objects"])), 1)
    shown = [v for v in marks["iou"] if v > 0]
    result["iou"] = round(float(np.mean(shown)), 3) if shown else 0.0
    return result


def evaluate(pipe: StableDiffusionPipeline, *, steps: int = 20) -> dict:
    """Choose the guidance scale on tuning prompts, then measure on report prompts; all shares in percent."""
    n, tune, singles = _REPORT, _TUNE, single_prompts()
    sweep = {}
    for scale in SCALES:
        one, two = [singles[i % 120] for i in range(tune)], pair_prompts(1, tune, "tuning")
        marks = [score(generate(pipe, p, scale=scale, seed=10_000, steps=steps), p)["right"] for p in (one, two)]
        sweep[scale] = [wilson(int(sum(m)), tune) for m in marks]
        print(f"CFG {scale:g}: single {sweep[scale][0]}, two objects {sweep[scale][1]}", flush=True)
    best = max(sweep, key=lambda s: sweep[s][0][0] + sweep[s][1][0])
    result: dict = {"steps": steps, "scale": best, "n": n}
    result["sweep"] = {f"{s:g}": {"single": v[0], "pairs": v[1]} for s, v in sweep.items()}
    sets = {
        "single": [singles[i % 120] for i in range(n)],
        "pairs": list(pair_prompts(2, n, "report")),
        "heldout": list(pair_prompts(3, n // 2, "heldout")),
    }
    for name, prompts in sets.items():
        result[name] = summary(score(generate(pipe, prompts, scale=best, seed=20_000, steps=steps), prompts))
        print(name, result[name], flush=True)
    inside = localisation(pipe, scale=best, n=min(n, 256), seed=30_000, steps=steps)
    result["noun_maps"] = {k: wilson(int(sum(v)), len(v)) for k, v in inside.items() if k != "chance"}
    result["noun_maps"]["chance"] = round(100 * float(np.mean(inside["chance"] or [0.0])), 1)
    print("noun maps", result["noun_maps"], flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("mmdit", "video", "video-still", "videodit"):
        # They import this module, so it imports them only here.
        name = "mmdit" if argv[0] == "mmdit" else "video"
        module = importlib.import_module(f"attnctl.shapes.training.evaluate_{name}")
        return int(module.main(argv[1:] if name == "mmdit" else argv))
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.evaluate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "model", choices=("text2image",), help="or mmdit, video, video-still or videodit, with their own options"
    )
    parser.add_argument("--folder", type=Path, help="a pipeline folder (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="64 pictures at one scale, nothing written")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale of --quick and --sheet")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (PNG)")
    args = parser.parse_args(argv)
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.monotonic()
    pipe = load_shapes(args.model, folder=args.folder)
    if args.sheet is not None:
        prompts = [*[single_prompts()[i * 37 % 120] for i in range(24)], *pair_prompts(4, 24, "report")]
        sheet = contact_sheet(generate(pipe, prompts, scale=args.scale, seed=5, steps=args.steps), prompts)
        cv2.imwrite(str(args.sheet), sheet[..., ::-1])
    if args.quick:
        for prompts in ([single_prompts()[i * 15 % 119] for i in range(64)], list(pair_prompts(5, 64, "tuning"))):
            marks = score(generate(pipe, prompts, scale=args.scale, seed=7, steps=args.steps), prompts)
            print({k: round(100 * float(np.mean(v)), 1) for k, v in marks.items()}, flush=True)
        inside = localisation(pipe, scale=args.scale, n=64, seed=9, steps=args.steps)
        print({k: round(100 * float(np.mean(v)), 1) for k, v in inside.items() if v})
    else:
        result = evaluate(pipe, steps=args.steps)
        parts = (pipe.vae, pipe.text_encoder, pipe.unet)
        result["params"] = round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
        folder = args.folder or WEIGHTS / args.model
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_card(folder, result)
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
