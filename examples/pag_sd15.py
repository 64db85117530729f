"""Stable Diffusion 1.5 with and without PAG, the same noise.

python examples/pag_sd15.py --prompt "a photo of a fox in the snow"
python examples/pag_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 4 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import PAG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"help": "PAG weight"})
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
prompt = prompt_of(args, "a photo of a fox in the snow")
# The mid block, as published; the small model's mid block decides little, its last stage much.
control = PAG(scale=args.scale, sites="up.1" if args.shapes else None)
compare(args, pipe, prompt, control, "pag", guidance_scale=4.0, num_inference_steps=25)
