"""Edit a video with a text prompt, by FateZero on Stable Diffusion 1.5.

python examples/fatezero_sd15.py jeep.mp4 --source "a silver jeep on a road" --target "a red jeep on a road"
python examples/fatezero_sd15.py --shapes        # offline: a rendered clip and the model that attnctl ships

VRAM: about 10 GB for windows of 8 frames of 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import attnctl
from attnctl.pipelines import edit_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?", help="a video file, a folder of frames or an image")
parser.add_argument("--source", help="what it shows")
parser.add_argument("--target", help="what it shall show")
parser.add_argument("--shapes", action="store_true", help="use the shipped model and a rendered clip")
parser.add_argument("--steps", type=int, help="steps of the inversion and of the edit")
parser.add_argument("--frames", type=int, default=8)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    from attnctl.shapes.motion import Motion, render_clip, sample_clip

    pipe = attnctl.load_shapes("text2image")
    clip = sample_clip(np.random.default_rng(3), Motion("right", "slow"))
    video, source = render_clip(clip, args.frames), "a red circle on black"
    target, steps, size, guidance = "a blue circle on black", args.steps or 20, None, 4.0
else:
    from diffusers import StableDiffusionPipeline

    if not (args.video and args.source and args.target):
        parser.error("give a video, --source and --target (or --shapes)")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=dtype).to(
        device
    )
    video, source, target = args.video, args.source, args.target
    steps, size, guidance = args.steps or 50, 512, 7.5

edited = edit_video(
    pipe,
    video,
    source=args.source or source,
    target=args.target or target,
    steps=steps,
    size=size,
    count=args.frames,
    guidance_scale=guidance,
    out=args.out / "edited",
    force=True,
    progress=False,
)
edited.strip.save(args.out / "strip.png")
print(edited.report)
print(f"wrote {args.out / 'edited'} and {args.out / 'strip.png'}")
