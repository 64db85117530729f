"""Wan 2.1 with and without PAG in some of its blocks, the same noise.

python examples/pag_wan.py --prompt "a paper boat drifts down a stream"
python examples/pag_wan.py --shapes        # offline, with the video model that attnctl ships

VRAM: about 18 GB for 33 frames of 832 x 480 in bfloat16, most of it the text encoder (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import SCALE, arguments, model, prompt_of, save_gif

import attnctl
from attnctl.processors import PAG

shapes, show = "use the shipped video model", {"help": "what to show"}
args = arguments(__doc__, shapes=shapes, prompt=show, scale=SCALE | {"default": 2.0})
pipe = model(args, "video", "WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="bfloat16")
prompt = prompt_of(args, "a paper boat drifts down a stream", "a red circle moving right on gray")
if args.shapes:
    sites = "up.0"
    call = {"num_frames": 8, "num_inference_steps": args.steps or 20, "guidance_scale": 3.0}
else:
    sites = "blocks.14.attn1"  # nobody has published layers for Wan: a block in the middle of the thirty
    call = {"num_frames": 33, "height": 480, "width": 832, "num_inference_steps": args.steps or 50}
    call |= {"guidance_scale": 5.0}


def film(name: str) -> None:
    """Generate from the same noise every time, and save."""
    generator = torch.Generator("cpu").manual_seed(args.seed)
    frames = pipe(prompt, generator=generator, output_type="pil", **call).frames[0]
    save_gif(frames, args.out / f"{name}.gif", 62)


film("plain")
with attnctl.control(pipe, PAG(scale=args.scale, sites=sites, stop=0.6, every=2)) as handle:
    film("pag")
    print(handle.report())
print(f"wrote {args.out / 'plain.gif'} and {args.out / 'pag.gif'}")
