"""Stable Diffusion XL with and without PAG, the same noise.

python examples/pag_sdxl.py --prompt "an old sailor with a cat"
python examples/pag_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 12 GB at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import PAG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
prompt = prompt_of(args, "an old sailor with a cat")
# The mid block, as published; the small model's mid block decides little, its last stage much. Guidance acts in the
# first 60 % of the run, and c - p is computed on every second step.
control = PAG(scale=args.scale, sites="up.1" if args.shapes else None, stop=0.6, every=2)
compare(args, pipe, prompt, control, "pag", guidance_scale=4.0 if args.shapes else 5.0, num_inference_steps=30)
