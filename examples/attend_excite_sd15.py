"""Stable Diffusion 1.5 with and without Attend-and-Excite, the same noise.

python examples/attend_excite_sd15.py --prompt "a cat and a frog" --concepts cat frog
python examples/attend_excite_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 6 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.processors import AttendExcite

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model")
parser.add_argument("--prompt", help="what to draw")
parser.add_argument("--concepts", nargs="+", help="the words of which none shall be neglected")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("text2image")
    prompt, concepts = args.prompt or "a red circle and a blue square on gray", args.concepts or ["circle", "square"]
    # Steps of a fixed length, because the small model's gradients have another scale.
    guide = AttendExcite(concepts=tuple(concepts), grad_transform="l2", step_size=0.5, thresholds=())
    scale, steps = 1.5, 20
else:
    from diffusers import StableDiffusionPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=dtype).to(
        device
    )
    prompt, concepts = args.prompt or "a cat and a frog", args.concepts or ["cat", "frog"]
    guide = AttendExcite(concepts=tuple(concepts))
    scale, steps = 7.5, 50


def draw() -> object:
    """Generate from the same noise every time."""
    generator = torch.Generator("cpu").manual_seed(args.seed)
    return pipe(prompt, guidance_scale=scale, num_inference_steps=steps, generator=generator).images[0]


args.out.mkdir(parents=True, exist_ok=True)
draw().save(args.out / "plain.png")
with attnctl.control(pipe, guide) as handle:
    draw().save(args.out / "attend_excite.png")
    print(handle.report())
print(f"wrote {args.out / 'plain.png'} and {args.out / 'attend_excite.png'}")
