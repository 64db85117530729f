"""Stable Diffusion 1.5 with cheaper self-attention, the same noise, timed.

python examples/agent_sd15.py --prompt "a photo of a fox in the snow"
python examples/agent_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 4 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import attnctl
from attnctl.processors import AgentAttention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model, too small to gain time")
parser.add_argument("--prompt", help="what to draw")
parser.add_argument("--ratio", type=float, default=0.4, help="share of tokens merged away")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("text2image")
    prompt = args.prompt or "a red circle and a blue square on gray"
else:
    from diffusers import StableDiffusionPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=dtype).to(
        device
    )
    prompt = args.prompt or "a photo of a fox in the snow"


def draw(name: str) -> None:
    """Generate from the same noise every time, and save."""
    generator = torch.Generator("cpu").manual_seed(args.seed)
    began = time.perf_counter()
    image = pipe(prompt, guidance_scale=4.0, num_inference_steps=25, generator=generator).images[0]
    print(f"{name}: {time.perf_counter() - began:.1f} s")
    image.save(args.out / f"{name}.png")


args.out.mkdir(parents=True, exist_ok=True)
draw("plain")
with attnctl.control(pipe, AgentAttention(ratio=args.ratio)) as handle:
    draw("agent")
    print(handle.report())
print(f"wrote {args.out / 'plain.png'} and {args.out / 'agent.png'}")
