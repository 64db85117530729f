"""Stable Diffusion 1.5 with cheaper self-attention, the same noise, timed.

python examples/agent_sd15.py --prompt "a photo of a fox in the snow"
python examples/agent_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 4 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import time

from _run import PROMPT, arguments, draw, model, prompt_of

import attnctl
from attnctl.processors import AgentAttention

share = {"type": float, "default": 0.4, "help": "share of tokens merged away"}
args = arguments(__doc__, shapes="use the shipped model, too small to gain time", prompt=PROMPT, ratio=share)
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
prompt = prompt_of(args, "a photo of a fox in the snow")


def timed(name: str) -> None:
    """Generate, save, and print the time."""
    began = time.perf_counter()
    image = draw(args, pipe, prompt, guidance_scale=4.0, num_inference_steps=25)
    print(f"{name}: {time.perf_counter() - began:.1f} s")
    image.save(args.out / f"{name}.png")


timed("plain")
with attnctl.control(pipe, AgentAttention(ratio=args.ratio)) as handle:
    timed("agent")
    print(handle.report())
print(f"wrote {args.out / 'plain.png'} and {args.out / 'agent.png'}")
