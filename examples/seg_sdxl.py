"""Stable Diffusion XL with and without SEG, the same noise.

python examples/seg_sdxl.py --prompt "a lighthouse in a storm" --sigma 10
python examples/seg_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 12 GB at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import SEG

blur = {"type": float, "default": float("inf"), "help": "blur in tokens; inf is the mean query"}
args = arguments(__doc__, prompt=PROMPT, scale=SCALE, sigma=blur)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
prompt = prompt_of(args, "a lighthouse in a storm")
# The mid block, as for PAG; the small model's mid block decides little, its last stage much.
control = SEG(scale=args.scale, sigma=args.sigma, sites="up.1" if args.shapes else None)
compare(args, pipe, prompt, control, "seg", guidance_scale=4.0 if args.shapes else 3.0, num_inference_steps=30)
