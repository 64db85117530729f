"""What FateZero does to clips, judged: `python benchmarks/fatezero_effects.py > results/effects_fatezero.json`.

Rendered clips of the shapes world (one moving object) are edited four ways: another colour, another shape, another
background, and everything at once ("style": colour and background). Each edit is also done by two plain means, on the
same clips: SDEdit (noise and denoise with the target prompt, at its best strength) and the inversion with the target
prompt without any fusion. Settings are chosen on tuning clips, the figures come from others; intervals are 95 %
bootstrap intervals over clips. Marks, per clip:

    success      share of frames in which the judge sees the target's attribute
    trajectory   mean distance of the edited object's centre from the source object's, pixels
    psnr         PSNR outside the source's object (colour and shape edits) against the source, dB
    object       share of frames in which the object keeps what should stay (background edits)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from judged import interval
from PIL import Image
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.pipelines import edit_video
from attnctl.pipelines.editing.codec import decode, encode
from attnctl.processors import FateZero
from attnctl.shapes.judge import judge
from attnctl.shapes.motion import Clip, clip_caption, render_clip, sample_clip
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES

KINDS = ("colour", "shape", "background", "style")
TUNING_SEED, REPORT_SEED = 61_000, 720_000
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MARGIN = 4  # pixels around the source's object that count as object


@dataclass(frozen=True)
class Task:
    """One edit of one rendered clip."""

    kind: str
    clip: Clip
    video: np.ndarray
    source: str
    target: str
    word: str

    @property
    def wanted(self) -> dict[str, str]:
        """Return what the target shows: colour, shape, background."""
        _, color, shape, _, background = self.target.split()
        return {"color": color, "shape": shape, "background": background}


def tasks(kind: str, n: int, seed: int, frames: int) -> list[Task]:
    """Draw clips of one object, and for each another attribute."""
    rng = np.random.default_rng(seed + KINDS.index(kind))
    found = []
    for _ in range(n):
        clip = sample_clip(rng)
        thing, back = clip.scene.things[0], clip.scene.background
        color, shape = thing.color, thing.shape
        if kind in ("colour", "style"):
            color = str(rng.choice([c for c in COLORS if c != color]))
        if kind == "shape":
            shape = str(rng.choice([s for s in SHAPES if s != shape]))
        if kind in ("background", "style"):
            back = str(rng.choice([b for b in BACKGROUNDS if b != back]))
        source = clip_caption(clip, motion=False)
        video = render_clip(clip)[:: max(1, 16 // frames)][:frames]
        found.append(Task(kind, clip, video, source, f"a {color} {shape} on {back}", thing.shape))
    return found


def marks(task: Task, edited: np.ndarray) -> dict[str, float]:
    """Judge one edit."""
    want, before, after = task.wanted, [judge(f) for f in task.video], [judge(f) for f in edited]
    right, kept, ways = [], [], []
    outside = np.ones(task.video.shape[:3], bool)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        thing = b.things[0]
        own = [f for f in a.things if f.color == want["color"]]
        best = max(own, key=lambda f: (f.shape == want["shape"], f.area), default=None)
        shaped = best is not None and best.shape == want["shape"]
        attribute = {
            "colour": best is not None,
            "shape": shaped,
            "background": a.background == want["background"],
            "style": best is not None and a.background == want["background"],
        }
        right.append(attribute[task.kind])
        kept.append(shaped)
        if best is not None:
            ways.append(np.hypot(best.x - thing.x, best.y - thing.y))
        left, top, right_, bottom = thing.box
        outside[i, max(top - MARGIN, 0) : bottom + MARGIN, max(left - MARGIN, 0) : right_ + MARGIN] = False
    square = ((edited.astype(np.float64) - task.video) ** 2).mean(-1)[outside].mean()
    return {
        "success": float(np.mean(right)),
        "object": float(np.mean(kept)),
        "trajectory": float(np.mean(ways)) if ways else 64.0,
        "psnr": float(10 * np.log10(255**2 / max(square, 1e-9))),
    }


def fatezero(pipe: Any, task: Task, steps: int, guidance: float, **fields: Any) -> np.ndarray:
    """Edit by FateZero, or without fusion where both windows are zero."""
    words = fields.pop("blend", False)
    control = FateZero(source=task.source, target=task.target, blend_words=[task.word] if words else None, **fields)
    done = edit_video(
        pipe, task.video, control, steps=steps, guidance_scale=guidance, window=len(task.video), progress=False
    )
    assert done.frames is not None
    return done.frames


def sdedit(pipe: Any, task: Task, steps: int, guidance: float, strength: float) -> np.ndarray:
    """Noise every frame alike and denoise it with the target prompt."""
    host = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    host.set_progress_bar_config(disable=True)
    n = len(task.video)
    out = host(
        prompt=[task.target] * n,
        image=[Image.fromarray(f) for f in task.video],
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(0) for _ in range(n)],
    ).images
    return np.stack([np.asarray(i) for i in out])


METHODS = {"FateZero": fatezero, "SDEdit": sdedit, "no fusion": fatezero}


def settings(kind: str) -> dict[str, list[dict[str, Any]]]:
    """List what is tried on the tuning clips, what is likely to be best first."""
    scales = (5.0, 7.5, 3.0)
    ours: list[dict[str, Any]] = []
    if kind in ("colour", "shape"):
        latents = {"blend": True, "blend_attention": False, "blend_latents": True, "blend_window": (0.0, 1.0)}
        for guidance in scales:
            ours += [{"guidance": guidance, "cross_replace": 0.8, "self_replace": s} | latents for s in (0.5, 0.3)]
    for guidance in scales:
        for cross, own in ((0.8, 0.5), (0.5, 0.5), (0.3, 0.3), (0.8, 0.8), (0.8, 0.3)):
            base = {"guidance": guidance, "cross_replace": cross, "self_replace": own}
            ours.append(base)
            if kind == "shape":
                ours.append(base | {"blend": True, "mode": "replace"})
        for keys in ("self", ("self", "mid")):
            ours.append({"guidance": guidance, "cross_replace": 0.8, "self_replace": 0.8, "keys": keys})
    plain = {"cross_replace": 0.0, "self_replace": 0.0}
    return {
        "FateZero": ours,
        "SDEdit": [{"guidance": g, "strength": s} for g in (3.0, 5.0) for s in STRENGTHS],
        "no fusion": [{"guidance": g} | plain for g in (1.5, 3.0, 5.0, 7.5)],
    }


def score(pipe: Any, method: str, chosen: dict[str, Any], clips: list[Task], steps: int) -> dict[str, list[float]]:
    """Edit and judge clips with one setting."""
    rows = [marks(t, METHODS[method](pipe, t, steps, **chosen)) for t in clips]
    return {name: [r[name] for r in rows] for name in rows[0]}


def merit(kind: str, found: dict[str, list[float]]) -> float:
    """Weigh success and preservation; below 90 % success, success alone counts."""
    success = float(np.mean(found["success"]))
    if success < 0.9:
        return success - 10
    kept = float(np.mean(found["object"]))
    if kind in ("colour", "shape"):
        return min(float(np.mean(found["psnr"])) / 28, 1.5) - 0.2 * float(np.mean(found["trajectory"])) + kept
    return kept - 0.2 * float(np.mean(found["trajectory"]))


def study(kind: str, options: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Tune each method on some clips, report on others."""
    tuning = tasks(kind, options.tune, TUNING_SEED, options.frames)
    report = tasks(kind, options.n, REPORT_SEED, options.frames)
    result: dict[str, Any] = {"tuning": [], "methods": {}}
    raw: dict[str, dict[str, list[float]]] = {}
    for method, tried in settings(kind).items():
        tried = tried[: options.tries] if options.tries else tried
        best = None
        for chosen in tqdm(tried, desc=f"{kind}, {method}: settings", disable=None):
            found = score(pipe, method, chosen, tuning, options.steps)
            means = {m: round(float(np.mean(v)), 3) for m, v in found.items()}
            result["tuning"].append({"method": method, "setting": chosen, **means})
            if best is None or merit(kind, found) > best[0]:
                best = (merit(kind, found), chosen)
        assert best is not None
        began = time.perf_counter()
        raw[method] = score(pipe, method, best[1], report, options.steps)
        spread = {m: interval(np.array(v), percent=m in ("success", "object")) for m, v in raw[method].items()}
        result["methods"][method] = {"setting": best[1], "seconds": time.perf_counter() - began, **spread}
        shown = "  ".join(f"{m} {v[0]} [{v[1]}, {v[2]}]" for m, v in spread.items())
        print(f"{kind:10} {method:10} {shown}  {best[1]}", file=sys.stderr)
    for other in ("SDEdit", "no fusion"):
        result["methods"][other]["FateZero_minus_this"] = {
            m: interval(np.array(raw["FateZero"][m]) - np.array(raw[other][m]), percent=m in ("success", "object"))
            for m in raw[other]
        }
    through = [marks(t, decode(pipe, encode(pipe, t.video)))["psnr"] for t in report]
    result["autoencoder_psnr"] = interval(np.array(through), percent=False)
    print(f"{kind:10} autoencoder alone: psnr {result['autoencoder_psnr']}", file=sys.stderr)
    return result


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=64, help="clips of each kind in the report")
    parser.add_argument("--tune", type=int, default=8, help="clips of each setting tried")
    parser.add_argument("--tries", type=int, default=0, help="most settings of a method; 0 for all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = attnctl.load_shapes("text2image", device=options.device)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result: dict[str, Any] = {"versions": versions, "machine": platform.machine(), "steps": options.steps}
    result |= {"frames": options.frames, "clips": options.n}
    result["kinds"] = {kind: study(kind, options, pipe) for kind in options.kinds}
    result["defaults"] = dataclasses.asdict(FateZero(source="", target="")) | {"inversion": None}
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
