"""Stable Diffusion XL with a negative prompt inside cross-attention (NAG), the same noise.

python examples/nag_sdxl.py --prompt "a portrait of an old fisherman" --negative "glasses, hat"
python examples/nag_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 12 GB at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.processors import NAG

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model")
parser.add_argument("--prompt", help="what to draw")
parser.add_argument("--negative", help="what not to draw")
parser.add_argument("--scale", type=float, default=4.0, help="how strongly")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("text2image")
    prompt, guidance = args.prompt or "a red circle and a blue square on gray", 1.5
else:
    from diffusers import StableDiffusionXLPipeline

    if not torch.cuda.is_available():
        raise SystemExit("This model needs a CUDA GPU; --shapes runs anywhere.")
    pipe = StableDiffusionXLPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16, variant="fp16"
    ).to("cuda")
    prompt, guidance = args.prompt or "a portrait of an old fisherman", 1.5
negative = args.negative or ("on gray" if args.shapes else "glasses, hat")


def draw() -> object:
    """Generate from the same noise every time."""
    generator = torch.Generator("cpu").manual_seed(args.seed)
    return pipe(
        prompt, negative_prompt=negative, guidance_scale=guidance, num_inference_steps=30, generator=generator
    ).images[0]


# Every cross-attention. The negative rows must be there: a guidance_scale just above 1 is enough.
guide = NAG(scale=args.scale)
args.out.mkdir(parents=True, exist_ok=True)
draw().save(args.out / "plain.png")
with attnctl.control(pipe, guide) as handle:
    draw().save(args.out / "nag.png")
    print(handle.report())
print(f"wrote {args.out / 'plain.png'} and {args.out / 'nag.png'}")
