"""Stable Diffusion 3.5 medium plain and with CFG-Zero*, the same noise.

python examples/zero_star_sd35.py --prompt "a glass of water on a red table"
python examples/zero_star_sd35.py --shapes        # offline, with the model that attnctl ships

Needs access to stabilityai/stable-diffusion-3.5-medium on the Hub. VRAM: about 18 GB at 1024 px in bfloat16, most of it
the T5 text encoder (estimate, not measured). The control costs no pass.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import CFGZeroStar

args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"default": 4.5, "help": "guidance scale of both pictures"})
pipeline, repository = "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"
pipe = model(args, "mmdit", pipeline, repository, dtype="bfloat16")
prompt = prompt_of(args, "a glass of water on a red table")
call = {"guidance_scale": args.scale, "num_inference_steps": 20 if args.shapes else 28}
call |= {"max_sequence_length": 0} if args.shapes else {}
compare(args, pipe, prompt, CFGZeroStar(), "zero_star", **call)
