"""Stable Diffusion XL with and without TPG, the same noise.

python examples/tpg_sdxl.py --prompt "a market street in the rain"
python examples/tpg_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 12 GB at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import TPG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
prompt = prompt_of(args, "a market street in the rain")
control = TPG(scale=args.scale, seed=args.seed)  # the down blocks, as published
compare(args, pipe, prompt, control, "tpg", guidance_scale=1.5 if args.shapes else 3.0, num_inference_steps=30)
