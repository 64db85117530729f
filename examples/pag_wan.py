"""Wan 2.1 with and without PAG in some of its blocks, the same noise.

python examples/pag_wan.py --prompt "a paper boat drifts down a stream"
python examples/pag_wan.py --shapes        # offline, with the video model that attnctl ships

VRAM: about 18 GB for 33 frames of 832 x 480 in bfloat16, most of it the text encoder (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import attnctl
from attnctl.processors import PAG

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped video model")
parser.add_argument("--prompt", help="what to show")
parser.add_argument("--scale", type=float, default=2.0, help="guidance weight")
parser.add_argument("--steps", type=int, help="denoising steps")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

call: dict[str, Any]
if args.shapes:
    pipe = attnctl.load_shapes("video")
    prompt, sites = args.prompt or "a red circle moving right on gray", "up.0"
    call = {"num_frames": 8, "num_inference_steps": args.steps or 20, "guidance_scale": 3.0, "output_type": "pil"}
else:
    from diffusers import WanPipeline

    if not torch.cuda.is_available():
        raise SystemExit("This model needs a CUDA GPU; --shapes runs anywhere.")
    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
    # Nobody has published layers for Wan: a block in the middle of the thirty.
    prompt, sites = args.prompt or "a paper boat drifts down a stream", "blocks.14.attn1"
    call = {"num_frames": 33, "height": 480, "width": 832, "num_inference_steps": args.steps or 50}
    call |= {"guidance_scale": 5.0, "output_type": "pil"}


def film(name: str) -> None:
    """Generate from the same noise every time, and save."""
    frames = pipe(prompt, generator=torch.Generator("cpu").manual_seed(args.seed), **call).frames[0]
    frames[0].save(args.out / f"{name}.gif", save_all=True, append_images=frames[1:], duration=62, loop=0)


args.out.mkdir(parents=True, exist_ok=True)
film("plain")
with attnctl.control(pipe, PAG(scale=args.scale, sites=sites, stop=0.6, every=2)) as handle:
    film("pag")
    print(handle.report())
print(f"wrote {args.out / 'plain.gif'} and {args.out / 'pag.gif'}")
