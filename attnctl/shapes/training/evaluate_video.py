"""Measure the shapes models of videos: video, video-still and videodit.

`python -m attnctl.shapes.training.evaluate video [--folder DIR] [--quick] [--strip out.png]`

The guidance scale is chosen on tuning prompts; the figures are then taken on other prompts and seeds. They go to
stdout, to `evaluation.json` and into the model card, both beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from attnctl.data.motion import measure
from attnctl.shapes.judge_video import judge_clip
from attnctl.shapes.load import WEIGHTS, load_shapes
from attnctl.shapes.motion import FRAMES, clip_prompts, parse_clip
from attnctl.shapes.scenes import SIZE
from attnctl.shapes.tokenizer import MAX_LENGTH
from attnctl.shapes.training.cards import write_still_card, write_video_card, write_videodit_card
from attnctl.shapes.training.evaluate import wilson

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline, WanPipeline

__all__ = ["evaluate_video", "generate_clips", "main", "mark", "strip", "totals"]

SCALES = (2.0, 3.0, 4.0, 5.0)
_BATCH = 4

_CARDS = {"video": write_video_card, "video-still": write_still_card, "videodit": write_videodit_card}
# What the pipelines are told about their videos; the text is padded no further than it has to be.
_SIZES: dict[str, dict[str, int]] = {
    "AnimateDiffPipeline": {"num_frames": FRAMES},
    "WanPipeline": {"num_frames": 17, "height": SIZE, "width": SIZE, "max_sequence_length": MAX_LENGTH},
}


def generate_clips(
    pipe: AnimateDiffPipeline | WanPipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    seed: int,
    steps: int = 20,
    **call: Any,
) -> list[np.ndarray]:
    """Make one video per prompt, uint8 RGB [16, 64, 64, 3] (videodit: 17 frames).

    Video i has the noise of seed + i, whatever stands beside it; `call` goes to the pipeline.
    """
    call = {**_SIZES[type(pipe).__name__], **call}
    videos: list[np.ndarray] = []
    for first in range(0, len(prompts), _BATCH):
        part = list(prompts[first : first + _BATCH])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        out = pipe(
            part, num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="np", **call
        ).frames
        videos += list(np.round(np.asarray(out) * 255).astype(np.uint8))
    return videos


def mark(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict]:
    """Mark videos of one object each: shares of frames, direction, speed, steadiness, flow figures."""
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        verdict = judge_clip(video)
        match, figures = verdict.matches(prompt), measure(video)
        (track,), (wanted,) = match.tracks, parse_clip(prompt)[1]
        rows.append({
            "asked": str(wanted), "present": track.present, "bound": track.bound, "background": match.background,
            "direction": match.direction[0], "speed": match.speed[0], "right": match.right, "wobble": track.wobble,
            "pulse": track.pulse, "flicker": verdict.flicker, "motion_mean": figures.motion_mean,
            "dynamic": figures.dynamic, "warp_error": figures.warp_error, "flow_accel": figures.flow_accel,
        })  # fmt: skip
    return rows


def totals(rows: Sequence[dict]) -> dict:
    """Add marks up: shares of videos in percent with their intervals, means of the rest."""
    n = len(rows)
    result: dict = {k: wilson(sum(bool(r[k]) for r in rows), n) for k in ("direction", "speed", "right", "dynamic")}
    for key in ("present", "bound", "background"):
        result[key] = wilson(sum(r[key] >= 0.9 for r in rows), n)
        result[f"{key} frames"] = round(100 * float(np.mean([r[key] for r in rows])), 1)
    for key in ("wobble", "pulse", "flicker", "motion_mean", "warp_error", "flow_accel"):
        seen = [r[key] for r in rows if not np.isnan(r[key])]
        result[key] = round(float(np.mean(seen)), 5) if seen else None
    return result


def evaluate_video(
    pipe: AnimateDiffPipeline | WanPipeline,
    *,
    n: int = 128,
    tune: int = 27,
    steps: int = 20,
    scales: Sequence[float] = SCALES,
) -> dict:
    """Choose the guidance scale on tuning prompts, then measure on other prompts; shares in percent."""
    sweep, prompts = {}, clip_prompts(1, tune)
    for scale in scales:
        sweep[scale] = totals(mark(generate_clips(pipe, prompts, scale=scale, seed=10_000, steps=steps), prompts))
        print(f"CFG {scale:g}: {sweep[scale]}", flush=True)
    best = max(sweep, key=lambda s: sweep[s]["right"][0] + sweep[s]["direction"][0])
    result: dict = {"steps": steps, "scale": best, "n": n, "tune": tune}
    result["sweep"] = {f"{s:g}": {k: v[k] for k in ("right", "direction", "bound")} for s, v in sweep.items()}
    prompts = clip_prompts(2, n)
    rows = mark(generate_clips(pipe, prompts, scale=best, seed=20_000, steps=steps), prompts)
    result["all"] = totals(rows)
    result["motions"] = {m: totals([r for r in rows if r["asked"] == m]) for m in sorted({r["asked"] for r in rows})}
    print(result["all"], flush=True)
    return result


def strip(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Lay videos out, one a row, every third frame; a green bar means right, a red one wrong. uint8 RGB."""
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        good = judge_clip(video).matches(prompt).right
        row = np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in video[::3]], 1)
        head = np.full((18, row.shape[1], 3), (40, 160, 60) if good else (210, 40, 40), np.uint8)
        cv2.putText(head, prompt, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
        rows += [head, row]
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, whose first word is the model; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", choices=("video", "video-still", "videodit"))
    parser.add_argument("--folder", type=Path, help="a pipeline folder (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=128, help="videos of the card")
    parser.add_argument("--tune", type=int, default=27, help="videos for each guidance scale")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales to choose from")
    parser.add_argument("--quick", action="store_true", help="18 videos at one scale, nothing written")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of --quick and --strip")
    parser.add_argument("--strip", type=Path, help="also write nine videos, one a row (PNG)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    pipe = load_shapes(args.model, folder=args.folder)
    if args.strip is not None:
        prompts = clip_prompts(4, 9)
        videos = generate_clips(pipe, prompts, scale=args.scale, seed=5, steps=args.steps)
        cv2.imwrite(str(args.strip), strip(videos, prompts)[..., ::-1])
    if args.quick:
        prompts = clip_prompts(5, 18)
        videos = generate_clips(pipe, prompts, scale=args.scale, seed=7, steps=args.steps)
        print(totals(mark(videos, prompts)), flush=True)
    else:
        result = evaluate_video(pipe, n=args.n, tune=args.tune, steps=args.steps, scales=args.scales)
        parts = (pipe.vae, pipe.text_encoder, pipe.transformer if args.model == "videodit" else pipe.unet)
        result["params"] = round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
        folder = args.folder or WEIGHTS / args.model
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _CARDS[args.model](folder, result)
    print(f"{time.monotonic() - began:.0f} s")
    return 0
