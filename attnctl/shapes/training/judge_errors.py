"""Count what the judge itself gets wrong: `python -m attnctl.shapes.training.judge_errors`.

It is shown rendered scenes and videos, of which everything is known. Every second one carries grain and JPEG blocks.
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np

from attnctl.shapes.judge import judge
from attnctl.shapes.judge_video import judge_clip
from attnctl.shapes.motion import clip_caption, render_clip, sample_clip
from attnctl.shapes.scenes import caption, render, sample

__all__ = ["clip_errors", "main", "scene_errors"]


def scene_errors(n: int, seed: int = 0) -> dict[str, int]:
    """Count on `n` rendered scenes of one and two objects what the judge gets wrong, clean and spoilt apart."""
    rng = np.random.default_rng(seed)
    wrong = {"clean": 0, "spoilt": 0}
    for i in range(n):
        scene = sample(rng, 1 + i // 2 % 2, "any")
        image = _spoil(render(scene), rng) if i % 2 else render(scene)
        match = judge(image).matches(caption(scene))
        wrong["spoilt" if i % 2 else "clean"] += not (match.right and match.background)
    return wrong


def clip_errors(n: int, seed: int = 0) -> dict[str, int]:
    """Count on `n` rendered videos what the judge gets wrong."""
    rng = np.random.default_rng(seed)
    wrong = dict.fromkeys(("colour or shape", "direction", "speed", "background", "any"), 0)
    for i in range(n):
        clip = sample_clip(rng)
        frames = render_clip(clip)
        if i % 2:
            frames = np.stack([_spoil(f, rng) for f in frames])
        match = judge_clip(frames).matches(clip_caption(clip))
        (track,) = match.tracks
        marks = (track.bound < 0.9, not match.direction[0], not match.speed[0], match.background < 1, not match.right)
        for key, bad in zip(wrong, marks, strict=True):
            wrong[key] += bad
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m attnctl.shapes.training.judge_errors", description=main.__doc__)
    parser.add_argument("--scenes", type=int, default=4000, help="half of them clean")
    parser.add_argument("--videos", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for key, count in scene_errors(args.scenes, args.seed).items():
        total = args.scenes // 2 if key == "spoilt" else args.scenes - args.scenes // 2
        print(f"scenes, {key}: wrong {count} of {total} ({100 * count / max(total, 1):.2f} %)")
    for key, count in clip_errors(args.videos, args.seed).items():
        print(f"videos, {key}: wrong {count} of {args.videos} ({100 * count / max(args.videos, 1):.2f} %)")
    return 0


def _spoil(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = np.clip(frame + rng.normal(0, 8, frame.shape), 0, 255).astype(np.uint8)
    data = cv2.imencode(".jpg", noisy[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1].copy()


if __name__ == "__main__":
    raise SystemExit(main())
