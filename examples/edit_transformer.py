"""Edit a picture with a text prompt on a transformer, by FateZero, FlowEdit or injection.

python examples/edit_transformer.py cat.png --source "a cat on a sofa" --target "a dog on a sofa" --method flowedit
python examples/edit_transformer.py --shapes     # offline: a rendered picture and the model that attnctl ships

VRAM: about 35 GB for FLUX.1 dev at 1024 px in bfloat16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import attnctl
from attnctl.pipelines import edit_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", nargs="?", help="an image (or a video, with a model of videos)")
parser.add_argument("--source", help="what it shows")
parser.add_argument("--target", help="what it shall show")
parser.add_argument("--method", choices=("fatezero", "flowedit", "inject"), default="fatezero")
parser.add_argument("--shapes", action="store_true", help="use the shipped model and a rendered picture")
parser.add_argument("--steps", type=int, help="steps of the path")
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    from attnctl.shapes.motion import Motion, render_clip, sample_clip

    pipe = attnctl.load_shapes("mmdit")
    clip = sample_clip(np.random.default_rng(3), Motion("right", "slow"))
    picture, source, target = render_clip(clip)[:1], "a red circle on black", "a blue circle on black"
    steps, guidance = args.steps or 20, 4.0
else:
    from diffusers import DiffusionPipeline

    if not (args.picture and args.source and args.target):
        parser.error("give a picture, --source and --target (or --shapes)")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=dtype).to(device)
    picture, source, target = args.picture, args.source, args.target
    steps, guidance = args.steps, None

edited = edit_video(
    pipe,
    picture,
    source=args.source or source,
    target=args.target or target,
    method=args.method,
    steps=steps,
    guidance_scale=guidance,
    out=args.out / "edited.png",
    force=True,
    progress=False,
    announce=print,
)
edited.strip.save(args.out / "before_and_after.png")
print(edited.report)
